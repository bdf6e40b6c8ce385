"""The fast step: a rule of its own that changes the kept weights, and only those.

Masking a gradient is not enough where one optimizer serves both phases: its momentum, moments and weight decay move
masked weights too. Here the fast step computes the *change* of the kept weights and adds it to them alone, so that
every masked weight stays bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    if p.is_contiguous():
        return p.view(-1)
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


_Target = tuple[nn.Parameter, Tensor | None]
"""A weight, and which of its elements are kept, in memory order: indices `[kept]`, or `None` for all."""


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
        self.targets: list[_Target] = []
        for name, p in params.items():
            index = None
            if mask is not None:
                keep = mask_of(mask, name, p)
                if not bool(keep.all()):
                    index = flat_view(like(local(p), keep)).nonzero().flatten().to(torch.int32)
                    if index.numel() == 0 and not bool(mask[name].any()):  # another process may hold what is kept
                        continue
            self.targets.append((p, index))
        self.together: list[_Together] = []
        self.adam: torch.optim.Adam | None = None
        if rule == "adam":
            self.together = _together(self.targets)
            self.adam = torch.optim.Adam([each.shadow for each in self.together], betas=betas, fused=True)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change the kept weights by the rule at `rate`; their gradients are used up (set to `None`)."""
        if self.adam is not None:
            self._adam_step(self.adam, rate)
            return
        grads = [_taken(p, index) for p, index in self.targets]
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

    def _adam_step(self, adam: torch.optim.Adam, rate: float) -> None:
        for each in self.together:
            each.gather(self.targets)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        adam.zero_grad(set_to_none=True)
        for each in self.together:
            each.scatter(self.targets)

    def state_dict(self) -> dict[str, Any]:
        """The moments of the rule, by target, in the order of kept weights; empty for rules without moments."""
        if self.adam is None:
            return {}
        state = {}
        for i, (each, at) in self._places():
            if moments := self.adam.state.get(each.shadow):
                state[i] = {k: self._piece(i, v[at]) if v.ndim else v for k, v in moments.items()}
        return {"state": state}

    def _places(self) -> Iterator[tuple[int, tuple[_Together, slice]]]:
        """Where each target lies, in the order in which processes that share weights ask each other."""
        found = {i: (each, at) for each in self.together for i, at in each.places.items()}
        yield from sorted(found.items(), key=lambda item: item[0])

    def _piece(self, i: int, moment: Tensor) -> Tensor | Piece:
        p = self.targets[i][0]
        return Piece(moment, *before(len(moment), p)) if is_sharded(p) else moment

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, by as many processes as saved it or others."""
        if self.adam is None:
            return
        for i, (each, at) in self._places():
            if i not in state["state"]:
                continue
            moments = self.adam.state[each.shadow]
            start, _ = before(at.stop - at.start, self.targets[i][0])
            for key, value in state["state"][i].items():
                if key == "step":
                    moments[key] = value.to(each.shadow.device, copy=True)  # fused Adam counts where the weights are
                    continue
                if key not in moments:
                    moments[key] = each.shadow.new_zeros(each.size)
                moments[key][at] = rows(value, start, start + at.stop - at.start)


@dataclass
class _Together:
    """Kept weights that Adam steps as one tensor: a network has hundreds, most of them small.

    Those that are kept whole are stepped by themselves, so that their gradients need no copy.
    """

    places: dict[int, slice]
    """Where each target's kept weights lie."""
    shadow: Tensor
    """What Adam steps: the weights at 0, so that its step is the change; empty between steps."""

    @property
    def size(self) -> int:
        """How many weights there are."""
        return sum(at.stop - at.start for at in self.places.values())

    def gather(self, targets: list[_Target]) -> None:
        """Make the shadow and its gradient; that of weights without one is 0."""
        if len(self.places) == 1:
            [i] = self.places
            g = _taken(*targets[i])
        else:
            g = None
            for i, at in self.places.items():
                p, index = targets[i]
                if p.grad is None:
                    continue
                if g is None:
                    g = self.shadow.new_zeros(self.size)
                _taken(p, index, out=g[at])
        if g is not None:
            self.shadow.data = torch.zeros_like(g)
            self.shadow.grad = g

    def scatter(self, targets: list[_Target]) -> None:
        """Add the change to the weights."""
        if self.shadow.numel():
            for i, at in self.places.items():
                p, index = targets[i]
                _add(local(p), index, self.shadow[at], 1.0)
            self.shadow.data = self.shadow.new_zeros(0)


def _together(targets: list[_Target]) -> list[_Together]:
    groups: dict[Any, dict[int, slice]] = {}
    for i, (p, index) in enumerate(targets):
        places = groups.setdefault(i if index is None else (p.dtype, p.device), {})
        start = next(reversed(places.values())).stop if places else 0
        places[i] = slice(start, start + (local(p).numel() if index is None else index.numel()))
    found = []
    for places in groups.values():
        p = targets[next(iter(places))][0]
        found.append(_Together(places, torch.zeros(0, dtype=p.dtype, device=p.device, requires_grad=True)))
    return found


def _taken(p: nn.Parameter, index: Tensor | None, out: Tensor | None = None) -> Tensor | None:
    """The gradient of the kept weights, `[kept]`, which is used up."""
    g = p.grad
    if g is None:
        return None
    p.grad = None
    flat = flat_view(like(local(p), local(g)))
    return flat if index is None else torch.index_select(flat, 0, index, out=out)


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
