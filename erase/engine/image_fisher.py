"""The diagonal that Selective Amnesia's authors call Fisher: gradients summed over timesteps, then squared.

    F_j = mean_i (Σ_t ∂ℓ_i,t/∂θ_j)²         i images, t every timestep once, each with noise of its own

The definition (`erase.engine.fisher`) squares the gradient of each timestep. Source: the DDPM script published with
arXiv 2305.10120, whose ℓ is a sum over channels and pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from erase.engine.backend import Backend, LossFn, batch_size, device_of, map_batch, trainable
from erase.engine.fisher import Autocast, Fisher, add_gradient, average, evaluating
from erase.engine.losses import plain


@runtime_checkable
class Timed(Protocol):
    """A backend whose times can be chosen."""

    @property
    def num_times(self) -> int:
        """T, how many timesteps there are."""

    def draw_at(self, batch: Any, t: Tensor, generator: torch.Generator) -> Any:
        """The batch with everything random added to it, at timesteps `t` `[B]`."""


def image_diagonal(
    backend: Backend[Any],
    batches: Iterable[Any],
    *,
    draws: int = 1,
    generator: torch.Generator,
    loss: LossFn = plain,
    chunk: int = 50,
    autocast: Autocast = nullcontext,
    scale: float = 1.0,
    share: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Fisher:
    """Mean over images and draws of `(Σ_t g_t)²`, float32, in eval mode; other arguments as `fisher_diagonal`.

    Processes take the images in turn. Nothing is kept of it before it is done: a run that is resumed begins it again.

    Args:
        backend: the model; only trainable parameters get entries.
        batches: each of B images.
        draws: how often all timesteps are gone through, with new noise.
        generator: all randomness.
        loss: `(backend, batch, generator) -> [B]`.
        chunk: timesteps in one pass; the result is the same to rounding, but for the noise that is drawn.
        autocast: makes the precision context of passes; sums are float64.
        scale: losses are multiplied by it before the backward pass and gradients divided after (fp16).
        share: this process's number, and how many there are.
        total: sums a tensor over processes.
        progress: called with the images done.

    Raises:
        ValueError: for no batches, draws or chunk < 1, a backend without timesteps, or gradients that are not finite.
    """
    if draws < 1 or chunk < 1:
        raise ValueError(f"draws and chunk must be at least 1; got {draws} and {chunk}")
    if not isinstance(backend, Timed):
        raise ValueError(f"per=image is over timesteps, and {type(backend).__name__} has none: use per=sample")
    params = trainable(backend.net)
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    times, (rank, world), count = torch.arange(backend.num_times, device=device_of(backend.net)), share, 0
    with evaluating(backend.net):
        for batch in batches:
            for number in range(batch_size(batch)):
                for _ in range(draws):
                    count += 1
                    parts = torch.split(times, chunk)
                    drawn = [backend.draw_at(_repeated(batch, number, len(t)), t, generator) for t in parts]
                    if count % world != rank:
                        continue
                    whole = {name: torch.zeros_like(x) for name, x in sums.items()}
                    for part in drawn:
                        with autocast():
                            losses = loss(backend, part, generator)
                        add_gradient(whole, params, losses, scale)
                    for name, g in whole.items():
                        sums[name].addcmul_(g, g)
                if progress is not None:
                    progress(1)
    if count == 0:
        raise ValueError("image_diagonal got no batches")
    if total is not None:
        for value in sums.values():
            value.copy_(total(value))
    average(sums, count)
    return Fisher(named={name: value.float() for name, value in sums.items()}, per="image", count=count)


def _repeated(batch: Any, number: int, times: int) -> Any:
    """One sample of a batch, several times."""
    return map_batch(lambda x: x[number : number + 1].expand(times, *x.shape[1:]), batch)
