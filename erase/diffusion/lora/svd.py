"""The change of one layer as a product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """How the rank of a layer is chosen."""

    rank: int | None = None
    """The same for all layers, where their change has so much."""
    energy: float = 0.99
    """Without `rank`: the least rank whose singular values hold this share of the sum of all squares."""

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for a rank or a share out of range.
        """
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"--rank must be at least 1; got {self.rank}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"--energy must be above 0 and at most 1; got {self.energy}")


@dataclass(frozen=True)
class Factors:
    """`up · down`, the best approximation of a change at its rank (Eckart and Young)."""

    up: Tensor
    """`[O, R]`, or of a convolution `[O, R, 1, 1]`; float32."""
    down: Tensor
    """`[R, I]`, or of a convolution `[R, I, H, W]`; float32."""
    lost: float
    """Sum of squares of what the product lacks."""

    @property
    def rank(self) -> int:
        """R."""
        return len(self.down)


def factor(change: Tensor, ranks: Ranks) -> Factors:
    """Factors of a change by its singular values in float32.

    Directions below float32's rounding of the largest count as none, so that a change of rank r has factors of rank r.
    Each factor has the square root of the singular values: both are then far from the limits of 16 bits.

    Args:
        change: `[O, I]`, or of a convolution `[O, I, H, W]`; not all zeros.
        ranks: how the rank is chosen.
    """
    flat = change.detach().float().flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    held = s.double().square()
    known = int((s > s[0] * max(flat.shape) * torch.finfo(torch.float32).eps).sum())
    if ranks.rank is not None:
        rank = min(ranks.rank, known)
    else:
        reached = held.cumsum(0) >= ranks.energy * held.sum()
        rank = min(int(reached.int().argmax()) + 1 if reached.any() else known, known)
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    lost = float(held[rank:].sum())
    if change.ndim == 4:
        return Factors(up[:, :, None, None].contiguous(), down.reshape(rank, *change.shape[1:]).contiguous(), lost)
    return Factors(up.contiguous(), down.contiguous(), lost)


def product(up: Tensor, down: Tensor) -> Tensor:
    """`up · down` in float32, shaped as the layer's weight: `[O, I]` or `[O, I, H, W]`."""
    flat = up.float().flatten(1) @ down.float().flatten(1)
    return flat.reshape(len(flat), *down.shape[1:])
