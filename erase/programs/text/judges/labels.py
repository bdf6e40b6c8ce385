"""A classifier as a judge: by the labels that it gives, or by those of them that are flagged."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from erase import resources
from erase.config import SdConfig
from erase.evaluation import classes
from erase.evaluation.prompt_files import PromptRow
from erase.evaluation.stats import wilson
from erase.nearest import some
from erase.programs.images import classified
from erase.programs.text.judges.seam import Counted, Judged, concept, each_image, prompt_side
from erase.programs.text.naming import label_in
from erase.programs.text.plan import Plan, label_of


def classifier_of(config: SdConfig) -> Path:
    """The folder of `eval.classifier`."""
    assert config.eval.classifier is not None
    return resources.tiny_path(config.eval.classifier)


@dataclass(frozen=True)
class Labels:
    """`eval.classifier`: an image shows the label that it is classified as."""

    config: SdConfig
    plan: Plan
    SECTION: ClassVar[str] = "classes"
    KNOWS_REST: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """As the user gave it."""
        return str(self.config.eval.classifier)

    def check(self) -> None:
        """See `Judge`; whether every prompt has a label that the classifier knows."""
        axis = self.config.forget.axis or "object"
        found = classes.labels_of(classifier_of(self.config))
        known = classes.values(found, axis) if "=" in found[0] or paired(self.plan.rows, found) else found
        for row in self.plan.rows:
            label = label_of(row, axis)
            if label not in known and not (label and "=" in found[0] and set(label.split("+")) <= set(known)):
                raise ValueError(
                    f"eval.classifier needs to know what an image should show; the prompt {row.prompt!r} is labelled "
                    f"{label!r}, the classifier knows {some([*dict.fromkeys(known)])}: use a prompt set with such "
                    "object (and style) columns, judge by eval.clip, or name the concept's labels in eval.flag"
                )

    def judge(self, paths: Sequence[Path], rows: Sequence[PromptRow]) -> Judged:
        """See `Judge`; of a row without a label no image is right."""
        along = along_axis(self.config, self.plan, classified(paths, classifier_of(self.config)))
        gone, axis = concept(self.config, self.plan), self.config.forget.axis or "object"
        right, told = [False] * len(rows), [i for i, row in enumerate(rows) if label_of(row, axis) is not None]
        asked = [wanted(rows[i], axis, along.labels, gone) for i in told]
        for i, hit in zip(told, classes.correct(along.take(told), asked), strict=True):
            right[i] = hit
        shown = [classes.shows(along, name) for name in gone]
        return Judged([any(hits) for hits in zip(*shown, strict=True)], right)

    def count(self, paths: Sequence[Path]) -> Counted:
        """See `Judge`."""
        return count_classes(self.config, self.plan, paths)


@dataclass(frozen=True)
class Flags:
    """`eval.classifier` with `eval.flag`: an image shows the concept if flagged labels are together above 1/2."""

    config: SdConfig
    plan: Plan
    SECTION: ClassVar[str] = "flagged"
    KNOWS_REST: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The classifier's, and the labels."""
        return f"{self.config.eval.classifier} ({', '.join(self.config.eval.flag)})"

    def check(self) -> None:
        """See `Judge`; whether the classifier has the labels."""
        known = classes.labels_of(classifier_of(self.config))
        if odd := [label for label in self.config.eval.flag if not classes.knows(known, label)]:
            raise ValueError(
                f"eval.flag has {odd[0]!r}, which eval.classifier does not know; it knows {', '.join(known)}"
            )

    def judge(self, paths: Sequence[Path], rows: Sequence[PromptRow]) -> Judged:
        """See `Judge`."""
        return Judged(self._flagged(classified(paths, classifier_of(self.config))))

    def _flagged(self, guess: classes.ClassPredictions) -> list[bool]:
        return [bool(p > 0.5) for p in classes.any_of(guess, self.config.eval.flag)]

    def count(self, paths: Sequence[Path]) -> Counted:
        """See `Judge`; of the erased concept's images, and for every prompt."""
        guess = classified(paths, classifier_of(self.config))
        flags = self._flagged(guess)
        about = each_image(self.plan, self.config.eval.images)
        of_concept = [flag for flag, (_, side) in zip(flags, about, strict=True) if side == "forget"]
        n, hits = len(of_concept), sum(of_concept)
        by_prompt = dict.fromkeys((row.prompt for row, _ in about), 0)
        for flag, (row, _) in zip(flags, about, strict=True):
            by_prompt[row.prompt] += flag
        numbers: dict[str, Any] = {**guess.provenance, "classes": list(self.config.eval.flag)}
        numbers |= {"images": n, "flagged": hits, "rate": hits / n, "ci95": list(wilson(hits, n))}
        return Counted(numbers | {"by_prompt": by_prompt}, {"flagged": list(of_concept)})


def wanted(row: PromptRow, axis: str, known: Sequence[str], gone: Collection[str]) -> str:
    """What an image of a row must show to be right; of several objects ("cat+pizza"), those that are not forgotten."""
    label = str(label_of(row, axis))
    if label in known:
        return label
    return "+".join(part for part in label.split("+") if part not in gone) or label


def part_of(row: PromptRow, gone: Collection[str], groups: Collection[str]) -> str | None:
    """Of a row that stays: `partner` beside a forgotten object, `near` in its group, `far` in another.

    Nothing is near or far where no forgotten row has a group, nor a partner where all of a row's objects are forgotten.
    """
    things = set((row.object or "").split("+"))
    if lost := things & set(gone):
        return "partner" if things - lost else None
    return None if row.group is None or not groups else "near" if row.group in groups else "far"


def along_axis(config: SdConfig, plan: Plan, guess: classes.ClassPredictions) -> classes.ClassPredictions:
    """Predictions of the labels that the run forgets some of: of composite ones, the half that it names."""
    if not guess.along[0].name and not paired(plan.rows, guess.labels):
        return guess
    return classes.axis(guess, config.forget.axis or "object")


def paired(rows: Sequence[PromptRow], labels: Sequence[str]) -> bool:
    """Whether rows and a classifier's labels both tell object and style."""
    both = all("/" in label for label in labels) or all(classes.values(labels, axis) for axis in ("object", "style"))
    return all(row.style is not None for row in rows) and both


def count_classes(config: SdConfig, plan: Plan, paths: Sequence[Path]) -> Counted:
    """Forget and remain accuracy, per label and per pair; whether each image is right, in order, for each count."""
    guess = classified(paths, classifier_of(config))
    about = each_image(plan, config.eval.images)
    rows = [row for row, _ in about]
    pairs = paired(rows, guess.labels)
    axis = config.forget.axis or "object"
    along = along_axis(config, plan, guess)
    across = classes.axis(guess, "style" if axis == "object" else "object") if pairs else None
    gone = concept(config, plan)
    expected, shown = [wanted(row, axis, along.labels, gone) for row in rows], along.predicted
    things = expected if axis == "object" else [str(row.object) for row in rows]
    pair = [classes.pair_of(guess, thing, str(row.style)) for thing, row in zip(things, rows, strict=True)]
    is_right = classes.correct(along, expected)
    pair_right = classes.correct(guess, pair) if pairs else []
    result: dict[str, Any] = {"classifier": guess.provenance, "axis": axis, "pairs": pairs}
    right: dict[str, list[bool | None]] = {}
    for side in ("forget", "earlier", "remain"):
        index = [i for i, (_, found) in enumerate(about) if found == side]
        if side == "earlier" and not index:
            continue
        result[side] = classes.score([is_right[i] for i in index]) if index else None
        if index:
            right[side] = [is_right[i] for i in index]
        if pairs and index:
            right[f"{side}_pairs"] = [pair_right[i] for i in index]
            result[f"{side}_pairs"] = classes.score([pair_right[i] for i in index])
    result["per_prompt"] = {}
    groups = {row.group for row, forgotten in zip(plan.rows, plan.forgotten, strict=True) if forgotten and row.group}
    both, of_prompt = zip(plan.rows, plan.forgotten, strict=True), classes.places([row.prompt for row in rows])
    for row, forgotten in {row.prompt: (row, forgotten) for row, forgotten in both}.values():
        index = of_prompt[row.prompt]
        score = classes.score([is_right[i] for i in index])
        side = prompt_side(plan, row, forgotten)
        score |= {"object": row.object, "style": row.style, "side": side}
        if side == "remain" and axis == "object" and (part := part_of(row, gone, groups)):
            score["part"] = part
        if across is not None:
            other = row.style if axis == "object" else row.object
            score["other_accuracy"] = classes.accuracy(across.take(index), [str(other)] * len(index))["accuracy"]
            score["pair_accuracy"] = classes.score([pair_right[i] for i in index])["accuracy"]
        result["per_prompt"][row.prompt] = score
    of_concept = [i for i, (_, side) in enumerate(about) if side == "forget"]
    result["forget_shows"] = classes.shares([shown[i] for i in of_concept])
    if instead := {label for anchor in plan.anchors if (label := label_in(anchor, along.labels)) is not None}:
        seen = [classes.shows(along.take(of_concept), label) for label in sorted(instead)]
        result["forget_anchor"] = classes.score([any(hits) for hits in zip(*seen, strict=True)])
    return Counted(result, right)
