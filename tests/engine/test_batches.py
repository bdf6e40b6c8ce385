import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from erase.engine.batches import Batches, Together, once, some


@dataclass
class Numbers:
    """Sample i is i."""

    count: int

    def __len__(self) -> int:
        return self.count

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        return {"x": torch.arange(self.count)[index]}


def order(batches: Iterable[Any], count: int) -> list[list[int]]:
    return [batch["x"].tolist() for batch in islice(batches, count)]


@pytest.mark.parametrize(("n", "size"), [(6, 2), (5, 2), (5, 5), (2, 5), (1, 3)])
def test_batches_are_endless_even_and_of_the_seed(n: int, size: int) -> None:
    batches = Batches(Numbers(n), size, seed=4)
    seen = order(batches, 3 * n)  # 3 · size epochs
    assert all(len(batch) == size for batch in seen)
    assert seen == order(batches, 3 * n)
    flat = functools.reduce(operator.iadd, seen, [])
    epochs = [flat[i : i + n] for i in range(0, len(flat), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)  # epochs run on into each other
    if n > 2:
        assert len({tuple(epoch) for epoch in epochs}) > 1
        assert order(Batches(Numbers(n), size, seed=5), 3 * n) != seen


def test_once_is_every_sample_in_order() -> None:
    assert order(once(Numbers(5), 2), 9) == [[0, 1], [2, 3], [4]]
    assert once(Numbers(0), 2) == []


def test_some_are_of_the_seed() -> None:
    chosen = [order(some(Numbers(20), 8, 3, seed), 9) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert [len(batch) for batch in chosen[0]] == [3, 3, 2]
    flat = functools.reduce(operator.iadd, chosen[0], [])
    assert flat == sorted(set(flat))
    assert order(some(Numbers(3), 8, 4, 0), 9) == [[0, 1, 2]]
    mixed = functools.reduce(operator.iadd, order(some(Numbers(20), 8, 3, 0, shuffled=True), 9), [])
    assert mixed != flat
    assert sorted(mixed) == flat  # the same samples


def test_bad_batches() -> None:
    for data, size in ((Numbers(0), 2), (Numbers(3), 0)):
        with pytest.raises(ValueError, match=f"needs batch_size ≥ 1 and data; got {size} and {len(data)} samples"):
            next(iter(Batches(data, size, 0)))


@pytest.mark.parametrize(("n", "size"), [(6, 2), (5, 2), (2, 5)])
def test_whole_epochs_end_with_a_smaller_batch(n: int, size: int) -> None:
    batches = Batches(Numbers(n), size, 4, whole=True)
    seen = order(batches, 2 * batches.per_epoch)
    for epoch in (seen[: batches.per_epoch], seen[batches.per_epoch :]):
        assert [len(batch) for batch in epoch] == [size] * (n // size) + [n % size] * (n % size > 0)
        assert sorted(functools.reduce(operator.iadd, epoch, [])) == list(range(n))


@pytest.mark.parametrize("index", [[0, 1], [4, 2], [3, 0, 4, 1, 2], [2]])
def test_two_sets_are_one(index: list[int]) -> None:
    """The first samples are the forget data's, and are said to be; batches keep the order that is asked for."""
    both = Together(Numbers(2), Numbers(3))
    batch = both.gather(torch.tensor(index))
    assert len(both) == 5
    assert batch["x"].tolist() == [i if i < 2 else i - 2 for i in index]
    assert batch["relabel"].tolist() == [i < 2 for i in index]
