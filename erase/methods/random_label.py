"""RL: fit forget data to random other labels, together with the remain data.

Source: Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020, arXiv 1911.04933 (as a baseline).

    joint    θ ← θ - η ∇ (mean_r ℓ + β mean_f ℓ on other labels)
    turn     in each epoch  θ ← θ - η β ∇ mean_f ℓ on other labels  for all forget batches,
             then           θ ← θ - η ∇ mean_r ℓ                    for all remain batches
    mixed    θ ← θ - η ∇ mean ℓ  over batches of both sides' data, shuffled together; forget data with other labels

In diffusion the other label is another class's prediction: the forget objective is a `redirect` without fixed
anchors. Deliberate differences from the scripts that are published with SalUn (arXiv 2310.12508), for classifiers:

- One step is on both sides at once; theirs are in turn for CIFAR-10 and SVHN (`order: turn`), and for CIFAR-100 and
  TinyImageNet they shuffle both sides together (`order: mixed`).
- By `joint` every batch is full, epochs run on into each other; by the other orders, as theirs, an epoch ends with a
  smaller batch where the data do not divide.
- The label is never the true one; theirs is by lot from all classes: `forget.relabel: any`.
- Batch normalisation does not count forget batches in its running statistics; theirs does: `forget.statistics: update`.
  By `order: mixed` there are no forget batches, and every batch counts.
- The learning rate falls with each step (`slow_schedule`), theirs with each epoch.

For DDPM and Stable Diffusion the scripts take one step on both losses, as `joint` does.
"""

from __future__ import annotations

from typing import Literal, get_args

from erase.engine.losses import DESCENT, Objective
from erase.engine.method import Method
from erase.engine.updates import Descent, Epoch, InTurn, Joint, Update
from erase.engine.weighting import Schedule
from erase.methods import Entry

Order = Literal["joint", "turn", "mixed"]
"""`joint`: one step on both losses (`Joint`); `turn`: steps on one side's batches, then on the other's (`InTurn`);
`mixed`: steps on batches of both sides' data, shuffled together (`Descent`)."""


def relabelling(
    order: Order,
    epoch: Epoch | None,
    fast_rate: float,
    slow_schedule: Schedule,
    clip: float | None,
    mask_all: bool = False,
) -> Update:
    """The update rule of random labels, and of SalUn, which masks all gradients.

    Raises:
        ValueError: for an unknown order, and a weight of the forget loss where both sides are in one mean.
    """
    if order not in get_args(Order):
        raise ValueError(f"unknown order {order!r}; allowed: {', '.join(get_args(Order))}")
    if order == "mixed":
        if fast_rate != 1:
            raise ValueError(f"order=mixed takes one mean over both sides: fast_rate must be 1; got {fast_rate}")
        return Descent(slow_schedule, clip, mixed=True, mask_all=mask_all)
    if order == "turn":
        return InTurn(fast_rate, epoch or Epoch(1, 1), slow_schedule, clip, mask_all)
    return Joint(fast_rate, slow_schedule=slow_schedule, clip=clip, mask_all=mask_all)


def random_label(
    *,
    fast_rate: float = 1.0,
    slow_schedule: Schedule = "constant",
    clip_remain: float | None = None,
    order: Order = "joint",
    epoch: Epoch | None = None,
    forget: Objective = DESCENT,
    remain: Objective = DESCENT,
) -> Method:
    """Random labels as a method.

    Args:
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
    update = relabelling(order, epoch, fast_rate, slow_schedule, clip_remain)
    return Method(name="random_label", forget=None if order == "mixed" else forget, remain=remain, update=update)


METHOD = Entry(random_label, needs=("forget", "remain", "epoch"), data=("forget", "remain"))
