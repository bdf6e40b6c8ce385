"""A run's folder: opened, resumed, refused."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launched
import pytest

from erase.programs import folder


@dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 5
    places: list[Path] = field(default_factory=list)
    note: str = ""


RECORD: dict[str, Any] = {"plan": {"forget": [1]}, "base": {"weights": {"a": "0"}}}


def tree(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_run_json_holds_what_makes_the_run(tmp_path: Path) -> None:
    for out in (tmp_path / "deep/new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        folder.open_folder(Config(seed=4, places=[Path("x")]), out, RECORD, "erase run", resume=False)
        run = json.loads((out / "run.json").read_text())
        assert run.items() >= {**RECORD, "schema": 1, "command": "erase run", "seed": 4}.items()
        assert run["config"] == {"seed": 4, "steps": 5, "places": ["x"], "note": ""}
        assert run["versions"].keys() == set(folder.PACKAGES)
        assert [p.name for p in out.iterdir()] == ["run.json"]


def test_a_run_is_gone_on_with_where_it_is_the_same(tmp_path: Path) -> None:
    folder.open_folder(Config(), tmp_path / "out", RECORD, "first", resume=True)  # nothing there yet
    before = tree(tmp_path)
    folder.open_folder(Config(), tmp_path / "out", RECORD, "second", resume=True)
    assert tree(tmp_path) == before
    assert json.loads((tmp_path / "out/run.json").read_text())["command"] == "first"


def test_a_folder_is_worked_in_by_one_launch_at_a_time(tmp_path: Path) -> None:
    """A lock of a process holds against others alone: the second one is a process of its own."""
    out = tmp_path / "out"

    def work() -> None:
        try:
            with folder.working_in(out):
                print("free")
        except ValueError as error:
            print(error)

    def ask() -> str:
        assert launched.two(work, tmp_path / "log", 1) == [0]
        return (tmp_path / "log.0").read_text()

    with folder.working_in(out):
        folder.open_folder(Config(), out, RECORD, "", resume=False)
        assert ask().startswith(f"{out} is in use by another process")
        assert {p.name for p in out.iterdir()} == {"run.json", folder.LOCK}
    assert ask() == "free\n"
    assert [p.name for p in out.iterdir()] == ["run.json"]


def test_a_run_whose_note_is_put_in_other_words_is_gone_on_with(tmp_path: Path) -> None:
    for resume, note in ((False, "what it does"), (True, "what they do")):
        folder.open_folder(Config(note=note), tmp_path / "out", RECORD, "", resume)


@pytest.mark.parametrize(
    ("config", "record", "key"),
    [
        (Config(steps=6), RECORD, "config"),
        (Config(seed=1), RECORD, "config"),
        (Config(), {**RECORD, "plan": {"forget": [2]}}, "plan"),
        (Config(), {**RECORD, "base": {}}, "base"),
        (Config(), {**RECORD, "data": {"sha256": "1"}}, "data"),
    ],
)
def test_another_run_is_not_gone_on_with(tmp_path: Path, config: Config, record: dict[str, Any], key: str) -> None:
    out = tmp_path / "out"
    folder.open_folder(Config(), out, RECORD, "", resume=False)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=f"out holds a run with another {key} \\(.+, now .+\\): resume with the same"):
        folder.open_folder(config, out, record, "", resume=True)
    with pytest.raises(ValueError, match="out is not empty: choose another --out, or resume its run with --resume"):
        folder.open_folder(Config(), out, RECORD, "", resume=False)
    assert tree(tmp_path) == before


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    before = tree(tmp_path)
    for resume, said in (
        (False, "is not empty: choose another --out"),
        (True, "holds no run to resume: choose an"),
    ):
        with pytest.raises(ValueError, match="file is a file"):
            folder.open_folder(Config(), tmp_path / "file", RECORD, "", resume)
        with pytest.raises(ValueError, match=f"mine {said}"):
            folder.open_folder(Config(), tmp_path / "mine", RECORD, "", resume)
    assert tree(tmp_path) == before


def test_a_broken_run_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"run\.json: not JSON, or cut short") as caught:
        folder.open_folder(Config(), tmp_path, RECORD, "", resume=True)
    assert "\n" not in str(caught.value)


def test_images_of_the_base_by_another_path_do_not_make_another_run(tmp_path: Path) -> None:
    """As in a comparison that is resumed from another working folder."""

    @dataclass(frozen=True)
    class Judged:
        seed: int = 0
        eval: dict[str, str] = field(default_factory=dict)

    runs = [
        Judged(eval={"base": base, "retrained_base": base, "kind": "x"}) for base in ("images/base", "/images/base")
    ]
    folder.open_folder(runs[0], tmp_path / "out", RECORD, "", resume=False)
    folder.open_folder(runs[1], tmp_path / "out", RECORD, "", resume=True)
    with pytest.raises(ValueError, match="eval"):
        folder.open_folder(Judged(eval={"kind": "y"}), tmp_path / "out", RECORD, "", resume=True)


def test_a_model_that_was_moved_is_the_same_model(tmp_path: Path) -> None:
    """As the first of two runs one after another is, from another working directory; not one that is still there."""
    record = {"base": {"model": "gone/model", "weights": {"a": "0"}}}
    moved = {"base": {"model": "there/model", "weights": {"a": "0"}}}
    folder.open_folder(Config(), tmp_path / "out", record, "", resume=False)
    folder.open_folder(Config(), tmp_path / "out", moved, "", resume=True)
    for old in ({"model": str(tmp_path), "weights": {"a": "0"}}, {"model": "gone", "weights": {}}):
        folder.open_folder(Config(), (out := tmp_path / str(len(old["weights"]))), {"base": old}, "", resume=False)
        with pytest.raises(ValueError, match="another base"):
            folder.open_folder(Config(), out, {"base": {**old, "model": "there"}}, "", resume=True)


def test_what_killed_writes_left_is_swept(tmp_path: Path) -> None:
    """Killed before run.json was there, and again while the model was saved; no file of anybody else is."""
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)
    for name in (".run.json.abc.tmp", ".git/.theirs.tmp"):
        (out / name).write_text("{")
    folder.open_folder(Config(), out, RECORD, "", resume=False)
    assert sorted(p.name for p in out.rglob("*")) == [".git", ".theirs.tmp", "run.json"]
    shutil.rmtree(out / ".git")
    (out / ".model.abc.tmp/model/unet").mkdir(parents=True)
    for name in (".model.abc.tmp/model/unet/.x.safetensors.1.tmp", ".state.safetensors.1.tmp"):
        (out / name).write_text("{")
    folder.open_folder(Config(), out, RECORD, "", resume=True)
    assert [p.name for p in out.rglob("*")] == ["run.json"]
