"""RT: train from scratch without what is to be forgotten, the gold standard of unlearning; or with everything.

Named RT in Huang et al., arXiv 2409.19732.
Not an unlearning method: what the others are measured against, and how a model is trained in the first place.
"""

from __future__ import annotations

from erase.engine.losses import DESCENT, Objective
from erase.engine.method import Method
from erase.engine.updates import Descent
from erase.engine.weighting import Schedule
from erase.methods import Entry


def retrain(*, average: float = 0.999, slow_schedule: Schedule = "constant", remain: Objective = DESCENT) -> Method:
    """Training as a method: new weights, the remain objective alone.

    Args:
        average: decay of the moving average (EMA) of the weights, which the run saves; 0 saves the last weights.
        slow_schedule: schedule of the learning rate (`train.lr`).
        remain: remain objective.
    """
    return Method(
        name="retrain",
        forget=None,
        remain=remain,
        update=Descent(slow_schedule),
        average=average,
    )


METHOD = Entry(retrain, needs=("remain",), data=("remain",), fresh=True)
