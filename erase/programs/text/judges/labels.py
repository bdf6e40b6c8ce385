"""A classifier as a judge: by the labels that it gives, or by those of them that are flagged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from erase import resources
from erase.config import SdConfig
from erase.evaluation import classes
from erase.evaluation.prompt_files import PromptRow
from erase.evaluation.stats import wilson
from erase.programs.images import classified
from erase.programs.text.judges.seam import Counted, Judged, concept, each_image, prompt_side
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
        axis = self.config.forget.axis
        known = classes.labels_of(classifier_of(self.config))
        if paired(self.plan.rows, known):
            known = tuple(label.split("/")[0 if axis != "style" else 1] for label in known)
        for row in self.plan.rows:
            label = label_of(row, axis or "object")
            if label not in known:
                raise ValueError(
                    f"eval.classifier needs to know what a picture should show; the prompt {row.prompt!r} is labelled "
                    f"{label!r}, the classifier knows {', '.join(dict.fromkeys(known))}: use a prompt set with such "
                    "object (and style) columns, judge by eval.clip, or name the concept's labels in eval.flag"
                )

    def judge(self, paths: Sequence[Path], rows: Sequence[PromptRow]) -> Judged:
        """See `Judge`."""
        seen = along_axis(self.config, self.plan, classified(paths, classifier_of(self.config))).predicted
        gone, axis = concept(self.config, self.plan), self.config.forget.axis or "object"
        right = [shown == label_of(row, axis) for shown, row in zip(seen, rows, strict=True)]
        return Judged([name in gone for name in seen], right)

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
        if odd := [label for label in self.config.eval.flag if label not in known]:
            raise ValueError(
                f"eval.flag has {odd[0]!r}, which eval.classifier does not know; it knows {', '.join(known)}"
            )

    def judge(self, paths: Sequence[Path], rows: Sequence[PromptRow]) -> Judged:
        """See `Judge`."""
        return Judged(self._flagged(classified(paths, classifier_of(self.config))))

    def _flagged(self, guess: classes.ClassPredictions) -> list[bool]:
        columns = [k for k, label in enumerate(guess.labels) if label in self.config.eval.flag]
        return [bool(p > 0.5) for p in guess.probabilities[:, columns].sum(axis=1)]

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


def along_axis(config: SdConfig, plan: Plan, guess: classes.ClassPredictions) -> classes.ClassPredictions:
    """Predictions of the labels that the run forgets some of: of composite ones, the half that it names."""
    if not paired(plan.rows, guess.labels):
        return guess
    return classes.axis(guess, 1 if config.forget.axis == "style" else 0)


def paired(rows: Sequence[PromptRow], labels: Sequence[str]) -> bool:
    """Whether rows and a classifier's labels both tell object and style."""
    return all(row.style is not None for row in rows) and all("/" in label for label in labels)


def count_classes(config: SdConfig, plan: Plan, paths: Sequence[Path]) -> Counted:
    """Forget and remain accuracy, per label and per pair; whether each picture is right, in order, for each count."""
    guess = classified(paths, classifier_of(config))
    about = each_image(plan, config.eval.images)
    rows = [row for row, _ in about]
    pairs = paired(rows, guess.labels)
    axis = config.forget.axis or "object"
    along = along_axis(config, plan, guess)
    across = classes.axis(guess, 1 if axis == "object" else 0) if pairs else None
    expected, shown = [str(label_of(row, axis)) for row in rows], along.predicted
    result: dict[str, Any] = {"classifier": guess.provenance, "axis": axis, "pairs": pairs}
    right: dict[str, list[bool | None]] = {}
    for side in ("forget", "earlier", "remain"):
        index = [i for i, (_, found) in enumerate(about) if found == side]
        if side == "earlier" and not index:
            continue
        result[side] = classes.accuracy(along.take(index), [expected[i] for i in index]) if index else None
        if index:
            right[side] = [shown[i] == expected[i] for i in index]
        if pairs and index:
            both = [f"{rows[i].object}/{rows[i].style}" for i in index]
            result[f"{side}_pairs"] = classes.accuracy(guess.take(index), both)
            right[f"{side}_pairs"] = [guess.predicted[i] == pair for i, pair in zip(index, both, strict=True)]
    result["per_prompt"] = {}
    for row, gone in {row.prompt: (row, gone) for row, gone in zip(plan.rows, plan.forgotten, strict=True)}.values():
        index = [i for i, other in enumerate(rows) if other.prompt == row.prompt]
        score = classes.accuracy(along.take(index), [expected[i] for i in index])
        score |= {"object": row.object, "style": row.style, "side": prompt_side(plan, row, gone)}
        if across is not None:
            other = row.style if axis == "object" else row.object
            score["other_accuracy"] = classes.accuracy(across.take(index), [str(other)] * len(index))["accuracy"]
            score["pair_accuracy"] = classes.accuracy(guess.take(index), [f"{row.object}/{row.style}"] * len(index))[
                "accuracy"
            ]
        result["per_prompt"][row.prompt] = score
    of_concept = [shown[i] for i, (_, side) in enumerate(about) if side == "forget"]
    result["forget_shows"] = shares(of_concept)
    return Counted(result, right)


def shares(names: Sequence[str]) -> dict[str, float]:
    """Of N names, the share of each."""
    return {name: names.count(name) / len(names) for name in sorted(set(names))}
