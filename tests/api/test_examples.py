"""What the documentation shows runs as it is written, on micro models under its names; so do the scripts."""

import itertools
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import micro_classify
import micro_ddpm
import micro_own as models
import pytest
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

import erase
from erase.config import put

ROOT = Path(__file__).parents[2]
PAGES = ("erase/api/README.md",)
"""Whose blocks take what is in memory; those of README and tutorials are run by tests/docs."""
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S))
]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    pictures = models.images(6)
    for number, picture in enumerate(pictures[:2]):
        picture.save(tmp_path / "cats" / f"{number}.png")
    pairs = [(picture, i % 3) for i, picture in enumerate(pictures)]
    names = {
        "pipe": pipe,
        "unet": models.unet(),
        "scheduler": DDPMScheduler(),
        "vit": erase.load(micro_classify.write_foreign("vit", tmp_path / "vit")),
        "images": pairs[:3],
        "others": pairs[3:],
        "net": models.network().eval(),
        "forget_batches": models.batches(0),
        "remain_batches": models.batches(1),
    }
    exec(compile(block, "block", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_short(page: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
        assert len([line for line in block.splitlines() if line.strip()]) <= 6


Script = Callable[..., str]


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run a script of `pipelines/` as if from the command line; what it prints."""

    def run(name: str, *words: str) -> str:
        path = ROOT / "pipelines" / name
        assert len(path.read_text().splitlines()) <= 60
        monkeypatch.setattr("sys.argv", [str(path), *words])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


SMALL = ("train.steps=1", "train.batch_size=2", "saliency.count=2", "saliency.density=0.5", "saliency.threshold=null")
DRAWN = ("forget.count=2", "remain.count=1", "draw.steps=2")


@pytest.mark.slow
def test_erase_nsfw(run_script: Script, micro_sd: Path, tmp_path: Path) -> None:
    words = (*SMALL, *DRAWN, "remain.prompts=[a car]", "forget.prompts=[a cat]", "forget.anchors=[a dog]")
    said = run_script("erase_nsfw.py", str(micro_sd), "--out", str(tmp_path / "o"), "--images", "2", "--set", *words)
    assert said.count("of 2 images") == 2
    assert (tmp_path / "o/grid.png").is_file()
    assert (tmp_path / "o/model/model_index.json").is_file()


@pytest.mark.slow
def test_forget_class(run_script: Script, tmp_path: Path) -> None:
    micro_ddpm.pipeline(tmp_path).save_pretrained(tmp_path / "ddpm")
    run_script("forget_class.py", str(tmp_path / "ddpm"), "cat", "--out", str(tmp_path / "o"), "--set", *SMALL, *DRAWN)
    assert (tmp_path / "o/grid.png").is_file()
    assert (tmp_path / "o/model/model_index.json").is_file()


def test_unlearn_images(run_script: Script, tmp_path: Path) -> None:
    vit = micro_classify.write_foreign("vit", tmp_path / "vit")
    for image, (side, k) in zip(models.images(6), itertools.product(("forget", "remain"), range(3)), strict=True):
        (tmp_path / side / f"LABEL_{k}").mkdir(parents=True)
        image.save(tmp_path / side / f"LABEL_{k}" / "0.png")
    sides = [str(tmp_path / side) for side in ("forget", "remain")]
    said = run_script("unlearn_images.py", str(vit), *sides, "--out", str(tmp_path / "o"), "--set", *SMALL)
    assert said.count("of 3 named right before") == 2


def test_folders_of_images_are_named_as_those_that_are_unlearned(tmp_path: Path) -> None:
    """By a class, one of its synonyms or its number; hidden ones are none."""
    vit = micro_classify.write_foreign("vit", tmp_path / "vit")
    config = json.loads((vit / "config.json").read_text())
    config["id2label"] = {"0": "tench, Tinca tinca", "1": "crane", "2": "shark"}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    (vit / "config.json").write_text(json.dumps(config))
    picture = models.images(1)[0]
    for name in ("Tinca tinca", "1", "2", ".cache"):
        (tmp_path / "images" / name).mkdir(parents=True)
        picture.save(tmp_path / "images" / name / "0.png")
    named_right = runpy.run_path(str(ROOT / "pipelines/unlearn_images.py"))["named_right"]
    assert named_right(str(vit), tmp_path / "images") == "1 of 3"


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "nsfw": ("erase_nsfw.py", ["photos-sd"], "out/model"),
    "nsfw, a file": ("erase_nsfw.py", ["photos-sd"], "out"),
    "images": ("erase_nsfw.py", ["photos-sd", "--images", "0"], "other"),
    "class": ("forget_class.py", ["fashion-ddpm", "trouser"], "out/model"),
    "unlearn": ("unlearn_images.py", ["vit", "forget", "remain"], "out"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_scripts_refuse_before_they_open_a_model(
    what: str, run_script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, words, there = REFUSED[what]
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    monkeypatch.setattr(erase, "load", lambda *_: pytest.fail("opened"))
    with pytest.raises(SystemExit):
        run_script(script, *words, "--out", str(tmp_path / "out"))
    assert ("--images" if what == "images" else "--out") in capsys.readouterr().err.splitlines()[-1]


def test_a_failing_detector_does_not_lose_the_model(run_script: Script, tmp_path: Path, monkeypatch: Any) -> None:
    class Done:
        def save(self, out: Path) -> None:
            out.mkdir(parents=True)

        def count(self, *_: Any, **__: Any) -> Any:
            raise ValueError("the detector failed")

    monkeypatch.setattr(erase, "load", lambda *_: None)
    monkeypatch.setattr(erase, "forget", lambda *_, **__: Done())
    with pytest.raises(ValueError, match="detector"):
        run_script("erase_nsfw.py", "photos-sd", "--out", str(tmp_path / "out"))
    assert (tmp_path / "out/model").is_dir()


def test_image_grid(run_script: Script, tmp_path: Path) -> None:
    for name in ("base", "erased"):
        (tmp_path / name).mkdir()
        models.images(1)[0].save(tmp_path / name / "0.png")
    rows = [f"{name}={tmp_path / name}" for name in ("base", "erased")]
    run_script("image_grid.py", *rows, "--out", str(tmp_path / "grid.png"))
    assert (tmp_path / "grid.png").is_file()


def test_put_leaves_what_it_is_given() -> None:
    given = {"a": {"b": 1}}
    assert put(given, {"a.b": 2, "c": 3}) == {"a": {"b": 2}, "c": 3}
    assert given == {"a": {"b": 1}}
