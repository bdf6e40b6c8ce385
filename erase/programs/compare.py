"""Methods × targets × seeds, for any pipeline: `erase compare SPEC --out DIR`.

Every run is a folder of its own, `DIR/runs/METHOD/TARGET/SEED`; finished ones are not done again, a broken one goes on
where it was, and the same command given twice at a time shares the runs: each process takes those that no other has.

The table is written after each run: `table.md`, `table.csv`, `results.json`, and `forgetting.svg`, forgetting against
retention; at the end `differences.md`, each method against the first. In table and plot are means over seeds: in the
table with their sample deviation, and the two numbers that are plotted with 95 % intervals (Student's; seeds that agree
have none). Methods on the Pareto front of a target (forgetting, retention, time) are marked in the table and ringed in
the plot.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erase import config, resources
from erase.evaluation.clip import locate_clip
from erase.evaluation.plot import scatter
from erase.evaluation.stats import pareto_front, t_interval
from erase.methods import find_method
from erase.programs.run import job_of
from erase.programs.run import main as run_one
from erase.store import files


@dataclass(frozen=True)
class Run:
    """One cell of the comparison."""

    method: str
    """Of a sweep with the values, `SFR-on [steps=10]`."""
    target: str
    seed: int
    settings: dict[str, Any]
    preset: str = ""
    """What the settings began with, by name or file."""

    @property
    def folder(self) -> Path:
        """Relative to the comparison's."""
        return Path("runs") / slug(self.method) / slug(self.target) / str(self.seed)


@dataclass(frozen=True)
class Spec:
    """What is compared: see `read_spec`."""

    pipeline: str
    runs: list[Run]
    columns: list[str]


def slug(name: str) -> str:
    """A name as a folder's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name.lower()).strip(".") or "-"


def read_spec(data: Mapping[str, Any], words: Sequence[str] = ()) -> Spec:
    """A comparison from a YAML mapping.

    Keys: `pipeline`, `preset`, `settings` (of every run), `methods` (name: settings), `targets` (name: settings),
    `seeds`; `columns` (names of a summary's numbers; all by default). Settings are nested as in a preset; a method
    may name another `preset`, and a `sweep` of settings (`train.steps: [10, 20]`): it is then a method for every
    combination of their values. Later ones win: preset, `settings`, method, sweep, target, `words`; who names another
    `method.name` starts its settings anew.

    Raises:
        ValueError: for an unknown or missing key, or settings that no run could start with.
    """
    known = ("pipeline", "preset", "settings", "methods", "targets", "seeds", "columns", "note")
    for key in data:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in a comparison; allowed: {', '.join(known)}")
    for key in ("pipeline", "preset", "targets"):
        if key not in data:
            raise ValueError(f"a comparison needs the key {key!r}")
    if any(word.partition("=")[0].strip() == "seed" for word in words):
        raise ValueError("a comparison's seeds are in its key seeds: leave seed=… out")
    for key, wanted, word in (
        ("pipeline", str, "name"),
        ("preset", str, "name"),
        ("settings", dict, "mapping"),
        ("columns", list, "list"),
    ):
        if data.get(key) is not None and not isinstance(data[key], wanted):
            raise ValueError(f"{key} must be a {word}; got {data[key]!r}")
    if data["pipeline"] not in config.PIPELINES:
        raise ValueError(f"no pipeline {data['pipeline']!r}; pipelines: {', '.join(config.PIPELINES)}")
    kind = config.PIPELINES[data["pipeline"]]
    methods = data.get("methods") or {"": {}}
    for name, group in (("methods", methods), ("targets", data["targets"])):
        if not isinstance(group, dict) or not group or not all(isinstance(v or {}, dict) for v in group.values()):
            raise ValueError(f"{name} must map names to settings")
    seeds = data.get("seeds")
    if seeds is not None and (not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds)):
        raise ValueError(f"seeds must be a list of whole numbers; got {seeds!r}")
    runs = []
    for method, changes in methods.items():
        changes = dict(changes or {})
        begun = str(changes.pop("preset", data["preset"]))
        preset = config.read_preset(resources.preset_path(begun))
        first = str(method) or str(preset.get("method", {}).get("name", "method"))
        swept = variants(first, changes.pop("sweep", None))
        for (name, values), (target, more) in itertools.product(swept.items(), data["targets"].items()):
            merged: dict[str, Any] = {}
            for layer in (preset, data.get("settings") or {}, changes, values, more or {}):
                merged = config.over(merged, layer)
            for seed in seeds or [merged.get("seed", 0)]:
                settings = config.override({**merged, "seed": seed}, words)
                checked: Any = config.parse(settings, kind)
                for key, find in (("classifier", resources.tiny_path), ("clip", locate_clip)):
                    if (judge := getattr(checked.eval, key, None)) is not None:
                        find(judge)  # now, not when the run's turn comes
                entry = find_method(str(checked.method.get("name", "")))
                entry.build(**config.arguments(checked.method, entry))
                runs.append(Run(name, str(target), seed, settings, begun))
    twice = [folder for folder, times in Counter(run.folder for run in runs).items() if times > 1]
    if twice:
        raise ValueError(f"two runs of the comparison would share the folder {min(twice)}: rename one")
    return Spec(data["pipeline"], runs, columns=list(data.get("columns") or []))


def variants(method: str, sweep: Any) -> dict[str, dict[str, Any]]:
    """The methods that a sweep makes of one, by name, with the settings of each; without a sweep the one alone.

    Raises:
        ValueError: for a sweep that does not map settings to lists of values.
    """
    if sweep is None:
        return {method: {}}
    if not isinstance(sweep, dict) or not sweep or not all(isinstance(v, list) and v for v in sweep.values()):
        raise ValueError(f"sweep must map settings to lists of values, such as train.steps: [10, 20]; got {sweep!r}")
    found: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*sweep.values()):
        settings: dict[str, Any] = {}
        for key, value in zip(sweep, values, strict=True):
            for part in reversed(str(key).split(".")):
                value = {part: value}
            settings = config.merge(settings, value)
        named = (f"{str(key).rpartition('.')[2]}={value}" for key, value in zip(sweep, values, strict=True))
        found[f"{method} [{', '.join(named)}]"] = settings
    return found


def main(
    spec: Spec,
    out: Path,
    *,
    command: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Run what is not there yet; the table's path.

    Raises:
        ValueError: for a folder that holds something else, or a run that cannot be done.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out names a folder")
    if files.in_use(out) and not (out / "compare.json").exists():
        raise ValueError(f"{out} is in use by something else than a comparison: choose another --out")
    begun: dict[str, Any] = {}
    if (out / "compare.json").exists():
        begun = files.read_json(out / "compare.json")["runs"]
    now = {str(run.folder): json.loads(json.dumps(run.settings, default=str)) for run in spec.runs}
    for name, settings in begun.items():
        if (out / name).exists():
            if name not in now:
                raise ValueError(
                    f"{out} has a run that is not in this comparison, {name}: remove it, or choose another --out"
                )
            if changed := files.differences(settings, now[name]):
                raise ValueError(f"{out / name} was begun with other settings ({changed[0]}): choose another --out")
    files.write_json(out / "compare.json", {"schema": 1, "command": command, "runs": now})
    kind, job = config.PIPELINES[spec.pipeline], job_of(spec.pipeline)
    found: dict[int, dict[str, Any]] = {}
    drawn: dict[str, Path] = {}
    left = dict(enumerate(spec.runs, 1))

    def results() -> list[dict[str, Any]]:
        return [found[number] for number in sorted(found)]

    def begin(number: int, run: Run) -> None:
        folder = out / run.folder
        spare = {setting: str(drawn[key]) for setting, (_, key) in reusable(run).items() if key in drawn}
        settings: Any = config.parse(config.merge(run.settings, {"eval": spare}), kind)
        say(f"run {number} of {len(spec.runs)}: {run.method}, {run.target}, seed {run.seed}")
        try:
            run_one(settings, folder, resume=folder.exists(), command=command, say=say, preset=run.preset)
        except ValueError as error:
            raise ValueError(f"{run.method}, {run.target}, seed {run.seed}: {error}") from error

    def gather() -> None:
        """What is finished, by whichever process, goes into the tables."""
        before = len(left)
        for number, run in list(left.items()):
            folder = out / run.folder
            if (folder / "report.json").exists():
                for what, key in reusable(run).values():
                    if (folder / "images" / what).is_dir():
                        drawn.setdefault(key, folder / "images" / what)
                numbers = job.summary(files.read_json(folder / "report.json"))
                found[number] = {"method": run.method, "target": run.target, "seed": run.seed, **numbers}
                del left[number]
        if len(left) < before:
            write(results(), out, spec.columns, job.AXES, job.GOALS)

    gather()
    while left:
        for number, run in list(left.items()):
            with claim(out, run) as mine:
                gather()
                if mine and number in left:
                    begin(number, run)
        gather()
        if left:
            time.sleep(1)
    if lines := differences(results(), spec.columns):
        files.write_text(out / "differences.md", "\n".join(lines) + "\n")
    return out / "table.md"


def claim(out: Path, run: Run) -> AbstractContextManager[bool]:
    """Whether no other process is at work on the run; the processes of one launch are at work on it together."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return nullcontext(True)
    return files.claim(out / "runs" / ".lock", str(run.folder))


def reusable(run: Run) -> dict[str, tuple[str, str]]:
    """Pictures that runs share: the setting that takes them, their folder's name, and what they depend on."""
    settings = run.settings
    alike = [settings.get("draw"), settings.get("precision"), run.seed]
    found = {"base": ("base", json.dumps(["base", settings.get("model"), *alike]))}
    retrained = (settings.get("eval") or {}).get("retrained")
    if retrained is not None:
        found["retrained_base"] = ("retrained", json.dumps(["retrained", retrained, *alike]))
    return found


def write(
    results: Sequence[Mapping[str, Any]],
    out: Path,
    columns: Sequence[str],
    axes: Mapping[str, tuple[str, float]],
    goals: Mapping[str, int],
) -> None:
    """The tables and the plot.

    Args:
        results: a run each.
        out: the comparison's folder.
        columns: the table's; all by default.
        axes: the numbers across and up, with their names and what is most; the least is 0.
        goals: the numbers of the Pareto front, and whether less (-1) or more (1) is better.
    """
    keys = keys_of(results)
    names = list(columns) or keys[3:]
    missing = [name for name in names if name not in keys]
    if missing:
        raise ValueError(f"no column {missing[0]!r}; this pipeline has: {', '.join(keys[3:])}")
    own = [(method, target, group(results, method, target)) for method, target in pairs(results)]
    many = len({target for _, target, _ in own}) > 1
    methods = dict.fromkeys(method for method, _, _ in own) if many else {}
    rows = own + [(method, "all", group(results, method)) for method in methods]
    best = front(rows, goals)
    table = [
        [method, target, *(spread(some, name) + bracket(some, name, axes) for name in names)]
        for method, target, some in rows
    ]
    if best:
        names = [*names, "front"]
        for row in table:
            row.append("●" if (row[0], row[1]) in best else "")
    lines = ["| method | target | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    files.write_text(out / "table.md", "\n".join(lines) + "\n")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(keys)
    writer.writerows([result.get(k) for k in keys] for result in results)
    files.write_text(out / "table.csv", buffer.getvalue())
    fronts = {target: [m for m, t in best if t == target] for target in dict.fromkeys(t for _, t in best)}
    files.write_json(out / "results.json", {"schema": 1, "runs": list(results), "front": fronts})
    across, up = axes
    shown = [
        (method, target, some)
        for method, target, some in own
        if all(r.get(axis) is not None for r in some for axis in axes)
    ]
    if shown:
        points: list[Any] = [
            (method.partition(" [")[0], *(statistics.fmean(r[axis] for r in some) for axis in axes))
            for method, _, some in shown
        ]
        ringed = [number for number, (method, target, _) in enumerate(shown) if (method, target) in best]
        named = [f"{method}, {target}" if many else method for method, target, _ in shown]
        bars = [(interval(some, across, axes), interval(some, up, axes)) for *_, some in shown]
        picture = scatter(points, axes[across][0], axes[up][0], ringed, named, bars)
        files.write_text(out / "forgetting.svg", picture)


def keys_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """`method`, `target`, `seed`, and the names of all numbers that some run has."""
    return list(dict.fromkeys(key for result in results for key in result))


def front(
    rows: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]], goals: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Method and target of the rows on their target's Pareto front; rows that lack one of the numbers are left out."""
    found = []
    for target in dict.fromkeys(target for _, target, _ in rows):
        methods, points = [], []
        for method, where, some in rows:
            if where != target or any(r.get(goal) is None for r in some for goal in goals):
                continue
            methods.append(method)
            points.append([sign * statistics.fmean(r[goal] for r in some) for goal, sign in goals.items()])
        found += [(method, target) for method, on in zip(methods, pareto_front(points), strict=True) if on]
    return found


def pairs(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Method and target, in order of appearance."""
    return list(dict.fromkeys((str(r["method"]), str(r["target"])) for r in results))


def group(results: Sequence[Mapping[str, Any]], method: str, target: str | None = None) -> list[Mapping[str, Any]]:
    """The runs of a method, over seeds and, without a target, over targets."""
    return [r for r in results if r["method"] == method and target in (None, r["target"])]


def differences(results: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """A table of each method's mean differences from the first one, paired by target and seed; none of one method.

    Intervals are Student's, over seeds (of all targets together: over targets and seeds).
    """
    first, *others = dict.fromkeys(str(r["method"]) for r in results)
    names = list(columns) or keys_of(results)[3:]
    targets = list(dict.fromkeys(str(r["target"]) for r in results))
    values: dict[Any, Mapping[str, Any]] = {(r["method"], r["target"], r["seed"]): r for r in results}
    lines = [f"| method | target | number | difference from {first} | 95 % interval | |", "|---|---|---|---|---|---|"]
    for method in others:
        for target in [*targets, *(["all"] if len(targets) > 1 else [])]:
            for name in names:
                found = []
                for (what, where, seed), result in values.items():
                    a: Any = result.get(name)
                    b: Any = values.get((first, where, seed), {}).get(name)
                    if what == method and target in (where, "all") and all(type(x) in (int, float) for x in (a, b)):
                        found.append(a - b)
                if found:
                    mean = statistics.fmean(found)
                    lines.append(f"| {method} | {target} | {name} | {mean:+.3f} | {verdict(found)} |")
    return lines if others else []


def verdict(found: Sequence[float]) -> str:
    """The interval of a mean difference and what it says, as two cells."""
    if len(found) < 2:
        return "– | one run: no interval"
    if max(found) - min(found) < 1e-9:
        return "– | the same each time: no interval"
    low, high = t_interval(found)
    says = "inside its interval: no difference shown" if low <= 0 <= high else "a difference"
    return f"{low:+.3f} to {high:+.3f} | {says}"


def interval(
    results: Sequence[Mapping[str, Any]], name: str, axes: Mapping[str, tuple[str, float]]
) -> tuple[float, float] | None:
    """Student's 95 % interval of a plotted number's mean, within its range; `None` of one value, or of equal ones."""
    values = [r[name] for r in results if r.get(name) is not None]
    if name not in axes or len(set(values)) < 2:
        return None
    low, high = t_interval(values)
    return max(low, 0.0), min(high, axes[name][1])


def bracket(results: Sequence[Mapping[str, Any]], name: str, axes: Mapping[str, tuple[str, float]]) -> str:
    """The `interval`, for a cell of the table; nothing where there is none."""
    found = interval(results, name, axes)
    return f" [{found[0]:.3f}, {found[1]:.3f}]" if found else ""


def spread(results: Sequence[Mapping[str, Any]], name: str) -> str:
    """Mean, and ± sample standard deviation where there are several."""
    values = [r[name] for r in results if r.get(name) is not None]
    if not values:
        return "–"
    if isinstance(values[0], str):
        return ", ".join(dict.fromkeys(values))
    mean = statistics.fmean(values)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
