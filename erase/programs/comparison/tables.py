"""The numbers of a comparison: means over seeds with their spread and interval, Pareto fronts, differences, plots."""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erase.evaluation.page.names import name_of
from erase.evaluation.plot import scatter
from erase.evaluation.stats import pareto_front, t_interval
from erase.programs.comparison.spec import ALL, Spec
from erase.store import files

Result = Mapping[str, Any]
"""A run: its `method`, `target` and `seed`, and the numbers of its summary."""
Row = tuple[str, str, list[Result]]
"""Method, target and their runs; over all targets the target is `ALL`, over a part of them it says how many."""
Place = tuple[str, str]
"""Method and target."""
FRONT = "front"
"""The Pareto front of a job's goals; with what the worst attack brings back as a further one, `ATTACKED_FRONT`."""
ATTACKED_FRONT = "front_attacked"


def write(results: Sequence[Result], out: Path, spec: Spec, axes: tuple[str, str], goals: Sequence[str]) -> None:
    """The tables and the plot.

    Args:
        results: a run each.
        out: the comparison's folder.
        spec: what is compared, and which columns are asked for.
        axes: the numbers across and up.
        goals: the numbers of the Pareto front.
    """
    keys = keys_of(results)
    names = spec.columns or keys[3:]
    own, over = rows_of(results, spec)
    best = fronts([*own, *over], goals, spec)
    lines = table([*own, *over], names, axes, best)
    if "rte_s" in names:
        lines += ["", "rte_s: seconds of mask and steps, without those of the data that the runs share (data_s)"]
    files.write_text(out / "table.md", "\n".join(lines) + "\n")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(keys)
    writer.writerows([result.get(k) for k in keys] for result in results)
    files.write_text(out / "table.csv", buffer.getvalue())
    on = {
        name: {target: [m for m, t in rows if t == target] for target in dict.fromkeys(t for _, t in rows)}
        for name, rows in best.items()
    }
    files.write_json(out / "results.json", {"schema": 1, "runs": list(results), FRONT: {}} | on)
    if image := plot(own, axes, best.get(FRONT, [])):
        files.write_text(out / "forgetting.svg", image)


def table(
    rows: Sequence[Row], names: Sequence[str], axes: tuple[str, str], best: Mapping[str, Sequence[Place]]
) -> list[str]:
    """The lines of `table.md`."""
    lines = _head(["method", "target", *names, *best])
    for method, target, some in rows:
        cells = [spread(some, name) + (bracket(some, name) if name in axes else "") for name in names]
        cells += ["●" if (method, target) in on else "" for on in best.values()]
        lines.append(_line([method, target, *cells]))
    return lines


def _head(names: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: Sequence[str]) -> str:
    """A row of a Markdown table, whatever its cells hold."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def plotted(rows: Sequence[Row], axes: tuple[str, str]) -> list[Row]:
    """The rows that a plot shows: those that have both numbers."""
    return [row for row in rows if all(r.get(axis) is not None for r in row[2] for axis in axes)]


def series(method: str) -> str:
    """Of a plot: the variants of a sweep are one."""
    return method.partition(" [")[0]


def plot(rows: Sequence[Row], axes: tuple[str, str], best: Sequence[Place], *, legend: bool = True) -> str | None:
    """A point for each method and target that has both numbers, in the units of `NAMES`; `None` without any."""
    shown = plotted(rows, axes)
    if not shown:
        return None
    named = [name_of("summary", axis) for axis in axes]
    scales = [name.scale for name in named]
    points: list[Any] = [
        (
            series(method),
            *(scale * mean(some, axis) for axis, scale in zip(axes, scales, strict=True)),
        )
        for method, _, some in shown
    ]
    bars: list[Any] = [
        tuple(
            None if found is None else (scale * found[0], scale * found[1])
            for axis, scale in zip(axes, scales, strict=True)
            for found in [interval(some, axis)]
        )
        for *_, some in shown
    ]
    many = len({target for _, target, _ in rows}) > 1
    return scatter(
        points,
        named[0].heading,
        named[1].heading,
        [number for number, (method, target, _) in enumerate(shown) if (method, target) in best],
        [f"{method}, {target}" if many else method for method, target, _ in shown],
        bars,
        [(name.least, None if name.most is None else name.scale * name.most) for name in named],
        legend,
    )


def keys_of(results: Sequence[Result]) -> list[str]:
    """`method`, `target`, `seed`, and the names of all numbers that some run has."""
    return list(dict.fromkeys(key for result in results for key in result))


def rows_of(results: Sequence[Result], spec: Spec) -> tuple[list[Row], list[Row]]:
    """A row for each method and target, in order of appearance, and where there are several targets one over all.

    A method that has runs of some targets alone is not called a mean over all.
    """
    pairs = dict.fromkeys((str(r["method"]), str(r["target"])) for r in results)
    own = [(method, target, group(results, method, target)) for method, target in pairs]
    counts = Counter(method for method, _ in pairs)
    over = [(method, spec.over(count), group(results, method)) for method, count in counts.items()]
    return own, over if len({target for _, target in pairs}) > 1 else []


def group(results: Sequence[Result], method: str, target: str | None = None) -> list[Result]:
    """The runs of a method, over seeds and, without a target, over targets."""
    return [r for r in results if r["method"] == method and target in (None, r["target"])]


def fronts(rows: Sequence[Row], goals: Sequence[str], spec: Spec) -> dict[str, list[Place]]:
    """The rows on each Pareto front that has any: of methods of the same base models, without means of some targets."""
    bases = spec.bases
    whole = {str(result["target"]) for _, _, some in rows for result in some} | {ALL}
    ranked = [row for row in rows if row[1] in whole]
    found: dict[str, list[Place]] = {FRONT: [], ATTACKED_FRONT: []}
    for base in dict.fromkeys(bases.values()):
        alike = [row for row in ranked if bases[row[0]] == base]
        found[FRONT] += front(alike, goals)
        found[ATTACKED_FRONT] += front(alike, [*goals, "attacked"])
    return {name: places for name, places in found.items() if places}


def front(rows: Sequence[Row], goals: Sequence[str]) -> list[Place]:
    """Method and target of the rows on their target's Pareto front; rows that lack one of the numbers are left out.

    Which way a number is better `NAMES` says.
    """
    found = []
    for target in dict.fromkeys(target for _, target, _ in rows):
        methods, points = [], []
        for method, where, some in rows:
            if where != target or any(r.get(goal) is None for r in some for goal in goals):
                continue
            methods.append(method)
            better = {goal: name_of("summary", goal).better for goal in goals}
            points.append([sign * mean(some, goal) for goal, sign in better.items()])
        found += [(method, target) for method, on in zip(methods, pareto_front(points), strict=True) if on]
    return found


Difference = tuple[str, str, str, list[float]]
"""Method, target, number, and its differences from the first method: a seed each, or over several targets one each."""


def differences(results: Sequence[Result], columns: Sequence[str], spec: Spec) -> list[Difference]:
    """Each method's differences from the first one, paired by target and seed; none where base models differ."""
    first, *others = dict.fromkeys(str(r["method"]) for r in results)
    bases = spec.bases
    others = [method for method in others if bases[method] == bases[first]]
    names = list(columns) or keys_of(results)[3:]
    targets = list(dict.fromkeys(str(r["target"]) for r in results))
    values: dict[Any, Result] = {(r["method"], r["target"], r["seed"]): r for r in results}
    rows = []
    for method in others:
        for target in [*targets, *([ALL] if len(targets) > 1 else [])]:
            for name in names:
                found: dict[str, list[float]] = {}
                for (what, where, seed), result in values.items():
                    a: Any = result.get(name)
                    b: Any = values.get((first, where, seed), {}).get(name)
                    if what == method and target in (where, ALL) and all(type(x) in (int, float) for x in (a, b)):
                        found.setdefault(where, []).append(a - b)
                if found:
                    called = spec.over(len(found)) if target == ALL else target
                    rows.append((method, called, name, independent(found)))
    return rows


def differences_table(results: Sequence[Result], spec: Spec) -> list[str]:
    """The lines of `differences.md`: means with Student's intervals, over seeds or over targets (`independent`)."""
    first = str(results[0]["method"])
    lines = _head(["method", "target", "number", f"difference from {first}", "95 % interval", ""])
    rows = differences(results, spec.columns, spec)
    for method, target, name, found in rows:
        ends, says = judged(found)
        between = "–" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"
        lines.append(_line([method, target, name, f"{statistics.fmean(found):+.3f}", between, says]))
    return lines if rows else []


def independent(found: Mapping[str, list[float]]) -> list[float]:
    """Values by target as an interval needs them: of one target its seeds', of several a mean over seeds each.

    Seeds of one target are alike: as many values, they would make the interval over targets too narrow.
    """
    several = list(found.values())
    return several[0] if len(several) == 1 else [statistics.fmean(values) for values in several]


def judged(found: Sequence[float]) -> tuple[tuple[float, float] | None, str]:
    """The interval of a mean difference, where there is one, and what it says."""
    if len(found) < 2:
        return None, "one run: no interval"
    if max(found) - min(found) < 1e-9:
        return None, "the same each time: no interval"
    low, high = t_interval(found)
    return (low, high), "inside its interval: no difference shown" if low <= 0 <= high else "a difference"


def values_of(results: Sequence[Result], name: str) -> list[Any]:
    """Those that are known."""
    return [r[name] for r in results if r.get(name) is not None]


def mean(results: Sequence[Result], name: str) -> float:
    """A number's mean; over several targets each counts the same, however many seeds of it have finished."""
    return statistics.fmean(independent(_by_target(results, name)))


def _by_target(results: Sequence[Result], name: str) -> dict[str, list[Any]]:
    """The known values of a number."""
    found: dict[str, list[Any]] = {}
    for result in results:
        if (value := result.get(name)) is not None:
            found.setdefault(str(result["target"]), []).append(value)
    return found


def interval(results: Sequence[Result], name: str) -> tuple[float, float] | None:
    """Student's 95 % interval of a number's mean, within its range; `None` of one value, of equal ones, of words.

    It is over seeds, or over targets where there are several (`independent`).
    """
    by_target = _by_target(results, name)
    if not by_target or isinstance(next(iter(by_target.values()))[0], str):
        return None
    values, called = independent(by_target), name_of("summary", name)
    if len(set(values)) < 2:
        return None
    low, high = t_interval(values)
    return (
        low if called.least is None else max(low, called.least),
        high if called.most is None else min(high, called.most),
    )


def bracket(results: Sequence[Result], name: str) -> str:
    """The `interval`, for a cell of the table; nothing where there is none."""
    found = interval(results, name)
    return f" [{found[0]:.3f}, {found[1]:.3f}]" if found else ""


def spread(results: Sequence[Result], name: str) -> str:
    """Mean, and ± sample standard deviation where there are several."""
    values = values_of(results, name)
    if not values:
        return "–"
    if isinstance(values[0], str):
        return ", ".join(dict.fromkeys(values))
    return f"{mean(results, name):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
