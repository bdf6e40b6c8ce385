"""The slow optimizer, and the loop with progress, metrics and run state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from erase.config import Train, TrainClassifier, dump
from erase.engine import distributed
from erase.engine.backend import Backend
from erase.engine.loop import Probe, unlearn
from erase.engine.method import Method
from erase.engine.state import Checkpoint
from erase.programs.progress import advance, bar, held
from erase.programs.tracking import JsonlTracker, OtherTracker, step_seconds


def make_optimizer(train: Train | TrainClassifier, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The slow optimizer."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(params, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    if train.optimizer == "adam8bit":
        import bitsandbytes

        small: torch.optim.Optimizer = bitsandbytes.optim.Adam8bit(params, lr=train.lr, weight_decay=train.weight_decay)
        return small
    kind = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(params, lr=train.lr, weight_decay=train.weight_decay, fused=True)


def check_adam8bit(device: torch.device) -> None:
    """One step of eight-bit Adam on a tensor of the device: old versions of bitsandbytes have none for a CPU.

    Raises:
        ValueError: where it fails.
    """
    weight = torch.nn.Parameter(torch.ones(4096, device=device))  # fewer elements are kept in 32 bits
    weight.grad = torch.ones_like(weight)
    try:
        make_optimizer(Train(steps=1, optimizer="adam8bit"), [weight]).step()
    except Exception as error:  # what it raises is the library's affair, and differs from version to version
        raise ValueError(
            f"train.optimizer=adam8bit: bitsandbytes {version('bitsandbytes')} does not run on {device.type} "
            f"({error}): update it, or use adam"
        ) from error


@dataclass(frozen=True)
class Steps:
    """How long the loop took, for reports; the steps of a resumed run before the interruption count as the others."""

    steps: int
    step_s: float | None

    @property
    def timing(self) -> dict[str, float | int | None]:
        """`erase_s`, `steps`, `step_s`."""
        total = None if self.step_s is None else self.step_s * self.steps
        return {"erase_s": total, "steps": self.steps, "step_s": self.step_s}


def run_steps(
    config: Any,
    backend: Backend[Any],
    method: Method,
    forget: Iterable[Any] | None,
    remain: Iterable[Any] | None,
    accelerator: Accelerator,
    out: Path,
    resume: bool,
    desc: str = "unlearning",
    until: Callable[[int], Probe | None] | None = None,
) -> Steps:
    """The loop with a progress bar, `metrics.jsonl`, and run state in `state.safetensors`.

    `config` has `train`, `seed` and `checkpoint_every`; `until` may end it early. SIGTERM and SIGINT save first.
    """
    seconds: list[float] = []
    with held() as stop, bar(config.train.steps, desc) as shown, ExitStack() as stack:
        tracker: JsonlTracker | None = None
        other: OtherTracker | None = None
        if config.tracker != "jsonl" and distributed.rank() == 0:
            other = OtherTracker(config.tracker, out / config.tracker, dump(config))
            stack.callback(other.close)

        def log(row: dict[str, Any]) -> None:
            nonlocal tracker
            if tracker is None:  # rows of steps that a resumed run does again are dropped
                tracker = JsonlTracker(out / "metrics.jsonl", keep=row["step"])
            tracker(row)
            if other is not None:
                other(row)
            seconds.append(row["seconds"])
            advance(shown, row["step"] + 1)

        result = unlearn(
            backend,
            method,
            forget,
            remain,
            steps=config.train.steps,
            optimizer=lambda params: make_optimizer(config.train, params),
            seed=config.seed,
            accelerator=accelerator,
            log=log if distributed.rank() == 0 else None,
            checkpoint=Checkpoint(out / "state.safetensors", config.checkpoint_every, resume),
            stop=stop,
            until=until,
            micro_batch=config.train.micro_batch,
        )
    if not seconds and distributed.rank() == 0:  # the last step was done before the run was interrupted
        seconds = step_seconds(out / "metrics.jsonl")
    return Steps(result.steps, sum(seconds) / len(seconds) if seconds else None)
