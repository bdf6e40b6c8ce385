"""One file a method: a docstring that names the paper, and a builder that returns a `Method`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from erase.engine.method import Method


def list_methods() -> list[str]:
    """Names of the methods, which are the names of the files here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def builder(name: str) -> Callable[..., Method]:
    """The builder of a method: the function that its file is named after.

    Raises:
        ValueError: for a name that is no method.
    """
    known = list_methods()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        raise ValueError(
            f"no method {name!r}{f', did you mean {close[0]}?' if close else ''}; methods: {', '.join(known)}"
        )
    found: Any = getattr(importlib.import_module(f"erase.methods.{name}"), name)
    make: Callable[..., Method] = found
    return make
