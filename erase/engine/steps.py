"""One step after another: what the update rules step with (`erase.engine.updates.Run`), and when a phase is skipped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from erase.engine.fast_step import FastStep, mask_gradients, outer_step
from erase.engine.method import Method
from erase.engine.phases import Phases
from erase.engine.sharding import clip_factor, local, total_norm
from erase.engine.state import Checkpoint, there
from erase.engine.trained import Trained
from erase.engine.updates import SIDES, NonFiniteError, Side
from erase.engine.weighting import Schedule, schedule_scale


class Skips:
    """Phases that were skipped because a loss or gradient was not finite; too many in a row end the run."""

    def __init__(self, most: int, checkpoint: Checkpoint | None) -> None:
        self.most, self.checkpoint = most, checkpoint
        self.counts: dict[Side, int] = dict.fromkeys(SIDES, 0)
        self.in_a_row: dict[Side, int] = dict.fromkeys(SIDES, 0)

    def record(self, side: Side, t: int, skipped: bool) -> None:
        """Count a phase of step t.

        Raises:
            NonFiniteError: when `most` phases of this side in a row were skipped.
        """
        if not skipped:
            self.in_a_row[side] = 0
            return
        self.counts[side] += 1
        self.in_a_row[side] += 1
        if self.in_a_row[side] >= self.most:
            saved = "nothing was saved"
            if self.checkpoint is not None and there(self.checkpoint.path):
                saved = f"the last good state is {self.checkpoint.path}"
            raise NonFiniteError(
                f"{self.in_a_row[side]} {side} phases in a row had a loss or gradient that was not finite "
                f"(step {t}): lower fast_rate or the learning rate, or use precision=bf16 or no; {saved}"
            )


class Steps:
    """Takes the steps of a method. It is the `Run` that the update rule steps with."""

    def __init__(self, method: Method, trained: Trained, phases: Phases, steps: int, skips: Skips) -> None:
        self.update, self.trained, self.phases, self.steps, self.skips = method.update, trained, phases, steps, skips
        self.net, self.params, self.slow = trained.net, trained.named, trained.slow
        self.remains = method.remain is not None
        self.t = 0
        self.row: dict[str, Any] = {}
        self.finite = True
        """Every loss since the last change of the weights."""
        self.skipped = False
        """Whether a phase of the last step was."""
        self.before: list[Tensor] | None = None
        """The network's running statistics when the phase began."""

    def take(self, t: int) -> dict[str, Any]:
        """Take step t; its row for the log."""
        began = time.perf_counter()
        self.t, self.row, self.skipped = t, {}, False
        self.update.step(self, t)
        self.trained.follow(t)
        if self.phases.precision.name == "fp16":
            self.row["loss_scale"] = self.phases.precision.scale
        self.row["seconds"] = time.perf_counter() - began
        return self.row

    # ------------------------------------------------------------ what rules step with

    @property
    def fast(self) -> FastStep:
        """The fast step with a rule of its own."""
        assert self.trained.fast is not None
        return self.trained.fast

    def fading(self, schedule: Schedule) -> float:
        """s(t) of this step."""
        return schedule_scale(schedule, self.t, self.steps)

    def set_learning_rate(self, schedule: Schedule) -> None:
        """Set the learning rate of the slow optimizer to s(t) times what it began with."""
        self.trained.set_learning_rate(self.fading(schedule))

    def gradients(self, side: Side, k: int = 0, factor: float = 1.0) -> None:
        """Add the gradients of the objective on the next batch, times `factor`, to `.grad`."""
        if self.before is None:
            self.before = [buffer.clone() for buffer in self.trained.statistics]
        numbers = self.phases.gradients(side, self.t, k, factor)
        self.finite &= numbers[f"{side}_loss"] is not None
        self.row |= numbers

    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights."""
        if self.trained.keep is not None:
            mask_gradients(self.params, self.trained.keep)

    def step_within_mask(self) -> None:
        """A step of the slow optimizer that leaves masked weights as they are, whatever its weight decay."""
        self.slow.step()
        self.trained.restore_masked()

    def masked(self, name: str, new: Tensor) -> Tensor:
        """The new values of one weight where it is kept, and its present ones where it is masked."""
        keep = self.trained.keep
        return new if keep is None else torch.where(keep[name], new, self.params[name])

    def finish(self, side: Side, step: Callable[[], Any], clip: float | None) -> None:
        """End a phase: average over processes, unscale, check, clip, step, clear.

        A phase with a loss or gradient that is not finite changes no weight and no running statistics.

        Raises:
            ValueError: if no trainable weight has a gradient.
            NonFiniteError: after too many skipped phases in a row.
        """
        params = self.trained.params
        self.phases.processes.average_gradients(params)
        self.phases.precision.unscale(params)
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            raise ValueError("no trainable weight takes part in the loss: check train.parameters")
        norm = total_norm(grads)
        value = float(norm)
        finite = math.isfinite(value)
        self.row[f"{side}_norm"] = value if finite else None
        skipped = not (finite and self.finite)
        if skipped:
            self.skipped = True
            for buffer, before in zip(self.trained.statistics, self.before or [], strict=True):
                buffer.copy_(before)
        else:
            if clip is not None:
                torch._foreach_mul_([local(g) for g in grads], clip_factor(norm, clip))
            step()
        self.skips.record(side, self.t, skipped)
        self.finite, self.before = True, None
        for p in params:
            p.grad = None

    def outer_step(self, rate: float) -> None:
        """`φ ← φ + α (θ - φ)`, then `θ ← φ`; nothing at α = 1."""
        if self.trained.anchor is not None:
            outer_step(self.trained.anchor, self.trained.params, rate)
