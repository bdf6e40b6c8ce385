"""F: adaptive sample weights, and the schedules that fade forgetting out.

Source: Huang et al., arXiv 2409.19732, section 4: the weight of a forget sample falls as its loss grows,
so that what is forgotten already is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal["linear", "cosine", "constant"]


def schedule_scale(schedule: Schedule, step: int, steps: int) -> float:
    """s(t) in `[0, 1]`, 1 at step 0: `linear` 1 - t/T (the paper), `cosine` (the published script), `constant`.

    Raises:
        ValueError: for an unknown schedule or a step outside `[0, steps]`.
    """
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"step {step} is outside [0, {steps}]")
    if schedule == "linear":
        return 1.0 - step / steps
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / steps))
    if schedule == "constant":
        return 1.0
    raise ValueError(f"unknown schedule {schedule!r}; allowed: {', '.join(get_args(Schedule))}")


def adaptive_weights(
    losses: Tensor,
    *,
    lambd: float,
    scale: float = 1.0,
    floor: float = 1e-6,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Weights `[B]` of a forget batch: `w_i = scale · B · ℓ_i^-λ / Σ_j ℓ_j^-λ`; mean `scale`, detached.

    λ = 0 gives every sample `scale`. A negative λ reverses the order: weights grow with the loss, which is
    what a loss that measures *remembering* (`redirect`) needs.

    Args:
        losses: per-sample losses, `[B]`, ≥ 0; lower ones count as the floor.
        lambd: λ.
        scale: mean weight, s(t) in the paper.
        floor: losses are clamped here first: a loss of exactly 0 would otherwise take all the weight
            while its own gradient is 0, and forgetting would stop.
        total: sums a `[2]` tensor over processes; the sum then runs over the global forget batch.

    Raises:
        ValueError: for losses not of shape `[B]`, or a `floor` that is not positive.
    """
    if losses.ndim != 1 or losses.numel() == 0:
        raise ValueError(f"adaptive_weights takes losses of shape [B], B ≥ 1; got {list(losses.shape)}")
    if floor <= 0:
        raise ValueError(f"floor must be positive; got {floor}")
    log = -lambd * losses.detach().double().clamp(min=floor).log()
    powers = log.exp()
    sums = torch.stack([powers.sum(), powers.new_tensor(float(len(powers)))])
    if total is not None:
        sums = total(sums)
    return (scale * sums[1] * powers / sums[0]).to(losses.dtype)


class BinNormalizer:
    """Divides losses by the running mean of their bin.

    In diffusion a loss depends far more on its timestep than on its sample; raw weights then mostly pick
    high-noise timesteps. The state is two `[num_bins]` float64 vectors on the CPU: an exponential mean per bin
    and its bias correction.
    """

    def __init__(self, num_bins: int, momentum: float = 0.9) -> None:
        if num_bins < 1 or not 0 <= momentum < 1:
            raise ValueError(f"needs num_bins ≥ 1 and momentum in [0, 1); got {num_bins}, {momentum}")
        self.momentum = momentum
        self.mean = torch.zeros(num_bins, dtype=torch.float64)
        self.mass = torch.zeros(num_bins, dtype=torch.float64)

    def update(self, losses: Tensor, bins: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take in losses `[B]` and their bins `[B]`; `total` sums the statistics over processes.

        Losses that are not finite are left out: one of them would spoil its bin for good.
        """
        losses = losses.detach().to("cpu", torch.float64)
        finite = losses.isfinite()
        bins = bins.to("cpu", torch.long)[finite]
        stats = torch.zeros(2, len(self.mean), dtype=torch.float64)
        stats[0].index_add_(0, bins, losses[finite])
        stats[1].index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))
        if total is not None:
            stats = total(stats)
        seen = stats[1] > 0
        fresh = stats[0][seen] / stats[1][seen]
        self.mean[seen] = self.momentum * self.mean[seen] + (1 - self.momentum) * fresh
        self.mass[seen] = self.momentum * self.mass[seen] + (1 - self.momentum)

    def __call__(self, losses: Tensor, bins: Tensor) -> Tensor:
        """Losses `[B]` relative to their bin's mean; not finite where they were not.

        Raises:
            ValueError: for a bin without statistics.
        """
        index = bins.to("cpu", torch.long)
        if bool(((self.mass[index] == 0) & losses.isfinite().cpu()).any()):
            raise ValueError("a bin has no statistics yet: call update(...) with this batch first")
        means = (self.mean[index] / self.mass[index]).clamp(min=1e-12)
        return losses.detach() / means.to(losses.device, losses.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The two `[num_bins]` vectors."""
        return {"mean": self.mean.clone(), "mass": self.mass.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.mean, self.mass = state["mean"].clone(), state["mass"].clone()
