"""NudeNet as a judge: whether images show the body parts that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from erase.config import SdConfig
from erase.engine import distributed
from erase.evaluation import detections, detector, nudity
from erase.evaluation.people import may_show_people
from erase.evaluation.prompt_files import PromptRow
from erase.programs.progress import bar
from erase.programs.text.judges.seam import Counted, Judged
from erase.programs.text.plan import Plan


@dataclass(frozen=True)
class NudeNet:
    """`eval.nudity`."""

    config: SdConfig
    plan: Plan
    SECTION: ClassVar[str] = "nudity"
    KNOWS_REST: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The counting preset's."""
        return count_preset(self.config).name

    def check(self) -> None:
        """See `Judge`; whether detections can be counted."""
        count_preset(self.config)

    def judge(self, paths: Sequence[Path], rows: Sequence[PromptRow]) -> Judged:
        """See `Judge`; an image on which the detector fails is an error."""
        found = look_for_nudity(self.config, paths, paths[0].parent)
        return Judged(list(nudity.flags(found, count_preset(self.config)).values()))

    def count(self, paths: Sequence[Path]) -> Counted:
        """See `Judge`; an image on which the detector fails is in no count."""
        found = look_for_nudity(self.config, paths, paths[0].parent, strict=False)
        numbers, flags = count_nudity(found, count_preset(self.config), self.plan, self.config.eval.images)
        return Counted(numbers, {"nudity": flags})


def hides(config: SdConfig, plan: Plan) -> bool:
    """Whether images are looked at for what to hide: by `eval.blur`, where they may be of persons."""
    shown = [row.prompt for row in plan.rows] + (plan.anchors or [""])
    return config.eval.blur and (config.eval.nudity is not None or may_show_people(shown))


def count_preset(config: SdConfig) -> nudity.CountPreset:
    """Which detections count.

    Raises:
        ValueError: unless a known preset, or classes and a threshold, are given.
    """
    wanted = config.eval.nudity
    assert wanted is not None
    if wanted.preset is not None:
        if wanted.preset not in nudity.PRESETS:
            raise ValueError(f"eval.nudity.preset={wanted.preset} is unknown; allowed: {', '.join(nudity.PRESETS)}")
        return nudity.PRESETS[wanted.preset]
    if not wanted.classes or wanted.threshold is None:
        raise ValueError(f"eval.nudity needs a preset ({', '.join(nudity.PRESETS)}), or classes and threshold")
    return nudity.custom_preset(wanted.classes, wanted.threshold)


def look_for_nudity(
    config: SdConfig, paths: Sequence[Path], folder: Path, *, strict: bool = True
) -> detections.Detections:
    """Raw detections of a folder's images, kept beside it.

    Raises:
        ValueError: if the detector failed on an image: it is not known to be safe. Unless `strict`, such images
            are there as failed.
    """
    kept = folder.with_name(f"{folder.name}-detections.json")
    if distributed.on_main(kept.exists):
        return whole(detections.load_detections(kept), strict)
    channels = config.eval.nudity.channels if config.eval.nudity is not None else "corrected"
    with bar(len(paths), f"detecting: {folder.name}") as shown:

        def detect(part: Sequence[Path]) -> detections.Detections:
            return detector.detect(part, channels=channels, progress=lambda done, total: shown.update(world))

        world = distributed.world()
        parts = distributed.spread(detect, distributed.shares(paths))
    found = replace(parts[0], images=tuple(image for part in parts for image in part.images))
    found = whole(found, strict)  # before it is kept: the detector may have failed for lack of memory
    distributed.on_main(lambda: detections.save_detections(found, kept))
    return found


def whole(found: detections.Detections, strict: bool) -> detections.Detections:
    """The same, if it is strict: without images on which the detector failed."""
    failed = [image for image in found.images if image.error is not None]
    if strict and failed:
        raise ValueError(f"the detector failed on {len(failed)} images, first {failed[0].file}: {failed[0].error}")
    return found


def count_nudity(
    found: detections.Detections, preset: nudity.CountPreset, plan: Plan, per_prompt: int
) -> tuple[dict[str, Any], list[bool | None]]:
    """The count over images of the erased concept, and for every prompt; flags of the former, in order.

    An image on which the detector failed is in no count and its flag is None, as is the count of its prompt.
    """
    groups: dict[str, list[Any]] = {}
    erased: list[Any] = []
    for number, (row, gone) in enumerate(zip(plan.rows, plan.forgotten, strict=True)):
        group = found.images[number * per_prompt : (number + 1) * per_prompt]
        groups.setdefault(row.prompt, []).extend(group)
        erased.extend(group if gone else ())
    part = replace(found, images=tuple(erased))
    result = nudity.count(part, preset)
    result["by_prompt"] = {}
    for prompt, images in groups.items():
        counted = nudity.count(replace(found, images=tuple(images)), preset)
        result["by_prompt"][prompt] = None if counted["errors"] else counted["flagged"]
    flags = nudity.flags(part, preset)
    return result, [flags.get(image.file) for image in erased]
