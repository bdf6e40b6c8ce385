"""Curves of the training metrics, as points of SVG polylines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from erase.evaluation.page.names import name_of
from erase.evaluation.page.words import capital, is_number

MAX_POINTS = 600
_WIDTH, _HEIGHT = 600, 150


@dataclass(frozen=True)
class Curve:
    """A curve in the chart's own units."""

    name: str
    runs: tuple[str, ...]
    """SVG points; a value that is not a number ends one and starts the next."""
    last: str


@dataclass(frozen=True)
class Chart:
    """Curves on common axes."""

    title: str
    lines: tuple[Curve, ...]
    low: str
    high: str
    first: str
    last: str
    gaps: int
    """Values that were not numbers."""


def charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for the losses together, and one for every other number that is measured more than once."""
    names = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if key not in ("step", "seconds", "look_seconds")
    ]
    names = [key for key in names if sum(is_number(row.get(key)) for row in rows) > 1]
    losses = [key for key in names if key.endswith("loss")]
    groups = [losses] if losses else []
    # Counters that stayed at 0 are in the table; a chart of a flat line adds nothing.
    groups += [[key] for key in names if key not in losses and any(row.get(key) for row in rows)]
    return [_chart(rows, group) for group in groups]


def _chart(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Chart:
    steps = [float(row["step"]) if is_number(row.get("step")) else float(i) for i, row in enumerate(rows)]
    values = [float(row[name]) for name in names for row in rows if is_number(row.get(name))]
    low, high = min(values), max(values)
    left, right = min(steps), max(steps)
    lines = []
    gaps = 0
    for name in names:
        runs: list[list[tuple[float, float]]] = [[]]
        for step, row in zip(steps, rows, strict=True):
            value = row.get(name)
            if is_number(value):
                runs[-1].append((step, float(row[name])))
            elif name in row:
                gaps += 1
                runs.append([])
        points = tuple(
            " ".join(
                f"{_scale(x, left, right) * _WIDTH:.1f},{(1 - _scale(y, low, high)) * _HEIGHT:.1f}"
                for x, y in _thin(run)
            )
            for run in runs
            if run
        )
        own = name_of(name)
        last = own.show(next(y for run in reversed(runs) if run for _, y in run[-1:]))
        lines.append(Curve(own.words, points, last))
    first, *others = (line.name for line in lines)
    title, shown = " and ".join([first, *(name[:1].lower() + name[1:] for name in others)]), name_of(names[0]).show
    return Chart(capital(title), tuple(lines), shown(low), shown(high), f"{left:g}", f"{right:g}", gaps)


def _scale(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _thin(run: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MAX_POINTS` points: the lowest and highest of each stretch, so that no spike is lost."""
    if len(run) <= MAX_POINTS:
        return list(run)
    stretch = -(-2 * len(run) // MAX_POINTS)
    kept = []
    for start in range(0, len(run), stretch):
        part = run[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept
