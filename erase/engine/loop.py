"""The one loop, for every method and every backend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from erase.engine.backend import Backend, Binned, Drawing, batch_size, device_of, map_batch, seeded, trainable
from erase.engine.losses import Objective, weighted_mean
from erase.engine.method import Edit, Method
from erase.engine.precision import Precision
from erase.engine.state import Checkpoint, load_state, save_state
from erase.engine.updates import FastStep, keep_of, like, mask_gradients, outer_step
from erase.engine.weighting import BinNormalizer, adaptive_weights, schedule_scale

Log = Callable[[dict[str, Any]], None]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
FORGET, REMAIN = 0, 1
PHASES = ("forget", "remain")


class NonFiniteError(RuntimeError):
    """A phase had a loss or gradient that is not finite too many times in a row."""


class StoppedError(RuntimeError):
    """The run was asked to stop, and did after a step; where there is a checkpoint its state is saved."""


@dataclass(frozen=True)
class Look:
    """What was seen of the model between two steps."""

    numbers: Mapping[str, float | None]
    """For the step's row in the log."""
    enough: bool = False
    """Whether the run may end here."""


@dataclass(frozen=True)
class Result:
    """What a run did. `seconds` is the loop alone, without saliency, evaluation (looks, too) or saving."""

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
    log: Log | None = None,
    checkpoint: Checkpoint | None = None,
    stop: Callable[[], bool] | None = None,
    until: Callable[[int], Look | None] | None = None,
    micro_batch: int | None = None,
    max_skips: int = 10,
) -> Result:
    """Run a method on a model, in place.

    Batches are global: with several processes every process is given the same weights and batches and takes its
    share. An iterable that ends is started again. All randomness derives from `seed`, the step and the phase.
    The network stays in the mode (train or eval) it comes in.

    Args:
        backend: the model.
        method: what to do.
        forget: batches of forget data (not needed by a method without a forget objective).
        remain: batches of remain data.
        steps: T; one step is a fast step and its slow steps.
        optimizer: makes the slow optimizer from the trainable parameters.
        seed: of timesteps, noise and dropout.
        accelerator: processes and precision; by default those of the launch, and no mixed precision.
        log: called once a step with a row of plain numbers.
        checkpoint: save run state, and resume from it bit-identically.
        stop: asked after each step whether to save and end here; with several processes one that says so is enough.
        until: asked after each step, with the number of steps done, to look at the model as it is (not at a running
            mean of its weights) and to change nothing; a look that is enough ends the run as finished. All processes
            must be told the same. Schedules run over `steps` all the same.
        micro_batch: most samples that a process takes through the network at once; the gradient is the whole batch's.
            Where samples are weighted, a pass without gradients finds the weights first.
        max_skips: times in a row that a phase may have a loss or gradient that is not finite; the last gives up.

    Raises:
        ValueError: for steps or micro_batch < 1, missing data, batches that do not divide over processes, gradient
            accumulation, FSDP or DeepSpeed, weight decay where a mask holds in slow steps.
        KeyError: for a trainable parameter that the mask does not know.
        NonFiniteError: after a phase was skipped `max_skips` times in a row.
        StoppedError: `stop` said so.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1; got {micro_batch}")
    run = _Run(backend, method, forget, remain, steps, optimizer, seed, accelerator, log, checkpoint)
    run.stop, run.until, run.micro_batch, run.max_skips = stop, until, micro_batch, max_skips
    return run.run()


def check_launch(launched: Accelerator | PartialState) -> None:
    """Refuse what spreads one copy of the weights over processes.

    Raises:
        ValueError: for FSDP, DeepSpeed and Megatron.
    """
    kind = str(launched.distributed_type.value)
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"{kind} is not supported: masks need whole weights; use plain multi-process (DDP) launch")


class _Run:
    def __init__(
        self,
        backend: Backend[Any],
        method: Method,
        forget: Iterable[Any] | None,
        remain: Iterable[Any] | None,
        steps: int,
        optimizer: MakeOptimizer,
        seed: int,
        accelerator: Accelerator | None,
        log: Log | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.backend, self.method, self.steps, self.seed = backend, method, steps, seed
        self.log, self.checkpoint = log, checkpoint
        self.stop: Callable[[], bool] | None = None
        self.until: Callable[[int], Look | None] | None = None
        self.micro_batch: int | None = None
        self.max_skips = 10
        self.device = device_of(backend.net)
        # An Accelerator of our own would fix the precision of every later one in this process.
        self.processes = accelerator or PartialState(cpu=self.device.type == "cpu")
        check_launch(self.processes)
        if accelerator is not None and accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps must be 1: with two phases a step, forgetting would never step"
            )
        self.world, self.rank = self.processes.num_processes, self.processes.process_index
        self.precision = Precision("no" if accelerator is None else str(accelerator.mixed_precision), self.device)
        self.named = trainable(backend.net)
        self.params = list(self.named.values())
        self.slow = optimizer(self.params)
        if method.update.mask_slow and any(group.get("weight_decay") for group in self.slow.param_groups):
            raise ValueError(
                f"method {method.name!r} never moves masked weights, and weight decay would: set train.weight_decay=0"
            )
        self.base_rates = [float(g["lr"]) for g in self.slow.param_groups]
        update = method.update
        self.own_rule = method.forget is not None and update.fast_rule not in ("shared", "joint")
        self.fast = FastStep(self.named, method.mask, update.fast_rule) if self.own_rule else None
        self.keep: dict[str, Tensor] | None = None
        forgets = method.forget is not None or method.edit is not None
        if method.mask is not None and (update.mask_slow or (forgets and not self.own_rule)):
            self.keep = {name: keep_of(method.mask, name, p) for name, p in self.named.items()}
        self.normalizer: BinNormalizer | None = None
        if method.weights is not None and method.weights.per_bin and isinstance(backend, Binned):
            self.normalizer = BinNormalizer(backend.num_bins)
        self.batches = {
            FORGET: None if method.forget is None else _endless(forget, "forget"),
            REMAIN: None if method.remain is None else _endless(remain, "remain"),
        }
        self.anchor = [p.detach().clone() for p in self.params] if update.outer_rate < 1 else None
        self.average = [p.detach().clone() for p in self.params] if method.average else None
        self.skips = [0, 0]
        self.in_a_row = [0, 0]
        self.finite = True  # every loss since the last change of the weights
        self.done = 0

    # ------------------------------------------------------------ the run

    def run(self) -> Result:
        if self.checkpoint is not None and self.checkpoint.resume:
            there = float(self._total(torch.tensor(float(self.checkpoint.path.exists()))))
            if there not in (0, self.world):
                raise ValueError(f"not all processes see {self.checkpoint.path}: use a folder that all share")
            if there:
                self._load(self.checkpoint.path)
        began, looking = time.perf_counter(), 0.0
        for step in range(self.done, self.steps):
            row = self._step(step)
            self.done = step + 1
            row |= {"skipped_fast": self.skips[FORGET], "skipped_slow": self.skips[REMAIN]}
            since = time.perf_counter()
            seen = None if self.until is None else self.until(self.done)
            if seen is not None:
                row |= {**seen.numbers, "look_seconds": time.perf_counter() - since}
                looking += row["look_seconds"]
            if self.log is not None:
                self.log({"step": step, **row})
            if seen is not None and seen.enough:
                break  # nothing is saved: a run that is killed now comes here again, from an earlier state
            stopping = self._stopping()
            due = self.checkpoint is not None and (stopping or self.done % self.checkpoint.every == 0)
            if self.checkpoint is not None and due and not any(self.in_a_row):
                self._save(self.checkpoint.path)
            if stopping:
                raise StoppedError(f"stopped after {self.done} of {self.steps} steps")
        if self.average is not None:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.params), self.average)
        seconds = time.perf_counter() - began - looking
        return Result(self.done, seconds, self.skips[FORGET], self.skips[REMAIN])

    def _step(self, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        update, row = self.method.update, dict[str, Any]()
        fading = schedule_scale(update.schedule, step, self.steps)
        slow_fading = schedule_scale(update.slow_schedule, step, self.steps)
        for group, base in zip(self.slow.param_groups, self.base_rates, strict=True):
            group["lr"] = base * slow_fading
        if (self.method.forget is not None or self.method.edit is not None) and step % update.every == 0:
            rate = update.fast_rate * fading
            row["fast_rate"] = rate
            if self.method.edit is not None:
                self._edit_phase(rate, self.method.edit, row)
            elif self.method.forget is not None:
                self._forget_phase(step, rate, self.method.forget, row)
        if self.method.remain is not None:
            for k in range(update.slow_steps):
                self._remain_phase(step, k, self.method.remain, row)
        if self.anchor is not None:
            outer_step(self.anchor, self.params, update.outer_rate)
        if self.average is not None:
            self._follow(self.average, step)
        if self.precision.name == "fp16":
            row["loss_scale"] = self.precision.scale
        row["seconds"] = time.perf_counter() - began
        return row

    def _forget_phase(self, step: int, rate: float, objective: Objective, row: dict[str, Any]) -> None:
        update, fast = self.method.update, self.fast
        row["forget_loss"] = self._backward(step, FORGET, 0, objective, 1.0 if self.own_rule else rate, row)
        if self.keep is not None and not self.own_rule:
            mask_gradients(self.named, self.keep)
        if update.fast_rule == "joint" and self.method.remain is not None:
            return  # the remain phase adds its gradient and steps on both
        apply = self.slow.step if fast is None else lambda: fast.step(rate)
        self._finish(apply, update.clip_forget, FORGET, row)

    @torch.no_grad()
    def _edit_phase(self, rate: float, edit: Edit, row: dict[str, Any]) -> None:
        new = dict[str, Tensor]()
        for name, end in edit(self.backend.net).items():
            p = self.named[name]
            x = torch.lerp(p, end.to(p), rate)
            new[name] = x if self.keep is None else torch.where(self.keep[name], x, p)
        norm = float(torch.nn.utils.get_total_norm([x - self.named[name] for name, x in new.items()]))
        if not math.isfinite(norm):  # it would be so again
            raise NonFiniteError(f"the closed form of method {self.method.name!r} is not finite: regularise it more")
        row["edit_norm"] = norm
        for name, x in new.items():
            self.named[name].copy_(x)

    def _remain_phase(self, step: int, k: int, objective: Objective, row: dict[str, Any]) -> None:
        row["remain_loss"] = self._backward(step, REMAIN, k, objective, 1.0, row)
        if self.keep is not None and self.method.update.mask_slow:
            mask_gradients(self.named, self.keep)
        self._finish(self.slow.step, self.method.update.clip_remain, REMAIN, row)

    @torch.no_grad()
    def _follow(self, average: list[Tensor], step: int) -> None:
        """The running mean takes a step; early ones are larger, so that it forgets where it began."""
        decay = min(self.method.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, list[Tensor](self.params), 1 - decay)

    # ------------------------------------------------------------ a phase

    def _backward(
        self, step: int, phase: int, k: int, objective: Objective, factor: float, row: dict[str, Any]
    ) -> float | None:
        """Gradients of `sense · factor · mean_i(w_i ℓ_i)` into `.grad`; the mean loss, `None` if not finite."""
        batches = self.batches[phase]
        assert batches is not None
        batch = map_batch(lambda x: x.to(self.device, non_blocking=True), next(batches))
        size = batch_size(batch)
        if size % self.world:
            raise ValueError(f"a batch of {size} does not divide over {self.world} processes: use a multiple")
        drawing = isinstance(self.backend, Drawing)

        def anew() -> torch.Generator:
            return seeded(self.device, self.seed, step, phase, k, *(() if drawing else (self.rank,)))

        generator = anew()
        batch = self._share(self.backend.draw(batch, generator) if isinstance(self.backend, Drawing) else batch)
        mine = size // self.world
        most = self.micro_batch or mine
        spans = [slice(start, min(start + most, mine)) for start in range(0, mine, most)]
        parts = [batch] if len(spans) == 1 else [_rows(batch, at) for at in spans]
        weighted = phase == FORGET and self.method.weights is not None
        weights = None
        if weighted and len(parts) > 1:
            with torch.no_grad():
                found = torch.cat([self._losses(objective, part, generator) for part in parts])
            weights = self._weights(found, batch, objective)
            generator = anew()
        seen = []
        for at, part in zip(spans, parts, strict=True):
            losses = self._losses(objective, part, generator)
            if weighted and weights is None:
                weights = self._weights(losses, batch, objective)
            loss = weighted_mean(losses, None if weights is None else weights[at]) * ((at.stop - at.start) / mine)
            self.precision.backward(objective.sense * factor * loss)
            seen.append(losses.detach())
        if weights is not None:
            heaviest = self._largest(weights)
            row["weight_max"] = heaviest if math.isfinite(heaviest) else None
        losses = torch.cat(seen)
        mean = float(self._total(losses.detach().mean()) / self.world)
        self.finite &= math.isfinite(mean)
        return mean if math.isfinite(mean) else None

    def _losses(self, objective: Objective, batch: Any, generator: torch.Generator) -> Tensor:
        with self.precision.autocast():
            losses = objective.loss(self.backend, batch, generator)
        if losses.ndim != 1:
            raise ValueError(
                f"objective {objective.name!r} must give one loss per sample, [B]; got {list(losses.shape)}"
            )
        return losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses

    def _weights(self, losses: Tensor, batch: Any, objective: Objective) -> Tensor:
        assert self.method.weights is not None
        total = self._total if self.world > 1 else None
        relative = losses.detach()
        if self.normalizer is not None and isinstance(self.backend, Binned):
            bins = self.backend.bins(batch)
            self.normalizer.update(relative, bins, total)
            relative = self.normalizer(relative, bins)
        lambd = self.method.weights.lambd * -objective.sense
        return adaptive_weights(relative, lambd=lambd, floor=self.method.weights.floor, total=total)

    def _finish(self, apply: Callable[[], Any], clip: float | None, phase: int, row: dict[str, Any]) -> None:
        """Reduce, unscale, check, clip, step, clear; a phase that is not finite changes nothing."""
        if self.world > 1:
            for p in self.params:
                if p.grad is not None:
                    p.grad.copy_(self._total(p.grad) / self.world)
        self.precision.unscale(self.params)
        grads = [p.grad for p in self.params if p.grad is not None]
        if not grads:
            raise ValueError("no trainable weight takes part in the loss: check train.parameters")
        norm = torch.nn.utils.get_total_norm(grads)
        value = float(norm)
        row[f"{PHASES[phase]}_norm"] = value if math.isfinite(value) else None
        if self.finite and math.isfinite(value):
            if clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.params, clip, norm)
            apply()
            self.in_a_row[phase] = 0
        else:
            self.skips[phase] += 1
            self.in_a_row[phase] += 1
            if self.in_a_row[phase] >= self.max_skips:
                saved = self.checkpoint.path if self.checkpoint is not None and self.checkpoint.path.exists() else None
                raise NonFiniteError(
                    f"{self.in_a_row[phase]} {PHASES[phase]} phases in a row had a loss or gradient that is not finite "
                    f"(step {self.done}): lower fast_rate or the learning rate, or use precision=bf16 or no; "
                    + (f"the last good state is {saved}" if saved else "nothing was saved")
                )
        self.finite = True
        for p in self.params:
            p.grad = None

    def _share(self, batch: Any) -> Any:
        return batch if self.world == 1 else map_batch(lambda x: x[self.rank :: self.world], batch)

    def _total(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        if self.world == 1:
            return x
        summed = reduce(x.to(self.processes.device), reduction="sum")
        assert isinstance(summed, Tensor)
        return summed.to(x.device)

    def _largest(self, x: Tensor) -> float:
        """Over processes."""
        each = x.new_zeros(self.world)
        each[self.rank] = x.detach().max()
        return float(self._total(each).max())

    def _stopping(self) -> bool:
        if self.stop is None:
            return False
        return bool(self._total(torch.tensor(float(self.stop()))) > 0)

    # ------------------------------------------------------------ state

    def _settings(self) -> str:
        return f"{self.method.update}, {self.method.weights}, average={self.method.average}"

    def _buffers(self) -> dict[str, Tensor]:
        """What a network keeps besides weights: running statistics of batch normalisation."""
        kept = self.backend.net.state_dict()
        return {name: b for name, b in self.backend.net.named_buffers() if name in kept}

    def _save(self, path: Path) -> None:
        if self.rank == 0:
            save_state(
                path,
                {
                    "method": self.method.name,
                    "settings": self._settings(),
                    "seed": self.seed,
                    "steps": self.steps,
                    "done": self.done,
                    "skips": self.skips,
                    "params": {name: p.detach() for name, p in self.named.items()},
                    "buffers": self._buffers(),
                    "slow": self.slow.state_dict(),
                    "fast": self.fast.state_dict() if self.fast is not None else {},
                    "bins": self.normalizer.state_dict() if self.normalizer is not None else {},
                    "precision": self.precision.state_dict(),
                    "anchor": self.anchor or [],
                    "average": self.average or [],
                },
            )

    def _load(self, path: Path) -> None:
        state = load_state(path)
        run = {"method": self.method.name, "settings": self._settings(), "seed": self.seed, "steps": self.steps}
        for key, mine in run.items():
            if state[key] != mine:
                raise ValueError(
                    f"{path} was saved with {key} {state[key]!r}, this run has {mine!r}: resume the same run"
                )
        if state["params"].keys() != self.named.keys():
            raise ValueError(f"{path} holds other trainable parameters than this run: use the same train.parameters")
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(state["params"][name])
            for name, b in self._buffers().items():
                b.copy_(state["buffers"][name])
            for copies, saved in ((self.anchor, state["anchor"]), (self.average, state["average"])):
                for mine, theirs in zip(copies or [], saved, strict=True):
                    mine.copy_(theirs)
        self.slow.load_state_dict(state["slow"])
        for p in self.params:  # files hold row-major tensors; fused optimizers need the weight's own layout
            moments = self.slow.state.get(p, {})
            moments.update({k: like(p, v) for k, v in moments.items() if isinstance(v, Tensor) and v.shape == p.shape})
        if self.fast is not None:
            self.fast.load_state_dict(state["fast"])
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["bins"])
        self.precision.load_state_dict(state["precision"])
        self.skips, self.done = list(state["skips"]), int(state["done"])
        update = self.method.update
        forgets = sum(1 for step in range(self.done) if step % update.every == 0)
        for phase, count in ((FORGET, forgets), (REMAIN, self.done * update.slow_steps)):
            batches = self.batches[phase]
            if batches is not None:
                for _ in range(count):
                    next(batches)


def _rows(batch: Any, at: slice) -> Any:
    return map_batch(lambda x: x[at], batch)


def _endless(batches: Iterable[Any] | None, side: str) -> Iterator[Any]:
    if batches is None:
        raise ValueError(f"this method needs {side} data, got none")

    def cycle() -> Iterator[Any]:
        while True:
            count = 0
            for count, batch in enumerate(batches, 1):  # noqa: B007
                yield batch
            if count == 0:
                raise ValueError(f"the {side} data has no batches, or is an iterator that cannot be started again")

    return cycle()
