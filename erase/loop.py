"""Another name of `erase.engine.loop`."""

from erase.engine.loop import unlearn

__all__ = ["unlearn"]
