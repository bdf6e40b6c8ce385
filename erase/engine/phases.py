"""The gradients of one phase: the next batch of a side, over micro-batches and processes, with the weights F.

The loss of a phase is `sense · factor · mean_i(w_i ℓ_i)`, the mean over the global batch, with w = 1 on remain data. On
forget data w is F times the sample's own share, `weight` `[B]` of a batch that has it; F does not depend on the shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from erase.engine.backend import Backend, Binned, Drawing, batch_size, device_of, map_batch, seeded
from erase.engine.distributed import Processes
from erase.engine.losses import Objective, weighted_mean
from erase.engine.method import Method
from erase.engine.precision import Precision
from erase.engine.updates import Side
from erase.engine.weighting import BinNormalizer, adaptive_weights

NUMBERS: dict[Side, int] = {"forget": 0, "remain": 1}
"""What a side is called in the seed of its randomness."""


class Phases:
    """Batches, and the gradients of a method's objectives on them."""

    def __init__(
        self,
        backend: Backend[Any],
        method: Method,
        data: Mapping[Side, Iterable[Any] | None],
        seed: int,
        processes: Processes,
        precision: Precision,
        micro_batch: int | None,
    ) -> None:
        self.backend, self.seed, self.processes, self.precision = backend, seed, processes, precision
        self.device = device_of(backend.net)
        self.draw = backend.draw if isinstance(backend, Drawing) else None
        self.micro_batch = micro_batch
        self.weights = method.weights
        self.objectives: dict[Side, Objective] = {}
        self.batches: dict[Side, Iterator[Any]] = {}
        for side, objective in zip(NUMBERS, (method.forget, method.remain), strict=True):
            if objective is not None:
                self.objectives[side] = objective
                self.batches[side] = endless(data[side], side)
        self.normalizer: BinNormalizer | None = None
        if method.weights is not None and method.weights.per_bin and isinstance(backend, Binned):
            self.bins, self.normalizer = backend.bins, BinNormalizer(backend.num_bins)

    def gradients(self, side: Side, t: int, k: int = 0, factor: float = 1.0) -> dict[str, float | None]:
        """Add the gradients of a phase to `.grad`.

        Args:
            side: whose objective and next batch.
            t: the step, and
            k: the phase within it; timesteps and noise follow from both.
            factor: on the loss.

        Returns:
            The mean loss, and the largest weight where samples are weighted; `None` for what is not finite.

        Raises:
            ValueError: for negative losses that weights depend on.
        """
        objective = self.objectives[side]
        generator = self._generator(side, t, k)
        batch, mine = self._share(next(self.batches[side]), generator)
        most = self.micro_batch or mine
        spans = [slice(start, min(start + most, mine)) for start in range(0, mine, most)]
        parts = [batch] if len(spans) == 1 else [_rows(batch, at) for at in spans]
        weighted = side == "forget" and self.weights is not None
        weights: Tensor | None = None
        shares = batch.get("weight") if side == "forget" and isinstance(batch, Mapping) else None
        if weighted and self.weights is not None and not self.weights.lambd:
            weights = torch.ones(mine, device=self.device)
        elif weighted and len(parts) > 1:  # a pass without gradients: the weights depend on the losses of all parts
            before = generator.get_state()
            with torch.no_grad():
                found = torch.cat([self._losses(objective, part, generator) for part in parts])
            weights = self._weigh(found, batch, objective)
            generator.set_state(before)
        seen = []
        for at, part in zip(spans, parts, strict=True):
            losses = self._losses(objective, part, generator)
            if weighted and weights is None:
                weights = self._weigh(losses, batch, objective)
            each = [x[at] for x in (weights, shares) if x is not None]
            loss = weighted_mean(losses, math.prod(each[1:], start=each[0]) if each else None)
            loss = loss * ((at.stop - at.start) / mine)
            self.precision.backward(objective.sense * factor * loss)
            seen.append(losses.detach())
        numbers = {} if weights is None else {"weight_max": self.processes.largest(weights)}
        whole = torch.cat(seen)
        numbers[f"{side}_loss"] = float(self.processes.total(whole.mean()) / self.processes.world)
        if weighted:
            self._check_weighable(whole)
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    def _generator(self, side: Side, t: int, k: int) -> torch.Generator:
        # What a backend draws is drawn for the global batch, the same in every process; the rest is each process's own.
        own = () if self.draw is not None else (self.processes.rank,)
        return seeded(self.device, self.seed, t, NUMBERS[side], k, *own)

    def _share(self, batch: Any, generator: torch.Generator) -> tuple[Any, int]:
        """This process's share of a global batch, on the device and drawn; and its size."""
        batch = map_batch(lambda x: x.to(self.device, non_blocking=True), batch)
        size, world = batch_size(batch), self.processes.world
        if size % world:
            raise ValueError(f"a batch of {size} does not divide over {world} processes: use a multiple")
        if self.draw is not None:
            batch = self.draw(batch, generator)
        if world > 1:
            batch = map_batch(lambda x: x[self.processes.rank :: world], batch)
        return batch, size // world

    def _losses(self, objective: Objective, batch: Any, generator: torch.Generator) -> Tensor:
        with self.precision.autocast():
            losses = objective.loss(self.backend, batch, generator)
        if losses.ndim != 1:
            raise ValueError(
                f"objective {objective.name!r} must give one loss per sample, [B]; got {list(losses.shape)}"
            )
        return losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses

    def _weigh(self, losses: Tensor, batch: Any, objective: Objective) -> Tensor:
        """F: the weights of a batch, `[B]`."""
        assert self.weights is not None
        total = self.processes.total if self.processes.world > 1 else None
        relative = losses.detach()
        if self.normalizer is not None:
            bins = self.bins(batch)
            self.normalizer.update(relative, bins, total)
            relative = self.normalizer(relative, bins)
        # A loss that is descended is large while the concept is remembered: λ changes its sign.
        lambd = self.weights.lambd * -objective.sense
        return adaptive_weights(relative, lambd=lambd, floor=self.weights.floor, total=total)

    def _check_weighable(self, losses: Tensor) -> None:
        """Refuse finite losses `[B]` below 0, which have no powers; down to minus the floor they may be rounding."""
        assert self.weights is not None
        least = -self.processes.largest(-losses.nan_to_num(0.0, 0.0, 0.0)) if self.weights.lambd else 0.0
        if least < -self.weights.floor:
            raise ValueError(
                f"method.lambd={self.weights.lambd:g} weights samples by powers of their losses, which must be 0 or "
                f"more; got {least:g}: set method.lambd=0, or add a constant to the losses"
            )

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The timestep bins, and the loss scale of fp16."""
        bins = {} if self.normalizer is None else self.normalizer.state_dict()
        return {"bins": bins, "precision": self.precision.state_dict()}

    def load_state_dict(self, state: dict[str, Any], done: Mapping[Side, int]) -> None:
        """Restore what `state_dict` gave, and go past the batches that are `done`."""
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["bins"])
        self.precision.load_state_dict(state["precision"])
        for side, batches in self.batches.items():
            for _ in range(done[side]):
                next(batches)


def _rows(batch: Any, at: slice) -> Any:
    return map_batch(lambda x: x[at], batch)


def endless(batches: Iterable[Any] | None, side: Side) -> Iterator[Any]:
    """The batches of a side, started again whenever they end.

    Raises:
        ValueError: for no data.
    """
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
