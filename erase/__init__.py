"""Erase concepts from diffusion models.

`load`, `forget`, `count` and `grid` are the Python interface (`erase.api`). Importing the package costs nothing: no
torch before one of them is used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erase.api import Result as Result
    from erase.api import count as count
    from erase.api import forget as forget
    from erase.api import grid as grid
    from erase.api import load as load

__version__ = version("erase")
_PUBLIC = ("Result", "count", "forget", "grid", "load")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module("erase.api"), name)
    raise AttributeError(f"module 'erase' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
