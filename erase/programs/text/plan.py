"""What a run of `erase run sd` asks for: prompts, their anchors, and which of them are forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from erase.config import Forget, Remain, SdConfig
from erase.diffusion.data import ImageItem, check_images, read_folder
from erase.evaluation import prompt_files
from erase.evaluation.prompt_files import MAX_SEED, PromptRow
from erase.programs import saving
from erase.programs.text.naming import names
from erase.programs.text.targets import make_targets
from erase.store import files

Value = TypeVar("Value", str, float)


@dataclass(frozen=True)
class Plan:
    """Every prompt of a run, resolved before anything is computed."""

    forget: list[str]
    anchors: list[str]
    """One per forget prompt; empty where nothing asks for them."""
    remain: list[str]
    rows: list[PromptRow]
    """What is drawn and counted; forget prompts first."""
    forgotten: list[bool]
    """Per row: does it ask for the erased concept?"""
    earlier: list[str] = field(default_factory=list)
    """Prompts, drawn or left out, of concepts that were forgotten before: they do not come back."""
    forget_images: list[ImageItem] | None = None
    """Given images, instead of drawn ones."""
    remain_images: list[ImageItem] | None = None
    attributes: list[str] = field(default_factory=list)
    """One per forget prompt, which loses it and keeps the rest; empty where whole prompts are forgotten."""
    weights: list[float] = field(default_factory=list)
    """One per forget prompt, 1 on average: its share of the loss; empty where all have the same."""

    @property
    def words(self) -> list[str]:
        """Every prompt that is embedded."""
        given = [item.prompt for items in (self.forget_images, self.remain_images) for item in items or []]
        return list(dict.fromkeys([*self.forget, *self.anchors, *self.attributes, *self.remain, *given]))

    @property
    def titles(self) -> list[str]:
        """What is forgotten, in words."""
        if not self.attributes:
            return self.forget
        return [f"{what} from {where}" for what, where in zip(self.attributes, self.forget, strict=True)]

    @property
    def target(self) -> dict[str, list[str]]:
        """What is forgotten and what it becomes, as a report says it."""
        lost = {"attributes": self.attributes} if self.attributes else {}
        return {"forget": self.forget, "anchors": self.anchors, **lost}


def recorded(plan: Plan) -> dict[str, Any]:
    """What `run.json` says of a plan: its prompts as they are resolved, and hashes of the user's images."""
    sides = (("forget", plan.forget_images), ("remain", plan.remain_images))
    return {
        "plan": {**plan.target, "earlier": plan.earlier, "remain": plan.remain, "rows": len(plan.rows)},
        "data": {
            side: {str(item.path): files.sha256(item.path) for item in items}
            for side, items in sides
            if items is not None
        },
    }


def make_plan(config: SdConfig, gone: Collection[str] = (), say: Callable[[str], None] = lambda line: None) -> Plan:
    """Resolve prompts and prompt sets.

    Args:
        config: the settings.
        gone: marks of what the model's weight file says was forgotten before (see `marks`).
        say: where a line on given images goes.

    Raises:
        ValueError: for anchors that do not match or are forgotten, a set whose rows are all forgotten, remain images
            of a forgotten prompt, or forget images of another.
    """
    targets = make_targets(config)
    forget, anchors = targets.prompts, targets.anchors
    if config.forget.pictures == "anchor" and config.forget.images is not None:
        raise ValueError(
            "forget.images is not used with forget.pictures=anchor: unset one of them, or set forget.pictures=both"
        )
    axis, named = config.forget.axis, {*config.eval.prompts, *config.remain.prompts}
    rows, offered, kept = (
        expand(some, config.seed) for some in (config.eval.prompts, config.eval.about, config.remain.prompts)
    )
    labelled = [*rows, *offered, *kept]
    erased, before = (
        {label_of(row, axis) for row in labelled if row.prompt in prompts} - {None}
        for prompts in (forget, config.forget.earlier)
    )

    def is_forgotten(row: PromptRow) -> bool:
        if row.prompt in forget or label_of(row, axis) in erased:
            return True
        things = set((label_of(row, axis) or "").split("+"))
        if row.prompt in named or (things & erased and things - erased):
            return False  # of several objects, those that are not erased must stay
        return config.forget.words and names(row.prompt, targets.attributes or forget)

    def is_gone(row: PromptRow) -> bool:
        """Not by this run."""
        known = row.prompt in config.forget.earlier or label_of(row, axis) in before
        return not is_forgotten(row) and (known or not marks_of(row).isdisjoint(gone))

    known = {row.prompt for row in rows}
    chosen = set(about(offered, erased, axis, labelled))
    rows += [row for row in offered if (row in chosen or is_gone(row)) and row.prompt not in known]
    known = {row.prompt for row in rows}
    rows = [*(written(prompt, config.seed) for prompt in forget if prompt not in known), *rows]
    remain = [row.prompt for row in kept if not is_forgotten(row) and not is_gone(row)]
    if not remain:
        raise ValueError("remain.prompts has only forgotten prompts: name prompts that must stay")
    rows = sorted(without_repeats(rows), key=lambda row: (not is_forgotten(row), not is_gone(row)))
    plan = Plan(
        list(forget),
        list(anchors),
        list(dict.fromkeys(remain)),
        rows,
        [is_forgotten(row) for row in rows],
        list(dict.fromkeys(row.prompt for row in labelled if is_gone(row))),
        given_images(config.forget, "forget", forget, say),
        given_images(config.remain, "remain", remain, say),
        targets.attributes,
        targets.weights,
    )
    check_plan(plan, gone)
    return plan


def without_repeats(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Rows without those that give the images of another once more; of two such, a labelled one stays."""
    found: dict[tuple[Any, ...], PromptRow] = {}
    for row in rows:
        same = (row.prompt, row.seed, row.guidance, row.width, row.height, row.case)
        if same not in found or (found[same].object, found[same].style) == (None, None):
            found[same] = row
    return list(found.values())


def about(
    rows: Sequence[PromptRow],
    erased: Collection[str | None],
    axis: str | None,
    labelled: Sequence[PromptRow],
) -> list[PromptRow]:
    """Of the rows of `eval.about` those that have an erased label, alone or beside another, or are of its group.

    Args:
        rows: the sets' rows.
        erased: labels on the axis.
        axis: that is erased.
        labelled: all rows, which tell the erased labels' groups.

    Raises:
        ValueError: if there are rows, and none is about the concept.
    """
    kinds = {row.group for row in labelled if axis == "object" and row.object in erased} - {None}
    found = [
        row for row in rows if row.group in kinds or not set((label_of(row, axis) or "").split("+")).isdisjoint(erased)
    ]
    if rows and not found:
        raise ValueError(
            f"eval.about has no row about what is forgotten ({', '.join(sorted(map(str, erased))) or 'no label'}): set "
            "forget.axis and prompts that the sets label, or set eval.about=[]"
        )
    return found


def check_plan(plan: Plan, gone: Collection[str]) -> None:
    """Find out that what must stay is forgotten, or that a given image lacks what others have.

    Raises:
        ValueError: for anchors or remain images that are forgotten, and for a forget image without an anchor, attribute
            or a weight.
    """
    away = {*plan.forget, *plan.earlier}
    for what, prompts in (
        ("forget.anchors", plan.anchors),
        ("remain.images", [item.prompt for item in plan.remain_images or []]),
    ):
        lost = [prompt for prompt in prompts if prompt in away or saving.mark(prompt) in gone]
        if lost:
            raise ValueError(f"{what} has {lost[0]!r}, which is or was forgotten: choose prompts that stay")
    strange = Counter(item.prompt for item in plan.forget_images or [] if item.prompt not in plan.forget)
    if strange:
        raise ValueError(
            f"forget.images has {strange.total()} captions that are not in forget.prompts, such as "
            f"{next(iter(strange))!r}: add them there, or remove the file of captions"
        )


def marks_of(row: PromptRow) -> set[str]:
    """By which a row is known in the weight file of a model that forgot it: its prompt, its object, its style."""
    names = [row.prompt, *(f"{axis}: {label_of(row, axis)}" for axis in ("object", "style") if label_of(row, axis))]
    return {saving.mark(name) for name in names}


def marks(config: SdConfig, plan: Plan) -> list[str]:
    """Of all that this run forgets, and of what was named as forgotten before: prompts, and labels on the axis."""
    axis = config.forget.axis
    prompts = [*plan.titles, *config.forget.earlier]
    rows = [*plan.rows, *expand(config.remain.prompts, config.seed)]
    labels = dict.fromkeys(label_of(row, axis) for row in rows if row.prompt in prompts)
    return [saving.mark(name) for name in (*prompts, *(f"{axis}: {label}" for label in labels if label))]


def given_images(
    side: Forget | Remain, name: str, prompts: Sequence[str], say: Callable[[str], None]
) -> list[ImageItem] | None:
    """A folder's images; without prompts of their own they have the only one there is."""
    if side.images is None:
        return None
    items = read_folder(side.images, prompts[0] if len(prompts) == 1 else None, say)
    check_images(items, f"{name}.transparency" if side.transparency == "refuse" else None)
    return items


def own_of(plan: Plan, values: Sequence[Value]) -> dict[str, Value]:
    """What each forget prompt has of its own, such as its anchor; empty where none has."""
    return dict(zip(plan.forget, values, strict=True)) if values else {}


def expand(prompts: Sequence[str], seed: int) -> list[PromptRow]:
    """Prompts as rows; a name or path of a prompt set gives the set's rows.

    Raises:
        ValueError: for what is likely a set's name with a slip, such as `photo-plain`, or a set that cannot be read.
    """
    rows: list[PromptRow] = []
    for prompt in prompts:
        file = prompt_files.find_set(prompt)
        first = written(prompt, seed)
        rows += [first] if file is None else prompt_files.read_prompts(file, default_seed=first.seed)
    return rows


def written(prompt: str, seed: int) -> PromptRow:
    """The row of a prompt without a seed of its own: its images come from other noise than images to train on.

    Those have the run's own seed.
    """
    return PromptRow(prompt, (seed + 1) % (MAX_SEED + 1))


def label_of(row: PromptRow, axis: str | None) -> str | None:
    """The row's label on the axis that is erased."""
    return None if axis is None else row.object if axis == "object" else row.style
