"""Runs of small models in this process, for the tests of what each kind of model adds to the one program."""

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from erase.config import PIPELINES, arguments, override, parse
from erase.methods import find_method
from erase.programs import run
from erase.programs.launching import start

NAMES = ("cat", "dog", "car", "boat")
"""Objects of the text-to-image model's prompts; the first one is forgotten."""
COUNTED = ("eval.nudity={classes: [FACE_FEMALE], threshold: 0.35}", "eval.blur=true")


class StopError(Exception):
    """Stands for a kill."""


def stop(*_: Any, **__: Any) -> None:
    raise StopError


def silent(line: str) -> None:
    """Says nothing."""


class Runner:
    """Runs a preset with `key=value` words; `{work}` in them is the folder that it is given."""

    def __init__(self, preset: Path, work: Path) -> None:
        self.preset, self.work = preset, work
        self.settings = yaml.safe_load(preset.read_text())
        gc.freeze()  # a run collects garbage twice, 0.3 s each with all libraries in sight

    def config(self, *words: str) -> Any:
        settings = override(self.settings, [word.replace("{work}", str(self.work)) for word in words])
        return parse(settings, PIPELINES[settings["pipeline"]])

    def __call__(self, out: Path, *words: str, **options: Any) -> Path:
        """A run; its folder."""
        run.main(self.config(*words), out, **{"command": "erase run", "say": silent, **options})
        return out

    def setting(self, *words: str, out: Path = Path("none"), **options: Any) -> run.Setting:
        """What a job is made of."""
        config, accelerator, precision, _ = start(self.config(*words), silent)
        entry = find_method(config.method["name"])
        method = entry.build(**arguments(config.method, entry))
        return run.Setting(config, out, accelerator, precision, silent, entry, method, **options)

    def job(self, *words: str, **options: Any) -> Any:
        """A job that is planned; nothing is computed."""
        setting = self.setting(*words, **options)
        return run.job_of(setting.config.pipeline)(setting)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(out: Path) -> list[dict[str, Any]]:
    """Of `metrics.jsonl`."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that differ; all are finite and of the dtype that they were of."""
    assert before.keys() == after.keys()
    assert all(t.isfinite().all() and t.dtype == before[n].dtype for n, t in after.items())
    return {name for name in before if not torch.equal(before[name], after[name])}


def table(text: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """A case a line, `what | words ; words | what the message names`."""
    cells = [[cell.strip() for cell in line.split(" | ")] for line in text.strip().splitlines()]
    return {what: (tuple(word.strip() for word in words.split(" ; ")), named) for what, words, named in cells}
