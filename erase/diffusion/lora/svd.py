"""The change of one layer as a product of two thin matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOSSLESS = 5e-6
"""What a change may lose, by Frobenius norms, and be kept whole: float32's rounding of weights that it is added to."""


@dataclass(frozen=True)
class Ranks:
    """How the rank of a layer is chosen."""

    rank: int | None = None
    """The same for all layers, where their change has so much."""
    energy: float = 0.99
    """Without `rank`: the least rank whose singular values hold this share of the sum of all squares; with 1, all."""

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for a rank or a share out of range.
        """
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank (--rank) must be at least 1; got {self.rank}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy (--energy) must be above 0 and at most 1; got {self.energy}")


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


def factor(change: Tensor, ranks: Ranks, rounding: float = 0.0) -> Factors:
    """Factors of a change by its singular values in float32.

    The last directions count as none as long as they are `LOSSLESS` of the change together, or less than what the
    weights were rounded by: a change of rank r has factors of rank r. A bound on each singular value would not do, for
    those of a closed form fall evenly over many orders of magnitude. Each factor has the square root of the singular
    values: both are then far from the limits of 16 bits.

    Args:
        change: `[O, I]`, or of a convolution `[O, I, H, W]`; not all zeros.
        ranks: how the rank is chosen.
        rounding: Frobenius norm of what in the change is rounding (`rounded`).
    """
    flat = change.detach().float().flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    held = s.double().square()
    least = max(LOSSLESS * math.sqrt(float(held.sum())), rounding)
    known = max(1, int((held.flip(0).cumsum(0).flip(0).sqrt() > least).sum()))
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


def rounded(stored: Tensor) -> float:
    """Frobenius norm of what weights at most lost when they were rounded to the dtype in which they are stored."""
    return torch.finfo(stored.dtype).eps / 2 * float(stored.double().norm())


def product(up: Tensor, down: Tensor) -> Tensor:
    """`up · down` in float32, shaped as the layer's weight: `[O, I]` or `[O, I, H, W]`."""
    flat = up.float().flatten(1) @ down.float().flatten(1)
    return flat.reshape(len(flat), *down.shape[1:])
