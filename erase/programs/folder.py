"""A run's folder: what makes a run what it is, whether a folder holds this very run, and the first keys of a report."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from erase.config import dump
from erase.engine import distributed, memory
from erase.engine.saliency import Mask
from erase.engine.state import remove_state
from erase.store import files

TIMING = "timing.json"
STATE = ("state.safetensors", "fisher-forget.safetensors", "fisher-remain.safetensors", TIMING)
"""Files of a run that is not trained yet."""
LOCK = ".lock"
"""A file of a run's folder that is there, and locked, while a process is at work."""
PACKAGES = ("erase", "torch", "diffusers", "transformers", "accelerate", "safetensors", "nudenet", "pillow")


def versions() -> dict[str, str]:
    """Of the packages that results depend on."""
    return {name: _version(name) for name in PACKAGES}


_version = cache(version)  # it reads and parses a file, and a run asks several times


@contextmanager
def working_in(out: Path) -> Iterator[None]:
    """Keep other launches out of a run's folder until the context ends, or this launch does.

    Raises:
        ValueError: if another is at work there.
    """

    def claim() -> bool:
        mine = stack.enter_context(files.claim(out / LOCK, "run"))
        if mine:
            stack.callback((out / LOCK).unlink, missing_ok=True)
        return mine

    with ExitStack() as stack:
        if not distributed.on_main(claim):
            raise ValueError(f"{out} is in use by another process: wait until it has ended, or choose another --out")
        yield


def open_folder(config: Any, out: Path, record: dict[str, Any], command: str, resume: bool) -> None:
    """Write `run.json`, or check that the folder holds this very run.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        record: what else makes the run what it is: `plan`, `base`, `data`.
        command: as it was typed.
        resume: whether the folder may hold the run already.

    Raises:
        ValueError: for a folder in use, or one of another run.
    """
    if resume and (out / "run.json").exists():
        files.sweep(out)
    elif out.is_dir() and not files.in_use(out):  # what else is hidden there may be anybody's
        for path in out.glob(".run.json.*.tmp"):
            path.unlink()
    whole = {
        "schema": 1,
        "command": command,
        "config": dump(config),
        **record,
        "seed": config.seed,
        "versions": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    path = out / "run.json"
    if resume and path.exists():
        old = files.read_json(path)
        moved = ("model",) if is_moved(old.get("base", {}), whole.get("base", {})) else ()
        for key in ("config", *record):
            if changed := files.differences(_same(old.get(key), moved), _same(whole[key], moved)):
                raise ValueError(
                    f"{out} holds a run with another {key} ({changed[0]}): resume with the same settings, or "
                    "use a new folder"
                )
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder as --out")
    if files.in_use(out):
        raise ValueError(
            f"{out} holds no run to resume: choose another --out"
            if resume
            else f"{out} is not empty: choose another --out, or resume its run with --resume"
        )
    files.write_json(path, whole)


def without_note(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run without what a person says of them."""
    return {key: value for key, value in settings.items() if key != "note"}


def is_moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a model is where it was not: the same weights, at a path that there is no more (or not from here)."""
    same = bool(old.get("weights")) and old.get("weights") == new.get("weights")
    return same and not Path(str(old.get("model"))).exists()


def _same(part: Any, moved: Sequence[str]) -> Any:
    """Without the note, and without where images and data were copied from: they are the same wherever they were.

    Args:
        part: of a record.
        moved: other keys of what is the same elsewhere.
    """
    if not isinstance(part, dict):
        return part
    copied = {"eval": ("base", "retrained_base"), "draw": ("cache",)}
    return {
        key: {k: v for k, v in value.items() if k not in copied.get(key, ())} if isinstance(value, dict) else value
        for key, value in without_note(part).items()
        if key not in moved
    }


def drop(out: Path, *names: str) -> None:
    """Remove files that the run needs no more, where they are."""
    if distributed.rank() == 0:
        for name in names:
            remove_state(out / name)


def new_report(
    config: Any, command: str, target: dict[str, Any], mask: Mask | None, timing: dict[str, Any]
) -> dict[str, Any]:
    """The keys that every report has; `before`, `after` and `paired` are still empty."""
    return {
        "schema": 1,
        "command": command,
        "method": dict(config.method),
        "seed": config.seed,
        "target": target,
        "mask": None if mask is None else {**mask.meta, "density": mask.density, "per_layer": mask.per_layer()},
        "before": {},
        "after": {},
        "paired": {},
        "timing": timing,
        "memory": memory.peak(),
        "versions": versions(),
    }


def unjudged(judges: Sequence[Any], images: bool, settings: str) -> str | None:
    """Why nothing will be known of what a run does; `None` if something judges it.

    Args:
        judges: the settings that make judges, `None` where they are not set.
        images: whether the run generates images to judge.
        settings: what to set, in words.
    """
    if all(judge is None for judge in judges):
        return f"nothing judges this run: set {settings}"
    return None if images else "nothing judges this run: eval.images=0"


def first_line(why: str | None) -> str:
    """What an announcement begins with, of a run that nothing judges."""
    return "" if why is None else f"{why}\n"


def run_time(timing: Mapping[str, Any]) -> dict[str, float | None]:
    """Seconds of a report that a comparison tells: `data_s`, `saliency_s`, `erase_s`, and the latter two, `rte_s`.

    Data are apart, because the runs of a comparison share what they generate: the first one pays for it.
    """
    saliency, erase = timing.get("saliency_s"), timing["erase_s"]
    both = None if erase is None else erase + (saliency or 0.0)
    return {"data_s": timing.get("data_s"), "saliency_s": saliency, "erase_s": erase, "rte_s": both}
