"""RL: fit forget data to other labels that are drawn at random, together with the remain data.

Source: Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020, arXiv 1911.04933 (as a baseline).
In diffusion the other label is another class's prediction: the forget objective is a `redirect` without fixed
anchors.
"""

from __future__ import annotations

from erase.engine.losses import DESCENT, Objective
from erase.engine.method import Method
from erase.engine.updates import Joint
from erase.engine.weighting import Schedule
from erase.methods import Entry


def random_label(
    *,
    fast_rate: float = 1.0,
    slow_schedule: Schedule = "constant",
    clip_remain: float | None = None,
    forget: Objective = DESCENT,
    remain: Objective = DESCENT,
) -> Method:
    """Random labels as a method: one joint step on both losses.

    Args:
        fast_rate: weight of the forget loss beside the remain loss.
        slow_schedule: of the learning rate.
        clip_remain: gradient norm limit of the joint step.
        forget: forget objective, descended.
        remain: remain objective.
    """
    update = Joint(fast_rate, slow_schedule=slow_schedule, clip=clip_remain)
    return Method(name="random_label", forget=forget, remain=remain, update=update)


METHOD = Entry(random_label, needs=("forget", "remain"), data=("forget", "remain"))
