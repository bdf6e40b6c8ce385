"""SA: fit the forgotten label to a surrogate, pull important weights to where they were, replay the rest.

Source: Heng & Soh, "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models",
NeurIPS 2023, arXiv 2305.10120. The surrogate is uniform noise, as in the paper (`forget.loss=surrogate`); the pull is
elastic weight consolidation, λ/2 Σ F (θ - θ0)², with the Fisher diagonal of the remain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from erase.engine.losses import DESCENT, Objective, Pull
from erase.engine.method import Method
from erase.engine.updates import Joint
from erase.engine.weighting import Schedule
from erase.methods import Entry


def selective_amnesia(
    *,
    strength: float = 1000.0,
    fast_rate: float = 1.0,
    slow_schedule: Schedule = "constant",
    clip_remain: float | None = None,
    fisher: Mapping[str, Tensor] | None = None,
    origin: Mapping[str, Tensor] | None = None,
    forget: Objective = DESCENT,
    remain: Objective = DESCENT,
) -> Method:
    """Selective Amnesia as a method: one joint step on surrogate, replay and pull.

    Args:
        strength: λ of the pull; 0 switches it off.
        fast_rate: weight of the surrogate loss beside the replay loss.
        slow_schedule: of the learning rate.
        clip_remain: gradient norm limit of the joint step.
        fisher: Fisher diagonal of the remain data, by parameter name; the pull needs it.
        origin: θ0, copies of the weights the run starts from.
        forget: surrogate objective, descended.
        remain: replay objective.

    Raises:
        ValueError: for a negative strength.
    """
    if strength < 0:
        raise ValueError(f"strength must be ≥ 0; got {strength}")
    if fisher is not None and origin is not None and strength > 0:
        remain = replace(remain, loss=Pull(remain.loss, fisher, origin, strength))
    update = Joint(fast_rate, slow_schedule=slow_schedule, clip=clip_remain)
    return Method(name="selective_amnesia", forget=forget, remain=remain, update=update)


METHOD = Entry(selective_amnesia, needs=("fisher", "origin", "forget", "remain"), data=("forget", "remain"))
