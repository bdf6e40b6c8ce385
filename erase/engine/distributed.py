"""What the processes of one launch do together: accelerate's own state says which one this is.

All take the same decisions: the first one looks at the disk and tells the others. Only it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


def rank() -> int:
    """This process's number; 0 is the one that writes and speaks."""
    return int(PartialState().process_index)


def world() -> int:
    """How many there are."""
    return int(PartialState().num_processes)


def total(x: Tensor) -> Tensor:
    """Sum over processes, on the device of `x`."""
    if world() == 1:
        return x
    summed = reduce(x.to(PartialState().device), reduction="sum")
    assert isinstance(summed, Tensor)
    return summed.to(x.device)


def first(make: Callable[[], T]) -> T:
    """What the first process makes, given to all; the others wait for it."""
    if world() == 1:
        return make()
    found = [make() if rank() == 0 else None]
    broadcast_object_list(found)
    made: T = found[0]  # type: ignore[assignment]
    return made


def dealt(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of every item, done by one process each; all get all results, in order."""
    mine = [work(item) for item in items[rank() :: world()]]
    if world() == 1:
        return mine
    hands = gather_object([mine])
    return [hands[i % world()][i // world()] for i in range(len(items))]


def shares(items: Sequence[T]) -> list[Sequence[T]]:
    """Runs of items for `dealt`, as many as there are processes."""
    size = -(-len(items) // world())
    return [items[start : start + size] for start in range(0, len(items), size)]
