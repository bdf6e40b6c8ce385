"""CLIP or SigLIP as a judge: whether an image is more similar to the words for the concept than to any alternative."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from erase.config import SdConfig
from erase.engine import distributed
from erase.evaluation import classes, clip, zeroshot
from erase.evaluation.axes import Floats
from erase.evaluation.prompt_files import PromptRow
from erase.programs.text.judges.seam import Counted, Judged, each_image, prompt_side
from erase.programs.text.plan import Plan, expand


@dataclass(frozen=True)
class ZeroShot:
    """`eval.clip`.

    The concept's texts are the prompts of all forgotten rows. Alternatives are `eval.alternatives`; by default the
    anchors, the prompts of all other rows, and "something else", which only remaining images must beat, too.
    """

    config: SdConfig
    plan: Plan
    SECTION: ClassVar[str] = "clip"
    KNOWS_REST: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """As the user gave it."""
        return str(self.config.eval.clip)

    @cached_property
    def model(self) -> clip.Clip:
        """Loaded once: it is asked before a run, between its steps and at its end."""
        return clip.open_clip(self.name)

    @cached_property
    def texts(self) -> zeroshot.Texts:
        """What an image may be of."""
        plan, wanted = self.plan, self.config.eval.alternatives
        both = list(zip(plan.rows, plan.forgotten, strict=True))
        named = [row.prompt for row in expand(wanted, self.config.seed)]
        others = named or [*plan.anchors, *(row.prompt for row, gone in both if not gone), zeroshot.OTHER]
        concept = [row.prompt for row, gone in both if gone]
        return zeroshot.Texts(tuple(dict.fromkeys(concept)), tuple(text for text in dict.fromkeys(others) if text))

    def check(self) -> None:
        """See `Judge`; whether the model is there, and no alternative is a forgotten prompt."""
        if both := set(self.texts.concept) & set(self.texts.alternatives):
            raise ValueError(
                f"eval.alternatives has {min(both)!r}, which is to be forgotten: name other texts, from which the "
                "concept is distinguished"
            )
        try:
            _ = self.model
        except ValueError as error:
            raise ValueError(f"eval.clip: {error}") from error

    @cached_property
    def kept(self) -> dict[tuple[Path, ...], zeroshot.Seen]:
        """Of the evaluation's images: the base's are asked for to calibrate, and again for the report."""
        return {}

    def features(self, paths: Sequence[Path]) -> Iterable[Floats]:
        """Blocks `[n, D]`, one in memory at a time."""
        return clip.feature_blocks(self.model, paths)

    def look(self, paths: Sequence[Path], prompts: Sequence[str]) -> zeroshot.Seen:
        """What the images show, each process looking at its share."""

        def work(share: Sequence[int]) -> zeroshot.Seen:
            own = [paths[i] for i in share]
            return zeroshot.look(self.model, self.features(own), self.texts, [prompts[i] for i in share])

        return zeroshot.joined(distributed.spread(work, distributed.shares(range(len(paths)))))

    def judge(self, paths: Sequence[Path], rows: Sequence[PromptRow]) -> Judged:
        """See `Judge`."""
        seen = self.look(paths, [row.prompt for row in rows])
        return Judged(seen.shows, seen.right)

    def count(self, paths: Sequence[Path]) -> Counted:
        """See `Judge`; and the CLIP score of the remaining prompts."""
        about = each_image(self.plan, self.config.eval.images)
        prompts, sides = [row.prompt for row, _ in about], [side for _, side in about]
        if tuple(paths) not in self.kept:
            self.kept[tuple(paths)] = self.look(paths, prompts)
        seen = self.kept[tuple(paths)]
        hits = [a if side == "forget" else b for a, b, side in zip(seen.shows, seen.right, sides, strict=True)]
        numbers: dict[str, Any] = {**self.model.provenance, "axis": self.config.forget.axis or "object", "pairs": False}
        numbers["alternatives"] = list(self.texts.alternatives)
        numbers["truncated"] = self.model.truncated([*self.texts.concept, *self.texts.alternatives])
        outcomes: dict[str, list[bool | None]] = {}
        for side in ("forget", "earlier", "remain"):
            index = [i for i, found in enumerate(sides) if found == side]
            if index:
                outcomes[f"clip_{side}"] = [hits[i] for i in index]
                numbers[side] = classes.score([hits[i] for i in index])
        remain = [i for i, side in enumerate(sides) if side == "remain"]
        numbers["mistaken"] = sum(seen.shows[i] for i in remain)
        numbers["per_prompt"] = {}
        both, of_prompt = zip(self.plan.rows, self.plan.forgotten, strict=True), classes.places(prompts)
        for row, gone in {row.prompt: (row, gone) for row, gone in both}.values():
            score = classes.score([hits[i] for i in of_prompt[row.prompt]])
            numbers["per_prompt"][row.prompt] = score | {"side": prompt_side(self.plan, row, gone)}
        instead = [seen.best[i] for i, side in enumerate(sides) if side == "forget"]
        numbers["forget_shows"] = classes.shares(instead)
        if anchors := set(self.texts.alternatives) & set(self.plan.anchors):
            numbers["forget_anchor"] = classes.score([text in anchors for text in instead])
        scores: dict[str, list[tuple[str, float]]] = {}
        if remain:
            asked = [prompts[i] for i in remain]
            values: list[float] = (100 * seen.own[remain]).tolist()
            numbers["score"] = clip.clip_score(self.model, values, asked)
            scores["clip_score"] = list(zip(asked, values, strict=True))
        return Counted(numbers, outcomes, scores)


def calibration(base: Mapping[str, Any]) -> zeroshot.Calibration:
    """How well the judge knows what the base shows, from what it counted there."""
    return zeroshot.calibrate(base["forget"], base.get("remain", classes.score([])), base["mistaken"])


def withhold(before: dict[str, Any], after: dict[str, Any], paired: dict[str, Any]) -> None:
    """Leave no verdict, and no paired test, on a side that the judge does not know; and note how well it knows both.

    Args:
        before: its section of a report's `before`.
        after: that of `after`.
        paired: the report's paired tests.
    """
    found = calibration(before)
    before["calibration"] = str(found)
    for side, why in found.doubts.items():
        for part in (side, {"remain": "earlier", "forget": "forget_anchor"}[side]):
            paired.pop(f"clip_{part}_mcnemar_p", None)
            for counted in (before, after):
                if part in counted:
                    counted[part]["no_verdict"] = why
