"""Forget losses of diffusion models. All return `[B]`, mean over C, H, W, at timesteps the batch drew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from erase.backend import trainable
from erase.diffusion.denoiser import Denoiser, as_denoiser, mse
from erase.losses import ASCENT, DESCENT, Objective

Target = Literal["online", "frozen"]


@dataclass(frozen=True)
class Denoise:
    """The denoising loss with condition dropout, as in training with classifier-free guidance: for remain data.

    Forget data get none: a dropped condition would turn the ascent on the unconditional model.
    """

    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for a dropout outside [0, 1).
        """
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")

    def __call__(self, backend: Any, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Loss `[B]`."""
        model = as_denoiser(backend)
        if "t" not in batch:
            batch = model.draw(batch, generator)
        if self.dropout > 0:
            if model.null is None:
                raise ValueError(f"dropout {self.dropout} needs a null condition, which this model lacks: set it to 0")
            cond = batch["cond"]
            drop = (batch["drop_draw"] < self.dropout).view(-1, *[1] * (cond.ndim - 1))
            batch = {**batch, "cond": torch.where(drop, model.null.to(cond), cond)}
        return model.losses(batch, generator)


@dataclass(frozen=True)
class Redirect:
    """`MSE(ε_θ(z_t, t, forget), stop-grad ε(z_t, t, anchor))` at the same z_t: the concept becomes its anchor.

    The target network is the one being trained (`online`, the published scripts) or the one it started from
    (`frozen`, which holds one copy of the trainable weights).
    """

    frozen: dict[str, Tensor] | None = None

    def __call__(self, backend: Any, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Loss `[B]` of a batch with `cond` and `anchor`."""
        model = as_denoiser(backend)
        if "t" not in batch:
            batch = model.draw(batch, generator)
        noisy = model.noisy(batch)
        prediction = model.predict(noisy, batch["t"], batch["cond"])
        # After the pass with gradients: autocast caches cast weights, and a cast made without gradients
        # would serve the pass that needs them.
        # Constant weights, as the frozen ones are, are not cached.
        weights = {f"net.{name}": value for name, value in (self.frozen or {}).items()}
        with torch.no_grad():
            target = functional_call(_Prediction(model), weights, (noisy, batch["t"], batch["anchor"]))
        return mse(prediction, target)


class _Prediction(nn.Module):
    """Gives `functional_call` a module whose forward is a denoiser's prediction."""

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.net, self.predict_fn = model.net, model.predict_fn

    def forward(self, noisy: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.predict_fn(self.net, noisy, t, cond)


def forget_objective(name: str, net: nn.Module, target: str = "online") -> Objective:
    """The forget loss of a name, and whether it is descended.

    `redirect` descends the distance to the anchor's prediction, `ascent` ascends the denoising loss, `surrogate`
    descends it, on data that were exchanged.

    Raises:
        ValueError: for another name or target.
    """
    if target not in get_args(Target):
        raise ValueError(f"unknown target {target!r}; allowed: {', '.join(get_args(Target))}")
    if name == "ascent":
        return ASCENT
    if name == "surrogate":
        return DESCENT
    if name == "redirect":
        frozen = None
        if target == "frozen":
            frozen = {n: p.detach().clone() for n, p in trainable(net).items()}
        return Objective(Redirect(frozen), 1, "redirect")
    raise ValueError(f"unknown forget loss {name!r}; allowed: redirect, ascent, surrogate")
