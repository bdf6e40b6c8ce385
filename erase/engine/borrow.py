"""A network that belongs to somebody else, for the time of a run: what the run does to it besides learning is undone.

Weights that learn may become float32 meanwhile; in the end they have their own dtype again. After an error, or where
the user interrupts, the weights too are as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erase.engine.backend import trainable


@dataclass
class Values:
    """A network's weights that learn, and its buffers, as they were at one time: on the CPU, in their own dtypes."""

    net: nn.Module
    held: dict[str, Tensor]
    others: dict[str, Tensor]
    """The first values of each weight that does not learn, by which it is known."""

    def misfit(self) -> str | None:
        """Why they cannot be put back into the network as it is now, and what to do; `None` if they can."""
        there = named(self.net)
        for name, kept in self.held.items():
            if name not in there:
                return f"the model has lost {name} since: remove what was put into it, such as adapters"
            if (now := there[name].dtype) != kept.dtype:
                return f"the model was converted to {now} since ({name} was {kept.dtype}): load it again"
        for name, kept in self.others.items():
            if name not in there or not torch.equal(beginning(there[name]), kept):
                return f"{name}, which did not learn, has changed since, as by a conversion: load the model again"
        return None

    def check(self) -> None:
        """Refuse a network that is another than it was.

        Raises:
            ValueError: after a conversion to another dtype, even if it was converted back, or if layers are gone.
        """
        if said := self.misfit():
            raise ValueError(said)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange them with those of the network, in place; twice is none.

        Raises:
            ValueError: as `check`.
        """
        self.check()
        for name, there in named(self.net).items():
            if name in self.held:
                present = there.detach().to("cpu", copy=True)
                there.copy_(self.held[name])
                self.held[name] = present

    @contextmanager
    def back(self) -> Iterator[None]:
        """Have the network as it was, for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


@dataclass
class Loan:
    """A borrowed network; see `borrow`."""

    net: nn.Module
    dtypes: dict[str, torch.dtype]
    """Of its parameters, before they learn."""
    base: Values | None = None
    """What `keep` kept."""

    def keep(self) -> None:
        """Keep what is about to change, now that it is known what learns."""
        chosen = {*trainable(self.net), *dict(self.net.named_buffers())}
        parts = {name: x for name, x in named(self.net).items() if name in chosen}
        held = {name: x.detach().to("cpu", self.dtypes.get(name, x.dtype), copy=True) for name, x in parts.items()}
        others = {name: beginning(x) for name, x in named(self.net).items() if name not in chosen}
        self.base = Values(self.net, held, others)

    def settle(self) -> None:
        """Give weights their own dtypes again.

        Raises:
            ValueError: for values that are not finite there.
        """
        kept = {} if self.base is None else self.base.held
        changed = {n: p for n, p in self.net.named_parameters() if n in kept}
        for name, p in changed.items():
            if not bool(p.detach().to(self.dtypes[name]).isfinite().all()):
                kind = str(self.dtypes[name]).removeprefix("torch.")
                raise ValueError(f"{name} has values that are not finite in {kind}: lower method.fast_rate or train.lr")
        for name, p in changed.items():
            p.data = p.data.to(self.dtypes[name])

    def restore(self) -> None:
        """Undo all that was learned."""
        for name, p in self.net.named_parameters():
            p.data = p.data.to(self.dtypes[name])
        if self.base is not None:
            self.base.swap()


@contextmanager
def borrow(net: nn.Module, others: Sequence[nn.Module] = ()) -> Iterator[Loan]:
    """A network for the time of a run, without gradients; call `Loan.keep` once it is known what learns.

    Args:
        net: the network that learns.
        others: networks that are used beside it.
    """
    needed = {p: p.requires_grad for p in net.parameters()}
    gradients = {p: p.grad for p in net.parameters()}
    loan = Loan(net, {name: p.dtype for name, p in net.named_parameters()})
    for p in net.parameters():
        p.grad = None
    try:
        with modes_kept((net, *others)):
            yield loan
        loan.settle()
    except BaseException:
        loan.restore()
        raise
    finally:
        for p, need in needed.items():
            p.requires_grad_(need)
        for p, gradient in gradients.items():
            p.grad = gradient


@contextmanager
def modes_kept(nets: Sequence[nn.Module]) -> Iterator[None]:
    """Put training and eval modes back in the end, module by module."""
    modes = {module: module.training for net in nets for module in net.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def beginning(x: Tensor) -> Tensor:
    """The first values of a tensor, `[≤ 8]`, on the CPU."""
    return x.detach().flatten()[:8].to("cpu", copy=True)


def named(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by name."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}
