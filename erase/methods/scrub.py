"""SCRUB: move away from the teacher on forget data and towards it on remain data, in turn.

Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, arXiv 2302.09880.

    max step   θ up   mean_f d(θ0, θ)
    min step   θ down mean_r (α d(θ0, θ) + γ ℓ)

d is the backend's: KL(teacher ‖ net) of a classifier. It follows the paper, not a script. Deliberate differences:

- Max and min steps alternate batch by batch instead of epoch by epoch, and the max steps fade out by a schedule, where
  the paper ends them after some epochs. Both sides have batches of one size.
- No temperature, γ is 1 (the learning rate scales both), and no rewinding to an earlier epoch (SCRUB+R).
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from erase.engine.fast_step import FastRule
from erase.engine.losses import ASCENT, DESCENT, Distance, Objective
from erase.engine.method import Method
from erase.engine.updates import FastSlow, Shared, Update
from erase.engine.weighting import Schedule
from erase.methods import Entry


def scrub(
    *,
    fast_rate: float = 1.0,
    fast_rule: FastRule | Literal["shared"] = "shared",
    schedule: Schedule = "linear",
    slow_steps: int = 1,
    slow_schedule: Schedule = "constant",
    alpha: float = 1.0,
    clip_forget: float | None = None,
    clip_remain: float | None = None,
    origin_net: nn.Module | None = None,
    remain: Objective = DESCENT,
) -> Method:
    """SCRUB as a method.

    Args:
        fast_rate: size of the max step (forget data); with `shared` the factor on its loss.
        fast_rule: `shared`: one optimizer for max and min steps (the paper); others: the rule of max steps.
        schedule: schedule of the max steps.
        slow_steps: min steps (remain data) after each max step.
        slow_schedule: schedule of the learning rate (`train.lr`).
        alpha: α, weight of the distance to the base model relative to the remain loss.
        clip_forget: gradient norm limit of the max step.
        clip_remain: gradient norm limit of the min steps.
        origin_net: the network at θ0, in eval mode.
        remain: remain objective.

    Raises:
        ValueError: for a negative α.
    """
    if alpha < 0:
        raise ValueError(f"alpha must be ≥ 0; got {alpha}")
    forget = ASCENT
    if origin_net is not None:
        forget = Objective(Distance(origin_net), -1, "leave the teacher")
        remain = Objective(Distance(origin_net, alpha, remain.loss), 1, "obey the teacher")
    update: Update
    if fast_rule == "shared":
        update = Shared(
            fast_rate, slow_steps, schedule, slow_schedule, clip_forget=clip_forget, clip_remain=clip_remain
        )
    else:
        update = FastSlow(
            fast_rate,
            fast_rule,
            slow_steps,
            schedule=schedule,
            slow_schedule=slow_schedule,
            clip_forget=clip_forget,
            clip_remain=clip_remain,
        )
    return Method(name="scrub", forget=forget, remain=remain, update=update)


METHOD = Entry(scrub, needs=("origin_net", "remain"), data=("forget", "remain"))
