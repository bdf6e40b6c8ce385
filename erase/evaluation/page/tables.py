"""A report as rows of text: title, counts, times, hashes, and whatever the page has no place of its own for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from erase.evaluation.page.names import name_of, path_words
from erase.evaluation.page.scores import HITS, ORDER, Score, read_score, read_scores
from erase.evaluation.page.verdict import is_classifier
from erase.evaluation.page.words import as_p, as_text, is_number

_SHOWN_ELSEWHERE = (
    frozenset(
        [
            "schema",
            "command",
            "method",
            "seed",
            "target",
            "mask",
            "before",
            "after",
            "retrained",
            "paired",
            "robustness",
        ]
    )
    | {"lora"}
    | {"timing", "memory", "versions", "preset", "unjudged"}
)
_COUNTED = (*HITS, "images", "n", "rate", "accuracy", "ci95", "errors")


def title(report: Mapping[str, Any]) -> str:
    """What was forgotten, and by which method; the settings are below."""
    target, method = report.get("target"), report.get("method")
    if isinstance(target, dict):
        target = target.get("forget")
    if isinstance(method, dict):
        method = method.get("name")
    return " · ".join(as_text(part) for part in (target, name_of("method", method).words if method else None) if part)


def facts(report: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Small print below the title."""
    base, method, target = run.get("base"), report.get("method"), report.get("target")
    if isinstance(target, dict) and isinstance(anchors := target.get("anchors"), list):
        target = {**target, "anchors": [anchor or "the empty prompt" for anchor in anchors]}
    values = {
        "model": base.get("model") if isinstance(base, dict) else None,
        "preset": report.get("preset"),
        **({key: value for key, value in target.items() if key != "forget"} if isinstance(target, dict) else {}),
        **({key: value for key, value in method.items() if key != "name"} if isinstance(method, dict) else {}),
        "steps": report["timing"].get("steps"),
        "seed": report.get("seed"),
    }
    return [(name_of(key).words, name_of(key).show(value)) for key, value in values.items() if value not in (None, [])]


Row = tuple[str, list[Score | None]]
Rest = tuple[str, list[str]]


def tables(
    report: Mapping[str, Any], sides: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[tuple[str, list[Row]]], list[Rest]]]:
    """(section, [(group, [(what, scores)])], [(what, values)]): a score or value for each side."""
    rows_by_section = []
    above = ("classify",) if is_classifier(report) else ()
    names = [name for name in dict.fromkeys(name for side in sides for name in side) if name != "pictures"]
    for section in sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        parts = [{section: side[section]} if section in side else {} for side in sides]
        scores = [read_scores(part) for part in parts]
        groups: dict[str, list[Row]] = {}
        for path in dict.fromkeys(path for found in scores for path in found):
            row: Row = (name_of(*above, *path).words, [found[path][0] if path in found else None for found in scores])
            within = [name_of(*above, *path[: end + 1]).words for end in range(1, len(path) - 1)]
            groups.setdefault(" · ".join(within), []).append(row)
        leaves = [dict(_leaves(part)) for part in parts]
        rest = [
            (path_words(path[1:], (*above, section)) or section, [found.get(path, "–") for found in leaves])
            for path in dict.fromkeys(path for found in leaves for path in found)
        ]
        rows_by_section.append((name_of(*above, section).words, list(groups.items()), rest))
    return rows_by_section


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """Every value of a tree that is not part of a score, in words."""
    rows: list[tuple[tuple[str, ...], str]] = []
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, dict):
            counted = _COUNTED if read_score(value) else ()
            rows.extend(_leaves({k: v for k, v in value.items() if k not in counted}, here))
        else:
            rows.append((here, name_of(*here).show(value)))
    return rows


def errors(side: Mapping[str, Any], name: str) -> list[str]:
    """A line for each image that an evaluator could not look at."""
    found = []
    for value in side.values():
        if not isinstance(value, dict):
            continue
        for error in value.get("errors") or []:
            what = f"{error.get('file')}: {error.get('error')}" if isinstance(error, dict) else str(error)
            found.append(f"{name}: {what}")
        found.extend(errors({k: v for k, v in value.items() if k != "errors"}, name))
    return found


def flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Every value of a tree below `path`, scores in words."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        here = (*path, str(key))
        score, name = read_score(value), name_of(*here)
        if score:
            rows.append((name.words, str(score)))
        elif isinstance(value, dict):
            rows.extend((f"{name.words} · {more}", text) for more, text in flat(value, here))
        else:
            rows.append((name.words, name.show(value)))
    return rows


def paired(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The exact McNemar tests of before and after: what was counted, and p."""
    rows = []
    for key, p in report["paired"].items():
        what = key.removesuffix("_mcnemar_p")
        if what == key:  # of no count: a CLIP score has a line of its own
            continue
        above: tuple[str, ...] = () if what in ORDER else ("classes",)
        if is_classifier(report):
            above = ("classify", "classes")
        elif what.startswith("clip_"):
            above, what = ("clip",), what.removeprefix("clip_")
        rows.append((name_of(*above, what).words, as_p(p) if is_number(p) else as_text(p)))
    return rows


def mask_densities(mask: Any) -> tuple[float | None, list[tuple[str, float]]]:
    """The density of a mask and of each of its layers, as fractions of 1."""
    if not isinstance(mask, dict):
        return None, []
    density = mask.get("density")
    layers = mask.get("per_layer") or {}
    if not isinstance(layers, dict) or not all(is_number(v) and 0 <= v <= 1 for v in layers.values()):
        raise ValueError("report.json: mask.per_layer is not a mapping of layer to density, 0 to 1")
    return (float(density) if is_number(density) else None), [(name, float(v)) for name, v in layers.items()]


def hashes(report: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was made of and what it counted with, by SHA-256."""
    rows: list[tuple[str, str]] = []
    base = run.get("base")
    for what, weights in (
        ("base model", base.get("weights") if isinstance(base, dict) else None),
        ("erased model", (report["after"].get("pictures") or {}).get("weights")),
    ):
        rows += [(f"{what}: {file}", str(value)) for file, value in (weights or {}).items()]
    data = run.get("data")
    for side, files in (data if isinstance(data, dict) else {}).items():
        if isinstance(files, dict) and files:
            whole = hashlib.sha256("\n".join(map(str, files.values())).encode("utf-8")).hexdigest()
            rows.append((f"{side} data, {len(files)} files, of the list of their hashes", whole))
    seen = {path_words(path): text for path, text in _leaves(report["after"]) if path[-1].endswith("sha256")}
    return [*rows, *seen.items()]


def costs(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Times of the run's parts, and the most memory that it used; what is not known or 0 is left out."""
    timing = report["timing"]
    steps = timing.get("steps")
    rows = []
    for key, value in timing.items():
        if key != "steps" and value is not None:
            times = f" × {steps}" if key == "step_s" and steps else ""
            rows.append((name_of(key).words, name_of(key).show(value) + times))
    return rows + [(name_of(key).words, name_of(key).show(value)) for key, value in report["memory"].items() if value]


def others(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The sections that the page has no place of its own for."""
    return [
        (name_of(key).words, flat(value, (key,)) if isinstance(value, dict) else [(name_of(key).words, as_text(value))])
        for key, value in report.items()
        if key not in _SHOWN_ELSEWHERE
    ]
