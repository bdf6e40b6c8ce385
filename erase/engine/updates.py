"""R-on: the fast step with a rule of its own, the slow steps, the outer step; and what the baselines use instead.

Masking a gradient is not enough where one optimizer serves both phases: its momentum, moments and weight decay
move masked weights too. Here the fast step computes the *change* of the kept weights alone and adds nothing
else, so that a masked weight stays bit-identical through it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from erase.engine.saliency import Mask
from erase.engine.weighting import Schedule

FastRule = Literal["sgd", "normalized", "adam", "shared", "joint"]


@dataclass(frozen=True)
class Update:
    """How one step changes the weights.

    `fast_rule`:

    - `sgd`: `θ ← θ - β_t m ⊙ g`, the paper's.
    - `normalized`: the same along `g / rms(m ⊙ g)`, so that β is the RMS change of a kept weight.
    - `adam`: Adam with moments of its own, held for kept weights only; β is its learning rate.
    - `shared`: no rule of its own: β folded into the loss, the mask on the gradient, the slow optimizer steps
      (what the published scripts do).
    - `joint`: no fast step: β times the forget gradient is added to the remain gradient (R-on off).

    `clip_forget` and `clip_remain` limit a phase's gradient norm: of all weights before masking, but after it
    under `shared` (as published). Under `joint` there is one gradient, the sum, limited by `clip_remain`.

    `mask_slow` masks the gradients of slow and joint steps too: weights outside the mask never learn (SalUn).
    """

    fast_rate: float
    fast_rule: FastRule = "adam"
    slow_steps: int = 1
    outer_rate: float = 1.0
    schedule: Schedule = "linear"
    slow_schedule: Schedule = "constant"
    every: int = 1
    clip_forget: float | None = None
    clip_remain: float | None = None
    mask_slow: bool = False

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: with the value got and the values allowed.
        """
        if self.fast_rule not in get_args(FastRule):
            raise ValueError(f"unknown fast_rule {self.fast_rule!r}; allowed: {', '.join(get_args(FastRule))}")
        for name in ("schedule", "slow_schedule"):
            if getattr(self, name) not in get_args(Schedule):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; allowed: {', '.join(get_args(Schedule))}")
        if not (self.fast_rate >= 0 and math.isfinite(self.fast_rate)):
            raise ValueError(f"fast_rate must be finite and ≥ 0; got {self.fast_rate}")
        if self.slow_steps < 0 or self.every < 1:
            raise ValueError(f"needs slow_steps ≥ 0 and every ≥ 1; got {self.slow_steps} and {self.every}")
        if not 0 <= self.outer_rate <= 1:
            raise ValueError(f"outer_rate must be in [0, 1]; got {self.outer_rate}")
        if self.fast_rule == "joint" and self.slow_steps != 1:
            raise ValueError(
                f"fast_rule joint takes one step on both losses: slow_steps must be 1; got {self.slow_steps}"
            )
        for name in ("clip_forget", "clip_remain"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0 or left out; got {value}")


def flat_view(p: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, `[numel]`, without a copy."""
    assert sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True)) == p.numel() - 1, "not dense"
    return p.as_strided((p.numel(),), (1,), p.storage_offset())


def like(p: Tensor, x: Tensor) -> Tensor:
    """`x` in the memory layout of `p`; itself where it has that layout already."""
    if x.stride() == p.stride():
        return x
    return torch.empty_like(p, dtype=x.dtype).copy_(x)


class FastStep:
    """Steps the kept weights down the gradient in `.grad`, with a rule of its own.

    Memory, in weights kept: 4 bytes of index, and 8 of state under `adam`; 8 more while it steps.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        mask: Mask | None,
        rule: FastRule,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        if rule not in ("sgd", "normalized", "adam"):
            raise ValueError(f"FastStep has rules sgd, normalized and adam; got {rule!r}")
        self.rule = rule
        self.targets: list[tuple[nn.Parameter, Tensor | None]] = []
        for name, p in params.items():
            index = None
            if mask is not None:
                keep = keep_of(mask, name, p)
                if not bool(keep.all()):
                    index = flat_view(like(p, keep)).nonzero().flatten().to(torch.int32)
                    if index.numel() == 0:
                        continue
            self.targets.append((p, index))
        self.shadows: list[Tensor] = []
        self.adam: torch.optim.Adam | None = None
        if rule == "adam":
            for p, _ in self.targets:
                self.shadows.append(torch.zeros(0, dtype=p.dtype, device=p.device, requires_grad=True))
            self.adam = torch.optim.Adam(self.shadows, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change the kept weights by the rule at `rate`; their gradients are used up (set to `None`)."""
        grads: list[Tensor | None] = []
        for p, index in self.targets:
            g = p.grad
            if g is not None:
                flat = flat_view(like(p, g))
                g = flat if index is None else flat.index_select(0, index)
                p.grad = None
            grads.append(g)
        if self.adam is not None:
            for shadow, g in zip(self.shadows, grads, strict=True):
                if g is not None:  # a shadow is a weight at 0, whose step is then the change
                    shadow.data = torch.zeros_like(g)
                    shadow.grad = g
            self.adam.param_groups[0]["lr"] = rate
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
            for (p, index), shadow, g in zip(self.targets, self.shadows, grads, strict=True):
                if g is not None:
                    _add(p, index, shadow, 1.0)
                    shadow.data = shadow.new_zeros(0)
            return
        scale = 1.0
        if self.rule == "normalized":
            used = [g for g in grads if g is not None]
            norm = float(torch.nn.utils.get_total_norm(used)) if used else 0.0
            scale = math.sqrt(sum(g.numel() for g in used)) / norm if norm > 0 else 0.0
        for (p, index), g in zip(self.targets, grads, strict=True):
            if g is not None:
                _add(p, index, g, -rate * scale)

    def state_dict(self) -> dict[str, Any]:
        """The rule's moments; empty for rules without any."""
        return {} if self.adam is None else dict(self.adam.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if self.adam is not None:
            self.adam.load_state_dict(state)


def _add(p: Tensor, index: Tensor | None, change: Tensor, alpha: float) -> None:
    flat = flat_view(p)
    if index is None:
        flat.add_(change, alpha=alpha)
    else:
        flat.index_add_(0, index, change, alpha=alpha)


def keep_of(mask: Mask, name: str, p: Tensor) -> Tensor:
    """The mask of one parameter, on its device.

    Raises:
        KeyError: for a parameter the mask does not know.
        ValueError: for a mask of another shape.
    """
    keep = mask[name]
    if keep.shape != p.shape:
        raise ValueError(f"the mask of {name!r} has shape {list(keep.shape)}, the weight {list(p.shape)}")
    return keep.to(p.device)


@torch.no_grad()
def mask_gradients(params: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor]) -> None:
    """Zero the gradient of every masked weight (the `shared` and `joint` rules)."""
    for name, p in params.items():
        if p.grad is not None:
            p.grad.mul_(keep[name])


@torch.no_grad()
def outer_step(anchor: list[Tensor], params: list[nn.Parameter], rate: float) -> None:
    """`φ ← φ + α (θ - φ)`, then `θ ← φ`, in place."""
    for phi, theta in zip(anchor, params, strict=True):
        phi.lerp_(theta, rate)
        theta.copy_(phi)
