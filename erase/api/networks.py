"""Any network with a loss for each sample forgets batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erase.api.history import past
from erase.api.learning import Learned, no_launch_left, take_steps
from erase.api.result import About, Result, base_name, finish
from erase.api.settings import Call, choose
from erase.config import arguments
from erase.engine.backend import Backend, batch_size, device_of
from erase.engine.borrow import borrow
from erase.engine.losses import ASCENT, DESCENT
from erase.programs.inputs import resolve_inputs
from erase.programs.progress import listening

Losses = Callable[[nn.Module, Any], Any]
"""`(network, batch) -> [B]`"""


@dataclass(frozen=True)
class Own:
    """A network and the user's loss, as a backend."""

    net: nn.Module
    loss: Losses

    def losses(self, batch: Any, generator: torch.Generator) -> Tensor:
        """`[B]`.

        Raises:
            ValueError: for anything else.
        """
        found = self.loss(self.net, batch)
        if not isinstance(found, Tensor) or found.ndim != 1:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"losses must return one loss for each sample, a tensor [B]; got {shape}")
        return found


def forget_batches(
    model: Any,
    batches: Iterable[Any] | None,
    call: Call,
    *,
    remain: Iterable[Any] | None = None,
    losses: Losses | None = None,
) -> Result:
    """Arguments as those of `erase.forget`; what learns are the parameters with `requires_grad`."""
    began = time.perf_counter()
    backend: Backend[Any] = model
    if isinstance(model, nn.Module):
        if losses is None:
            raise TypeError(
                f"a {type(model).__name__} needs losses=…, a function (network, batch) -> [B] with one loss for each "
                "sample"
            )
        backend = Own(model, losses)
    net = backend.net
    sides = _checked(batches, "what to forget"), _checked(remain, "remain")
    chosen = choose(call, "network", ASKED, (), device_of(net))
    config, before = chosen.config, past(net)
    with listening(call.progress), no_launch_left(), borrow(net) as loan:
        loan.keep()
        shown = [list(_first(side, config.saliency.count)) for side in sides]
        given = resolve_inputs(chosen.entry, config, backend, ASCENT, DESCENT, shown, chosen.precision)
        method = chosen.entry.build(**arguments(config.method, chosen.entry), **given)
        learned = Learned(given.get("mask"), take_steps(chosen, backend, method, *sides, call.progress))
    about = About(chosen, base_name(net, before), {})
    return finish(Result(net, learned, time.perf_counter() - began, net, about, before, loan.base), call)


ASKED: dict[str, Any] = {
    "pipeline": "classify",
    "model": "a network in memory",
    "data": {"source": "in memory"},
    "forget": {"fraction": None, "labels": [], "ids": [], "split": None},
    "architecture": None,
}
"""Of the settings of classifiers, what has no meaning here."""


def _checked(batches: Iterable[Any] | None, name: str) -> Iterable[Any]:
    """Batches that can be gone over again.

    Raises:
        TypeError: for an iterator, or nothing.
    """
    if batches is None or isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be batches that can be read again, such as a list or DataLoader; got {type(batches).__name__}"
        )
    return batches


def _first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """As many batches as hold `count` samples."""
    for batch in batches:
        if count <= 0:
            return
        count -= batch_size(batch)
        yield batch
