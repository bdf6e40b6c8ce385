"""What a run of `erase run sd` asks for: prompts, their anchors, and which of them are forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from erase import resources
from erase.config import Forget, Remain, SdConfig
from erase.diffusion.data import ImageItem, check_images, read_folder
from erase.evaluation import prompt_files
from erase.evaluation.prompt_files import PromptRow
from erase.methods import find_method
from erase.programs import saving


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

    @property
    def words(self) -> list[str]:
        """Every prompt that is embedded."""
        given = [item.prompt for items in (self.forget_images, self.remain_images) for item in items or []]
        return list(dict.fromkeys([*self.forget, *self.anchors, *self.remain, *given]))


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
    forget, anchors = config.forget.prompts, make_anchors(config)
    if not forget:
        raise ValueError("forget.prompts is empty: name what to erase, such as forget.prompts='a photo of a cat'")
    if config.forget.pictures == "anchor" and config.forget.images is not None:
        raise ValueError("forget.images are not used with forget.pictures=anchor: take one back, or use both")
    rows = expand(config.eval.prompts, config.seed)
    known = {row.prompt for row in rows}
    missing = [p for p in forget if p not in known]
    rows = [*(PromptRow(p, config.seed) for p in missing), *rows]
    axis = config.forget.axis
    labelled = [*rows, *expand(config.remain.prompts, config.seed)]
    erased, before = (
        {label_of(row, axis) for row in labelled if row.prompt in prompts} - {None}
        for prompts in (forget, config.forget.earlier)
    )

    def is_forgotten(row: PromptRow) -> bool:
        return row.prompt in forget or label_of(row, axis) in erased

    def is_gone(row: PromptRow) -> bool:
        """Not by this run."""
        known = row.prompt in config.forget.earlier or label_of(row, axis) in before
        return not is_forgotten(row) and (known or not marks_of(row).isdisjoint(gone))

    remain = [
        row.prompt for row in expand(config.remain.prompts, config.seed) if not is_forgotten(row) and not is_gone(row)
    ]
    if not remain:
        raise ValueError("remain.prompts holds nothing but forgotten prompts: name what must stay")
    rows = sorted(rows, key=lambda row: (not is_forgotten(row), not is_gone(row)))
    plan = Plan(
        list(forget),
        list(anchors),
        list(dict.fromkeys(remain)),
        rows,
        [is_forgotten(row) for row in rows],
        list(dict.fromkeys(row.prompt for row in labelled if is_gone(row))),
        given_images(config.forget, "forget", forget, say),
        given_images(config.remain, "remain", remain, say),
    )
    away = {*forget, *plan.earlier}
    for what, prompts in (
        ("forget.anchors", anchors),
        ("remain.images", [item.prompt for item in plan.remain_images or []]),
    ):
        lost = [prompt for prompt in prompts if prompt in away or saving.mark(prompt) in gone]
        if lost:
            raise ValueError(f"{what} has {lost[0]!r}, which is to be forgotten or was before: choose what stays")
    strange = Counter(item.prompt for item in plan.forget_images or [] if item.prompt not in forget)
    if strange:
        raise ValueError(
            f"forget.images has {strange.total()} captions that are not in forget.prompts, such as "
            f"{next(iter(strange))!r}: add them there, or remove the file of captions"
        )
    return plan


def make_anchors(config: SdConfig) -> list[str]:
    """One per forget prompt; none where neither the loss nor the method looks at them.

    Raises:
        ValueError: for anchors that do not match, or are missing.
    """
    forget, anchors, pictures = config.forget.prompts, config.forget.anchors, config.forget.pictures
    needs = find_method(str(config.method.get("name", ""))).needs
    loss = config.forget.loss if "forget" in needs else None
    if loss in ("redirect", "surrogate") or ("concepts" in needs and anchors):
        if len(anchors) == 1:
            anchors = anchors * len(forget)
        if len(anchors) != len(forget):
            raise ValueError(
                f"forget.anchors has {len(anchors)} prompts for {len(forget)} forget prompts: "
                "give one for each, or one for all"
            )
        if loss == "surrogate" and pictures != "anchor":
            raise ValueError(
                f"forget.loss=surrogate learns from pictures of the anchors: set forget.pictures=anchor; got {pictures}"
            )
        return list(anchors)
    if pictures != "own":
        what = f"method {config.method['name']}" if loss is None else f"forget.loss={loss}"
        raise ValueError(f"forget.pictures={pictures} needs anchors, and {what} has none: own")
    return []


def marks_of(row: PromptRow) -> set[str]:
    """By which a row is known in the weight file of a model that forgot it: its prompt, its object, its style."""
    names = [row.prompt, *(f"{axis}: {label_of(row, axis)}" for axis in ("object", "style") if label_of(row, axis))]
    return {saving.mark(name) for name in names}


def marks(config: SdConfig, plan: Plan) -> list[str]:
    """Of all that this run forgets, and of what was named as forgotten before: prompts, and labels on the axis."""
    axis = config.forget.axis
    prompts = [*plan.forget, *config.forget.earlier]
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


def expand(prompts: Sequence[str], seed: int) -> list[PromptRow]:
    """Prompts as rows; a name or path of a prompt set gives the set's rows.

    Raises:
        ValueError: for what is likely a set's name with a slip, such as `photo-plain`, or a set that cannot be read.
    """
    rows: list[PromptRow] = []
    sets = resources.list_prompts()
    for prompt in prompts:
        if prompt in sets or prompt.endswith((".csv", ".txt")):
            rows += prompt_files.read_prompts(resources.prompt_path(prompt))
        elif "-" in prompt and " " not in prompt and (near := get_close_matches(prompt, sets, 1, 0.8)):
            raise ValueError(f"there is no prompt set {prompt!r}; did you mean {near[0]}?")
        else:
            rows.append(PromptRow(prompt, seed))
    return rows


def label_of(row: PromptRow, axis: str | None) -> str | None:
    """The row's label on the axis that is erased."""
    return None if axis is None else row.object if axis == "object" else row.style
