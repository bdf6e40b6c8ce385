"""A comparison's page, `index.html`: what each method did in numbers, images side by side, tables and plots."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erase.evaluation.manifest import MANIFEST, read_manifest
from erase.evaluation.page import verdict
from erase.evaluation.page.folder import FOLDERS
from erase.evaluation.page.headline import headline
from erase.evaluation.page.names import Name, name_of
from erase.evaluation.page.render import render
from erase.evaluation.page.scores import Score
from erase.evaluation.page.verdict import is_classifier
from erase.evaluation.page.words import as_seconds, is_number
from erase.evaluation.plot import key
from erase.evaluation.stats import wilson
from erase.programs.comparison import tables
from erase.programs.comparison.images import Finished, base_names, image_blocks
from erase.programs.comparison.spec import ALL, Spec
from erase.store import files


@dataclass(frozen=True)
class Cell:
    """A number of the table of means."""

    text: str
    """In the unit of its column."""
    more: str = ""
    """Its spread and interval."""


def write_page(
    spec: Spec,
    done: Sequence[Finished],
    out: Path,
    axes: tuple[str, str],
    goals: Sequence[str],
    command: str,
    boxes: dict[Path, Any],
) -> None:
    """Write `index.html` into the comparison's folder.

    Args:
        spec: what is compared.
        done: the runs that have finished.
        out: the folder.
        axes: the numbers that are plotted, across and up.
        goals: the numbers of the Pareto front.
        command: as it was typed.
        boxes: see `image_blocks`.

    Raises:
        ValueError: for images that are not those of their folder's manifest.
    """
    results = [one.result for one in done]
    own, over = tables.rows_of(results, spec)
    best = tables.fronts([*own, *over], goals, spec)
    blocks, blurred, note = image_blocks(spec.pipeline, done, out, boxes)
    every = tables.keys_of(results)[3:]
    main = [name for name in spec.columns or dict.fromkeys([*axes, *goals]) if name in every]
    cost = (axes[0], "rte_s")
    values = {
        "title": _title(spec),
        "headline": _finished(spec, done),
        "facts": [],
        "methods": [(method, _in_numbers(part, out)) for method, part in _by_method(done).items()],
        "blocks": blocks,
        "width": max((len(block.columns) for block in blocks), default=0),
        "blurred": blurred,
        "left_out": note,
        "counts": _counts(done, out),
        "main": _means([*own, *over], main, best),
        "rest": _means([*own, *over], every, best) if set(every) - set(main) else None,
        "plots": [
            (plot, key([tables.series(method) for method, *_ in tables.plotted(own, pair)]))
            for pair in (axes, cost)
            if (plot := tables.plot(own, pair, best.get(tables.FRONT, []) if pair == axes else [], legend=False))
        ],
        "ringed": tables.FRONT in best,
        "first": results[0]["method"],
        "differences": _differences(results, main, spec),
        "runs": [_run(one) for one in done],
        "command": command,
    }
    files.write_text(out / "index.html", render("comparison.html", values))


def _title(spec: Spec) -> str:
    methods, targets = (list(dict.fromkeys(getattr(run, of) for run in spec.runs)) for of in ("method", "target"))
    return f"{_listed(methods, 'methods')} · {_listed(targets, 'targets')}"


def _listed(names: Sequence[str], what: str) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} {what}"


def _finished(spec: Spec, done: Sequence[Finished]) -> str:
    """How much of the comparison there is yet."""
    seeds = len({run.seed for run in spec.runs})
    whole = f"{len(spec.runs)} runs, {seeds} seed{'' if seeds == 1 else 's'} each"
    return f"{whole}." if len(done) == len(spec.runs) else f"{len(done)} of {whole}, have finished."


def _by_method(done: Sequence[Finished]) -> dict[str, list[Finished]]:
    return {method: [one for one in done if one.run.method == method] for method in _order(done, "method")}


def _order(done: Sequence[Finished], of: str) -> list[str]:
    return list(dict.fromkeys(str(getattr(one.run, of)) for one in done))


def _pooled(done: Sequence[Finished], side: str, out: Path) -> dict[str, Score]:
    """The counts of one model, `before`, `after` or `retrained`, over runs, by their words.

    Those of two judges that have the same words are told apart by the judge.
    """
    found: dict[tuple[str, ...], list[Score]] = {}
    names: dict[tuple[str, ...], str] = {}
    for one in _distinct(done, side, out):
        for line in verdict.lines(one.report):
            score: Score | None = getattr(line, side)
            if score is not None and not line.path[-1].endswith("_pairs"):
                found.setdefault(line.path, []).append(score)
                names[line.path] = line.name
    times = Counter(names.values())
    by = {path: f" (by {name_of('judge', path[0]).words})" if times[name] > 1 else "" for path, name in names.items()}
    return {names[path] + by[path]: _sum(scores) for path, scores in found.items()}


def _sum(scores: Sequence[Score]) -> Score:
    hits, total, errors = (sum(getattr(score, of) for score in scores) for of in ("hits", "total", "errors"))
    doubt = next((score.doubt for score in scores if score.doubt), "")
    if not total:
        return Score(hits, total, None, None, errors, doubt)
    return Score(hits, total, hits / total, wilson(hits, total), errors, doubt)


def _in_numbers(done: Sequence[Finished], out: Path) -> str:
    """What a method did, over all its runs."""
    parts = []
    for name, score in _pooled(done, "after", out).items():
        count = f"{score.percent} %" if is_classifier(done[0].report) else f"{score.hits} of {score.total}"
        parts.append(f"{name}: {'no images' if score.rate is None else count}")
    times = [one.result["rte_s"] for one in done if is_number(one.result.get("rte_s"))]
    if times:
        parts.append(f"mask and steps {as_seconds(statistics.fmean(times))}" + (" a run" if len(done) > 1 else ""))
    return "; ".join(parts) or "nothing was judged"


def _distinct(done: Sequence[Finished], side: str, out: Path) -> list[Finished]:
    """Runs without those whose model has the same images for the same target as another's: they would count twice."""
    found: dict[Any, Finished] = {}
    images = next(name for name, key in FOLDERS.items() if key == side)
    for one in done:
        folder = out / one.run.folder / "images" / images
        key: Any = one.run.folder
        if (folder / MANIFEST).is_file():
            rows = read_manifest(folder)
            key = one.run.target, frozenset((row.prompt, row.seed, row.index, row.sha256) for row in rows)
        found.setdefault(key, one)
    return list(found.values())


def _counts(done: Sequence[Finished], out: Path) -> dict[str, Any] | None:
    """A table of counts over seeds: for each target its bases, every method, and the retrained model."""
    heads: dict[str, None] = {}
    groups = []
    for target in _order(done, "target"):
        here = [one for one in done if one.run.target == target]
        parts, rows = _by_method(here), []
        named = base_names([part[0] for part in parts.values()])
        for method, part in parts.items():
            if method in named:
                rows.append((named[method], _pooled(part, "before", out)))
            rows.append((method, _pooled(part, "after", out)))
        rows.append(("retrained", _pooled(next(iter(parts.values())), "retrained", out)))
        heads |= dict.fromkeys(name for _, found in rows for name in found)
        groups.append((target, [(name, found) for name, found in rows if found]))
    if not heads:
        return None
    return {
        "heads": list(heads),
        "groups": [
            (target, [(name, [found.get(head) for head in heads]) for name, found in rows]) for target, rows in groups
        ],
    }


def _means(
    rows: Sequence[tables.Row], names: Sequence[str], best: Mapping[str, Sequence[tables.Place]]
) -> dict[str, Any]:
    """A table of means over seeds, in the units of its headings."""
    return {
        "heads": [name_of("summary", name).heading for name in names],
        "rows": [
            (
                method,
                "all targets" if target == ALL else target,
                [_cell(some, name) for name in names],
                [(method, target) in on for on in best.values()],
            )
            for method, target, some in rows
        ],
        "fronts": [name_of("summary", name).words for name in best],
    }


def _cell(results: Sequence[tables.Result], name: str) -> Cell:
    values, called = tables.values_of(results, name), name_of("summary", name)
    if not values or isinstance(values[0], str):
        return Cell(tables.spread(results, name))
    more = f"± {_number(statistics.stdev(values), called)}" if len(values) > 1 else ""
    if ends := tables.interval(results, name):
        more += f" ({_number(ends[0], called)} to {_number(ends[1], called)})"
    return Cell(_number(tables.mean(results, name), called), more)


def _number(value: float, called: Name, sign: str = "") -> str:
    """In the unit of its name, without that."""
    digits = ".1f" if called.unit in ("share", "%", "points", "s") else ".3g"
    return f"{called.scale * value:{sign}{digits}}".replace("-", "−")


def _differences(results: Sequence[tables.Result], names: Sequence[str], spec: Spec) -> list[tuple[str, ...]]:
    """Method, target, number with its unit, mean difference, interval, and what it says."""
    rows: list[tuple[str, ...]] = []
    for method, target, name, found in tables.differences(results, names, spec):
        called, (ends, says) = name_of("summary", name), tables.judged(found)
        unit = {"share": "points", "%": "points"}.get(called.unit, called.unit)
        mean = _number(statistics.fmean(found), called, "+")
        between = "–" if ends is None else " to ".join(_number(end, called, "+") for end in ends)
        where = "all targets" if target == ALL else target
        rows.append((method, where, f"{called.words}, {unit}" if unit else called.words, mean, between, says))
    return rows


def _run(one: Finished) -> tuple[str, str, int, str, str]:
    """Method, target, seed, headline, and the address of its page within the folder."""
    report = {"before": {}, "after": {}, **one.report}
    record = {"config": one.run.settings}
    said = headline(report, record, verdict.lines(report))
    return one.run.method, one.run.target, one.run.seed, said, (one.run.folder / "report.html").as_posix()
