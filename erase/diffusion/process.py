"""Noising processes: how data become noise, and what a network is to say of it. No network is in here.

Times are a process's own: steps of a discrete schedule (long), or noise levels σ of a flow (float). Each is distributed
as the process says on its own; how those of a batch go together is a `Spread`:

- `stratified`: one in each of B equal parts of the distribution, in random order: a batch covers the whole range.
- `uniform`: independent of each other.
- `antithetic`: ⌊B/2⌋ + 1 independent ones and then their mirror images, of a discrete schedule T-1-t, B in all (the
  DDPM scripts published with arXiv 2409.19732, after those of arXiv 2010.02502).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]
Density = Literal["logit_normal", "uniform"]
Spread = Literal["stratified", "uniform", "antithetic"]


class Process(Protocol):
    """A noising process. B is the batch size; `z0` and `noise` are `[B, C, H, W]`, times `[B]`."""

    def times(
        self, count: int, generator: torch.Generator, device: torch.device, spread: Spread = "stratified"
    ) -> Tensor:
        """`count` times, `[B]`."""

    def noisy(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`z_t`, `[B, C, H, W]`."""

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to predict at `z_t`, `[B, C, H, W]`."""

    def clock(self, t: Tensor) -> Tensor:
        """The times as the network is told them, `[B]`; of a flow 1000 σ."""

    def bins(self, t: Tensor, count: int) -> Tensor:
        """Which of `count` equal parts of the schedule each time lies in, `[B]` long."""

    def evenly(self, count: int, device: torch.device) -> Tensor:
        """The middles of `count` equal parts of the distribution of times, from the least noise on, `[count]`."""

    def split(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data and noise that a prediction at `z_t` stands for, `[B, C, H, W]` each: `target` undone."""


def _strata(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """One number in each of [0, 1), [1, 2), … [count - 1, count), in random order, `[B]`."""
    part = torch.randperm(count, generator=generator, device=device)
    return part + torch.rand(count, generator=generator, device=device)


def _middles(count: int, device: torch.device) -> Tensor:
    """Of `count` equal parts of [0, 1], `[count]`."""
    return (torch.arange(count, device=device) + 0.5) / count


def _independent(count: int, spread: Spread) -> int:
    """How many times of a batch are drawn independently; the others mirror them.

    Raises:
        ValueError: for an unknown spread.
    """
    if spread not in get_args(Spread):
        raise ValueError(f"unknown spread of times {spread!r}; allowed: {', '.join(get_args(Spread))}")
    return count // 2 + 1 if spread == "antithetic" else count


@dataclass(frozen=True)
class Discrete:
    """`z_t = √ᾱ_t z0 + √(1-ᾱ_t) noise` at integer steps t (DDPM, Ho et al., arXiv 2006.11239)."""

    alphas_cumprod: Tensor
    """ᾱ_t, `[T]`, float32."""
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for an unknown prediction type.
        """
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"unknown prediction type {self.prediction!r}; allowed: {', '.join(get_args(Prediction))}")

    def times(
        self, count: int, generator: torch.Generator, device: torch.device, spread: Spread = "stratified"
    ) -> Tensor:
        """Steps, uniform over the schedule, `[B]` long."""
        steps, alone = len(self.alphas_cumprod), _independent(count, spread)
        if spread == "stratified":
            return (_strata(count, generator, device) * (steps / count)).long().clamp_(max=steps - 1)
        t = torch.randint(steps, (alone,), generator=generator, device=device)
        return torch.cat([t, steps - 1 - t])[:count]

    def levels(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1-ᾱ_t), `[B, 1, …]`."""
        alpha = self.alphas_cumprod.to(t.device)[t].view(-1, *[1] * (ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def noisy(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`√ᾱ_t z0 + √(1-ᾱ_t) noise`."""
        signal, sigma = self.levels(t, z0.ndim)
        return signal * z0 + sigma * noise

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, the data, or `v = √ᾱ_t noise - √(1-ᾱ_t) z0`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return z0
        signal, sigma = self.levels(t, z0.ndim)
        return signal * noise - sigma * z0

    def clock(self, t: Tensor) -> Tensor:
        """The steps themselves."""
        return t

    def bins(self, t: Tensor, count: int) -> Tensor:
        """The part of the schedule."""
        return t * count // len(self.alphas_cumprod)

    def evenly(self, count: int, device: torch.device) -> Tensor:
        """The middles of parts of the schedule, long."""
        return (_middles(count, device) * len(self.alphas_cumprod)).long()

    def split(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """By `z_t = √ᾱ_t z0 + √(1-ᾱ_t) noise`, and of v by its definition."""
        signal, sigma = self.levels(t, noisy.ndim)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / signal, prediction
        if self.prediction == "sample":
            return prediction, (noisy - signal * prediction) / sigma
        return signal * noisy - sigma * prediction, sigma * noisy + signal * prediction


@dataclass(frozen=True)
class Flow:
    """`z_σ = (1-σ) z0 + σ noise`, velocity `noise - z0` (rectified flow, Liu et al., arXiv 2209.03003).

    Times are σ, shifted to the noisy side for larger images: `s σ / (1 + (s-1) σ)`, and before that uniform or
    logit-normal (Esser et al., arXiv 2403.03206).
    """

    shift: float = 1.0
    """s > 0; `exp(μ)` of a scheduler with dynamic shifting."""
    density: Density = "logit_normal"

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for a shift that is not positive, or an unknown density.
        """
        if not self.shift > 0:
            raise ValueError(f"shift must be > 0; got {self.shift}")
        if self.density not in get_args(Density):
            raise ValueError(f"unknown density {self.density!r}; allowed: {', '.join(get_args(Density))}")

    def times(
        self, count: int, generator: torch.Generator, device: torch.device, spread: Spread = "stratified"
    ) -> Tensor:
        """Noise levels σ in (0, 1), `[B]` float32."""
        alone = _independent(count, spread)
        if spread == "stratified":
            share = _strata(count, generator, device) / count
        else:
            drawn = torch.rand(alone, generator=generator, device=device)
            share = torch.cat([drawn, 1 - drawn])[:count]
        return self._level(share.clamp(1e-5, 1 - 1e-5))

    def _level(self, share: Tensor) -> Tensor:
        """σ of shares of the distribution in (0, 1)."""
        sigma = torch.special.ndtri(share).sigmoid() if self.density == "logit_normal" else share
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def _sigma(self, t: Tensor, ndim: int) -> Tensor:
        return t.view(-1, *[1] * (ndim - 1))

    def noisy(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`(1-σ) z0 + σ noise`."""
        sigma = self._sigma(t, z0.ndim)
        return (1 - sigma) * z0 + sigma * noise

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`noise - z0`."""
        return noise - z0

    def clock(self, t: Tensor) -> Tensor:
        """1000 σ."""
        return 1000 * t

    def bins(self, t: Tensor, count: int) -> Tensor:
        """The part of [0, 1)."""
        return (t * count).long().clamp(max=count - 1)

    def evenly(self, count: int, device: torch.device) -> Tensor:
        """The middles of parts of the density, float32."""
        return self._level(_middles(count, device))

    def split(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`z0 = z_σ - σ v`, `noise = z0 + v`."""
        z0 = noisy - self._sigma(t, noisy.ndim) * prediction
        return z0, z0 + prediction


SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
    "time_shift_type",
)
"""What a scheduler's configuration says of the noise schedule."""


def schedule(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule of a configuration, what it leaves to its class's defaults too.

    `from_config` takes the defaults of the class that is made, and betas of LCM are not those of DDPM.
    """
    return {key: scheduler[key] for key in SCHEDULE if key in scheduler}


def discrete(scheduler: Mapping[str, Any]) -> Discrete:
    """The schedule of betas that a scheduler's configuration describes, whatever sampler it is of."""
    made = DDPMScheduler.from_config(scheduler, **schedule(scheduler))
    return Discrete(made.alphas_cumprod.float(), made.config.prediction_type)


def flow(scheduler: Mapping[str, Any], tokens: int) -> Flow:
    """The flow of a flow-matching scheduler's configuration.

    Args:
        scheduler: configuration of a `FlowMatchEulerDiscreteScheduler`, or of one with the same keys.
        tokens: image tokens at the model's resolution, on which a dynamic shift depends.

    Raises:
        ValueError: for a scheduler that is not one of flow matching.
    """
    if scheduler.get("shift") is None:
        raise ValueError(f"the scheduler {scheduler.get('_class_name')} has no shift: it is not one of flow matching")
    if not scheduler.get("use_dynamic_shifting"):
        return Flow(float(scheduler["shift"]))
    low, high = scheduler["base_shift"], scheduler["max_shift"]
    first, last = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    mu = low + (high - low) * (tokens - first) / (last - first)
    return Flow(mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu))
