"""Model-agnostic losses. All return `[B]`; sign, weight and reduction are the caller's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from erase.engine.backend import Backend, Comparing, ComparingAtOnce, LossFn, drawn_from, trainable

Reduction = Literal["sum", "mean"]


def plain(backend: Backend[Any], batch: Any, generator: torch.Generator) -> Tensor:
    """The backend's own loss, `[B]`: what the model was trained with."""
    return backend.losses(batch, generator)


@dataclass(frozen=True)
class Objective:
    """A loss and what to do with it.

    `sense` -1 ascends it (forgetting by making the loss worse), +1 descends it (fitting a new target).
    """

    loss: LossFn = plain
    sense: Literal[-1, 1] = 1
    name: str = "plain"


@dataclass(frozen=True)
class Pull:
    """A loss with a quadratic pull to where the weights began: `ℓ_i + λ/2 Σ_j F_j (θ_j - θ0_j)²` (EWC, SA).

    Memory: one copy of the trainable weights, and the Fisher diagonal.
    """

    loss: LossFn
    fisher: Mapping[str, Tensor]
    origin: Mapping[str, Tensor]
    """θ0, by name."""
    strength: float
    """λ"""

    def __call__(self, backend: Backend[Any], batch: Any, generator: torch.Generator) -> Tensor:
        """Losses `[B]`."""
        params = trainable(backend.net)
        parts = [(self.fisher[name] * (p - self.origin[name]).square()).sum() for name, p in params.items()]
        return self.loss(backend, batch, generator) + 0.5 * self.strength * torch.stack(parts).sum()


@dataclass(frozen=True)
class Distance:
    """How far the network is from a teacher, `strength · d(teacher, net)`, beside another loss or alone."""

    teacher: nn.Module
    """In eval mode; it gets no gradients."""
    strength: float = 1.0
    beside: LossFn | None = None
    reduction: Reduction = "sum"
    """Of a classifier's KL over its K classes: the divergence itself, or divided by K (torch's default)."""

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for an unknown reduction.
        """
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"unknown reduction {self.reduction!r}; allowed: {', '.join(get_args(Reduction))}")

    def __call__(self, backend: Backend[Any], batch: Any, generator: torch.Generator) -> Tensor:
        """Losses `[B]`.

        Raises:
            ValueError: for a backend without `distances`, or one without classes to take the mean over.
        """
        if not isinstance(backend, Comparing):
            raise ValueError(
                f"{type(backend).__name__} has no distances(batch, teacher, generator): methods with a teacher need it"
            )
        own: Tensor | None = None
        if self.beside is plain and isinstance(backend, ComparingAtOnce):
            own, apart = backend.losses_and_distances(batch, self.teacher, generator)
        else:
            apart = backend.distances(batch, self.teacher, generator)
        apart = self.strength * apart
        if self.reduction == "mean":
            classes = getattr(backend, "num_classes", None)
            if classes is None:
                raise ValueError(f"reduction=mean is over classes, and {type(backend).__name__} has none: use sum")
            apart = apart / classes
        if own is None and self.beside is not None:
            own = self.beside(backend, batch, generator)
        return apart if own is None else own + apart


@dataclass(frozen=True)
class Training:
    """A loss of the network with its dropout layers in training mode; else the loop leaves the network in its mode.

    Dropout draws from torch's global generators: they are seeded by the loss's own generator, and put back. Where a
    batch is shared by processes, or cut into micro-batches, its parts see other dropout than the whole would.
    """

    loss: LossFn

    def __call__(self, backend: Backend[Any], batch: Any, generator: torch.Generator) -> Tensor:
        """Losses `[B]`.

        Raises:
            ValueError: for a network with gradient checkpointing, which would make the pass again without dropout.
        """
        if getattr(backend.net, "is_gradient_checkpointing", False):
            raise ValueError("dropout does not go with gradient checkpointing: set train.network_dropout=false")
        modes = {module: module.training for module in backend.net.modules() if isinstance(module, _DropoutNd)}
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        for module in modes:
            module.train()
        try:
            with drawn_from(seed, generator.device):
                return self.loss(backend, batch, generator)
        finally:
            for module, mode in modes.items():
                module.training = mode


ASCENT = Objective(plain, -1, "ascent")
DESCENT = Objective(plain, 1, "descent")


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """`mean_i(w_i ℓ_i)`, a scalar; weights `[B]` are constants, `None` means 1."""
    return losses.mean() if weights is None else (weights.detach() * losses).mean()
