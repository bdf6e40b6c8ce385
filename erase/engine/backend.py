"""The one seam between a method and a model.

A method asks a model for two things only: its network, and one loss per sample. Anything that offers
these two, a diffusion UNet, a classifier, a user's own ten lines, can be unlearned by every method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from erase.engine.sharding import compute_device

Batch = TypeVar("Batch", contravariant=True)


class Backend(Protocol[Batch]):
    """A model with per-sample losses."""

    @property
    def net(self) -> nn.Module:
        """The network; its parameters with `requires_grad` are the trainable ones."""

    def losses(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """One loss per sample, `[B]`, differentiable in the parameters of `net`.

        All randomness comes from `generator`.
        """


@runtime_checkable
class Drawing(Protocol):
    """A backend whose randomness can be drawn first, apart from the loss.

    After `draw`, `losses` uses the generator no more: it is a plain function of parameters and batch.
    The engine needs that to share one draw between two losses, between the shards of a global batch,
    and to take the gradients of a batch's samples at once. A backend without it still works, one sample at a time.
    """

    def draw(self, batch: Any, generator: torch.Generator) -> Any:
        """The batch with everything random added to it (timesteps, noise), first dimension `B`."""


@runtime_checkable
class Binned(Protocol):
    """A backend whose loss depends on a known nuisance more than on the sample: a diffusion timestep."""

    num_bins: int

    def bins(self, batch: Any) -> Tensor:
        """The bin of every sample of a drawn batch, `[B]` long, in `[0, num_bins)`."""


@runtime_checkable
class Comparing(Protocol):
    """A backend that can hold what its network says against what another one of the same kind says (a teacher)."""

    def distances(self, batch: Any, teacher: nn.Module, generator: torch.Generator) -> Tensor:
        """`[B]`, 0 where both say the same; differentiable in the parameters of `net` alone."""


@runtime_checkable
class ComparingAtOnce(Protocol):
    """One whose own losses and distances to a teacher come of one pass of the network."""

    def losses_and_distances(self, batch: Any, teacher: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`([B], [B])`, as `losses` and `distances` have them."""


LossFn = Callable[[Any, Any, torch.Generator], Tensor]
"""`(backend, batch, generator) -> [B]`."""


def trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with `requires_grad`, by name.

    Raises:
        ValueError: if there is none.
    """
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(f"{type(net).__name__} has no parameter with requires_grad: nothing can be unlearned")
    return params


def device_of(net: nn.Module) -> torch.device:
    """Where the network computes: the device of its first parameter."""
    return compute_device(next(net.parameters()))


def seeded(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator whose stream depends on every integer of `key` (seed, step, phase, …) and on nothing else.

    Counter-based: a run resumed at step t draws what an uninterrupted run draws there, with no state to save.
    """
    # The length and two words an integer: SeedSequence pads with zeros, and (1,) would equal (1, 0).
    words = [len(key), *(w & 0xFFFFFFFF for k in key for w in (k, k >> 32))]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state) & 0x7FFFFFFFFFFFFFFF)


@contextmanager
def drawn_from(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """New networks and dropout draw from torch's global generators: seed them, and put them back afterwards.

    Args:
        seed: of the CPU's generator, and of those of accelerators.
        device: whose generator is put back besides the CPU's.
    """
    other = None if device is None or device.type == "cpu" else device
    with torch.random.fork_rng(devices=[other] if other else [], device_type=other.type if other else "cuda"):
        torch.manual_seed(seed)  # noqa: TID251
        yield


def map_batch(fn: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """`fn` on every tensor of a batch: a tensor, or a tuple, list or mapping of batches; the rest as it is."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, Mapping):
        return {k: map_batch(fn, v) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [map_batch(fn, v) for v in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # _fields: a namedtuple
    return batch


def batch_tensors(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in a fixed order."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_batch(keep, batch)
    return found


def batch_size(batch: Any) -> int:
    """B, the common first dimension of a batch's tensors.

    Raises:
        ValueError: without tensors, or if their first dimensions differ.
    """
    sizes = {x.shape[0] if x.ndim else -1 for x in batch_tensors(batch)}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(f"a batch needs tensors with one common first dimension; got first dimensions {sorted(sizes)}")
    return sizes.pop()
