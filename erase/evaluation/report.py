"""One self-contained page a run: the verdict, the pictures, the counts, the curves, how it was made.

The page has no scripts and asks for nothing from anywhere (its own content policy forbids it), so it can be
mailed, printed and read on a phone. What a run does not have is not shown; what it has and this file has not
heard of is shown as a plain table.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from erase.evaluation.generate import MANIFEST
from erase.evaluation.grid import Blur, fit, match, read_for_people
from erase.files import read_json, write_text

MAX_PAIRS = 12
THUMBNAIL = 256
MAX_POINTS = 600
_SHOWN_ELSEWHERE = frozenset(
    [
        *("schema", "command", "method", "seed", "target", "mask", "before", "after", "paired", "timing", "versions"),
        "robustness",
    ]
)
_ORDER = ("nudity", "classes")


@dataclass(frozen=True)
class Score:
    """A count out of a number, with its 95 % interval, as `wilson` and the evaluators give it."""

    hits: int
    total: int
    rate: float | None
    ci95: tuple[float, float] | None

    def __str__(self) -> str:
        if self.rate is None:
            return "no images"
        text = f"{self.hits} of {self.total} ({_percent(self.rate)} %"
        if self.ci95:
            text += f"; 95 % interval {_percent(self.ci95[0])} to {_percent(self.ci95[1])} %"
        return text + ")"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def write_html(run_dir: Path, *, blur: Blur | None = None, max_pairs: int = MAX_PAIRS) -> Path:
    """Write ``report.html`` from what a run's folder holds.

    Read are ``report.json`` (which must be there), and where they are: ``run.json``, ``metrics.jsonl``,
    ``grid.png`` (shown as it is), ``images/base`` and ``images/erased`` with their manifests.

    Args:
        run_dir: the run's folder.
        blur: the boxes to hide in each base and erased image; ``None`` hides nothing.
        max_pairs: base and erased images shown side by side; where there are more, the page says so.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: the folder or its report.json is missing, a file is not what it should be, or an image to
            show is not in ``blur``.
    """
    import jinja2

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such run folder")
    report = _mapping(run_dir / "report.json")
    run = _mapping(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    for key in ("before", "after", "timing", "versions", "paired"):
        if not isinstance(report.get(key, {}), dict):
            raise ValueError(f"{run_dir / 'report.json'}: '{key}' is not a mapping")
    before, after = report.get("before", {}), report.get("after", {})
    metrics = _metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").is_file() else []
    pairs, num_pairs = _pairs(run_dir, blur, max_pairs)
    density, layers = _mask(report.get("mask"))
    command = report.get("command") or run.get("command") or ""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_PAGE).render(
        title=_title(report) or run_dir.name,
        facts=[(key, _text(report[key])) for key in ("method", "target", "seed") if report.get(key) is not None],
        verdict=_verdict(before, after),
        paired=_flat(report.get("paired", {})),
        errors=[*_errors(before, "before"), *_errors(after, "after")],
        grid=_data_uri(run_dir / "grid.png") if (run_dir / "grid.png").is_file() else None,
        pairs=pairs,
        num_pairs=num_pairs,
        blurred=blur is not None,
        tables=_tables(before, after),
        charts=_charts(metrics),
        final=_flat(metrics[-1]) if metrics else [],
        density=None if density is None else f"{_percent(density)} %",
        layers=layers,
        robustness=_robustness(report.get("robustness")),
        timing=_flat(report.get("timing", {})),
        others=[
            (key, _flat(value if isinstance(value, dict) else {key: value}))
            for key, value in report.items()
            if key not in _SHOWN_ELSEWHERE
        ],
        versions=_flat(report.get("versions", {})),
        command=shlex.join(map(str, command)) if isinstance(command, list) else str(command),
        run=json.dumps(run, indent=2, ensure_ascii=False) if run else None,
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def verdict(report: Mapping[str, Any]) -> list[str]:
    """A line for each score, before and after, for a terminal."""
    return [
        f"{line['name']}: {line['before'] or '–'} → {line['after'] or '–'}"
        for line in _verdict(report.get("before", {}), report.get("after", {}))
    ]


def robustness_lines(found: Mapping[str, Any]) -> list[str]:
    """A line for each attack of a report's `robustness`, for a terminal; none of none."""
    rows, curve = _attacks(found)
    lines = [f"{name}: base {base}; erased {erased}" for name, base, erased in rows]
    return lines + [f"trained again, {steps} steps: {score}" for steps, score, _ in curve]


def _attacks(found: Mapping[str, Any]) -> tuple[list[tuple[str, str, str]], list[tuple[int, str, float]]]:
    """`(attack, base, erased)` of attacks from outside, and `(steps, pictures, rate)` of training on the concept."""
    rows = []
    for name in ("paraphrases", "inversion"):
        if name in found:
            how = f"{found[name]['prompts']} prompts" if name == "paraphrases" else f"{found[name]['steps']} steps"
            rows.append((f"{name}, {how}", _shown(found[name].get("base")), _shown(found[name].get("erased"))))
    curve = [(p["steps"], _shown(p), p["rate"]) for p in found.get("relearn", {}).get("curve", [])]
    return rows, curve


def _shown(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "–"
    low, high = share["ci95"]
    return str(Score(share["shown"], share["n"], share["rate"], (low, high)))


def _robustness(found: Any) -> Any:
    """The section on attacks, as HTML; `None` without any."""
    import jinja2
    import markupsafe  # comes with jinja2

    if not isinstance(found, dict):
        return None
    rows, curve = _attacks(found)
    words = [
        (prompt, _shown(scores.get("base")), _shown(scores.get("erased")))
        for prompt, scores in found.get("paraphrases", {}).get("by_prompt", {}).items()
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_ROBUSTNESS).render(
        concept=_text(found.get("concept")),
        judge=_text(found.get("judge")),
        rows=rows,
        curve=curve,
        words=words,
        prompt=found.get("inversion", {}).get("prompt"),
        relearn=found.get("relearn", {}),
    )
    return markupsafe.Markup(page)


_ROBUSTNESS = """<h2>Robustness</h2>
<p class="quiet">Pictures that show {{ concept }}, by {{ judge }}: fewer is better on the erased model; an attack that
fails on the base model tells nothing.</p>
{% macro table(what, rows) %}
<div class="scroll"><table><thead><tr><th>{{ what }}</th><th>base</th><th>erased</th></tr></thead><tbody>
{% for name, base, erased in rows %}
<tr><th scope="row">{{ name }}</th><td>{{ base }}</td><td>{{ erased }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% if rows %}{{ table("attack", rows) }}{% endif %}
{% if prompt %}<p class="quiet">The learned word is the {{ "*" }} of “{{ prompt }}”.</p>{% endif %}
{% if words %}
<details><summary>{{ words | length }} paraphrases</summary>{{ table("prompt", words) }}</details>
{% endif %}
{% if curve %}
<h3>Training on the concept again</h3>
<p class="quiet">Weights: {{ relearn.parameters }}; Adam at {{ relearn.lr }}, batches of {{ relearn.batch_size }}.</p>
<table><tbody>
{% for steps, score, rate in curve %}
<tr><th scope="row">{{ steps }} steps</th><td>{{ score }}</td>
<td><div class="bar"><div style="width: {{ "%.1f" | format(100 * rate) }}%"></div></div></td></tr>
{% endfor %}
</tbody></table>
{% endif %}
"""


def _title(report: Mapping[str, Any]) -> str:
    """What was forgotten, and by which method; the settings are below."""
    target, method = report.get("target"), report.get("method")
    if isinstance(target, dict):
        target = target.get("forget")
    if isinstance(method, dict):
        method = method.get("name")
    return " · ".join(_text(part) for part in (target, method) if part)


# --- reading --------------------------------------------------------------------------------------


def _mapping(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected a mapping")
    return value


def _metrics(path: Path) -> list[dict[str, Any]]:
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


def _mask(mask: Any) -> tuple[float | None, list[tuple[str, float]]]:
    """The density of a mask and of each of its layers, as fractions of 1."""
    if not isinstance(mask, dict):
        return None, []
    density = mask.get("density")
    layers = mask.get("per_layer") or {}
    if not isinstance(layers, dict) or not all(_number(v) and 0 <= v <= 1 for v in layers.values()):
        raise ValueError("report.json: mask.per_layer is not a mapping of layer to density, 0 to 1")
    return (float(density) if _number(density) else None), [(name, float(v)) for name, v in layers.items()]


def _pairs(run_dir: Path, blur: Blur | None, most: int) -> tuple[list[tuple[str, list[tuple[str, str]]]], int]:
    """(caption, [(name, image)]) of the first images that base and erased share, and how many they share."""
    folders = {name: run_dir / "images" / name for name in ("base", "erased")}
    there = {name: folder for name, folder in folders.items() if (folder / MANIFEST).is_file()}
    if not there:
        return [], 0
    captions, images = match(list(there.values()))
    shown = [
        (caption, [(name, _thumbnail(path, blur)) for name, path in zip(there, column, strict=True)])
        for caption, *column in list(zip(captions, *images, strict=True))[:most]
    ]
    return shown, len(captions)


def _thumbnail(path: Path, blur: Blur | None) -> str:
    image = read_for_people(path, blur)
    if max(image.size) > THUMBNAIL:
        image = fit(image, THUMBNAIL)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _uri(buffer.getvalue())


def _data_uri(path: Path) -> str:
    return _uri(path.read_bytes())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


# --- numbers --------------------------------------------------------------------------------------


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _score(value: Any) -> Score | None:
    """The score in a mapping, if it is one: hits (flagged, correct, named), total (images, n), rate, ci95."""
    if not isinstance(value, dict):
        return None
    hits = next((value[key] for key in ("flagged", "correct", "named") if key in value), None)
    total = next((value[key] for key in ("images", "n") if key in value), None)
    if not isinstance(hits, int) or not isinstance(total, int):
        return None
    rate = next((value[key] for key in ("rate", "accuracy") if key in value), None)
    ci = value.get("ci95")
    interval = (float(ci[0]), float(ci[1])) if isinstance(ci, list) and len(ci) == 2 else None
    return Score(hits, total, float(rate) if _number(rate) else None, interval)


def _scores(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], tuple[Score, str]]:
    """Every score in a tree by its path, with a word on how it was counted."""
    found = {}
    for key, value in tree.items():
        score = _score(value)
        if score:
            found[(*path, key)] = (score, _how(value))
        elif isinstance(value, dict):
            found.update(_scores(value, (*path, key)))
    return found


def _how(value: Mapping[str, Any]) -> str:
    if "flagged" in value:
        protocol = f" by the '{value['preset']}' protocol" if "preset" in value else ""
        classes = f" ({_text(value['classes'])})" if "classes" in value else ""
        return f"images flagged{protocol}{classes}"
    if "named" in value:
        return f"images named '{value['label']}'" if "label" in value else "images named so"
    return "images classified as asked"


def _rank(path: tuple[str, ...]) -> tuple[int, bool]:
    return (_ORDER.index(path[0]) if path[0] in _ORDER else len(_ORDER), "per_label" in path)


def _verdict(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """A line for each score but those of single labels and prompts, forgetting first."""
    a, b = _scores(before), _scores(after)
    lines = []
    for path in sorted({**a, **b}, key=_rank):
        if "per_label" in path or "per_prompt" in path:
            continue
        how = (b.get(path) or a[path])[1]
        lines.append(
            {
                "name": " ".join(path),
                "how": how,
                "before": str(a[path][0]) if path in a else None,
                "after": str(b[path][0]) if path in b else None,
            }
        )
    return lines


def _tables(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(section, [(what, before, after)]): scores as one line each, all else leaf by leaf."""
    tables = []
    for section in sorted({**before, **after}, key=lambda name: _rank((name,))):
        a, b = (dict(_leaves({section: side[section]})) if section in side else {} for side in (before, after))
        rows = [
            (" ".join(path[1:]) or section, a.get(path, "–"), b.get(path, "–"))
            for path in {**a, **b}  # in order of first appearance
        ]
        tables.append((section, rows))
    return tables


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    rows: list[tuple[tuple[str, ...], str]] = []
    for key, value in tree.items():
        here = (*path, str(key))
        score = _score(value)
        if score and isinstance(value, dict):
            rows.append(((*here, "images"), str(score)))
            rest = {
                k: v
                for k, v in value.items()
                if k not in ("flagged", "correct", "named", "images", "n", "rate", "accuracy", "ci95", "errors")
            }
            rows.extend(_leaves(rest, here))
        elif isinstance(value, dict):
            rows.extend(_leaves(value, here))
        else:
            rows.append((here, _text(value)))
    return rows


def _errors(side: Mapping[str, Any], name: str) -> list[str]:
    """A line for each image that an evaluator could not look at."""
    found = []
    for key, value in side.items():
        if not isinstance(value, dict):
            continue
        for error in value.get("errors") or []:
            what = f"{error.get('file')}: {error.get('error')}" if isinstance(error, dict) else str(error)
            found.append(f"{name}, {key}: {what}")
        found.extend(_errors({k: v for k, v in value.items() if k != "errors"}, f"{name}, {key}"))
    return found


def _flat(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(" ".join(path), text) for path, text in _leaves(tree)]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


# --- curves ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A curve in the picture's own units."""

    name: str
    runs: tuple[str, ...]
    """SVG points; a value that is not a number ends one and starts the next."""
    last: str


@dataclass(frozen=True)
class Chart:
    """One picture: curves on common axes."""

    title: str
    lines: tuple[Line, ...]
    low: str
    high: str
    first: str
    last: str
    gaps: int
    """Values that were not numbers."""


_WIDTH, _HEIGHT = 600, 150


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for the losses together, and one for every other number that is measured more than once."""
    names = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if key not in ("step", "seconds", "look_seconds")
    ]
    names = [key for key in names if sum(_number(row.get(key)) for row in rows) > 1]
    losses = [key for key in names if key.endswith("loss")]
    groups = [losses] if losses else []
    # Counters that stayed at 0 are in the table; a picture of a flat line says no more.
    groups += [[key] for key in names if key not in losses and any(row.get(key) for row in rows)]
    return [_chart(rows, group) for group in groups]


def _chart(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Chart:
    steps = [float(row["step"]) if _number(row.get("step")) else float(i) for i, row in enumerate(rows)]
    values = [float(row[name]) for name in names for row in rows if _number(row.get(name))]
    low, high = min(values), max(values)
    left, right = min(steps), max(steps)
    lines = []
    gaps = 0
    for name in names:
        runs: list[list[tuple[float, float]]] = [[]]
        for step, row in zip(steps, rows, strict=True):
            value = row.get(name)
            if _number(value):
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
        lines.append(Line(name, points, _text(next(y for run in reversed(runs) if run for _, y in run[-1:]))))
    return Chart(", ".join(names), tuple(lines), f"{low:.4g}", f"{high:.4g}", f"{left:g}", f"{right:g}", gaps)


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


_PAGE = """{% macro table(rows) %}
<div class="scroll"><table><tbody>
{% for name, value in rows %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>erase: {{ title }}</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.45 system-ui, sans-serif; color: #181818; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
.quiet { color: #5a5a5a; font-size: .9rem; }
.verdict { border-left: .3rem solid #1f5fa8; background: #f3f6fa; padding: .5rem .8rem; margin: .5rem 0; }
.verdict strong { display: block; }
.warning { border-left: .3rem solid #b3261e; background: #fbf1f0; padding: .5rem .8rem; margin: .5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #e4e4e4;
  overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
.pair img { width: 100%; image-rendering: auto; }
.pair span { font-size: .8rem; color: #5a5a5a; display: block; }
figcaption { font-size: .85rem; }
svg { width: 100%; height: auto; display: block; background: #fafafa; border: 1px solid #ddd; }
polyline { fill: none; stroke: #1f5fa8; stroke-width: 2; vector-effect: non-scaling-stroke; }
.line1 polyline, .line1 line { stroke: #b3541e; stroke-dasharray: 6 3; }
.line2 polyline, .line2 line { stroke: #2e7d4f; stroke-dasharray: 2 3; }
.bar { background: #e8e8e8; height: .6rem; min-width: 5rem; margin-top: .4rem; }
.bar div { background: #1f5fa8; height: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; }
@media print { body { max-width: none; font-size: 11pt; } h2 { break-after: avoid; } }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="quiet">
{% for name, value in facts %}{{ name }} {{ value }}{{ "" if loop.last else " · " }}{% endfor %}
</p>
</header>
<main>
{% for line in verdict %}
<p class="verdict"><strong>{{ line.name }}:
{% if line.before is not none and line.after is not none %}{{ line.before }} → {{ line.after }}
{% elif line.after is not none %}after {{ line.after }}
{% else %}before {{ line.before }}
{% endif %}</strong> {{ line.how }}</p>
{% endfor %}
{% if paired %}
<p class="quiet">Paired tests:
{% for name, value in paired %}{{ name }} {{ value }}{{ "" if loop.last else "; " }}{% endfor %}</p>
{% endif %}
{% if errors %}
<div class="warning"><strong>{{ errors | length }}
{{ "image could not be looked at, and is" if errors | length == 1 else "images could not be looked at, and are" }}
in no count:</strong>
<ul>{% for error in errors %}<li>{{ error }}</li>{% endfor %}</ul></div>
{% endif %}
{% if grid or pairs %}
<h2>Pictures</h2>
{% if blurred %}<p class="quiet">Exposed body parts that the detector found are hidden.</p>{% endif %}
{% if grid %}<p class="scroll"><img src="{{ grid }}" alt="Models in rows, one seed a column"></p>{% endif %}

{% if pairs %}
<div class="pairs">
{% for caption, images in pairs %}
<figure><div class="pair">
{% for name, source in images %}
<div><span>{{ name }}</span><img src="{{ source }}" alt="{{ name }}: {{ caption }}"></div>
{% endfor %}
</div><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% if num_pairs > pairs | length %}
<p class="quiet">The first {{ pairs | length }} of {{ num_pairs }}; all are in images/.</p>
{% endif %}
{% endif %}
{% endif %}
{% if tables %}
<h2>Counts</h2>
{% for section, rows in tables %}
<h3>{{ section }}</h3>
<div class="scroll"><table><thead><tr><th></th><th>before</th><th>after</th></tr></thead><tbody>
{% for what, a, b in rows %}
<tr><th scope="row">{{ what }}</th><td>{{ a }}</td><td>{{ b }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% endif %}
{% if robustness %}{{ robustness }}{% endif %}
{% for name, rows in others %}
<h2>{{ name }}</h2>
{{ table(rows) }}
{% endfor %}
{% if charts or final %}
<h2>Training</h2>
{% for chart in charts %}
<figure><h3>{{ chart.title }}</h3>
<svg viewBox="-5 -8 610 166" role="img" aria-label="{{ chart.title }} by step, {{ chart.low }} to {{ chart.high }}">
{% for line in chart.lines %}
<g class="line{{ loop.index0 % 3 }}">
{% for points in line.runs %}<polyline points="{{ points }}"/>{% endfor %}
</g>
{% endfor %}
</svg>
<figcaption>
{% for line in chart.lines %}
{{ ["solid", "dashed", "dotted"][loop.index0 % 3] }}: {{ line.name }}, last {{ line.last }}.
{% endfor %}
Step {{ chart.first }} to {{ chart.last }}, from {{ chart.low }} (bottom) to {{ chart.high }} (top).
{% if chart.gaps %}{{ chart.gaps }} values were not numbers.{% endif %}
</figcaption></figure>
{% endfor %}
{% if final %}
<h3>Last step</h3>
{{ table(final) }}
{% endif %}
{% endif %}
{% if density is not none or layers %}
<h2>Mask</h2>
{% if density is not none %}<p>{{ density }} of the trainable weights may change.</p>{% endif %}
{% if layers %}
<details{{ " open" if layers | length <= 40 else "" }}><summary>Density of {{ layers | length }} layers</summary>
<table><tbody>
{% for name, value in layers %}
<tr><th scope="row">{{ name }}</th><td>{{ "%.1f" | format(100 * value) }} %</td>
<td><div class="bar"><div style="width: {{ "%.1f" | format(100 * value) }}%"></div></div></td></tr>
{% endfor %}
</tbody></table></details>
{% endif %}
{% endif %}
{% if timing %}
<h2>Time</h2>
{{ table(timing) }}
{% endif %}
<h2>How it was made</h2>
{% if command %}<pre>{{ command }}</pre>{% endif %}
{% if versions %}{{ table(versions) }}{% endif %}
{% if run %}<details><summary>run.json</summary><pre>{{ run }}</pre></details>{% endif %}
</main>
</body>
</html>
"""
