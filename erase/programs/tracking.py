"""Trackers: one JSON line a step, offline, readable while the run goes on; others beside it, through accelerate."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from erase.store import files


class JsonlTracker:
    """Appends rows to a file; a `log` callback for the loop.

    Args:
        path: the file; created with its folder.
        keep: rows of an earlier run to keep (on resume, those before the step it goes on from).
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        old = path.read_text(encoding="utf-8").splitlines()[:keep] if keep and path.exists() else []
        files.write_text(path, "".join(line + "\n" for line in old))
        self.path = path

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Append a row of plain numbers."""
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row, allow_nan=False) + "\n")


def step_seconds(path: Path) -> list[float]:
    """How long each step of `metrics.jsonl` took; none if there is no such file."""
    if not path.exists():
        return []
    return [float(json.loads(line)["seconds"]) for line in path.read_text(encoding="utf-8").splitlines()]


def check_tracker(name: str) -> None:
    """Find out now that a tracker's package is there.

    Raises:
        ValueError: if it is not.
    """
    if name != "jsonl" and find_spec(name) is None:
        raise ValueError(f"tracker={name} needs the package {name}: pip install 'erase[trackers]', or use jsonl")


class OtherTracker:
    """TensorBoard or Weights & Biases, through accelerate; a `log` callback for the loop.

    Args:
        name: `tensorboard` or `wandb`; the latter stays offline unless WANDB_MODE says otherwise.
        folder: where its files go.
        settings: shown with the run.
    """

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        from accelerate import tracking

        folder.mkdir(parents=True, exist_ok=True)
        if name == "wandb":
            os.environ.setdefault("WANDB_MODE", "offline")
            self.tracker = tracking.WandBTracker("erase", dir=str(folder), config=dict(settings))
        else:
            self.tracker = tracking.TensorBoardTracker("erase", logging_dir=str(folder))
        self.tracker.start()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Log a row of plain numbers."""
        self.tracker.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def close(self) -> None:
        """Write what is not written yet."""
        self.tracker.finish()
