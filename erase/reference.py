"""SFR-on from the mask to the outer step, in plain torch: read this first.

Source: Huang et al., "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement", NeurIPS 2024,
arXiv 2409.19732. Symbols are the paper's:

    θ weights, θ0 pretrained · ℓ_i loss of sample i · F_f, F_r Fisher diagonals of the forget and the remain data ·
    m mask · γ threshold · λ lambd · s(t) schedule · β fast_rate · η slow_rate · K slow_steps · α outer_rate

    m = 1[ F_f(θ0) / F_r(θ0) ≥ γ ]                                   S      which weights may forget, once
    φ = θ0
    for t in 0 … T-1:
        θ = φ
        w_i = B · ℓ_i^-λ / Σ_j ℓ_j^-λ                                F      what is forgotten already is left alone
        θ ← θ + β s(t) · m ⊙ ∇ mean_i(w_i ℓ_i)                       R-on   a fast step up the forget loss,
        K times: θ ← θ - η ∇ mean_i(remain ℓ_i)                             slow steps down the remain loss,
        φ ← φ + α (θ - φ)                                                   an outer step

Nothing here knows of processes, precision, memory or interruptions. `erase.engine` does the same with all of them, and
is tested against this file; what it adds to the method (other fast rules, timestep bins, objectives that are descended)
is described in `erase.methods.sfron`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "constant": lambda x: 1.0,
}
"""s as a function of t / T; the paper's is linear, its scripts' is cosine."""


def fisher(losses: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """`F_j = mean_i (∂ℓ_i/∂θ_j)²`: the gradient of each sample's loss, squared, then averaged; `losses` is `[N]`."""
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    return [torch.stack(grads).square().mean(0) for grads in zip(*rows, strict=True)]


def saliency_mask(forget_losses: Tensor, remain_losses: Tensor, net: nn.Module, threshold: float) -> list[Tensor]:
    """S: `m = 1[F_f / F_r ≥ γ]`, one bool tensor per parameter; losses are `[N]`, at the pretrained weights."""
    params = list(net.parameters())
    both = zip(fisher(forget_losses, params), fisher(remain_losses, params), strict=True)
    return [f / r >= threshold for f, r in both]  # a weight that moves neither loss (0/0) is masked


def adaptive_weights(losses: Tensor, lambd: float) -> Tensor:
    """F: `w_i = B · ℓ_i^-λ / Σ_j ℓ_j^-λ`, `[B]`, of mean 1; constants, through which no gradient flows."""
    powers = losses.detach() ** -lambd
    return len(losses) * powers / powers.sum()


def sfron(
    net: nn.Module,
    forget_loss: Callable[[int], Tensor],
    remain_loss: Callable[[int, int], Tensor],
    mask: Sequence[Tensor] | None = None,
    *,
    steps: int,
    fast_rate: float,
    slow_rate: float,
    slow_steps: int = 1,
    outer_rate: float = 1.0,
    lambd: float = 0.5,
    schedule: str = "linear",
    ron: bool = True,
) -> None:
    """SFR-on, in place. Without `mask` S is off, at `lambd=0` F is off.

    Without `ron` one step goes down both losses: `θ ← θ - η ∇ (mean_i(remain ℓ_i) - β s(t) m ⊙ mean_i(w_i ℓ_i))`.

    Args:
        net: the network at θ0.
        forget_loss: the losses of forget batch t at the present weights, `[B]`.
        remain_loss: the losses of the remain batch of step t and slow step k, `[B]`.
        mask: of `saliency_mask`.
        steps: T.
        fast_rate: β.
        slow_rate: η.
        slow_steps: K.
        outer_rate: α.
        lambd: λ.
        schedule: s(t), by name.
        ron: whether fast and slow steps are separate.
    """
    params = list(net.parameters())
    mask = [torch.ones_like(p, dtype=torch.bool) for p in params] if mask is None else mask

    def gradient(losses: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses.mean(), params)

    def move(rate: float, directions: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, direction in zip(params, directions, strict=True):
                p.add_(rate * direction)

    for t in range(steps):
        phi = [p.detach().clone() for p in params]
        losses = forget_loss(t)
        ascent = [m * g for m, g in zip(mask, gradient(adaptive_weights(losses, lambd) * losses), strict=True)]
        beta = fast_rate * SCHEDULES[schedule](t / steps)
        if ron:
            move(beta, ascent)
            for k in range(slow_steps):
                move(-slow_rate, gradient(remain_loss(t, k)))
        else:
            descent = gradient(remain_loss(t, 0))
            move(-slow_rate, [d - beta * a for d, a in zip(descent, ascent, strict=True)])
        with torch.no_grad():
            for p, start in zip(params, phi, strict=True):
                p.copy_(start + outer_rate * (p - start))
