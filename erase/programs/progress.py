"""Progress bars of the first process, and signals held back until a good moment."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from erase.engine import distributed

Listener = Callable[[dict[str, Any]], object]
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@dataclass
class Rows:
    """Stands in the place of a progress bar and calls back: `phase`, `done`, `total`."""

    total: int
    desc: str
    tell: Listener
    n: int = 0

    def update(self, n: int) -> None:
        """Move on by `n`."""
        self.n += n
        self.tell({"phase": self.desc, "done": self.n, "total": self.total})

    def __enter__(self) -> Rows:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Have a function called with a row in the place of progress bars; None leaves the bars."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def bar(total: int, desc: str) -> Any:
    """A progress bar, of the first process alone; or what `listening` says."""
    listener = _LISTENER.get()
    if listener is not None:
        return Rows(total, desc, listener)
    return tqdm(total=total, desc=desc, disable=distributed.rank() > 0)


def advance(shown: Any, done: int) -> None:
    """Move a progress bar to a total."""
    shown.update(done - shown.n)


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Hold SIGTERM and SIGINT back: the callable says whether one came.

    It takes effect at the end; a second one, at once.
    """
    came: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hold(number: int, _: Any) -> None:
        if came:
            restore()
            signal.raise_signal(number)
        came.append(number)

    before = {number: signal.signal(number, hold) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        restore()
        if came:
            signal.raise_signal(came[0])
