"""The images that a comparison's page shows: for each target the same seeds of the base and of every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erase import config
from erase.evaluation import detections, detector
from erase.evaluation.columns import Column, headings, match
from erase.evaluation.manifest import MANIFEST
from erase.evaluation.page.images import Block, encode, side
from erase.evaluation.people import may_show_people
from erase.programs.comparison.spec import Run, base_of

COLUMNS = 6
"""Most images of a row."""
MOST = 240
"""About as many images are on the page; rows become shorter where there are many of them."""


@dataclass(frozen=True)
class Finished:
    """A run that has finished."""

    run: Run
    report: dict[str, Any]
    result: dict[str, Any]
    """Its method, target and seed, and the numbers of its summary."""


@dataclass(frozen=True)
class _Part:
    """What becomes a block: rows of images, the same seed in each column."""

    title: str
    side: str
    heads: list[str]
    columns: list[Column]
    folders: dict[str, Path]
    images: list[list[Path]]


def image_blocks(
    pipeline: str, done: Sequence[Finished], out: Path, boxes: dict[Path, Any]
) -> tuple[list[Block], bool, str]:
    """The blocks, whether exposed parts are hidden in them, and a note on what they are of.

    Args:
        pipeline: of the comparison.
        done: the finished runs.
        out: the comparison's folder.
        boxes: what is hidden in images that were looked at before; those that are not in it are looked at now.

    Raises:
        ValueError: for images that are not those of their folder's manifest.
    """
    parts, missing, seeds = [], [], dict[int, None]()
    for target in dict.fromkeys(one.run.target for one in done):
        here = [one for one in done if one.run.target == target]
        seeds[here[0].run.seed] = None
        found = _parts([one for one in here if one.run.seed == here[0].run.seed], out)
        parts += found or []
        missing += [target] if found is None else []
    width = max(2, min(COLUMNS, MOST // max(1, sum(len(part.folders) for part in parts))))
    paths = [path for part in parts for row in part.images for path in row[:width]]
    prompts = {column.prompt for part in parts for column in part.columns}
    hidden = bool(paths) and any(_hides(one, pipeline, prompts) for one in done)
    if hidden and (new := [path for path in paths if path not in boxes]):
        boxes |= detections.exposed_boxes(detector.detect(new))
    folders = list(dict.fromkeys(folder for part in parts for folder in part.folders.values()))
    encoded = encode(folders, paths, boxes if hidden else None)
    blocks = []
    for part in parts:
        rows = tuple(
            (
                name,
                tuple(
                    replace(encoded[path], alt=f"{name}: {column}")
                    for path, column in zip(row[:width], part.columns, strict=False)
                ),
            )
            for name, row in zip(part.folders, part.images, strict=True)
        )
        heads = tuple((head, "") for head in part.heads[:width])
        blocks.append(Block(part.title, part.side, heads, rows))
    notes = [f"Of the runs with seed {', '.join(map(str, seeds))}."] if blocks else []
    notes += [f"No image is common to all methods of {', '.join(missing)}."] if missing else []
    return blocks, hidden, " ".join(notes)


def _hides(one: Finished, pipeline: str, prompts: set[str]) -> bool:
    """Whether a run's images are looked at for what to hide: by `eval.blur`, where they may be of persons."""
    wanted: Any = config.parse(one.run.settings, config.PIPELINES[pipeline])
    instead = one.report.get("target", {}).get("anchors") or ([""] if pipeline == "sd" else [])
    asked = getattr(wanted.eval, "nudity", None) is not None or may_show_people([*prompts, *instead])
    return bool(getattr(wanted.eval, "blur", False)) and asked


def base_names(same: Sequence[Finished]) -> dict[str, str]:
    """What the base models of a target's runs are called, by the first method that begins with each."""
    first: dict[Any, str] = {}
    for one in same:
        first.setdefault((base_of(one.run), one.run.before), one.run.method)
    return {method: "base" if len(first) == 1 else f"base of {method}" for method in first.values()}


def _parts(same: Sequence[Finished], out: Path) -> list[_Part] | None:
    """What is shown of a target, by its runs with one seed: images of what is forgotten, and of the rest.

    `None` where no image is common to all.
    """
    named, folders = base_names(same), dict[str, Path]()
    for one in same:
        own = out / one.run.folder / "images"
        if one.run.method in named:
            folders[named[one.run.method]] = own / "base"
        folders[one.run.method] = own / "erased"
    folders["retrained"] = out / same[0].run.folder / "images" / "retrained"
    folders = {name: folder for name, folder in folders.items() if (folder / MANIFEST).is_file()}
    if not folders:
        return []
    try:
        columns, images = match(list(folders.values()))
    except ValueError:  # methods with eval.prompts of their own
        return None
    sides = [side(column.prompt, same[0].report) for column in columns]
    gone = [number for number, found in enumerate(sides) if found == "forgotten"]
    rest = dict[str, int]()  # of each prompt that stays the first image
    for number, column in enumerate(columns):
        if not sides[number]:
            rest.setdefault(column.prompt, number)
    parts = []
    for name, numbers in (("forgotten", gone), ("others", sorted(rest.values()))):
        if numbers := numbers[:COLUMNS]:
            shown = [columns[i] for i in numbers]
            prompts = {column.prompt for column in shown}
            title, heads = headings(prompts.pop() if len(prompts) == 1 else "", shown)
            heads = heads if title else [column.prompt.strip() for column in shown]
            above = ": ".join(filter(None, (same[0].run.target, title)))
            parts.append(_Part(above, name, heads, shown, folders, [[row[i] for i in numbers] for row in images]))
    return parts
