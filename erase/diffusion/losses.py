"""Losses of diffusion models. All return `[B]`, by `Denoiser.reduction` over C, H, W, at timesteps the batch drew."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from erase.diffusion import condition
from erase.diffusion.condition import Condition
from erase.diffusion.denoiser import Denoiser, as_denoiser
from erase.engine.backend import LossFn, trainable
from erase.engine.fisher import evaluating
from erase.engine.losses import ASCENT, DESCENT, Objective
from erase.engine.sharding import exchanged, is_sharded

Target = Literal["online", "frozen"]


@dataclass(frozen=True)
class Denoise:
    """The denoising loss with condition dropout, as in training with classifier-free guidance: for remain data.

    Forget data get none by default (see `Dropped`): a dropped condition turns the ascent on the unconditional model.

    With `teacher` weights the target is what they predict, `MSE(ε_θ(z_t, t, c), ε_θ0(z_t, t, c))`, not the noise: at θ0
    loss and gradient are 0, and no variance of the noise is in either. Costs a forward pass and a copy of the weights.
    """

    dropout: float = 0.1
    teacher: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for a dropout outside [0, 1).
        """
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")

    def __call__(self, backend: Any, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss `[B]`."""
        model = as_denoiser(backend)
        if "t" not in batch:
            batch = model.draw(batch, generator)
        batch = dropped(model, batch, self.dropout)
        if self.teacher is None:
            return model.losses(batch, generator)
        return model.distances(batch, Exchanged(model.net, self.teacher), generator)


@dataclass(frozen=True)
class Dropped:
    """A loss with condition dropout: the network is told the null condition in the place of a sample's own.

    For forget data, as in the DDPM scripts published with arXiv 2409.19732. A redirect's anchor stays.
    """

    loss: LossFn
    dropout: float

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for a dropout outside [0, 1).
        """
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")

    def __call__(self, backend: Any, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss `[B]`."""
        model = as_denoiser(backend)
        if "t" not in batch:
            batch = model.draw(batch, generator)
        return self.loss(backend, dropped(model, batch, self.dropout), generator)


def dropped(model: Denoiser, batch: dict[str, Any], dropout: float) -> dict[str, Any]:
    """A drawn batch, in which a share of the samples has the null condition.

    Raises:
        ValueError: for dropout on a model without a null condition.
    """
    if dropout == 0:
        return batch
    if model.null is None:
        raise ValueError(f"dropout {dropout} needs a null condition, which this model lacks: set it to 0")
    return {**batch, "cond": condition.where(batch["drop_draw"] < dropout, model.null, batch["cond"])}


@dataclass(frozen=True)
class Redirect:
    """`MSE(ε_θ(z_t, t, forget), stop-grad ε(z_t, t, anchor))` at the same z_t: the concept becomes its anchor.

    The target network is the one being trained (`online`, the published scripts) or the one it started from
    (`frozen`, which holds one copy of the trainable weights).
    """

    frozen: dict[str, Tensor] | None = None

    def __call__(self, backend: Any, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss `[B]` of a batch with `cond` and `anchor`."""
        model = as_denoiser(backend)
        if "t" not in batch:
            batch = model.draw(batch, generator)
        noisy, t = model.noisy(batch), batch["t"]
        prediction = model.predict(noisy, t, batch["cond"])
        return model.error(prediction, _predicted(model, self.frozen or {}, noisy, t, batch["anchor"]))


@dataclass(frozen=True)
class Guided:
    """The denoising loss of the guided prediction, `MSE(ε_θ(z_t, t, ∅) + s (ε_θ(z_t, t, c) - ε_θ(z_t, t, ∅)), target)`.

    Both predictions have gradients. For masks: SalUn's and SFR-on's scripts make them of it, where they write
    `(1 + w) ε_θ(c) - w ε_θ(∅)`, and s = 1 + w. At s = 1 it is the plain loss, for twice the cost.
    """

    scale: float
    """s"""

    def __call__(self, backend: Any, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss `[B]`.

        Raises:
            ValueError: for a model without a null condition.
        """
        model = as_denoiser(backend)
        if model.null is None:
            raise ValueError(f"guidance {self.scale} needs a null condition, which this model lacks")
        if "t" not in batch:
            batch = model.draw(batch, generator)
        noisy, t = model.noisy(batch), batch["t"]
        null = condition.expand(condition.to(model.null, noisy.device), len(noisy))
        without, asked = (model.predict(noisy, t, c) for c in (null, batch["cond"]))
        target = model.process.target(batch["z0"], batch["noise"], t)
        return model.error(without + self.scale * (asked - without), target)


@dataclass(frozen=True)
class Negate:
    """`MSE(ε_θ(z_t, t, c), ε0(z_t, t, ∅) - η (ε0(z_t, t, c) - ε0(z_t, t, ∅)))`: the prompt means its opposite (ESD).

    ε0 is the network with the weights `frozen`, θ0. Costs two forward passes and a copy of the weights.

    A batch with `attribute` a loses that from what its prompt c says, and keeps the rest:
    `MSE(ε_θ(z_t, t, c), ε0(z_t, t, c) - η (ε0(z_t, t, a) - ε0(z_t, t, ∅)))`; a third pass.
    """

    frozen: dict[str, Tensor]
    eta: float = 1.0
    """η, how far beyond the empty condition."""

    def __call__(self, backend: Any, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss `[B]`.

        Raises:
            ValueError: for a model without a null condition.
        """
        model = as_denoiser(backend)
        if model.null is None:
            raise ValueError("this loss needs a null condition, which this model lacks")
        if "t" not in batch:
            batch = model.draw(batch, generator)
        noisy, t, cond = model.noisy(batch), batch["t"], batch["cond"]
        prediction = model.predict(noisy, t, cond)
        null = condition.expand(condition.to(model.null, noisy.device), len(noisy))
        lost = batch.get("attribute", cond)
        if not self.eta:
            return model.error(
                prediction, _predicted(model, self.frozen, noisy, t, cond if "attribute" in batch else null)
            )
        without, asked = (_predicted(model, self.frozen, noisy, t, c) for c in (null, lost))
        kept = _predicted(model, self.frozen, noisy, t, cond) if "attribute" in batch else without
        return model.error(prediction, kept - self.eta * (asked - without))


@torch.no_grad()
def _predicted(model: Denoiser, weights: dict[str, Tensor], noisy: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """What the network predicts with some of its weights exchanged, `[B, C, H, W]`."""
    return model.predict(noisy, t, cond, Exchanged(model.net, weights))


class Exchanged(nn.Module):
    """A network with some of its weights exchanged: a teacher that takes the memory of these alone.

    To be called after the pass with gradients: autocast caches cast weights, and a cast made without gradients would
    serve the pass that needs them. Constant weights, as exchanged ones are, are not cached. Weights that are spread
    over processes are exchanged in place (`erase.engine.sharding.exchanged`).
    """

    def __init__(self, net: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.net, self.weights = net, weights

    def forward(self, *args: Any, **given: Any) -> Any:
        """What the network says: with other weights as a teacher, without dropout; with its own in its mode."""
        with evaluating(self.net) if self.weights else nullcontext():
            if is_sharded(self.net):
                with exchanged(self.net, self.weights) as net:
                    return net(*args, **given)
            return functional_call(self.net, self.weights, args, given)


def forget_objective(
    name: str, net: nn.Module, target: str = "online", start: dict[str, Tensor] | None = None, dropout: float = 0.0
) -> Objective:
    """The forget loss of a name, and whether it is descended; with condition `dropout`.

    `redirect` descends the distance to the anchor's prediction, `ascent` ascends the denoising loss, `surrogate`
    descends it, on data that were exchanged. `start` holds the weights of a `frozen` target, by default the present.

    Raises:
        ValueError: for another name or target, or a dropout outside [0, 1).
    """
    if dropout != 0:
        found = forget_objective(name, net, target, start)
        return replace(found, loss=Dropped(found.loss, dropout))
    if target not in get_args(Target):
        raise ValueError(f"unknown target {target!r}; allowed: {', '.join(get_args(Target))}")
    if name == "ascent":
        return ASCENT
    if name == "surrogate":
        return DESCENT
    if name == "redirect":
        return Objective(Redirect((start or copies(net)) if target == "frozen" else None), 1, "redirect")
    raise ValueError(f"unknown forget loss {name!r}; allowed: redirect, ascent, surrogate")


def remain_objective(name: str, net: nn.Module, dropout: float, start: dict[str, Tensor] | None = None) -> Objective:
    """The remain loss of a name, descended: `denoise`, or `distill`, with `start` (by default now) as the teacher.

    Raises:
        ValueError: for another name, or a dropout outside [0, 1).
    """
    if name not in ("denoise", "distill"):
        raise ValueError(f"unknown remain loss {name!r}; allowed: denoise, distill")
    return Objective(Denoise(dropout, (start or copies(net)) if name == "distill" else None), 1, name)


def copies(net: nn.Module) -> dict[str, Tensor]:
    """Of the trainable weights, by name, as they are now."""
    return {name: p.detach().clone() for name, p in trainable(net).items()}
