"""Progress bars of the first process, and signals held back until a good moment."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from erase.engine import distributed


def bar(total: int, desc: str) -> Any:
    """A progress bar; of the first process alone."""
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
