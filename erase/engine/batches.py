"""Samples in batches: endless and shuffled for the loop, once and in order for Fisher diagonals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from erase.engine.backend import seeded


class Samples(Protocol):
    """Data in memory, of which any samples can be asked for."""

    def __len__(self) -> int:
        """N."""

    def gather(self, index: Tensor) -> dict[str, Any]:
        """The batch of samples `index`, `[B]`."""


@dataclass(frozen=True)
class Together:
    """Forget and remain data as one set. `relabel` `[B]` says which samples of a batch are forget data."""

    forget: Samples
    remain: Samples

    def __len__(self) -> int:
        """Samples of both."""
        return len(self.forget) + len(self.remain)

    def gather(self, index: Tensor) -> dict[str, Any]:
        """The batch of samples `index`, `[B]`, of which the first are the forget data's; in this order."""
        relabel = index < len(self.forget)
        of_forget, of_remain = index[relabel], index[~relabel] - len(self.forget)
        if len(of_remain) == 0:
            batch = self.forget.gather(of_forget)
        elif len(of_forget) == 0:
            batch = self.remain.gather(of_remain)
        else:
            place = torch.cat([relabel.nonzero(), (~relabel).nonzero()]).flatten().argsort()
            parts = self.forget.gather(of_forget), self.remain.gather(of_remain)
            batch = {name: torch.cat([x, parts[1][name]])[place] for name, x in parts[0].items()}
        return {**batch, "relabel": relabel}


@dataclass(frozen=True)
class Batches:
    """Endless shuffled batches of `batch_size`; epoch e's order depends on `seed` and e alone."""

    data: Samples
    batch_size: int
    seed: int
    whole: bool = False
    """Whether epochs end on their own, with a smaller batch where the set does not divide; else they run on into each
    other, and all batches are full."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches of the set."""
        if self.batch_size < 1 or len(self.data) == 0:
            raise ValueError(f"needs batch_size ≥ 1 and data; got {self.batch_size} and {len(self.data)} samples")
        waiting = torch.zeros(0, dtype=torch.long)
        epoch = 0
        while True:
            while len(waiting) < (1 if self.whole else self.batch_size):
                order = torch.randperm(len(self.data), generator=seeded("cpu", self.seed, epoch))
                waiting = torch.cat([waiting, order])
                epoch += 1
            yield self.data.gather(waiting[: self.batch_size])
            waiting = waiting[self.batch_size :]

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch that ends on its own."""
        return -(-len(self.data) // self.batch_size)


def once(data: Samples, batch_size: int) -> list[dict[str, Any]]:
    """Every sample once, in order; the last batch may be smaller."""
    return _parts(data, torch.arange(len(data)), batch_size)


def some(data: Samples, count: int, batch_size: int, seed: int, *, shuffled: bool = False) -> list[dict[str, Any]]:
    """`count` samples (at most N), drawn without replacement, once, in batches: for Fisher diagonals.

    They come in the data's order, or shuffled: where batches count, not samples, classes should be mixed in them.
    """
    index = torch.randperm(len(data), generator=seeded("cpu", seed))[:count]
    return _parts(data, index if shuffled else index.sort().values, batch_size)


def _parts(data: Samples, index: Tensor, batch_size: int) -> list[dict[str, Any]]:
    return [data.gather(index[start : start + batch_size]) for start in range(0, len(index), batch_size)]
