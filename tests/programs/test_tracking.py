import json
from pathlib import Path

import pytest

from erase.programs import tracking
from erase.programs.tracking import JsonlTracker, OtherTracker, check_tracker


def test_rows_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    track = JsonlTracker(tmp_path / "deep/metrics.jsonl")
    assert track.path.read_text() == ""
    for step in range(3):
        track({"step": step, "loss": 0.1 * step, "norm": None})
        lines = track.path.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(step + 1))
    assert json.loads(lines[2]) == {"step": 2, "loss": 0.2, "norm": None}


def test_a_new_run_starts_anew_and_a_resumed_one_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(4):
        JsonlTracker(path, keep=step)({"step": step})
    path.write_text(path.read_text() + '{"step": 4, "lo')  # the line that a killed run was writing
    JsonlTracker(path, keep=3)({"step": 3, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *({"step": step} for step in range(3)),
        {"step": 3, "again": True},
    ]
    JsonlTracker(path)
    assert path.read_text() == ""
    JsonlTracker(tmp_path / "none.jsonl", keep=3)({"step": 0})
    assert (tmp_path / "none.jsonl").read_text() == '{"step": 0}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_json_is_not_written(tmp_path: Path, value: float) -> None:
    track = JsonlTracker(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        track({"loss": value})
    assert track.path.read_text() == ""


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_needs_its_package(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    check_tracker("jsonl")
    line = rf"tracker={name} needs the package {name}: pip install 'erase\[trackers\]', or use jsonl"
    with pytest.raises(ValueError, match=line):
        check_tracker(name)


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    track = OtherTracker("tensorboard", tmp_path / "tensorboard", {"seed": 0})
    track({"step": 0, "loss": 0.5, "norm": None})
    track.close()
    assert [p for p in (tmp_path / "tensorboard").rglob("events*") if p.stat().st_size > 100]
