"""The denoiser contract: a noise schedule around a network, with the draw of randomness apart from the loss.

Batches are dicts of tensors with first dimension B: `mean` and optionally `std` (the data, `[B, C, H, W]`,
already scaled; data = mean + std · noise), `cond` (what the network is conditioned on) and optionally `anchor`
(a second condition of the same shape). `draw` adds `z0`, `t`, `noise` and `drop_draw`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Prediction = Literal["epsilon", "v_prediction", "sample"]
Predict = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""`(net, noisy [B, C, H, W], t [B], cond [B, …]) -> [B, C, H, W]`."""


@dataclass(frozen=True)
class Denoiser:
    """A network, how to call it, and its noise schedule: a `Backend` that draws, with timestep bins."""

    net: nn.Module
    predict_fn: Predict
    alphas_cumprod: Tensor
    """ᾱ_t, `[T]`, float32."""
    prediction: Prediction = "epsilon"
    null: Tensor | None = None
    """The empty condition, `[1, …]`: what dropout (`erase.diffusion.losses.Denoise`) puts in the place of `cond`."""
    num_bins: int = 20

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for an unknown prediction type.
        """
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"unknown prediction type {self.prediction!r}; allowed: {', '.join(get_args(Prediction))}")

    def draw(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Add the data sample `z0`, timesteps `t` `[B]`, `noise`, and `drop_draw` `[B]`, uniform in [0, 1).

        Timesteps are stratified: one in each of B equal parts of the schedule, in random order; each is
        uniform over the schedule on its own.
        """
        mean = batch["mean"]
        size, device = len(mean), mean.device
        part = torch.randperm(size, generator=generator, device=device)
        t = ((part + torch.rand(size, generator=generator, device=device)) * (len(self.alphas_cumprod) / size)).long()
        t = t.clamp_(max=len(self.alphas_cumprod) - 1)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        z0 = mean
        if "std" in batch:
            z0 = mean + batch["std"] * torch.randn(mean.shape, generator=generator, device=device)
        drop_draw = torch.rand(size, generator=generator, device=device)
        return {**batch, "z0": z0, "t": t, "noise": noise, "drop_draw": drop_draw}

    def bins(self, batch: dict[str, Tensor]) -> Tensor:
        """The timestep bin of every sample, `[B]`."""
        return batch["t"] * self.num_bins // len(self.alphas_cumprod)

    def levels(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1-ᾱ_t), `[B, 1, …]`."""
        alpha = self.alphas_cumprod.to(t.device)[t].view(-1, *[1] * (ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def noisy(self, batch: dict[str, Tensor]) -> Tensor:
        """`z_t = √ᾱ_t z0 + √(1-ᾱ_t) noise`, `[B, C, H, W]`."""
        z0 = batch["z0"]
        signal, sigma = self.levels(batch["t"], z0.ndim)
        return signal * z0 + sigma * batch["noise"]

    def target(self, batch: dict[str, Tensor]) -> Tensor:
        """What the network should predict for a drawn batch, `[B, C, H, W]`."""
        if self.prediction == "epsilon":
            return batch["noise"]
        if self.prediction == "sample":
            return batch["z0"]
        signal, sigma = self.levels(batch["t"], batch["z0"].ndim)
        return signal * batch["noise"] - sigma * batch["z0"]

    def predict(self, noisy: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The network's prediction, `[B, C, H, W]`."""
        return self.predict_fn(self.net, noisy, t, cond)

    def losses(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Denoising MSE, mean over C, H, W: `[B]`. Draws first if the batch is not drawn yet."""
        if "t" not in batch:
            batch = self.draw(batch, generator)
        return mse(self.predict(self.noisy(batch), batch["t"], batch["cond"]), self.target(batch))

    def distances(self, batch: dict[str, Tensor], teacher: nn.Module, generator: torch.Generator) -> Tensor:
        """MSE between the network's prediction and a teacher's, mean over C, H, W: `[B]`."""
        if "t" not in batch:
            batch = self.draw(batch, generator)
        noisy = self.noisy(batch)
        prediction = self.predict(noisy, batch["t"], batch["cond"])
        with torch.no_grad():
            target = self.predict_fn(teacher, noisy, batch["t"], batch["cond"])
        return mse(prediction, target)


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
