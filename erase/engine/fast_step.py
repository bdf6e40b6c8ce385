"""The fast step: a rule of its own that changes the kept weights, and only those.

Masking a gradient is not enough where one optimizer serves both phases: its momentum, moments and weight decay move
masked weights too. Here the fast step computes the *change* of the kept weights and adds it to them alone, so that
every masked weight stays bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from erase.engine.saliency import Mask
from erase.engine.sharding import Piece, before, cut, is_sharded, local, rows, summed

FastRule = Literal["sgd", "normalized", "adam"]
"""The rules that a fast step may have of its own.

- `sgd`: `θ ← θ - β_t m ⊙ g`, the paper's.
- `normalized`: the same along `g / rms(m ⊙ g)`, so that β is the RMS change of a kept weight.
- `adam`: Adam with moments of its own, held for kept weights only; β is its learning rate.
"""


def flat_view(p: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, `[numel]`, without a copy."""
    assert sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True)) == p.numel() - 1, "not dense"
    return p.as_strided((p.numel(),), (1,), p.storage_offset())


def like(p: Tensor, x: Tensor) -> Tensor:
    """`x` in the memory layout of `p`; `x` itself where it has that layout already."""
    if x.stride() == p.stride():
        return x
    return torch.empty_like(p, dtype=x.dtype).copy_(x)


def mask_of(mask: Mask, name: str, p: Tensor) -> Tensor:
    """The mask of one parameter, of the rows that this process holds, on the parameter's device; all of a free one.

    Raises:
        KeyError: for a parameter that the mask does not know.
        ValueError: for a mask of another shape.
    """
    if mask.frees(name):
        return torch.ones_like(local(p), dtype=torch.bool)
    keep = mask[name]
    if keep.shape != p.shape:
        raise ValueError(f"the mask of {name!r} has shape {list(keep.shape)}, the weight {list(p.shape)}")
    return cut(keep, p).to(p.device)


class FastStep:
    """Steps the kept weights down the gradient in `.grad`, by a rule of its own.

    Memory per kept weight: 4 bytes of index, and 8 bytes of state under `adam`; 8 more while it steps.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        mask: Mask | None,
        rule: FastRule,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        if rule not in get_args(FastRule):
            raise ValueError(f"unknown fast_rule {rule!r}; allowed: {', '.join(get_args(FastRule))}")
        self.rule = rule
        self.targets: list[tuple[nn.Parameter, Tensor | None]] = []
        for name, p in params.items():
            index = None
            if mask is not None:
                keep = mask_of(mask, name, p)
                if not bool(keep.all()):
                    index = flat_view(like(local(p), keep)).nonzero().flatten().to(torch.int32)
                    if index.numel() == 0 and not bool(mask[name].any()):  # another process may hold what is kept
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
                flat = flat_view(like(local(p), local(g)))
                g = flat if index is None else flat.index_select(0, index)
                p.grad = None
            grads.append(g)
        if self.adam is not None:
            self._adam_step(self.adam, grads, rate)
            return
        scale = 1.0
        if self.rule == "normalized":
            used = [g for g in grads if g is not None]
            norm = float(torch.nn.utils.get_total_norm(used)) if used else 0.0
            count = sum(g.numel() for g in used)
            if self.targets and is_sharded(self.targets[0][0]):
                both = summed(torch.tensor([norm**2, count], dtype=torch.float64), self.targets[0][0])
                norm, count = math.sqrt(float(both[0])), int(both[1])
            scale = math.sqrt(count) / norm if norm > 0 else 0.0
        for (p, index), g in zip(self.targets, grads, strict=True):
            if g is not None:
                _add(local(p), index, g, -rate * scale)

    def _adam_step(self, adam: torch.optim.Adam, grads: list[Tensor | None], rate: float) -> None:
        for shadow, g in zip(self.shadows, grads, strict=True):
            if g is not None:  # a shadow is a weight at 0, so that its step is the change
                shadow.data = torch.zeros_like(g)
                shadow.grad = g
        adam.param_groups[0]["lr"] = rate
        adam.step()
        adam.zero_grad(set_to_none=True)
        for (p, index), shadow, g in zip(self.targets, self.shadows, grads, strict=True):
            if g is not None:
                _add(local(p), index, shadow, 1.0)
                shadow.data = shadow.new_zeros(0)

    def state_dict(self) -> dict[str, Any]:
        """The moments of the rule, in the order of kept weights; empty for rules without moments."""
        if self.adam is None:
            return {}
        found = dict(self.adam.state_dict())
        if self.targets and is_sharded(self.targets[0][0]):
            found["state"] = {
                i: {key: self._piece(i, value) if value.ndim else value for key, value in moments.items()}
                for i, moments in found["state"].items()
            }
        return found

    def _piece(self, i: int, moment: Tensor) -> Piece:
        start, count = before(len(moment), self.targets[i][0])
        return Piece(moment, start, count)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, by as many processes as saved it or others."""
        if self.adam is None:
            return
        moments = {}
        for i, saved in state["state"].items():
            p, index = self.targets[i]
            mine = local(p).numel() if index is None else index.numel()
            start, _ = before(mine, p)
            moments[i] = {
                key: value if key == "step" else rows(value, start, start + mine) for key, value in saved.items()
            }
        self.adam.load_state_dict({**state, "state": moments})


def _add(p: Tensor, index: Tensor | None, change: Tensor, alpha: float) -> None:
    flat = flat_view(p)
    if index is None:
        flat.add_(change, alpha=alpha)
    else:
        flat.index_add_(0, index, change, alpha=alpha)


@torch.no_grad()
def mask_gradients(params: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor]) -> None:
    """Zero the gradient of every masked weight."""
    for name, p in params.items():
        if p.grad is not None:
            local(p.grad).mul_(keep[name])


@torch.no_grad()
def outer_step(anchor: list[Tensor], params: list[nn.Parameter], rate: float) -> None:
    """`φ ← φ + α (θ - φ)`, then `θ ← φ`, in place."""
    for phi, theta in zip(anchor, params, strict=True):
        phi.lerp_(local(theta), rate)
        local(theta).copy_(phi)
