"""Scripts that are there to measure: what they make of figures, and checks that a CPU can run."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_measurements_of_the_same_are_compared(script: Any, tmp_path: Path) -> None:
    same = {"what": "step", "model": "embedded", "batch": 16}
    old = write(tmp_path / "old", {**same, "step_s": 2.0, "weights": 7}, {**same, "batch": 8, "step_s": 1.0})
    new = write(tmp_path / "new", {**same, "step_s": 1.0, "weights": 7}, {**same, "batch": 4, "step_s": 1.0})
    assert script("bench").compare(old, new) == [
        {**same, "new_over_old": {"step_s": 0.5}},
        {**same, "batch": 8, "only_in": str(old)},
        {**same, "batch": 4, "only_in": str(new)},
    ]


@pytest.mark.slow
def test_the_gpu_check_sees_an_overflow_skip_its_phase_alone(script: Any) -> None:
    found = script("gpu_check").check_precision("fp16")
    assert found["ok"]
    assert found["loss_scales"] == [4096, 2048, 2048, 2048]
    assert found["phases_skipped"] == found["skipped"] == 1
