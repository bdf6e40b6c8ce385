"""Bad Teacher: on forget data imitate a network that has learned nothing, on remain data imitate θ0.

Source: Chundawat et al., "Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an Incompetent
Teacher", AAAI 2023, arXiv 2205.08096.

    min over θ of  β mean_f d(random net, θ) + mean_r d(θ0, θ)

d is the backend's: KL(teacher ‖ net) of a classifier. Deliberate difference: forget and remain batches of equal size
and a weight β, where the paper mixes both sets into its batches as they come.
"""

from __future__ import annotations

from torch import nn

from erase.engine.losses import DESCENT, Distance, Objective
from erase.engine.method import Method
from erase.engine.updates import Joint
from erase.engine.weighting import Schedule
from erase.methods import Entry


def bad_teacher(
    *,
    fast_rate: float = 1.0,
    slow_schedule: Schedule = "constant",
    clip_remain: float | None = None,
    origin_net: nn.Module | None = None,
    new_net: nn.Module | None = None,
) -> Method:
    """Bad Teacher as a method: one joint step on both distances.

    Args:
        fast_rate: β, weight of the forget loss beside the remain loss.
        slow_schedule: of the learning rate.
        clip_remain: gradient norm limit of the joint step.
        origin_net: the network at θ0, in eval mode.
        new_net: a network with new weights, in eval mode.
    """
    update = Joint(fast_rate, slow_schedule=slow_schedule, clip=clip_remain)
    forget = DESCENT if new_net is None else Objective(Distance(new_net), 1, "bad teacher")
    remain = DESCENT if origin_net is None else Objective(Distance(origin_net), 1, "good teacher")
    return Method(name="bad_teacher", forget=forget, remain=remain, update=update)


METHOD = Entry(bad_teacher, needs=("origin_net", "new_net"), data=("forget", "remain"))
