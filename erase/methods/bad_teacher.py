"""Bad Teacher: on forget data imitate a network that has learned nothing, on remain data imitate θ0.

Source: Chundawat et al., "Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an Incompetent
Teacher", AAAI 2023, arXiv 2205.08096.

    min over θ of  β mean_f d(random net, θ) + mean_r d(θ0, θ)

d is the backend's: KL(teacher ‖ net) of a classifier, at temperature 1. Deliberate differences:

- Forget and remain batches are of equal size and the forget loss has a weight β, where the paper mixes both sets into
  its batches as they come, and takes one mean of all: half of this sum, where both have equal shares.
- d is the divergence; the authors' script takes torch's default reduction, which divides by the K classes too:
  `reduction: mean`. The learning rate makes up for it, but clips and weight decay see it.
"""

from __future__ import annotations

from typing import get_args

from torch import nn

from erase.engine.losses import DESCENT, Distance, Objective, Reduction
from erase.engine.method import Method
from erase.engine.updates import Joint
from erase.engine.weighting import Schedule
from erase.methods import Entry


def bad_teacher(
    *,
    fast_rate: float = 1.0,
    slow_schedule: Schedule = "constant",
    clip_remain: float | None = None,
    reduction: Reduction = "sum",
    origin_net: nn.Module | None = None,
    new_net: nn.Module | None = None,
) -> Method:
    """Bad Teacher as a method: one joint step on both distances.

    Args:
        fast_rate: β, weight of the forget loss relative to the remain loss.
        slow_schedule: schedule of the learning rate (`train.lr`).
        clip_remain: gradient norm limit of the joint step.
        reduction: how divergences are reduced over classes, `sum` or `mean` (the authors' script); classifiers only.
        origin_net: the network at θ0, in eval mode.
        new_net: a network with new weights, in eval mode.

    Raises:
        ValueError: for an unknown reduction.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"unknown reduction {reduction!r}; allowed: {', '.join(get_args(Reduction))}")
    update = Joint(fast_rate, slow_schedule=slow_schedule, clip=clip_remain)
    forget = DESCENT if new_net is None else Objective(Distance(new_net, reduction=reduction), 1, "bad teacher")
    remain = DESCENT if origin_net is None else Objective(Distance(origin_net, reduction=reduction), 1, "good teacher")
    return Method(name="bad_teacher", forget=forget, remain=remain, update=update)


METHOD = Entry(bad_teacher, needs=("origin_net", "new_net"), data=("forget", "remain"))
