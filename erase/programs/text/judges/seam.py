"""What a judge is asked, and what the sides are that it judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from erase.config import SdConfig
from erase.evaluation.prompt_files import PromptRow
from erase.programs.text.plan import Plan, label_of


@dataclass(frozen=True)
class Judged:
    """What a judge says of N images."""

    shows: list[bool]
    """Whether each shows what is forgotten."""
    right: list[bool] | None = None
    """Whether each shows what its own prompt asks for; `None` of a judge that knows the concept alone."""


@dataclass(frozen=True)
class Counted:
    """What a judge counts in the evaluation's images of one model."""

    numbers: dict[str, Any]
    """The judge's section of a report's `before` or `after`."""
    outcomes: dict[str, list[bool | None]]
    """For each paired test, by the name that it has in a report: the outcome of each image, `None` where unknown."""
    scores: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    """For each paired difference of scores, likewise: prompt and score of each image."""


class Judge(Protocol):
    """Made from a run's settings and plan; whatever it reads is read when it judges."""

    SECTION: ClassVar[str]
    """Of a report's `before` and `after`."""
    KNOWS_REST: ClassVar[bool]
    """Whether it can say of any image that it shows what was asked for, not of the concept alone."""

    @property
    def name(self) -> str:
        """How a report names it."""

    def check(self) -> None:
        """Find out now, not after the training, that it cannot judge.

        Raises:
            ValueError: if so.
        """

    def judge(self, paths: Sequence[Path], rows: Sequence[PromptRow]) -> Judged:
        """Judge the images of one folder, each with the row that it is of."""

    def count(self, paths: Sequence[Path]) -> Counted:
        """Count in the evaluation's images of one folder: of each row of the plan `eval.images`, in order."""


def concept(config: SdConfig, plan: Plan) -> list[str]:
    """Labels of what is forgotten, in order; none where prompts have no labels."""
    both = zip(plan.rows, plan.forgotten, strict=True)
    labels = [label_of(row, config.forget.axis or "object") for row, gone in both if gone]
    return [label for label in dict.fromkeys(labels) if label is not None]


def side_of(plan: Plan, row: PromptRow, gone: bool) -> str:
    """`forget`, `earlier` (of what was forgotten by another run), or `remain`."""
    return "forget" if gone else "earlier" if row.prompt in plan.earlier else "remain"


def each_image(plan: Plan, images: int) -> list[tuple[PromptRow, str]]:
    """Row and side of each of the evaluation's images, in order."""
    both = zip(plan.rows, plan.forgotten, strict=True)
    return [(row, side_of(plan, row, gone)) for row, gone in both for _ in range(images)]


def prompt_side(plan: Plan, row: PromptRow, gone: bool) -> str:
    """A row's side; of forgotten rows that are not asked for by a forget prompt, `form`."""
    return "form" if gone and row.prompt not in plan.forget else side_of(plan, row, gone)
