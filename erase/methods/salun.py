"""SalUn: random labels, learned only by the weights with the largest gradients of the training loss on forget data.

Source: Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024,
arXiv 2310.12508.

    m = 1[|∇ mean_f ℓ(θ0)| among the largest half]                     ℓ on true labels, or true noise
    θ ← θ - η m ⊙ ∇ (mean_r ℓ + β mean_f ℓ on other labels)

The mask holds in every step, those on remain data too: masked weights are restored after weight decay, and their
momentum is 0, as in the scripts. Deliberate differences from the paper's scripts:

- The gradient of the mask is of the network in eval mode; in diffusion it is of plain predictions. The scripts' are
  guided, `(1 + w) ε(c) - w ε(∅)` with w 7.5 (Stable Diffusion) and 2 (DDPM): `saliency.guidance` 8.5 and 3.
- Order of batches, labels and statistics are those of `erase.methods.random_label`, with the same settings.
- The losses of diffusion are means over channels and pixels; those of the DDPM script are sums, clipped to 1:
  `train.reduction: sum` and `clip_remain: 1`.
- The mask is of `saliency.count` samples, the scripts' of all forget data.
"""

from __future__ import annotations

from erase.engine.losses import DESCENT, Objective
from erase.engine.method import Method
from erase.engine.saliency import Mask
from erase.engine.updates import Epoch
from erase.engine.weighting import Schedule
from erase.methods import Entry
from erase.methods.random_label import Order, relabelling


def salun(
    *,
    mask: Mask | None = None,
    fast_rate: float = 1.0,
    slow_schedule: Schedule = "constant",
    clip_remain: float | None = None,
    order: Order = "joint",
    epoch: Epoch | None = None,
    forget: Objective = DESCENT,
    remain: Objective = DESCENT,
) -> Method:
    """SalUn as a method.

    Args:
        mask: weights that learn (`magnitude_mask` of the training loss; half of them in the paper).
        fast_rate: weight of the forget loss relative to the remain loss.
        slow_schedule: schedule of the learning rate (`train.lr`).
        clip_remain: gradient norm limit of every step.
        order: `joint`: each step is on both losses. `turn`: in each epoch, steps on all forget batches, then on all
            remain batches (SalUn's scripts for CIFAR-10). `mixed`, for classifiers: forget data, with other labels, and
            remain data are shuffled together (SalUn's for CIFAR-100 and TinyImageNet).
        epoch: how many batches `turn` has of each side.
        forget: forget objective, descended.
        remain: remain objective.

    Raises:
        ValueError: for an unknown order, and `mixed` with a fast_rate other than 1.
    """
    update = relabelling(order, epoch, fast_rate, slow_schedule, clip_remain, mask_all=True)
    return Method(name="salun", forget=None if order == "mixed" else forget, remain=remain, update=update, mask=mask)


METHOD = Entry(salun, needs=("mask", "forget", "remain", "epoch"), data=("forget", "remain"))
