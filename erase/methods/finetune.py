"""FT: continue training on the remain data alone, and let forgetting happen by itself.

Source: Warnecke et al., "Machine Unlearning of Features and Labels", NDSS 2023, arXiv 2108.11577.
"""

from __future__ import annotations

from erase.engine.losses import DESCENT, Objective
from erase.engine.method import Method
from erase.engine.updates import Descent
from erase.engine.weighting import Schedule
from erase.methods import Entry


def finetune(
    *, slow_schedule: Schedule = "constant", clip_remain: float | None = None, remain: Objective = DESCENT
) -> Method:
    """Fine-tuning as a method.

    Args:
        slow_schedule: schedule of the learning rate (`train.lr`).
        clip_remain: gradient norm limit.
        remain: remain objective.
    """
    return Method(name="finetune", forget=None, remain=remain, update=Descent(slow_schedule, clip_remain))


METHOD = Entry(finetune, needs=("remain",), data=("remain",))
