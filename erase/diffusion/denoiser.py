"""The denoiser contract: a noising process around a network, with the draw of randomness apart from the loss.

Batches are dicts of tensors with first dimension B: `mean` and optionally `std` (the data, `[B, C, H, W]`,
already scaled; data = mean + std · noise), `cond` (a `Condition`: what the network is told) and optionally `anchor`
(a second condition with the same leaves). `draw` adds `z0`, `t`, `noise` and `drop_draw`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from erase.diffusion.condition import Condition
from erase.diffusion.process import Discrete, Process, Spread

Call = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
"""`(net, noisy [B, C, H, W], clock [B], condition) -> [B, C, H, W]`: see `erase.diffusion.families.Family.call`."""
Reduction = Literal["mean", "sum"]
"""Of squared errors over C, H, W."""


@dataclass(frozen=True)
class Denoiser:
    """A network, how to call it, and its noising process: a `Backend` that draws, with timestep bins."""

    net: nn.Module
    call: Call
    process: Process
    null: dict[str, Tensor] | None = None
    """The empty condition, leaves `[1, …]`: what dropout (`erase.diffusion.losses.Denoise`) puts in the place of
    `cond`."""
    num_bins: int = 20
    spread: Spread = "stratified"
    """How the times of a batch are drawn."""
    reduction: Reduction = "mean"
    """Of every loss. By `sum` losses and gradients are C·H·W times as large, which an optimizer like Adam does not see
    and a limit of the gradient norm does (the DDPM scripts published with arXiv 2409.19732)."""

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for an unknown reduction.
        """
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"unknown reduction {self.reduction!r}; allowed: {', '.join(get_args(Reduction))}")

    def draw(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Add the data sample `z0`, times `t` `[B]`, `noise`, and `drop_draw` `[B]`, uniform in [0, 1)."""
        mean = batch["mean"]
        size, device = len(mean), mean.device
        t = self.process.times(size, generator, device, self.spread)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        z0 = mean
        if "std" in batch:
            z0 = mean + batch["std"] * torch.randn(mean.shape, generator=generator, device=device)
        drop_draw = torch.rand(size, generator=generator, device=device)
        return {**batch, "z0": z0, "t": t, "noise": noise, "drop_draw": drop_draw}

    @property
    def num_times(self) -> int:
        """T, the timesteps of a discrete process.

        Raises:
            ValueError: for another process, whose times are not counted.
        """
        if not isinstance(self.process, Discrete):
            raise ValueError(f"a {type(self.process).__name__} process has no timesteps that can be counted")
        return len(self.process.alphas_cumprod)

    def draw_at(self, batch: dict[str, Any], t: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """As `draw`, at times `t` `[B]`."""
        return {**self.draw(batch, generator), "t": t}

    def bins(self, batch: dict[str, Any]) -> Tensor:
        """The timestep bin of every sample, `[B]`."""
        return self.process.bins(batch["t"], self.num_bins)

    def noisy(self, batch: dict[str, Any]) -> Tensor:
        """`z_t` of a drawn batch, `[B, C, H, W]`."""
        return self.process.noisy(batch["z0"], batch["noise"], batch["t"])

    def predict(self, noisy: Tensor, t: Tensor, cond: Condition, net: nn.Module | None = None) -> Tensor:
        """The prediction of the network, or of another one of its kind, `[B, C, H, W]`."""
        return self.call(self.net if net is None else net, noisy, self.process.clock(t), cond)

    def losses(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Squared denoising error: `[B]`. Draws first if the batch is not drawn yet."""
        if "t" not in batch:
            batch = self.draw(batch, generator)
        target = self.process.target(batch["z0"], batch["noise"], batch["t"])
        return self.error(self.predict(self.noisy(batch), batch["t"], batch["cond"]), target)

    def distances(self, batch: dict[str, Any], teacher: nn.Module, generator: torch.Generator) -> Tensor:
        """Squared error between the network's prediction and a teacher's: `[B]`."""
        if "t" not in batch:
            batch = self.draw(batch, generator)
        noisy = self.noisy(batch)
        prediction = self.predict(noisy, batch["t"], batch["cond"])
        with torch.no_grad():
            target = self.predict(noisy, batch["t"], batch["cond"], teacher)
        return self.error(prediction, target)

    def error(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared error over C, H, W by the reduction, `[B]`, in float32 or better."""
        found = mse(a, b)
        return found * a[0].numel() if self.reduction == "sum" else found


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over all dimensions but the first, `[B]`, in float32 or better."""
    wide = torch.promote_types(torch.float32, torch.promote_types(a.dtype, b.dtype))
    return (a.to(wide) - b.to(wide)).square().flatten(1).mean(1)


def as_denoiser(backend: Any) -> Denoiser:
    """The backend, if it is a denoiser.

    Raises:
        ValueError: for any other backend.
    """
    if not isinstance(backend, Denoiser):
        raise ValueError(f"this loss needs a diffusion model; got a {type(backend).__name__}")
    return backend
