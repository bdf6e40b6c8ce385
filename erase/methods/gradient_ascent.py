"""GA: ascend the loss of the forget data, and use no other data.

Source: Thudi et al., "Unrolling SGD: Understanding Factors Influencing Machine Unlearning", EuroS&P 2022,
arXiv 2109.13398.
"""

from __future__ import annotations

from erase.engine.fast_step import FastRule
from erase.engine.losses import ASCENT, Objective
from erase.engine.method import Method
from erase.engine.updates import FastSlow
from erase.engine.weighting import Schedule
from erase.methods import Entry


def gradient_ascent(
    *,
    fast_rate: float,
    fast_rule: FastRule = "adam",
    schedule: Schedule = "constant",
    clip_forget: float | None = None,
    forget: Objective = ASCENT,
) -> Method:
    """Gradient ascent as a method; with a `redirect` objective it fits the anchors instead.

    Args:
        fast_rate: step size.
        fast_rule: `sgd`, `normalized` or `adam`.
        schedule: schedule of the step size.
        clip_forget: gradient norm limit.
        forget: forget objective.
    """
    update = FastSlow(fast_rate, fast_rule, schedule=schedule, clip_forget=clip_forget)
    return Method(name="gradient_ascent", forget=forget, remain=None, update=update)


METHOD = Entry(gradient_ascent, needs=("forget",), data=("forget",))
