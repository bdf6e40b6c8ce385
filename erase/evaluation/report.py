"""A run's report: one self-contained page, and its main lines for a terminal.

The page holds the verdict, the cost, the images, the counts, the curves and how it was made; `erase.evaluation.page`
has its parts, and `erase.evaluation.page.names` the words for every key. It asks for nothing from anywhere (its own
content policy forbids it, and any script but its own), so it can be mailed, printed and read on a phone. What a run
does not have is not shown; what it has and the page has not heard of is shown as a plain table. Images that are not
those the numbers are of are refused.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erase.evaluation.columns import match
from erase.evaluation.grid import Blur
from erase.evaluation.page import charts, headline, images, robustness, tables
from erase.evaluation.page import verdict as judgement
from erase.evaluation.page.folder import (
    FOLDERS,
    check_origin,
    image_folders,
    read_mapping,
    read_metrics,
    read_report,
    shortened,
)
from erase.evaluation.page.render import render
from erase.evaluation.page.scores import read_scores
from erase.evaluation.page.words import as_percent, as_text
from erase.store.files import write_text


def write_html(run_dir: Path, *, blur: Blur | None = None) -> Path:
    """Write ``report.html`` from what a run's folder holds.

    Read are ``report.json`` (which must be there), and where they are: ``run.json``, ``metrics.jsonl``, and
    ``images/base``, ``images/erased`` and others beside them with their manifests and settings.

    Args:
        run_dir: the run's folder.
        blur: the boxes to hide in each image that is shown (see `pictures`); ``None`` hides nothing.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: the folder or its report.json is missing, a file is not what it should be, an image to show
            is not in ``blur``, or images are not those that the counts are of: of other weights (base and
            erased swapped), or of other prompts or seeds in base and erased.
    """
    run_dir = Path(run_dir)
    report = read_report(run_dir)
    run = read_mapping(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    check_origin(run_dir, report, run)
    report |= {key: shortened(report[key]) for key in FOLDERS.values() if key in report}
    values = _page_values(run_dir, report, run, blur)
    path = run_dir / "report.html"
    write_text(path, render("page.html", values))
    return path


def _page_values(run_dir: Path, report: Mapping[str, Any], run: Mapping[str, Any], blur: Blur | None) -> dict[str, Any]:
    """What the template shows, by the names that it knows."""
    sides = {key: report[key] for key in FOLDERS.values() if key in report or key in ("before", "after")}
    metrics = read_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").is_file() else []
    shown, left_out = images.image_blocks(run_dir, report, blur)
    density, layers = tables.mask_densities(report.get("mask"))
    command = report.get("command") or run.get("command") or ""
    found = judgement.lines(report)
    return {
        "title": tables.title(report) or run_dir.name,
        "headline": headline.headline(report, run, found),
        "zero_shot": [line for line in (calibration(report), clip_score(report)) if line],
        "facts": tables.facts(report, run),
        "verdict": judgement.grouped(found),
        "percent": judgement.is_classifier(report),
        "costs": tables.costs(report),
        "paired": tables.paired(report),
        "errors": [line for key, side in sides.items() for line in tables.errors(side, key)],
        "blocks": shown,
        "width": max((len(block.columns) for block in shown), default=0),
        "left_out": left_out,
        "blurred": blur is not None,
        "sides": list(sides),
        "tables": tables.tables(report, list(sides.values())),
        "charts": charts.charts(metrics),
        "final": tables.flat(metrics[-1]) if metrics else [],
        "density": None if density is None else f"{as_percent(density)} %",
        "layers": layers,
        "robustness": robustness.section(report.get("robustness")),
        "through": images.came_through(run_dir, came_through(report), blur),
        "others": tables.others(report),
        "versions": [(name, as_text(value)) for name, value in report["versions"].items()],
        "hashes": tables.hashes(report, run),
        "command": shlex.join(map(str, command)) if isinstance(command, list) else str(command),
        "run": json.dumps(run, indent=2, ensure_ascii=False) if run else None,
    }


def verdict(report: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> list[str]:
    """The headline and a line for each score, before and after, for a terminal.

    A zero-shot judge's lines say how well it knows the base's images, and the CLIP score of what remains.

    Args:
        report: the run's.
        run: what ``run.json`` holds; of nothing judged it tells why.
    """
    whole = {"before": {}, "after": {}, "paired": {}, **report}
    found = judgement.lines(whole)
    scores = [
        f"{line.name}: {line.before or '–'} → {line.after or '–'}" + (f", {line.said}" if line.said else "")
        for line in found
    ]
    first = headline.headline(whole, run or {}, found)
    return [line for line in (first, calibration(whole), *scores, clip_score(whole)) if line]


def calibration(report: Mapping[str, Any]) -> str | None:
    """How well a zero-shot judge knows the base's images; `None` where there is none."""
    clip = report["before"].get("clip", {})
    return f"{clip['clip']}: {clip['calibration']}" if "calibration" in clip else None


def clip_score(report: Mapping[str, Any]) -> str | None:
    """The CLIP score of the remaining prompts, before and after; `None` where there is none of it."""
    before, after = (report[when].get("clip", {}).get("score") for when in ("before", "after"))
    if before is None or after is None:
        return None
    change = report["paired"].get("clip_score")
    interval = "too few prompts for an interval"
    if change is not None:
        interval = "95 % interval of the difference {:+.2f} to {:+.2f}".format(*change["ci95"])
    return f"clip score of what remains: {before['score']:.2f} → {after['score']:.2f} ({before['scale']}; {interval})"


def lora_lines(found: Mapping[str, Any]) -> list[str]:
    """What a report's `lora` holds, for a terminal: the file, and counts of the base with it; none of none."""
    if not found:
        return []
    file, rest = found["file"], {key: value for key, value in found.items() if key != "file"}
    first = f"LoRA: {file['layers']} layers, {file['bytes'] / 1e6:.1f} MB, {100 * file['kept']:.1f} % of the change"
    shown = {path: score for path, (score, _) in read_scores(rest, whole=True).items()}
    return [first, *(f"base with the LoRA, {judgement.words(path)}: {score}" for path, score in shown.items())]


def robustness_lines(found: Mapping[str, Any]) -> list[str]:
    """A line for each attack of a report's `robustness`, for a terminal; none of none."""
    lines = [f"{name}: base {base}; erased {erased}" for name, base, erased in robustness.attacks(found)]
    for name, _, points in robustness.curves(found):
        lines += [f"{name}, {steps} steps: {score}" for steps, score, _ in points]
    return lines


def came_through(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Images that attacks brought back, as paths within the run's folder, by attack."""
    found = report.get("robustness")
    return robustness.came_through(found) if isinstance(found, dict) else []


def attacked(run_dir: Path) -> list[Path]:
    """The images of a run's folder that attacks brought back and its page shows.

    Raises:
        ValueError: the folder or its report.json is missing.
    """
    return [run_dir / path for _, paths in came_through(read_report(run_dir)) for path in paths]


def shown_images(run_dir: Path) -> list[Path]:
    """The images of a run's folder that its page shows: those to scan for what to hide.

    Raises:
        ValueError: the folder or its report.json is missing, or a manifest is not what it should be.
    """
    brought = [path for path in attacked(run_dir) if path.is_file()]
    folders = image_folders(run_dir)
    if not folders:
        return brought
    columns, rows = match(list(folders.values()))
    return [row[i] for _, numbers in images.chosen_columns(columns) for i in numbers for row in rows] + brought
