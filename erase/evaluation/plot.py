"""A scatter plot as SVG, with intervals: forgetting against retention. No library, no network, no scripts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from html import escape

COLOURS = ("#0b6e99", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#4d7c0f", "#0f766e", "#a16207", "#475569", "#be185d")
DARK = ("#58b4dd", "#fb923c", "#4ade80", "#c084fc", "#f87171", "#a3e635", "#2dd4bf", "#facc15", "#94a3b8", "#f472b6")
"""The colours of the series, in the same order, where the reader's system is dark."""
PAPER = "#fff", "#14181c"
"""The background, light and dark."""
STYLE = "".join(
    [
        "<style>@media screen and (prefers-color-scheme: dark) {",
        f".scatter .paper {{ fill: {PAPER[1]} }}",
        " .scatter text { fill: #e6e9ec } .scatter .axis { stroke: #a0a9b2 }",
        *(f" .scatter .s{i} {{ fill: {c} }} .scatter .b{i} {{ stroke: {c} }}" for i, c in enumerate(DARK)),
        "}</style>",
    ]
)
"""Attributes have the light colours, which all programs read; browsers read this as well."""
MARKS = (
    "M-4,-4h8v8h-8z",
    "M0,-5L5,4H-5z",
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M0,-6L6,0L0,6L-6,0z",
    "M-5,-2h3v-3h4v3h3v4h-3v3h-4v-3h-3z",
)
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 400, 60, 45
LEGEND = 145
"""Width of the legend, at the right."""
INSET = 10
"""Between an axis and the marks, which are not to lie on its numbers."""
Interval = tuple[float, float]


def scatter(
    points: Sequence[tuple[str, float, float]],
    x_label: str,
    y_label: str,
    ringed: Collection[int] = (),
    names: Sequence[str] = (),
    bars: Sequence[tuple[Interval | None, Interval | None]] = (),
    ranges: Sequence[tuple[float | None, float | None]] = ((None, None), (None, None)),
    legend: bool = True,
) -> str:
    """An SVG image of (series, x, y), a colour and a mark for each series, light or dark; the axes span what there is.

    Args:
        points: what is drawn.
        x_label: of the axis across.
        y_label: of the axis up.
        ringed: numbers of the points on the Pareto front, which get a ring.
        names: of the points; by default their series'.
        bars: of each point the intervals across and up, `None` where it has none; by default none has.
        ranges: the least and the most that a value across, and one up, can be; no axis goes further.
        legend: whether the series are named at the right; see `key` for a legend elsewhere.

    Raises:
        ValueError: without points.
    """
    if not points:
        raise ValueError("nothing to plot")
    series = list(dict.fromkeys(name for name, _, _ in points))
    bars = bars or [(None, None)] * len(points)
    x0, x1 = _span([x for _, x, _ in points], [wide for wide, _ in bars], *ranges[0])
    y0, y1 = _span([y for _, _, y in points], [high for _, high in bars], *ranges[1])

    whole, right, floor = WIDTH if legend else WIDTH - LEGEND, WIDTH - LEGEND - 25, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + INSET + (x - x0) / (x1 - x0) * (right - LEFT - 2 * INSET)

    def up(y: float) -> float:
        return floor - INSET - (y - y0) / (y1 - y0) * (floor - 20 - INSET)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="scatter" viewBox="0 0 {whole} {HEIGHT}" '
        f'font-family="sans-serif" font-size="13" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">',
        STYLE,
        f'<rect class="paper" width="{whole}" height="{HEIGHT}" fill="{PAPER[0]}"/>',
        f'<path class="axis" d="M{LEFT},{up(y1):.1f}V{floor}H{right}" fill="none" stroke="#333"/>',
    ]
    for x in _ticks(x0, x1):
        parts.append(f'<path class="axis" d="M{across(x):.1f},{floor}v4" stroke="#333"/>')
        parts.append(f'<text x="{across(x):.1f}" y="{floor + 17}" text-anchor="middle">{x:.6g}</text>')
    for y in _ticks(y0, y1):
        parts.append(f'<path class="axis" d="M{LEFT},{up(y):.1f}h-4" stroke="#333"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (floor + up(y1)) / 2
    parts.append(
        f'<text transform="translate(14,{middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for i in ringed:
        _, x, y = points[i]
        parts.append(f'<circle class="axis" cx="{across(x):.1f}" cy="{up(y):.1f}" r="9" fill="none" stroke="#333"/>')
    for (one, x, y), (wide, high) in zip(points, bars, strict=True):
        line = f"M{across(wide[0]):.1f},{up(y):.1f}H{across(wide[1]):.1f}" if wide else ""
        line += f"M{across(x):.1f},{up(high[0]):.1f}V{up(high[1]):.1f}" if high else ""
        if line:
            i = series.index(one)
            parts.append(f'<path class="b{i % len(DARK)}" d="{line}" stroke="{_colour(i)}" stroke-opacity="0.45"/>')
    for (one, x, y), name in zip(points, names or [name for name, _, _ in points], strict=True):
        parts.append(_mark(series.index(one), across(x), up(y), f"{name}: {x:.4g}, {y:.4g}"))
    beside = _legend(series, right + 25, bool(ringed)) if legend else []
    return "\n".join([*parts, *beside, "</svg>", ""])


def key(names: Sequence[str]) -> list[tuple[str, str]]:
    """A mark as an SVG image and its name for each series of a plot, for a legend beside it."""
    frame = '<svg xmlns="http://www.w3.org/2000/svg" class="scatter" viewBox="-8 -8 16 16" aria-hidden="true">'
    return [(f"{frame}{_mark(i, 0, 0, name)}</svg>", name) for i, name in enumerate(dict.fromkeys(names))]


def _legend(series: Sequence[str], x: float, ringed: bool) -> list[str]:
    """A mark and a name for each series, one below the other, and what a ring means."""
    parts = []
    for i, name in enumerate(series):
        parts.append(_mark(i, x, 30 + 18 * i, name))
        parts.append(f'<text x="{x + 11:.1f}" y="{34 + 18 * i}">{escape(name)}</text>')
    if ringed:
        y = 30 + 18 * len(series)
        parts.append(f'<circle class="axis" cx="{x:.1f}" cy="{y}" r="6" fill="none" stroke="#333"/>')
        parts.append(f'<text x="{x + 11:.1f}" y="{y + 4}">Pareto front</text>')
    return parts


def _span(
    values: Sequence[float], bars: Sequence[Interval | None], least: float | None, most: float | None
) -> Interval:
    """The ends of an axis: those of what is drawn and a margin, within what a value can be."""
    ends = [*values, *(end for bar in bars for end in bar or ())]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (
        low - margin if least is None else max(low - margin, least),
        high + margin if most is None else min(high + margin, most),
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, three to seven of them."""
    power = 10 ** math.floor(math.log10((high - low) / 3))
    step = max(power * factor for factor in (0.5, 1, 2, 5) if power * factor <= (high - low) / 3)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _mark(i: int, x: float, y: float, title: str) -> str:
    return (
        f'<path class="s{i % len(DARK)}" transform="translate({x:.1f},{y:.1f})" d="{MARKS[i % len(MARKS)]}" '
        f'fill="{_colour(i)}" fill-opacity="0.75"><title>{escape(title)}</title></path>'
    )
