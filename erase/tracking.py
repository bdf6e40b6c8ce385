"""The default tracker: one JSON line a step, offline, readable while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erase import files


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
