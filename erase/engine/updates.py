"""The update rules: how one step changes the weights. Each rule owns its step, from gradients to weights.

- `FastSlow`: a fast step with a rule of its own, slow steps, an outer step. R-on, and the plain baselines.
- `Shared`: one optimizer for both phases, as published with arXiv 2409.19732; SCRUB too.
- `Joint`: one step on both losses. SFR-on without R-on, random labels, SalUn, Selective Amnesia, Bad Teacher.
- `InTurn`: steps on all forget batches, then on all remain batches. Random labels and SalUn as classifiers' scripts do.
- `Descent`: steps on the remain loss alone. Fine-tuning and retraining; random labels among the remain data.
- `ClosedForm`: new weights that are computed instead of stepped to. UCE, SPEED.

A rule is a frozen choice without state. What it steps with (gradients, optimizers, copies of weights) is offered by the
loop as a `Run`. Letters: θ weights, φ weights before the step, m mask, t step, s(t) schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from erase.engine.fast_step import FastRule, FastStep
from erase.engine.weighting import Schedule

Side = Literal["forget", "remain"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Solved:
    """What a closed form computed."""

    weights: Mapping[str, Tensor]
    """New values of some trainable weights, by name."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the log says of them."""


Edit = Callable[[nn.Module], Solved]
"""A closed form, of a network."""


class Run(Protocol):
    """What the step of a rule is made of. A phase is gradients, then `finish`."""

    net: nn.Module
    params: dict[str, nn.Parameter]
    """θ: the trainable weights, by name."""
    slow: torch.optim.Optimizer
    row: dict[str, Any]
    """The numbers of this step, for the log."""

    @property
    def fast(self) -> FastStep:
        """The fast step with a rule of its own, for rules with an `own_rule`."""

    @property
    def remains(self) -> bool:
        """Whether the method has a remain objective."""

    def fading(self, schedule: Schedule) -> float:
        """s(t) of this step."""

    def set_learning_rate(self, schedule: Schedule) -> None:
        """Set the learning rate of the slow optimizer to s(t) times what it began with."""

    def gradients(self, side: Side, k: int = 0, factor: float = 1.0) -> None:
        """Add the gradients of the objective on the next batch, times `factor`, to `.grad`; k counts slow steps."""

    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights, for rules with a `whole_mask`."""

    def step_within_mask(self) -> None:
        """A step of the slow optimizer that leaves masked weights as they are, for rules with a `whole_mask`."""

    def finish(self, side: Side, step: Callable[[], Any], clip: float | None) -> None:
        """End a phase: average over processes, check, clip, `step`, clear. What is not finite is skipped."""

    def masked(self, name: str, new: Tensor) -> Tensor:
        """`m ⊙ new + (1 - m) ⊙ θ` of one weight, for rules with a `whole_mask`."""

    def outer_step(self, rate: float) -> None:
        """`φ ← φ + α (θ - φ)`, then `θ ← φ`; nothing at α = 1."""


@dataclass(frozen=True)
class FastSlow:
    """A fast step with a rule of its own, K slow steps, an outer step.

        θ ← φ
        θ ← fast rule at rate β s(t), on the weighted forget loss, only where m
        K times: θ ← slow optimizer on the remain loss
        φ ← φ + α (θ - φ)

    Without a remain objective there are fast steps alone. Clipping limits the gradient norm of all weights, before
    masking.
    """

    fast_rate: float
    """β"""
    fast_rule: FastRule = "adam"
    slow_steps: int = 1
    """K"""
    outer_rate: float = 1.0
    """α; 1 needs no copy of the weights."""
    schedule: Schedule = "linear"
    """s(t) of the fast rate."""
    slow_schedule: Schedule = "constant"
    every: int = 1
    """The fast step is taken at every n-th step."""
    clip_forget: float | None = None
    clip_remain: float | None = None

    NEEDS: ClassVar[tuple[Side, ...]] = ("forget",)
    TAKES: ClassVar[tuple[Side, ...]] = SIDES
    whole_mask: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: with the value got and the values allowed.
        """
        if self.fast_rule not in get_args(FastRule):
            raise ValueError(f"unknown fast_rule {self.fast_rule!r}; allowed: {', '.join(get_args(FastRule))}")
        _check(self, "fast_rate")

    @property
    def own_rule(self) -> FastRule | None:
        """The rule of the fast step, which has a state of its own."""
        return self.fast_rule

    def phases(self, steps: int) -> dict[Side, int]:
        """How many batches of each side the first steps take, as far as the method has an objective for them."""
        return {"forget": -(-steps // self.every), "remain": steps * self.slow_steps}

    def step(self, run: Run, t: int) -> None:
        """Take step t."""
        run.set_learning_rate(self.slow_schedule)
        if t % self.every == 0:
            rate = run.row["fast_rate"] = self.fast_rate * run.fading(self.schedule)
            run.gradients("forget")
            run.finish("forget", lambda: run.fast.step(rate), self.clip_forget)
        for k in range(self.slow_steps if run.remains else 0):
            run.gradients("remain", k)
            run.finish("remain", run.slow.step, self.clip_remain)
        run.outer_step(self.outer_rate)


@dataclass(frozen=True)
class Shared:
    """One optimizer for both phases, as published: the factor α s(t) on the forget loss, the mask on its gradient.

    The optimizer's momentum, moments and weight decay move masked weights too. Clipping limits the norm of the masked
    gradient, as published.
    """

    forget_alpha: float
    """The factor on the forget loss, so named by the published scripts; 1 in SCRUB."""
    slow_steps: int = 1
    schedule: Schedule = "cosine"
    """s(t) of the factor."""
    slow_schedule: Schedule = "constant"
    every: int = 1
    clip_forget: float | None = None
    clip_remain: float | None = None

    NEEDS: ClassVar[tuple[Side, ...]] = ("forget",)
    TAKES: ClassVar[tuple[Side, ...]] = SIDES
    own_rule: ClassVar[FastRule | None] = None
    whole_mask: ClassVar[bool] = True
    outer_rate: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: with the value got and the values allowed.
        """
        _check(self, "forget_alpha")

    def phases(self, steps: int) -> dict[Side, int]:
        """How many batches of each side the first steps take, as far as the method has an objective for them."""
        return {"forget": -(-steps // self.every), "remain": steps * self.slow_steps}

    def step(self, run: Run, t: int) -> None:
        """Take step t."""
        run.set_learning_rate(self.slow_schedule)
        if t % self.every == 0:
            alpha = run.row["fast_rate"] = self.forget_alpha * run.fading(self.schedule)
            run.gradients("forget", factor=alpha)
            run.mask_gradients()
            run.finish("forget", run.slow.step, self.clip_forget)
        for k in range(self.slow_steps if run.remains else 0):
            run.gradients("remain", k)
            run.finish("remain", run.slow.step, self.clip_remain)


@dataclass(frozen=True)
class Joint:
    """One step of the slow optimizer on both losses: `θ ← θ - η (∇ remain + β s(t) m ⊙ ∇ forget)`."""

    forget_weight: float
    """β: the weight of the forget loss beside the remain loss."""
    schedule: Schedule = "constant"
    """s(t) of the weight."""
    slow_schedule: Schedule = "constant"
    every: int = 1
    """The forget loss takes part at every n-th step."""
    clip: float | None = None
    """Limit of the norm of the sum (the setting `clip_remain`)."""
    mask_all: bool = False
    """Mask the whole step instead of the forget part of its gradient: weights outside the mask never learn (SalUn)."""
    outer_rate: float = 1.0
    """α, as in `FastSlow`."""

    NEEDS: ClassVar[tuple[Side, ...]] = SIDES
    TAKES: ClassVar[tuple[Side, ...]] = SIDES
    own_rule: ClassVar[FastRule | None] = None
    whole_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: with the value got and the values allowed.
        """
        _check(self, "forget_weight")

    def phases(self, steps: int) -> dict[Side, int]:
        """How many batches of each side the first steps take."""
        return {"forget": -(-steps // self.every), "remain": steps}

    def step(self, run: Run, t: int) -> None:
        """Take step t."""
        run.set_learning_rate(self.slow_schedule)
        if t % self.every == 0:
            weight = run.row["fast_rate"] = self.forget_weight * run.fading(self.schedule)
            run.gradients("forget", factor=weight)
            if not self.mask_all:
                run.mask_gradients()
        run.gradients("remain")
        if self.mask_all:
            run.mask_gradients()
        run.finish("remain", run.step_within_mask if self.mask_all else run.slow.step, self.clip)
        run.outer_step(self.outer_rate)


@dataclass(frozen=True)
class Epoch:
    """How many batches one pass over the data has."""

    forget: int
    remain: int


@dataclass(frozen=True)
class InTurn:
    """One step of the slow optimizer on one loss: in each epoch on all forget batches, then on all remain batches."""

    forget_weight: float
    """β: the factor on the forget loss."""
    epoch: Epoch
    slow_schedule: Schedule = "constant"
    clip: float | None = None
    """Limit of the norm of each gradient (the setting `clip_remain`)."""
    mask_all: bool = False
    """Weights outside the mask never learn (SalUn)."""

    NEEDS: ClassVar[tuple[Side, ...]] = SIDES
    TAKES: ClassVar[tuple[Side, ...]] = SIDES
    own_rule: ClassVar[FastRule | None] = None
    whole_mask: ClassVar[bool] = True
    outer_rate: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: with the value got and the values allowed.
        """
        _check(self, "forget_weight")
        if self.epoch.forget < 1 or self.epoch.remain < 1:
            raise ValueError(f"an epoch needs a batch of each side; got {self.epoch}")

    def phases(self, steps: int) -> dict[Side, int]:
        """How many batches of each side the first steps take."""
        epochs, more = divmod(steps, self.epoch.forget + self.epoch.remain)
        forget = epochs * self.epoch.forget + min(more, self.epoch.forget)
        return {"forget": forget, "remain": steps - forget}

    def step(self, run: Run, t: int) -> None:
        """Take step t."""
        run.set_learning_rate(self.slow_schedule)
        side: Side = "forget" if t % (self.epoch.forget + self.epoch.remain) < self.epoch.forget else "remain"
        if side == "forget":
            run.row["fast_rate"] = self.forget_weight
        run.gradients(side, factor=self.forget_weight if side == "forget" else 1.0)
        if self.mask_all:
            run.mask_gradients()
        run.finish(side, run.step_within_mask if self.mask_all else run.slow.step, self.clip)


@dataclass(frozen=True)
class Descent:
    """One step of the slow optimizer on the remain loss: plain training."""

    slow_schedule: Schedule = "constant"
    clip_remain: float | None = None
    mixed: bool = False
    """Whether batches are of both sides' data (`erase.engine.batches.Together`); SalUn masks all, as in `InTurn`."""
    mask_all: bool = False

    NEEDS: ClassVar[tuple[Side, ...]] = ("remain",)
    TAKES: ClassVar[tuple[Side, ...]] = ("remain",)
    own_rule: ClassVar[FastRule | None] = None
    whole_mask: ClassVar[bool] = True
    outer_rate: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: with the value got and the values allowed.
        """
        _check(self)

    def phases(self, steps: int) -> dict[Side, int]:
        """How many batches of each side the first steps take."""
        return {"forget": 0, "remain": steps}

    def step(self, run: Run, t: int) -> None:
        """Take step t."""
        run.set_learning_rate(self.slow_schedule)
        run.gradients("remain")
        if self.mask_all:
            run.mask_gradients()
        run.finish("remain", run.step_within_mask if self.mask_all else run.slow.step, self.clip_remain)


@dataclass(frozen=True)
class ClosedForm:
    """New weights that are computed: `θ ← θ + share · m ⊙ (edit(θ) - θ)`. It needs neither objective."""

    edit: Edit = field(repr=False)
    share: float = 1.0
    """The share of the way to the solution; 1 goes all the way."""

    NEEDS: ClassVar[tuple[Side, ...]] = ()
    TAKES: ClassVar[tuple[Side, ...]] = ()
    own_rule: ClassVar[FastRule | None] = None
    whole_mask: ClassVar[bool] = True
    outer_rate: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: with the value got and the values allowed.
        """
        _check(self, "share")

    def phases(self, steps: int) -> dict[Side, int]:
        """How many batches of each side the first steps take: a closed form takes none."""
        return {"forget": 0, "remain": 0}

    @torch.no_grad()
    def step(self, run: Run, t: int) -> None:
        """Take step t.

        Raises:
            NonFiniteError: for a solution that is not finite; no weight is changed.
        """
        run.row["fast_rate"] = self.share
        new, solved = dict[str, Tensor](), self.edit(run.net)
        run.row.update(solved.numbers)
        for name, end in solved.weights.items():
            p = run.params[name]
            new[name] = run.masked(name, torch.lerp(p, end.to(p), self.share))
        norm = float(torch.nn.utils.get_total_norm([x - run.params[name] for name, x in new.items()]))
        if not math.isfinite(norm):  # a second try would give the same
            raise NonFiniteError("the closed form is not finite: raise method.lambd")
        run.row["edit_norm"] = norm
        for name, x in new.items():
            run.params[name].copy_(x)


Update = FastSlow | Shared | Joint | InTurn | Descent | ClosedForm


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a closed form was not finite, and there is nothing left to try."""


def _check(update: Update, rate: str | None = None) -> None:
    """Check the fields that rules have in common; `rate` names what the setting `fast_rate` is called here."""
    values = vars(update)
    for name in ("schedule", "slow_schedule"):
        if name in values and values[name] not in get_args(Schedule):
            raise ValueError(f"unknown {name} {values[name]!r}; allowed: {', '.join(get_args(Schedule))}")
    if rate is not None and not (values[rate] >= 0 and math.isfinite(values[rate])):
        called = rate if rate == "fast_rate" else f"{rate} (the setting fast_rate)"
        raise ValueError(f"{called} must be finite and ≥ 0; got {values[rate]}")
    for name, least in (("slow_steps", 0), ("every", 1)):
        if name in values and values[name] < least:
            raise ValueError(f"{name} must be at least {least}; got {values[name]}")
    if not 0 <= update.outer_rate <= 1:
        raise ValueError(f"outer_rate must be in [0, 1]; got {update.outer_rate}")
    for name in ("clip_forget", "clip_remain", "clip"):
        value = values.get(name)
        if value is not None and not value > 0:
            called = "clip (the setting clip_remain)" if name == "clip" else name
            raise ValueError(f"{called} must be > 0 or left out; got {value}")
