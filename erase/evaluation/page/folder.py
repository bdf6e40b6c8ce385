"""A run's folder, read and checked: its report, its metrics, and the images that its counts are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from erase.evaluation.manifest import MANIFEST, origin, read_manifest
from erase.evaluation.page.scores import SINGLE
from erase.store.files import read_json

FOLDERS = {"base": "before", "erased": "after", "lora": "lora", "retrained": "retrained"}
"""Folders of images, and the keys of their counts."""
MOST = 200
"""Prompts or labels whose counts a page shows, and texts of a list."""


def read_report(run_dir: Path) -> dict[str, Any]:
    """The run's ``report.json``, with empty mappings for sections that it does not have.

    Raises:
        ValueError: the folder or the file is missing, or a section is not a mapping.
    """
    if not Path(run_dir).is_dir():
        raise ValueError(f"{run_dir}: no such run folder")
    path = Path(run_dir) / "report.json"
    if not path.is_file():
        raise ValueError(_no_report(Path(run_dir)))
    report = {"before": {}, "after": {}, "timing": {}, "versions": {}, "paired": {}, "memory": {}, **read_mapping(path)}
    for key in ("before", "after", "timing", "versions", "paired", "memory"):
        if not isinstance(report[key], dict):
            raise ValueError(f"{path}: '{key}' is not a mapping")
    for key in ("lora", "retrained"):
        if not isinstance(report.get(key, {}), dict):
            raise ValueError(f"{path}: '{key}' is not a mapping")
    return report


def _no_report(folder: Path) -> str:
    """What a folder without a `report.json` is, and what to name in its place."""
    if (folder / "compare.json").is_file():
        return f"{folder} holds a comparison, whose page is {folder / 'index.html'}; name one of {folder / 'runs'}"
    if (folder / "run.json").is_file():
        return f"{folder} holds a run that has not finished (no report.json): go on with it by --resume"
    near = sorted(path.parent for path in folder.glob("*/report.json"))
    hint = f", such as {near[0]}" if near else ""
    return f"{folder} is no run (no report.json): name the --out of an erase run that has finished{hint}"


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ValueError: it is missing, is not JSON, or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected a mapping")
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``.

    Raises:
        ValueError: a line is not JSON, or not a mapping.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON, or cut short ({error.msg})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} holds a {type(row).__name__}, expected a mapping")
        rows.append(row)
    return rows


def image_folders(run_dir: Path) -> dict[str, Path]:
    """The run's folders of images, the base first."""
    found = {path.name: path for path in sorted((Path(run_dir) / "images").glob("*")) if (path / MANIFEST).is_file()}
    return {
        name: found[name] for name in [*(n for n in FOLDERS if n in found), *(n for n in found if n not in FOLDERS)]
    }


def check_origin(run_dir: Path, report: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse images and counts that are not of the model they are reported for, or are not pairs."""
    base = run.get("base")
    weights = base.get("weights") if isinstance(base, dict) else None
    folders = image_folders(run_dir)
    swapped = "base and erased are swapped, or of another run"
    for name, key in FOLDERS.items():
        said = report.get(key, {}).get("pictures")
        said = said if isinstance(said, dict) else {}
        sources = {f"report.json: '{key}'": said.get("weights")}
        if name in folders:
            there = origin(folders[name])
            sources[f"images/{name}"] = there["weights"]
            if said and said != there:
                raise ValueError(f"{folders[name]}: not the images that report.json has counted: {swapped}")
        for what, theirs in sources.items():
            # A retrained model may be any, the base itself too.
            if weights and theirs and name != "retrained" and (name == "base") != (theirs == weights):
                which = "other weights than the base model's" if name == "base" else "the base model's weights"
                raise ValueError(f"{run_dir}: {what} is of {which} by run.json: {swapped}")
    first, ours = "", list[tuple[str, int, int]]()
    for name, folder in folders.items():
        keys = [(row.prompt, row.seed, row.index) for row in read_manifest(folder)]
        if not first:
            first, ours = name, keys
        elif keys != ours:
            row = next((i for i, pair in enumerate(zip(ours, keys, strict=False)) if pair[0] != pair[1]), None)
            where = f"{len(ours)} and {len(keys)} images" if row is None else f"row {row + 1} differs"
            raise ValueError(
                f"{run_dir}: images/{first} and images/{name} are not of the same prompts and seeds ({where}): "
                "they are not pairs"
            )


def shortened(side: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of a model as a page shows them: of very many prompts, labels or texts the first, and how many more.

    Images that could not be looked at are all there: they are counted.
    """
    found: dict[str, Any] = {}
    for key, value in side.items():
        if isinstance(value, dict):
            cut = key in SINGLE and len(value) > MOST
            more = {f"and {len(value) - MOST} more": "in report.json"} if cut else {}
            value = shortened(dict(islice(value.items(), MOST)) if cut else value) | more
        elif isinstance(value, list) and key != "errors" and len(value) > MOST:
            value = [*value[:MOST], f"and {len(value) - MOST} more in report.json"]
        found[key] = value
    return found
