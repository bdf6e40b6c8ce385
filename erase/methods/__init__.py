"""The methods: one file each, with a docstring that names the paper, a builder, and its entry in the registry.

A builder returns a `Method`. Its keyword arguments are the settings that users write (`method.*`), except for those
that the entry lists as needs: a program computes them. Every builder works without its needs too, so that settings can
be checked before anything is computed.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from erase.engine.method import Method
from erase.engine.updates import SIDES, Side
from erase.nearest import meant

NEEDS = {
    "forget": "a forget objective",
    "remain": "a remain objective",
    "mask": "a saliency mask",
    "fisher": "the Fisher diagonal of the remain data",
    "origin": "a copy of the weights that the run starts from",
    "origin_net": "a copy of the network that the run starts from",
    "new_net": "a network with new weights",
    "concepts": "text embeddings",
    "denoiser": "a diffusion model",
    "epoch": "the numbers of batches in an epoch",
}
"""What a program can give a builder, each under the keyword argument of that name."""


@dataclass(frozen=True)
class Entry:
    """What programs know of a method before they build it."""

    build: Callable[..., Method]
    needs: tuple[str, ...] = ()
    """Keyword arguments of the builder that a program computes; see `NEEDS`."""
    data: tuple[Side, ...] = ()
    """The kinds of data that it trains on."""
    fresh: bool = False
    """Whether it trains new weights instead of the model's: training and retraining."""

    def __post_init__(self) -> None:
        """Check the entry.

        Raises:
            ValueError: for needs that nobody can give or the builder does not take, and unknown kinds of data.
        """
        for need in self.needs:
            if need not in NEEDS:
                raise ValueError(f"method {self.name} needs {need!r}, which is not known; known: {', '.join(NEEDS)}")
            if need not in inspect.signature(self.build).parameters:
                raise ValueError(f"method {self.name} needs {need!r}, which its builder does not take")
        for side in self.data:
            if side not in SIDES:
                raise ValueError(f"method {self.name} trains on unknown data {side!r}; allowed: {', '.join(SIDES)}")

    @property
    def name(self) -> str:
        """The method's name: that of its builder and its file."""
        return self.build.__name__

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """The settings that users write, by name; annotations are types."""
        parameters = inspect.signature(self.build, eval_str=True).parameters
        return {name: parameter for name, parameter in parameters.items() if name not in self.needs}

    @property
    def closed(self) -> bool:
        """Whether its result is computed from text embeddings, in closed form, and nothing is trained."""
        return "concepts" in self.needs

    def reads(self, side: Side, masked: bool) -> bool:
        """Whether a run reads data of this kind: to train on them, for its mask, or for a Fisher diagonal."""
        return side in self.data or (masked and "mask" in self.needs) or (side == "remain" and "fisher" in self.needs)


def list_methods() -> list[str]:
    """Names of the methods, which are the names of the files here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_method(name: str) -> Entry:
    """The entry of a method.

    Raises:
        ValueError: for an unknown name.
    """
    known = list_methods()
    if name not in known:
        raise ValueError(f"no method {name!r}{meant(name, known, 'methods', 'erase ls methods lists all')}")
    found: Any = importlib.import_module(f"erase.methods.{name}").METHOD
    entry: Entry = found
    return entry


def builder(name: str) -> Callable[..., Method]:
    """The builder of a method: the function that its file is named after.

    Raises:
        ValueError: for an unknown name.
    """
    return find_method(name).build
