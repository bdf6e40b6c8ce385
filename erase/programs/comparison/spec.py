"""What is compared: methods × targets × seeds, read from a YAML mapping and checked before the first run."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erase import config, resources
from erase.evaluation.page.names import NAMES, find_name
from erase.evaluation.prompt_files import is_file_name
from erase.nearest import meant
from erase.programs.settings import read_method
from erase.store import files

ALL = "all"
"""What the mean over all targets is called, in the place of a target."""


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
    after: str = ""
    """The target whose erased model, of the same method and seed, this run begins with; by default the preset's."""

    @property
    def name(self) -> str:
        """As lines name it."""
        return f"{self.method}, {self.target}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Relative to the comparison's."""
        return self._of(self.target)

    @property
    def before(self) -> Path | None:
        """The folder of the run that it begins after."""
        return self._of(self.after) if self.after else None

    def _of(self, target: str) -> Path:
        return Path("runs") / slug(self.method) / slug(target) / str(self.seed)


@dataclass(frozen=True)
class Spec:
    """What is compared: see `read_spec`."""

    pipeline: str
    runs: list[Run]
    columns: list[str]

    @property
    def bases(self) -> dict[str, str]:
        """By method the models of its targets, as one text: methods of other models are not compared in numbers."""
        models: dict[str, dict[str, str]] = {}
        for run in self.runs:
            models.setdefault(run.method, {})[run.target] = base_of(run)
        return {method: str(of) for method, of in models.items()}

    def over(self, targets: int) -> str:
        """What a mean over so many targets is called, in the place of a target."""
        number = len({run.target for run in self.runs})
        return ALL if targets == number else f"{targets} of {number} targets"


def base_of(run: Run) -> str:
    """What tells a run's base model apart from others, but for the run that it begins after."""
    return json.dumps([run.settings.get(key) for key in ("model", "components", "loras", "architecture")], default=str)


def data_of(run: Run) -> str:
    """What tells the data that a run is given apart from others'."""
    sides = [(run.settings.get(side) or {}).get("images") for side in ("forget", "remain")]
    return json.dumps([run.settings.get("data"), *sides], default=str)


def named_files(settings: Any) -> list[str]:
    """Files of prompts that settings name, however deep they stand."""
    if isinstance(settings, Mapping | list):
        parts = settings.values() if isinstance(settings, Mapping) else settings
        return list(dict.fromkeys(path for part in parts for path in named_files(part)))
    known = isinstance(settings, str) and is_file_name(settings) and Path(settings).is_file()
    return [settings] if known else []


def slug(name: str) -> str:
    """A name as a folder's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name.lower()).strip(".") or "-"


def read_spec(data: Mapping[str, Any], words: Sequence[str] = ()) -> Spec:
    """A comparison from a YAML mapping.

    Keys: `pipeline`, `preset`, `settings` (of every run), `methods` (name: settings), `targets` (name: settings),
    `seeds`; `columns` (names of a summary's numbers; all by default). Settings are nested as in a preset; a method
    may name another `preset`, and a `sweep` of settings (`train.steps: [10, 20]`): it is then a method for every
    combination of their values. A target may name another above it with `after`: its runs begin with the models that
    those runs erased, for concepts one after another. Later ones win: preset, `settings`, method, sweep, target,
    `words`; who names another `method.name` starts its settings anew.

    Raises:
        ValueError: for an unknown or missing key, or settings that no run could start with.
    """
    check_keys(data)
    if any(word.partition("=")[0].strip() == "seed" for word in words):
        raise ValueError("seed=… is not for comparisons: set the key seeds in the file")
    runs = []
    for method, changes in (data.get("methods") or {"": {}}).items():
        changes = dict(changes or {})
        begun = str(changes.pop("preset", data["preset"]))
        preset = config.read_preset(resources.preset_path(begun))
        first = str(method) or str(mapping_of(preset, "method").get("name", "method"))
        swept = variants(first, changes.pop("sweep", None))
        for (name, values), (target, more) in itertools.product(swept.items(), data["targets"].items()):
            merged: dict[str, Any] = {}
            own = dict(more or {})
            after = str(own.pop("after", None) or "")
            layers = [data.get("settings") or {}, changes, values, own]
            for layer in (preset, *layers):
                merged = config.over(merged, layer)
            if only := [forget["only"] for layer in layers if "only" in (forget := mapping_of(layer, "forget"))]:
                merged = config.merge(merged, {"forget": {"only": only[-1]}})  # of the comparison's own it stays
            if data.get("seeds") and any("seed" in layer for layer in layers):
                raise ValueError(f"{name}, {target}: seed stands beside seeds: leave one of them out")
            for seed in data.get("seeds") or [merged.get("seed", 0)]:
                settings = config.override({**merged, "seed": seed}, words)
                check_settings(data["pipeline"], settings)
                check_swept(name, values, settings)
                runs.append(Run(name, str(target), seed, settings, begun, after))
    twice = [folder for folder, times in Counter(run.folder for run in runs).items() if times > 1]
    if twice:
        raise ValueError(f"two runs of the comparison would share the folder {min(twice)}: rename one")
    return Spec(data["pipeline"], runs, columns=list(data.get("columns") or []))


def mapping_of(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A group of settings; an empty one where there is none.

    Raises:
        ValueError: for another value.
    """
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{key} must map names to settings; got {found!r}")
    return found


def check_keys(data: Mapping[str, Any]) -> None:
    """Find out that a comparison's keys are not what they should be.

    Raises:
        ValueError: if so.
    """
    known = ("pipeline", "preset", "settings", "methods", "targets", "seeds", "columns", "note")
    for key in data:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in a comparison; allowed: {', '.join(known)}")
    for key in ("pipeline", "preset", "targets"):
        if key not in data:
            raise ValueError(f"a comparison needs the key {key!r}")
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
    for name, group in (("methods", data.get("methods") or {"": {}}), ("targets", data["targets"])):
        if not isinstance(group, dict) or not group or not all(isinstance(v or {}, dict) for v in group.values()):
            raise ValueError(f"{name} must map names to settings")
    for name in data.get("columns") or []:
        if find_name("summary", str(name)) is None or str(name).startswith("front"):
            columns = [key.removeprefix("summary.") for key in NAMES if key.startswith("summary.") and "#" not in key]
            raise ValueError(f"no column {name!r}{meant(str(name), columns, 'columns', 'docs/tutorials/compare.md')}")
    above: list[str] = []
    for target, changes in data["targets"].items():
        after = (changes or {}).get("after")
        if after is not None and str(after) not in above:
            raise ValueError(
                f"target {target}: after names {after!r}, which is no target above it; above it are: "
                f"{', '.join(above) or 'none'}"
            )
        if str(target) == ALL:
            raise ValueError(f"a target cannot be called {ALL!r}, as the mean over all targets is: rename it")
        if after is not None and "model" in changes:
            raise ValueError(f"target {target} has after and model, and both say what it begins with: remove one")
        above.append(str(target))
    seeds = data.get("seeds")
    if seeds is not None and (not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds)):
        raise ValueError(f"seeds must be a list of whole numbers; got {seeds!r}")


def check_settings(pipeline: str, settings: dict[str, Any]) -> None:
    """Find out now, and not when the run's turn comes, that no run could start with these settings.

    Raises:
        ValueError: if so.
    """
    checked: Any = config.parse(settings, config.PIPELINES[pipeline])
    read_method(checked)


def check_swept(name: str, values: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Find out that a run has not the values that a sweep names it by.

    Raises:
        ValueError: if so.
    """
    found = files.paths(settings)
    for key, value in files.paths(values).items():
        if found.get(key) != value:
            raise ValueError(f"{name}: {key} is {found.get(key)!r} by the target or a word: leave it out there")


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


def reusable(run: Run) -> dict[str, tuple[str, str]]:
    """Images that runs share: the setting that takes them, their folder's name, and what they depend on.

    Each image has a seed of its own, which runs of several seeds may share.
    """
    settings = run.settings
    alike = [settings.get("draw"), settings.get("precision"), str(run.before or "")]
    found = {"base": ("base", json.dumps(["base", base_of(run), *alike]))}
    retrained = (settings.get("eval") or {}).get("retrained")
    if retrained is not None:
        found["retrained_base"] = ("retrained", json.dumps(["retrained", retrained, *alike]))
    return found
