"""SIGTERM and SIGINT: a step is finished and saved, and the command that resumes is said."""

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import micro_ddpm
import pytest
import yaml
from jobs import Runner, rows

from erase import cli
from erase.cli import common, run
from erase.diffusion import class_conditional
from erase.engine.state import load_state
from erase.programs import training
from erase.programs.labels import job

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("signals")
    class_conditional.save_new(micro_ddpm.model(), folder / "base")
    settings = {
        "pipeline": "ddpm",
        "model": str(folder / "base"),
        "method": {"name": "gradient_ascent", "fast_rate": 1e-3},
        "train": {"steps": 4, "batch_size": 2, "parameters": "full"},  # fewer than between two checkpoints
        "forget": {"labels": ["bee"], "count": 2},
        "draw": {"steps": 1},
        "eval": {"images": 0},
    }
    (folder / "micro.yaml").write_text(yaml.safe_dump(settings))
    return Runner(folder / "micro.yaml", folder)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals are handled as before, after a test."""
    before = [signal.getsignal(n) for n in SIGNALS]
    yield
    for n, handler in zip(SIGNALS, before, strict=True):
        signal.signal(n, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_end_of_the_step(
    runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    call, out = training.JsonlTracker.__call__, tmp_path / "out"

    def signalled(self: Any, row: dict[str, Any]) -> None:
        if row["step"] == 1:
            signal.raise_signal(number)
        call(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(training.JsonlTracker, "__call__", signalled)
        common.stoppable()
        ours = [signal.getsignal(n) for n in SIGNALS]
        with pytest.raises(common.Stopped) as stopped:
            runs(out)
        assert [signal.getsignal(n) for n in SIGNALS] == ours
    assert stopped.value.code == status
    assert load_state(out / "state.safetensors")["done"] == 2
    assert [row["step"] for row in rows(out)] == [0, 1]
    runs(out, resume=True)
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 3]


def test_a_signal_elsewhere_stops_at_once_and_says_how_to_resume(
    runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "gather", lambda *_: signal.raise_signal(signal.SIGTERM))
    words = ["erase", "run", "ddpm", str(runs.preset), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 143
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(f": {shlex.join(words)} --resume")


@pytest.mark.parametrize(
    ("words", "again"),
    [
        ("run sd x 'forget.prompts=a cat' --out y", "erase run sd x 'forget.prompts=a cat' --out y --resume"),
        ("run sd x --resume --out y", "erase run sd x --resume --out y"),
        ("run sd x --out y --dry-run", "erase run sd x --out y --dry-run"),
        ("run sd x --out new", "erase run sd x --out new"),
        ("attack x --out y", "erase attack x --out y --resume"),
        ("compare x --out y", "erase compare x --out y"),
        ("demo --out y", "erase run sd sd_photos_sfron --out y --resume"),
        ("demo --out new", "erase demo --out new"),
    ],
)
def test_a_stopped_command_says_which_one_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, again: str
) -> None:
    """Stopped as soon as it can be; a folder that holds nothing cannot be resumed."""
    monkeypatch.chdir(tmp_path)
    Path("y").mkdir()
    Path("y/run.json").touch()
    stoppable = common.stoppable

    def stopped(*args: Any) -> None:
        stoppable(*args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run, "stoppable", stopped)
    monkeypatch.setattr("sys.argv", ["erase", *shlex.split(words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith(f": {again}\n")
