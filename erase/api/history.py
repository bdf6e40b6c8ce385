"""What was forgotten by networks in memory, for as long as they live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

from torch import nn

from erase.programs.saving import Source


@dataclass(frozen=True)
class Past:
    """What is known of a network's weights."""

    forgotten: tuple[str, ...] = ()
    """Marks of prompts or names of classes: they do not come back when something else is forgotten."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Provenance, if they were erased before."""
    source: Source | None = None
    """Where they come from, if `erase.load` opened them and nothing was forgotten since."""
    name: str | None = None
    """Of the base, as cards have it."""
    result: ReferenceType[Any] | None = None
    """Of the last call."""


_PAST: WeakKeyDictionary[nn.Module, Past] = WeakKeyDictionary()


def past(net: nn.Module) -> Past:
    """What is known of a network."""
    return _PAST.get(net, Past())


def remember(net: nn.Module, what: Past) -> None:
    """Know something else from now on."""
    _PAST[net] = what
