"""Judge pictures of `erase run sd`: whether each shows what is forgotten, by a classifier or a detector, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erase import resources
from erase.config import SdConfig
from erase.engine import distributed
from erase.evaluation import classes, detections, detector, manifest, nudity
from erase.evaluation.prompt_files import PromptRow
from erase.evaluation.stats import wilson
from erase.programs.images import classified
from erase.programs.progress import bar
from erase.programs.text.plan import Plan, label_of


def check_evaluators(config: SdConfig, plan: Plan) -> None:
    """Find out now, not after the training, that an evaluator cannot run.

    Raises:
        ValueError: for an unknown counting preset, a classifier that cannot be loaded, or a prompt of which it
            is not known what the classifier should see.
    """
    if config.until is not None:
        check_until(config, plan)
    if not (config.eval.images or config.until or config.eval.attacks):
        return
    if config.eval.nudity is not None:
        count_preset(config)
    if config.eval.classifier is not None:
        known = classes.labels_of(resources.tiny_path(config.eval.classifier))
        if paired(plan.rows, known):
            known = tuple(label.split("/")[0 if config.forget.axis != "style" else 1] for label in known)
        for row in plan.rows:
            label = label_of(row, config.forget.axis or "object")
            if label not in known:
                raise ValueError(
                    f"eval.classifier needs to know what a picture should show; the prompt {row.prompt!r} is labelled "
                    f"{label!r}, the classifier knows {', '.join(dict.fromkeys(known))}: use a prompt set with such "
                    "object (and style) columns"
                )


def check_until(config: SdConfig, plan: Plan) -> None:
    """Find out now that looks at the model could tell nothing.

    Raises:
        ValueError: for pictures that nothing judges, or a share of remaining ones that there are none of.
    """
    assert config.until is not None
    if config.eval.classifier is None and config.eval.nudity is None:
        raise ValueError("until needs eval.classifier or eval.nudity, to judge pictures by")
    if config.until.remain is not None and (config.eval.classifier is None or all(plan.forgotten)):
        raise ValueError(
            "until.remain needs eval.classifier, and prompts in eval.prompts that are not forgotten: give them, or "
            "until.remain=null"
        )


def judged(config: SdConfig, plan: Plan, folder: Path) -> tuple[list[bool], list[str] | None]:
    """Of a folder's pictures, in order: whether each shows what is forgotten, and the labels that a classifier gives.

    It is the classifier's word where there is one, else the detector's.
    """
    paths = [folder / row.file for row in manifest.read_manifest(folder)]
    if config.eval.classifier is None:
        return list(nudity.flags(look_for_nudity(config, paths, folder), count_preset(config)).values()), None
    seen = along_axis(config, plan, classified(paths, resources.tiny_path(config.eval.classifier))).predicted
    gone = concept(config, plan)
    return [name in gone for name in seen], list(seen)


def concept(config: SdConfig, plan: Plan) -> list[str]:
    """Labels of what is forgotten, in order; none where prompts have no labels."""
    both = zip(plan.rows, plan.forgotten, strict=True)
    labels = [label_of(row, config.forget.axis or "object") for row, gone in both if gone]
    return [label for label in dict.fromkeys(labels) if label is not None]


def along_axis(config: SdConfig, plan: Plan, guess: classes.ClassPredictions) -> classes.ClassPredictions:
    """Predictions of the labels that the run forgets some of: of composite ones, the half that it names."""
    if not paired(plan.rows, guess.labels):
        return guess
    return classes.axis(guess, 1 if config.forget.axis == "style" else 0)


def paired(rows: Sequence[PromptRow], labels: Sequence[str]) -> bool:
    """Whether rows and a classifier's labels both tell object and style."""
    return all(row.style is not None for row in rows) and all("/" in label for label in labels)


def side_of(plan: Plan, row: PromptRow) -> str:
    """Of a row that this run does not forget."""
    return "earlier" if row.prompt in plan.earlier else "remain"


def share(shown: Sequence[bool]) -> dict[str, Any]:
    """How many of N pictures show the concept: `n, shown, rate, ci95` (Wilson; fractions of 1)."""
    n, hits = len(shown), sum(shown)
    return {"n": n, "shown": hits, "rate": hits / n, "ci95": list(wilson(hits, n))}


def count_preset(config: SdConfig) -> nudity.CountPreset:
    """Which detections count.

    Raises:
        ValueError: unless a known preset, or classes and a threshold, are given.
    """
    wanted = config.eval.nudity
    assert wanted is not None
    if wanted.preset is not None:
        if wanted.preset not in nudity.PRESETS:
            raise ValueError(f"no counting preset {wanted.preset!r}; presets: {', '.join(nudity.PRESETS)}")
        return nudity.PRESETS[wanted.preset]
    if not wanted.classes or wanted.threshold is None:
        raise ValueError(f"eval.nudity needs a preset ({', '.join(nudity.PRESETS)}), or classes and threshold")
    return nudity.custom_preset(wanted.classes, wanted.threshold)


def look_for_nudity(config: SdConfig, paths: list[Path], folder: Path, *, strict: bool = True) -> detections.Detections:
    """Raw detections of a folder's pictures, kept beside it.

    Raises:
        ValueError: if the detector failed on a picture: it is not known to be safe. Unless `strict`, such pictures
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
    distributed.on_main(lambda: detections.save_detections(found, kept))
    return whole(found, strict)


def whole(found: detections.Detections, strict: bool) -> detections.Detections:
    """The same, if it is strict: without pictures on which the detector failed."""
    failed = [image for image in found.images if image.error is not None]
    if strict and failed:
        raise ValueError(f"the detector failed on {len(failed)} pictures, first {failed[0].file}: {failed[0].error}")
    return found


def count_nudity(
    found: detections.Detections, preset: nudity.CountPreset, plan: Plan, per_prompt: int
) -> tuple[dict[str, Any], list[bool | None]]:
    """The count over pictures of the erased concept, and for every prompt; flags of the former, in order.

    A picture on which the detector failed is in no count and its flag is None, as is the count of its prompt.
    """
    groups: dict[str, tuple[Any, ...]] = {}
    erased: tuple[Any, ...] = ()
    for number, (row, gone) in enumerate(zip(plan.rows, plan.forgotten, strict=True)):
        group = found.images[number * per_prompt : (number + 1) * per_prompt]
        groups[row.prompt] = groups.get(row.prompt, ()) + tuple(group)
        erased += tuple(group) if gone else ()
    part = replace(found, images=erased)
    result = nudity.count(part, preset)
    result["by_prompt"] = {}
    for prompt, group in groups.items():
        counted = nudity.count(replace(found, images=group), preset)
        result["by_prompt"][prompt] = None if counted["errors"] else counted["flagged"]
    flags = nudity.flags(part, preset)
    return result, [flags.get(image.file) for image in erased]


def count_classes(
    config: SdConfig, plan: Plan, paths: list[Path], forgotten: list[bool]
) -> tuple[dict[str, Any], dict[str, list[bool]]]:
    """Forget and remain accuracy, per label and per pair; whether each picture is right, in order, for each count."""
    assert config.eval.classifier is not None
    guess = classified(paths, resources.tiny_path(config.eval.classifier))
    rows = [row for row in plan.rows for _ in range(config.eval.images)]
    pairs = paired(rows, guess.labels)
    axis = config.forget.axis or "object"
    along = along_axis(config, plan, guess)
    across = classes.axis(guess, 1 if axis == "object" else 0) if pairs else None
    expected, shown = [str(label_of(row, axis)) for row in rows], along.predicted
    result: dict[str, Any] = {"classifier": guess.provenance, "axis": axis, "pairs": pairs}
    right: dict[str, list[bool]] = {}
    sides = ["forget" if gone else side_of(plan, row) for row, gone in zip(rows, forgotten, strict=True)]
    for side in ("forget", "earlier", "remain"):
        index = [i for i, found in enumerate(sides) if found == side]
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
        score |= {"object": row.object, "style": row.style}
        score["side"] = "forget" if row.prompt in plan.forget else "form" if gone else side_of(plan, row)
        if across is not None:
            other = row.style if axis == "object" else row.object
            score["other_accuracy"] = classes.accuracy(across.take(index), [str(other)] * len(index))["accuracy"]
            score["pair_accuracy"] = classes.accuracy(guess.take(index), [f"{row.object}/{row.style}"] * len(index))[
                "accuracy"
            ]
        result["per_prompt"][row.prompt] = score
    names = sorted({shown[i] for i, gone in enumerate(forgotten) if gone})
    gone_total = sum(forgotten)
    result["forget_shows"] = {
        name: sum(shown[i] == name for i, gone in enumerate(forgotten) if gone) / gone_total for name in names
    }
    return result, right
