"""The one loop, for every method and every backend.

In each step the method's update rule (`erase.engine.updates`) applies the gradients of phases (`erase.engine.phases`)
to the trained weights (`erase.engine.trained`). Around the steps the loop logs, saves, resumes and stops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from erase.engine.backend import Backend, device_of
from erase.engine.distributed import processes_of
from erase.engine.method import Method
from erase.engine.phases import Phases
from erase.engine.precision import Precision
from erase.engine.sharding import asked, is_sharded
from erase.engine.state import Checkpoint, load_run, save_run, there
from erase.engine.steps import Skips, Steps
from erase.engine.trained import MakeOptimizer, Trained
from erase.engine.updates import ClosedForm, NonFiniteError

__all__ = ["Checkpoint", "NonFiniteError", "Probe", "Result", "StoppedError", "check_launch", "unlearn"]

Log = Callable[[dict[str, Any]], None]


class StoppedError(RuntimeError):
    """The run was asked to stop, and did so after a step; where there is a checkpoint its state is saved."""


@dataclass(frozen=True)
class Probe:
    """What was measured of the model between two steps, for early stopping."""

    numbers: Mapping[str, float | None]
    """For the row of the step in the log."""
    enough: bool = False
    """Whether the run may end here."""


@dataclass(frozen=True)
class Result:
    """What a run did. `seconds` is the loop alone, without saliency, evaluation, probes or saving."""

    steps: int
    seconds: float
    skipped_fast: int
    skipped_slow: int


def unlearn(
    backend: Backend[Any],
    method: Method,
    forget: Iterable[Any] | None,
    remain: Iterable[Any] | None,
    *,
    steps: int,
    optimizer: MakeOptimizer,
    seed: int,
    accelerator: Accelerator | None = None,
    precision: str | None = None,
    log: Log | None = None,
    checkpoint: Checkpoint | None = None,
    stop: Callable[[], bool] | None = None,
    until: Callable[[int], Probe | None] | None = None,
    micro_batch: int | None = None,
    max_skips: int = 10,
) -> Result:
    """Run a method on a model, in place.

    Batches are global: every process is given the same weights and batches, and takes its share. An iterable that ends
    is started again. All randomness derives from `seed`, the step and the phase. The network stays in its mode.

    Args:
        backend: the model.
        method: what to do.
        forget: batches of forget data; not needed by a method without a forget objective.
        remain: batches of remain data, likewise.
        steps: T; one step is a fast step and its slow steps.
        optimizer: makes the slow optimizer from the trainable parameters.
        seed: of timesteps, noise and dropout.
        accelerator: processes and precision; by default those of the launch, and no mixed precision.
        precision: of forward passes; by default the accelerator's.
        log: called once a step with a row of plain numbers.
        checkpoint: where to save run state, and whether to resume from it, bit-identically.
        stop: asked after each step whether to save and end here; one process that says yes is enough.
        until: called after each step with the number of steps done, to probe the model as it is (not the running mean
            of its weights) and to change nothing. A probe that is enough ends the run as finished; all processes must
            get the same answer. Schedules run over `steps` all the same.
        micro_batch: the most samples that a process takes through the network at once; the gradient is that of the
            whole batch. Where samples are weighted, a pass without gradients finds the weights first.
        max_skips: how many phases in a row may be skipped because a loss or gradient is not finite; the last gives up.

    Raises:
        ValueError: for settings, data or launches that do not go together.
        KeyError: for a trainable parameter that the mask does not know.
        NonFiniteError: after `max_skips` skipped phases in a row.
        StoppedError: when `stop` said yes.
    """
    for name, value in (("steps", steps), ("micro_batch", micro_batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    device = device_of(backend.net)
    # An Accelerator of our own would fix the precision of every later one in this process.
    launched = accelerator or PartialState(cpu=device.type == "cpu")
    check_launch(launched)
    check_sharding(backend.net, method, launched)
    name = precision or ("no" if accelerator is None else str(accelerator.mixed_precision))
    trained = Trained(backend.net, method, optimizer)
    data: Any = {"forget": forget, "remain": remain}
    phases = Phases(backend, method, data, seed, processes_of(launched), Precision(name, device), micro_batch)
    run = _Loop(Steps(method, trained, phases, steps, Skips(max_skips, checkpoint)), log, checkpoint, stop, until)
    settings = f"{method.update}, {method.weights}, average={method.average}"
    return run.run({"method": method.name, "settings": settings, "seed": seed, "steps": steps})


def check_launch(launched: Accelerator | PartialState) -> None:
    """Refuse launches that the loop cannot work in.

    Raises:
        ValueError: for FSDP1, DeepSpeed and Megatron, and for gradient accumulation.
    """
    asked(launched)
    if isinstance(launched, Accelerator) and launched.gradient_accumulation_steps != 1:
        raise ValueError(
            "gradient_accumulation_steps must be 1: with two phases in each step, the forget phase would never "
            "update the weights"
        )


def check_sharding(net: nn.Module, method: Method, launched: Accelerator | PartialState) -> None:
    """Refuse what does not go with weights that are spread over processes, or should be.

    Raises:
        ValueError: for FSDP without `erase.engine.sharding.shard`, and for closed forms.
    """
    if is_sharded(net):
        if isinstance(method.update, ClosedForm):
            raise ValueError(f"method {method.name} needs whole weights: launch without --use_fsdp")
    elif launched.num_processes > 1 and asked(launched) is not None:
        raise ValueError("FSDP2 was asked for, and the weights are whole: call erase.engine.sharding.shard(net) first")


@dataclass
class _Loop:
    """The steps, and what happens between two of them."""

    steps: Steps
    log: Log | None
    checkpoint: Checkpoint | None
    stop: Callable[[], bool] | None
    until: Callable[[int], Probe | None] | None
    done: int = 0

    def run(self, run: Mapping[str, Any]) -> Result:
        """Take the steps that are left; `run` is what makes the run what it is."""
        self._resume(run)
        skips, total = self.steps.skips, self.steps.steps
        began, probing = time.perf_counter(), 0.0
        for t in range(self.done, total):
            row = self.steps.take(t)
            self.done = t + 1
            row |= {"skipped_fast": skips.counts["forget"], "skipped_slow": skips.counts["remain"]}
            since = time.perf_counter()
            probe = None if self.until is None else self.until(self.done)
            if probe is not None:
                row |= {**probe.numbers, "look_seconds": time.perf_counter() - since}
                probing += row["look_seconds"]
            if self.log is not None:
                self.log({"step": t, **row})
            if probe is not None and probe.enough:
                break  # nothing is saved: a run that is killed now comes here again, from an earlier state
            stopping = self.stop is not None and self.steps.phases.processes.any(self.stop())
            self._save(run, stopping)
            if stopping:
                raise StoppedError(f"stopped after {self.done} of {total} steps")
        self.steps.trained.end()
        seconds = time.perf_counter() - began - probing
        return Result(self.done, seconds, skips.counts["forget"], skips.counts["remain"])

    def _save(self, run: Mapping[str, Any], stopping: bool) -> None:
        """Save the state when it is due; after a step with a skipped phase the last one stays, unless the run stops."""
        if self.checkpoint is None or not (stopping or self.done % self.checkpoint.every == 0):
            return
        steps = self.steps
        writes = steps.phases.processes.rank == 0 or is_sharded(steps.net)
        if writes and (stopping or not steps.skipped):
            state = {"done": self.done, "skips": steps.skips.counts, "in_a_row": steps.skips.in_a_row}
            state |= {"trained": steps.trained.state_dict(), "phases": steps.phases.state_dict()}
            save_run(self.checkpoint.path, run, state)

    def _resume(self, run: Mapping[str, Any]) -> None:
        """Go on from a state that was saved, if there is one.

        Raises:
            ValueError: for a state of another run, or one that not all processes see.
        """
        if self.checkpoint is None or not self.checkpoint.resume:
            return
        path, processes = self.checkpoint.path, self.steps.phases.processes
        seen = float(processes.total(torch.tensor(float(there(path)))))
        if seen not in (0, processes.world):
            raise ValueError(f"not all processes see {path}: use a folder that all of them share")
        if not seen:
            return
        state = load_run(path, run)
        try:
            self.steps.trained.load_state_dict(state["trained"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.done = int(state["done"])
        self.steps.skips.counts = {side: int(count) for side, count in state["skips"].items()}
        self.steps.skips.in_a_row |= {side: int(count) for side, count in state.get("in_a_row", {}).items()}
        self.steps.phases.load_state_dict(state["phases"], self.steps.update.phases(self.done))
