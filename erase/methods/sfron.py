"""SFR-on: saliency mask, adaptive forgetting weights, fast-slow updates.

Source: Huang et al., "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement",
NeurIPS 2024, arXiv 2409.19732.

    m = 1[F_f(θ0) / F_r(θ0) ≥ γ]                                    S
    w_i = B ℓ_i^-λ / Σ_j ℓ_j^-λ                                     F
    θ ← θ + β s(t) m ⊙ ∇ mean_i(w_i ℓ_i);  K steps on the remain loss;  φ ← φ + α (θ - φ)      R-on

Deliberate differences from the paper and its scripts:

- The fast step has a rule and a state of its own, and the weight *change* is masked (the published scripts share
  one optimizer between both phases and mask its gradient, which moves masked weights). `published=True` gives
  their loop.
- s(t) scales the fast rate, not the loss: the same under `sgd`, and effective also under rules that normalise.
- A forget objective that is descended (`redirect`: the distance to the anchor's prediction) is large while the
  concept is remembered, so its weights *grow* with the loss: λ changes its sign, "leave alone what is forgotten"
  stays.
- Losses are normalised per timestep bin before weighting (`per_bin`; off in the published scripts).
- Weights are of losses clamped at `floor`, where the scripts add to ℓ^λ: 1e-15 (classifiers) or 1e-8 (DDPM). A floor of
  that to the power of 1/λ gives the same.
- The mask's γ is compared with F_f / F_r as it is; the scripts add 1e-15 to both, by which weights without any gradient
  are kept, not masked.

With `robust` a redirect holds around the prompt and on images of the concept too: `erase.diffusion.robust`.

The scripts (presets `*_published`, each run beside a transcription in float64) differ among themselves. The DDPM's has
losses that are sums, clips every gradient to 1 and makes its mask of guided predictions; Stable Diffusion's has a
constant schedule and applies no mask; the classifiers' updates batch statistics in forget passes. Of what the one for
TinyImageNet does, RandAugment and the stochastic depth of Swin-T are not offered.
"""

from __future__ import annotations

from typing import Any

from erase.diffusion.robust import Robust, harden
from erase.engine.fast_step import FastRule
from erase.engine.losses import ASCENT, DESCENT, Objective
from erase.engine.method import Method, Weights
from erase.engine.saliency import Mask
from erase.engine.updates import FastSlow, Joint, Shared, Update
from erase.engine.weighting import Schedule
from erase.methods import Entry


def sfron(
    *,
    mask: Mask | None = None,
    lambd: float = 0.5,
    fast_rate: float,
    fast_rule: FastRule | None = None,
    slow_steps: int = 1,
    outer_rate: float = 1.0,
    schedule: Schedule | None = None,
    slow_schedule: Schedule = "constant",
    every: int = 1,
    published: bool = False,
    ron: bool = True,
    per_bin: bool | None = None,
    floor: float = 1e-6,
    clip_forget: float | None = None,
    clip_remain: float | None = None,
    robust: Robust | None = None,
    forget: Objective | None = None,
    remain: Objective = DESCENT,
) -> Method:
    """SFR-on as a method.

    S is off without a `mask`, F is off at `lambd=0`, R-on is off with `ron=False` (one step on both losses).

    Args:
        mask: weights the fast step may change (`erase.engine.saliency.fisher_ratio_mask`).
        lambd: λ ≥ 0, how strongly a forget sample's weight depends on its loss.
        fast_rate: β, size of the fast step; with `published` or `ron=False`, the factor on the forget loss
            (`forget_alpha`).
        fast_rule: `adam` (the default), or `sgd` or `normalized`, which did not forget in diffusion models. Not
            used with `ron=False`.
        slow_steps: K remain steps after each fast step; more steps protect more.
        outer_rate: α; 1 means no outer step and no copy of the weights.
        schedule: s(t); default `linear`, or `cosine` with `published` (the authors' script for SD: `constant`).
        slow_schedule: schedule of the slow learning rate (`train.lr`).
        every: take the fast step at every n-th step.
        published: the authors' loop: one optimizer, β s(t) in the loss, mask on the gradient, α = 1, K = 1.
        ron: False takes one joint step instead of fast and slow ones.
        per_bin: normalise losses per timestep bin before weighting; on by default.
        floor: smaller losses are raised to this before weighting.
        clip_forget: gradient norm limit of forget steps; not used with `ron=False`.
        clip_remain: gradient norm limit of remain steps, or of the joint step.
        robust: makes a redirect hold near the prompt too, by `steps`, `radius`, `images` and `away`, such as
            `{steps: 3, radius: 1.0}`. For `forget.loss=redirect` alone.
        forget: forget objective; by default the loss, ascended.
        remain: remain objective.

    Raises:
        ValueError: for values outside their range, `published` with an option it fixes, and `robust` with another
            objective than a redirect to what the model predicts at the start.
    """
    slow: dict[str, Any] = {"slow_schedule": slow_schedule, "every": every}
    clips: dict[str, Any] = {"clip_forget": clip_forget, "clip_remain": clip_remain}
    update: Update
    if published:
        _check_published(
            slow_steps=(slow_steps, 1),
            outer_rate=(outer_rate, 1.0),
            ron=(ron, True),
            fast_rule=(fast_rule or "shared", "shared"),
            per_bin=(bool(per_bin), False),
            robust=(robust, None),
        )
        per_bin = False
        update = Shared(fast_rate, schedule=schedule or "cosine", **slow, **clips)
    elif fast_rule in ("shared", "joint"):
        raise ValueError(
            f"fast_rule {fast_rule!r} is set by published=True or ron=False; allowed: sgd, normalized, adam"
        )
    elif ron:
        outer: dict[str, Any] = {"outer_rate": outer_rate, "slow_steps": slow_steps, "schedule": schedule or "linear"}
        update = FastSlow(fast_rate=fast_rate, fast_rule=fast_rule or "adam", **outer, **slow, **clips)
    elif slow_steps == 1:
        s = schedule or "linear"
        update = Joint(forget_weight=fast_rate, schedule=s, clip=clip_remain, outer_rate=outer_rate, **slow)
    else:
        raise ValueError(f"ron=False takes one step on both losses: slow_steps must be 1; got {slow_steps}")
    weights = Weights(lambd=lambd, floor=floor, per_bin=per_bin is not False)
    forget = ASCENT if forget is None else forget if robust is None else harden(forget, robust)
    return Method(name="sfron", forget=forget, remain=remain, update=update, weights=weights, mask=mask)


def _check_published(**fixed: tuple[object, object]) -> None:
    """Refuse settings, each given as the value got and the only one allowed, that the authors' loop fixes."""
    for name, (got, allowed) in fixed.items():
        if got != allowed:
            raise ValueError(f"published=True fixes {name} at {allowed}; got {got}")


METHOD = Entry(sfron, needs=("mask", "forget", "remain"), data=("forget", "remain"))
