"""The steps, on a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState

from erase.api.settings import Chosen
from erase.config import arguments
from erase.diffusion.lora.adapter import Pairs
from erase.engine.backend import Backend
from erase.engine.loop import unlearn
from erase.engine.method import Method
from erase.engine.saliency import Mask
from erase.programs.progress import Listener, advance, bar
from erase.programs.run import Lesson, epoch_of, make_batches, resolve
from erase.programs.training import make_optimizer


@dataclass
class Learned:
    """What the steps leave, besides weights."""

    mask: Mask | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """A row for each step."""
    pairs: Pairs = field(default_factory=dict)
    """Of `train.form=lora`: B and A by the name of the weight to which their product was added."""


def learn(chosen: Chosen, lesson: Lesson, progress: Listener | None) -> Learned:
    """Mask and steps on data in memory."""
    config, entry = chosen.config, chosen.entry
    sides = make_batches(config, chosen.method, lesson)
    given = resolve(config, entry, chosen.precision, lesson, epoch_of(sides), None)
    method = lesson.before_steps(entry.build(**arguments(config.method, entry), **given))
    return Learned(given.get("mask"), take_steps(chosen, lesson.backend, method, *sides, progress))


def take_steps(
    chosen: Chosen,
    backend: Backend[Any],
    method: Method,
    forget: Iterable[Any] | None,
    remain: Iterable[Any] | None,
    progress: Listener | None,
) -> list[dict[str, Any]]:
    """The loop; the rows of its steps. Each is also told to `progress`, which else is a bar."""
    train, rows = chosen.config.train, list[dict[str, Any]]()
    with bar(train.steps, "unlearning") as shown:

        def log(row: dict[str, Any]) -> None:
            rows.append(row)
            if progress is None:
                advance(shown, row["step"] + 1)
            else:
                progress({"phase": "unlearning", "done": row["step"] + 1, "total": train.steps, **row})

        unlearn(
            backend,
            method,
            forget,
            remain,
            steps=train.steps,
            optimizer=lambda params: make_optimizer(train, params),
            seed=chosen.config.seed,
            precision=chosen.precision.name,
            log=log,
            micro_batch=train.micro_batch,
        )
    return rows


@contextmanager
def no_launch_left() -> Iterator[None]:
    """Forget accelerate's state of processes afterwards, if there was none: it would bind later code to this device."""
    there = bool(PartialState._shared_state)
    try:
        yield
    finally:
        if not there:
            PartialState._reset_state()
