"""SA: fit the forgotten label to a surrogate, pull important weights to where they were, replay the rest.

Source: Heng & Soh, "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models",
NeurIPS 2023, arXiv 2305.10120.

    min over θ of  β mean_f ℓ on surrogates + mean_r ℓ + λ/2 Σ_j F_j (θ_j - θ0_j)²

The surrogate is uniform noise, as in the paper (`forget.loss=surrogate`); the pull is elastic weight consolidation.
Deliberate differences:

- λ/2 is the paper's; its scripts pull with λ: `pull: script`.
- F is a Fisher diagonal, the mean over samples and timesteps of squared gradients of the mean loss, of remain data.
  The DDPM script's is the mean over images of all classes of `(Σ_t g_t)²`: the gradients g_t of the loss that sums over
  channels and pixels are summed over all 1,000 timesteps, then squared. Were they independent, it would be 1,000 ·
  (C·H·W)² times ours. So its λ and ours cannot be compared, whichever `pull` is. This F is not offered.
- Remain and surrogate losses are means over channels and pixels, the script's are sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor

from erase.engine.losses import DESCENT, Objective, Pull
from erase.engine.method import Method
from erase.engine.updates import Joint
from erase.engine.weighting import Schedule
from erase.methods import Entry


def selective_amnesia(
    *,
    strength: float = 1000.0,
    pull: Literal["paper", "script"] = "paper",
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
        pull: `paper` is λ/2 Σ F (θ - θ0)², `script` (the authors' code) λ Σ F (θ - θ0)².
        fast_rate: weight of the surrogate loss beside the replay loss.
        slow_schedule: of the learning rate.
        clip_remain: gradient norm limit of the joint step.
        fisher: Fisher diagonal of the remain data, by parameter name; the pull needs it.
        origin: θ0, copies of the weights the run starts from.
        forget: surrogate objective, descended.
        remain: replay objective.

    Raises:
        ValueError: for a negative strength, or an unknown pull.
    """
    if pull not in ("paper", "script"):
        raise ValueError(f"unknown pull {pull!r}; allowed: paper, script")
    if strength < 0:
        raise ValueError(f"strength must be ≥ 0; got {strength}")
    if fisher is not None and origin is not None and strength > 0:
        scale = strength if pull == "paper" else 2 * strength
        remain = replace(remain, loss=Pull(remain.loss, fisher, origin, scale))
    update = Joint(fast_rate, slow_schedule=slow_schedule, clip=clip_remain)
    return Method(name="selective_amnesia", forget=forget, remain=remain, update=update)


METHOD = Entry(selective_amnesia, needs=("fisher", "origin", "forget", "remain"), data=("forget", "remain"))
