"""What the processes of one launch do together: accelerate's own state says which process this is.

All processes take the same decisions: the main one looks at the disk and sends the others what it found. Only the main
process writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn

from erase.engine.sharding import is_sharded

T = TypeVar("T")
R = TypeVar("R")


def rank() -> int:
    """The number of this process; 0 is the main one, which writes and prints."""
    return int(PartialState().process_index)


def world() -> int:
    """The number of processes."""
    return int(PartialState().num_processes)


def total(x: Tensor) -> Tensor:
    """Sum over processes, on the device of `x`."""
    return processes_of(PartialState()).total(x)


def on_main(make: Callable[[], T]) -> T:
    """What the main process makes, sent to all; the others wait for it."""
    if world() == 1:
        return make()
    found = [make() if rank() == 0 else None]
    broadcast_object_list(found)
    made: T = found[0]  # type: ignore[assignment]
    return made


def spread(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` on every item, each done by one process; all processes get all results, in order."""
    mine = [work(item) for item in items[rank() :: world()]]
    if world() == 1:
        return mine
    hands = gather_object([mine])
    return [hands[i % world()][i // world()] for i in range(len(items))]


def shares(items: Sequence[T]) -> list[Sequence[T]]:
    """The items in as many runs as there are processes, for `spread`."""
    size = -(-len(items) // world())
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True)
class Processes:
    """The processes of a launch, as the loop needs them."""

    rank: int
    world: int
    device: torch.device

    def total(self, x: Tensor) -> Tensor:
        """Sum over processes, on the device of `x`."""
        if self.world == 1:
            return x
        summed = reduce(x.to(self.device), reduction="sum")
        assert isinstance(summed, Tensor)
        return summed.to(x.device)

    def largest(self, x: Tensor) -> float:
        """The largest element over processes."""
        each = x.new_zeros(self.world)
        each[self.rank] = x.detach().max()
        return float(self.total(each).max())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.total(torch.tensor(float(flag))) > 0)

    def average_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over processes; of weights that are spread over them it is that already."""
        if self.world > 1:
            for p in params:
                if p.grad is not None and not is_sharded(p):
                    p.grad.copy_(self.total(p.grad) / self.world)


def processes_of(launched: Accelerator | PartialState) -> Processes:
    """The processes of a launch."""
    return Processes(int(launched.process_index), int(launched.num_processes), launched.device)
