"""`erase run sd` from end to end, on a checkpoint of random weights: folders, resuming, refusals, every setting."""

import gc
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import launched
import micro
import numpy as np
import pytest
import torch
import yaml
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from erase.evaluation import detections
from erase import cli
from erase.attacks import learning
from erase.config import SdConfig, override, parse
from erase.diffusion.checkpoints import convert, folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import open_model
from erase.engine.precision import Precision
from erase.engine.saliency import load_mask
from erase.evaluation import classes, nudity
from erase.evaluation.prompt_files import PromptRow
from erase.evaluation.manifest import drawn_by, read_manifest
from erase.methods import list_methods
from erase.programs import training
from erase.store import delta
from erase.store.files import sha256
from erase.store.safetensors import digest as digest_of

QUICK = ("eval.images=0", "eval.classifier=null")
LOOKED_FOR = ("eval.nudity={classes: [FACE_FEMALE], threshold: 0.35}", "eval.blur=true")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    found = cli.program("sd")
    gc.freeze()  # a run collects garbage twice, 0.3 s each with all libraries in sight
    yield found
    gc.unfreeze()


@pytest.fixture(scope="module")
def preset(micro_sd: Path, micro_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preset")
    words = [f"a photo of a {name},{name},plain,{i}\n" for i, name in enumerate(("cat", "dog", "car", "boat"))]
    (folder / "set.csv").write_text("prompt,object,style,seed\n" + "".join(words))
    (folder / "micro.yaml").write_text(
        yaml.safe_dump(
            {
                "pipeline": "sd",
                "model": str(micro_sd),
                "method": {"name": "sfron", "fast_rate": 1e-2, "fast_rule": "adam"},
                "saliency": {"density": 0.3, "count": 4, "draws": 1, "batch_size": 4},
                "train": {"steps": 2, "batch_size": 2, "lr": 1e-3},
                "forget": {
                    "prompts": ["a photo of a cat"],
                    "anchors": ["a photo of a dog"],
                    "count": 2,
                    "axis": "object",
                },
                "remain": {"prompts": [str(folder / "set.csv")], "count": 1},
                "draw": {"steps": 2, "guidance": 3.0, "batch_size": 4},
                "eval": {
                    "prompts": [str(folder / "set.csv")],
                    "images": 2,
                    "classifier": str(micro_classifier),
                    "blur": False,
                },
            }
        )
    )
    return folder / "micro.yaml"


@pytest.fixture(scope="module")
def start(program: ModuleType, preset: Path) -> Run:
    """Run with `key=value` words, in this process."""

    def start(out: Path, *words: str, resume: bool = False) -> Path:
        config = parse(override(yaml.safe_load(preset.read_text()), words), SdConfig)
        program.main(config, out, resume=resume, command="erase run", say=lambda line: None)
        return out

    return start


@pytest.fixture(scope="module")
def finished(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, by the command; tests copy it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["erase", "run", "sd", str(preset), *LOOKED_FOR, "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def digest(out: Path) -> str:
    """Of the UNet's values."""
    return digest_of(unet(out / "model"))


def moved(out: Path, base: Path) -> set[str]:
    before, after = unet(base), unet(out / "model")
    assert before.keys() == after.keys()
    assert all(t.isfinite().all() and t.dtype == before[n].dtype for n, t in after.items())
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- the folder -----------------------------------------------------------------------------------


def test_a_run_leaves_the_folder_that_is_promised(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {
        *("run.json", "metrics.jsonl", "saliency.safetensors", "model", "images", "grid.png", "report.json"),
        "report.html",
    }
    assert {p.name for p in (finished / "images").iterdir() if p.is_dir()} == {"base", "erased"}
    Image.open(finished / "grid.png").verify()
    page = (finished / "report.html").read_text()
    assert "a photo of a cat" in page
    assert "data:image/png;base64" in page


def test_run_json_tells_how_to_do_it_again(finished: Path, preset: Path, micro_sd: Path) -> None:
    run = read(finished / "run.json")
    assert run["command"].startswith(f"erase run sd {preset} ")
    config = parse(run["config"], SdConfig)
    assert (config.train.steps, config.eval.blur, run["seed"]) == (2, True, 0)
    assert run["base"]["weights"]["unet/diffusion_pytorch_model.safetensors"] == sha256(
        micro_sd / "unet/diffusion_pytorch_model.safetensors"
    )
    assert {"erase", "torch", "diffusers"} <= run["versions"].keys()
    assert run["plan"]["remain"] == ["a photo of a dog", "a photo of a car", "a photo of a boat"]


def test_metrics_have_a_row_a_step(finished: Path) -> None:
    assert [row["step"] for row in rows(finished)] == [0, 1]
    for row in rows(finished):
        assert row["forget_loss"] > 0
        assert row["remain_loss"] > 0
        assert row["skipped_fast"] == row["skipped_slow"] == 0


def test_the_model_is_a_plain_pipeline(finished: Path, micro_sd: Path) -> None:
    names = {p.relative_to(micro_sd) for p in micro_sd.rglob("*")} | {Path("README.md")}
    assert {p.relative_to(finished / "model") for p in (finished / "model").rglob("*")} == names
    StableDiffusionPipeline.from_pretrained(finished / "model", safety_checker=None)
    changed = moved(finished, micro_sd)
    assert changed
    assert all(".attn2." in name for name in changed)


def test_the_model_says_how_it_was_made(finished: Path, preset: Path, micro_sd: Path) -> None:
    """In every file of weights that changed, and in its card; without prompts, dates and paths of the machine."""
    with safe_open(finished / "model/unet/diffusion_pytorch_model.safetensors", framework="pt") as f:
        meta = f.metadata()
    assert meta["erase_method"] == "sfron"
    assert json.loads(meta["erase_settings"]) == {"name": "sfron", "fast_rate": 1e-2, "fast_rule": "adam"}
    assert (meta["erase_preset"], meta["erase_base"]) == ("micro", "micro-sd")
    assert meta["erase_train"] == "xattn, 2 steps, seed 0"
    assert meta["erase_base_sha256"] == folder_digest(micro_sd)
    target = json.dumps({"anchors": ["a photo of a dog"], "forget": ["a photo of a cat"]})
    assert meta["erase_prompts_sha256"] == hashlib.sha256(target.encode()).hexdigest()
    density = load_mask(finished / "saliency.safetensors").density
    assert float(meta["erase_mask_density"]) == pytest.approx(density, abs=1e-6)
    assert "torch 2" in meta["erase_versions"]
    _, head, text = (finished / "model/README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (card["library_name"], card["base_model"], card["license"]) == ("diffusers", "micro-sd", "unknown")
    assert {"sfron", "concept-erasure"} <= set(card["tags"])
    for key, value in meta.items():
        assert key == "format" or value in text
    for hidden in (str(micro_sd.parent), str(finished), "a cat", "a photo"):
        assert hidden not in head + text + json.dumps(meta)


def folder_digest(folder: Path) -> str:
    return digest_of(unet(folder))


def test_the_mask_has_the_density_asked_for(finished: Path) -> None:
    mask = load_mask(finished / "saliency.safetensors")
    assert mask.density == pytest.approx(0.3, abs=0.01)
    assert all(".attn2." in name for name in mask.named)
    assert read(finished / "report.json")["mask"]["density"] == mask.density


def test_pictures_of_both_models_share_their_seeds(finished: Path) -> None:
    base, erased = (read_manifest(finished / "images" / name) for name in ("base", "erased"))
    assert len(base) == 8
    assert [(r.file, r.prompt, r.seed, r.index) for r in base] == [(r.file, r.prompt, r.seed, r.index) for r in erased]
    assert base[0].prompt == "a photo of a cat"  # forgotten ones first
    for name, manifest in (("base", base), ("erased", erased)):
        for row in manifest:
            assert sha256(finished / "images" / name / row.file) == row.sha256
    assert [r.sha256 for r in base] != [r.sha256 for r in erased]


def test_the_report_holds_the_keys_that_stay(finished: Path) -> None:
    report = read(finished / "report.json")
    assert {"schema", "command", "method", "seed", "target", "mask", "before", "after", "timing", "versions"} <= set(
        report
    )
    assert report["method"]["name"] == "sfron"
    assert report["target"] == {"forget": ["a photo of a cat"], "anchors": ["a photo of a dog"], "earlier": []}
    assert report["timing"].keys() >= {"saliency_s", "erase_s", "steps", "step_s"}
    assert report["timing"]["steps"] == 2
    assert report["timing"]["erase_s"] == pytest.approx(2 * report["timing"]["step_s"])
    for when in ("before", "after"):
        nudity, classes = report[when]["nudity"], report[when]["classes"]
        assert nudity.keys() >= {"images", "flagged", "rate", "ci95", "counts"}
        assert nudity["images"] == 2  # of the erased concept
        assert len(nudity["by_prompt"]) == 4
        assert (classes["forget"]["n"], classes["remain"]["n"]) == (2, 6)
        assert classes["axis"] == "object"
    sides = ("forget", "forget_pairs", "remain", "remain_pairs") if classes["pairs"] else ("forget", "remain")
    assert report["paired"].keys() == {f"{what}_mcnemar_p" for what in ("nudity", *sides)}
    assert report["memory"]["ram_bytes"] > 1e8


def test_the_command_says_where_the_report_is(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["erase", "run", "sd", str(preset), *QUICK, "--out", "here"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    out = capsys.readouterr().out
    assert "weights in" in out.splitlines()[0]
    assert out.splitlines()[-1] == "report: here/report.html"
    assert {p.name for p in Path("here").iterdir()} == {
        *("run.json", "metrics.jsonl", "saliency.safetensors", "model", "report.json", "report.html")
    }


def test_the_same_seed_gives_the_same_weights(start: Run, tmp_path: Path) -> None:
    a, b, c = (start(tmp_path / n, *QUICK, f"seed={s}") for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert digest(a) == digest(b)
    assert digest(a) != digest(c)


def test_pictures_are_blurred_without_a_count_of_nudity(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    write = program.report.write_html
    monkeypatch.setattr(program.report, "write_html", lambda out, blur: seen.append(blur) or write(out, blur=blur))
    start(tmp_path / "out", "eval.images=1", "eval.classifier=null", "eval.blur=true")
    assert len(seen[0]) == 8  # every picture was looked at
    assert read(tmp_path / "out/report.json")["before"].keys() == {"pictures"}


# --- planted lies ---------------------------------------------------------------------------------

Counted = Callable[..., dict[str, Any]]


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished run to tamper with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def count_again(program: ModuleType, preset: Path, finished: Path) -> Counted:
    """Count a run's pictures anew, as by the weights that the finished run had."""
    drawn = {name: drawn_by(finished / "images" / name) for name in ("base", "erased")}

    def count_again(out: Path, *words: str) -> dict[str, Any]:
        for kept in (out / "images").glob("*-detections.json"):
            kept.unlink()
        config = parse(override(yaml.safe_load(preset.read_text()), [*LOOKED_FOR, *words]), SdConfig)
        result = program.make_report(config, program.make_plan(config), out, None, {"erase_s": 1.0}, "", drawn)
        (out / "report.json").write_text(json.dumps(result))
        program.draw_report(config, out)
        return dict(result)

    return count_again


@pytest.mark.parametrize("every", [1, 2])
def test_a_detector_that_raises_has_seen_nothing_safe(
    program: ModuleType, copied: Path, count_again: Counted, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """It is an error in the report, not a count of 0; a comparison has no number; the pictures are hidden whole."""
    import nudenet

    detect = nudenet.NudeDetector.detect_batch
    calls: list[int] = []

    def broken(self: Any, images: list[Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(images))
        if len(calls) % every == 0:
            raise RuntimeError("out of memory")
        return detect(self, images, *args, **kwargs)

    monkeypatch.setattr(nudenet.NudeDetector, "detect_batch", broken)
    result = count_again(copied)
    seen = 0 if every == 1 else 1
    for when in ("before", "after"):
        assert (result[when]["nudity"]["images"], len(result[when]["nudity"]["errors"])) == (seen, 2 - seen)
        assert set(result[when]["nudity"]["by_prompt"].values()) == {None}
    assert result["paired"]["nudity_mcnemar_p"] is None or every == 2
    assert result["after"]["nudity"]["rate"] == (None if every == 1 else 0)
    summary = program.summary(result)
    assert (summary["flagged_before"], summary["flagged"]) == (None, None)
    (line,) = [line for line in program.report.verdict(result) if line.startswith("nudity")]
    assert line.endswith(f"not known: {4 - 2 * seen} images could not be looked at")
    page = (copied / "report.html").read_text()
    assert "Whether the erased concept is gone is not known" in page
    assert "after, nudity: " in page
    assert "out of memory" in page
    assert np.unique(np.asarray(Image.open(copied / "grid.png"))[120:], axis=1).size  # drawn all the same


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_without_its_classifier_nothing_is_counted(
    copied: Path, count_again: Counted, micro_classifier: Path, tmp_path: Path, lost: str
) -> None:
    judge = Path(shutil.copytree(micro_classifier, tmp_path / "judge"))
    (judge / lost).unlink()
    (copied / "report.json").unlink()
    with pytest.raises(ValueError, match=r"judge: (not a transformers image classifier|no config\.json there)"):
        count_again(copied, f"eval.classifier={judge}")
    assert not (copied / "report.json").exists()


def shuffle(out: Path, key: str) -> None:
    """Exchange a value of two rows of the erased pictures' manifest."""
    path = out / "images/erased/manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0][key], lines[2][key] = lines[2][key], lines[0][key]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def exchange(a: Path, b: Path) -> None:
    a.rename(a.with_name("between"))
    b.rename(a)
    a.with_name("between").rename(b)


def swap_numbers(out: Path) -> None:
    report = read(out / "report.json")
    report["before"], report["after"] = report["after"], report["before"]
    (out / "report.json").write_text(json.dumps(report))
    shutil.rmtree(out / "images")


@pytest.mark.parametrize(
    ("lie", "counting", "drawing"),
    [
        (lambda out: shuffle(out, "prompt"), "prompts or seeds were shuffled", "not the pictures that report.json"),
        (lambda out: shuffle(out, "seed"), "prompts or seeds were shuffled", "not the pictures that report.json"),
        (
            lambda out: exchange(out / "images/erased/00000-00.png", out / "images/erased/00001-00.png"),
            "not the image that manifest.jsonl names for",
            "not the image that manifest.jsonl names for",
        ),
        (
            lambda out: exchange(out / "images/base", out / "images/erased"),
            "other weights than this run's, so it cannot be counted: base and erased swapped",
            "not the pictures that report.json has counted: base and erased are swapped",
        ),
        (swap_numbers, None, "other weights than the base model's by run.json: base and erased are swapped"),
    ],
    ids=["prompts", "seeds", "files", "models", "numbers"],
)
def test_pictures_that_are_not_what_they_are_said_to_be(
    program: ModuleType,
    copied: Path,
    count_again: Counted,
    lie: Callable[[Path], None],
    counting: str | None,
    drawing: str,
) -> None:
    """Neither counted nor put on a page: shuffled prompts, exchanged files, base and erased swapped."""
    (copied / "report.html").unlink()
    lie(copied)
    with pytest.raises(ValueError, match=drawing):
        program.report.write_html(copied)
    if counting is not None:
        with pytest.raises(ValueError, match=counting):
            count_again(copied)
    assert not (copied / "report.html").exists()


def test_shuffled_and_swapped_pictures_of_a_run_without_records(program: ModuleType, copied: Path) -> None:
    """As of an earlier version: what the folders themselves tell is enough."""
    report = read(copied / "report.json")
    for when in ("before", "after"):
        del report[when]["pictures"]
    (copied / "report.json").write_text(json.dumps(report))
    program.report.write_html(copied)
    exchange(copied / "images/base", copied / "images/erased")
    with pytest.raises(ValueError, match="images/base is of other weights than the base model's by run"):
        program.report.write_html(copied)
    exchange(copied / "images/base", copied / "images/erased")
    shuffle(copied, "prompt")
    with pytest.raises(ValueError, match=r"images/base and images/erased are not of the same prompts.*row 1 differs"):
        program.report.write_html(copied)


# --- other forms of a model -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(micro_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a single file."""
    out = tmp_path_factory.mktemp("single") / "micro.safetensors"
    source: Any = locate(micro_sd)
    convert.to_file(source, out)
    return out


def test_a_single_file_gives_a_single_file(start: Run, single: Path, tmp_path: Path) -> None:
    """The same run as on the folder, in the form that came in; the pictures are drawn with it too."""
    words = ("eval.images=1", "eval.classifier=null")
    folder, file = start(tmp_path / "a", *words), start(tmp_path / "b", f"model={single}", *words)
    assert {p.name for p in (file / "model").iterdir()} == {"model.safetensors", "README.md"}
    before, after = load_file(single), load_file(file / "model/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.diffusion_model.") and ".attn2." in name for name in changed)
    assert digest_of(dict(folders.tensors(locate(file / "model")))) == folder_digest(folder / "model")
    for name in ("base", "erased"):
        one, other = (read_manifest(out / "images" / name) for out in (folder, file))
        assert [row.sha256 for row in one] == [row.sha256 for row in other]
    again = start(tmp_path / "b", f"model={single}", *words, resume=True)
    assert (again / "report.html").exists()


def test_a_run_that_keeps_a_delta(
    program: ModuleType, preset: Path, micro_sd: Path, single: Path, start: Run, tmp_path: Path
) -> None:
    """It rebuilds the model of a run that keeps it whole, of the folder and of the single file, and the bases."""
    words = ("eval.images=1", "eval.classifier=null")
    whole = start(tmp_path / "whole", *words)
    config = parse(override(yaml.safe_load(preset.read_text()), words), SdConfig)
    out = tmp_path / "delta"
    for resume in (False, True):
        program.main(config, out, resume=resume, form="delta", say=lambda line: None)
    assert {p.name for p in out.iterdir()} >= {"run.json", "delta.safetensors", "report.json", "report.html"}
    assert not (out / "model").exists()
    change = delta.open_delta(out / "delta.safetensors")
    for name, base in (("folder", micro_sd), ("file", single)):
        source = locate(base)
        folders.save(source, delta.apply(change, folders.tensors(source)), tmp_path / name, change.meta)
        erased = locate(tmp_path / name)
        assert digest_of(dict(folders.tensors(erased))) == folder_digest(whole / "model")
        back = delta.apply(change, folders.tensors(erased), undo=True)
        folders.save(erased, back, tmp_path / f"{name}-base", {})
        assert digest_of(dict(folders.tensors(locate(tmp_path / f"{name}-base")))) == folder_digest(micro_sd)
    assert sha256(tmp_path / "file-base/model.safetensors") == sha256(single)
    trees = [
        {p.relative_to(top): sha256(p) for p in top.rglob("*") if p.is_file()}
        for top in (tmp_path / "folder-base", micro_sd)
    ]
    assert trees[0] == trees[1]  # the card is gone again
    assert (tmp_path / "folder/README.md").read_text() == (whole / "model/README.md").read_text()


def test_a_run_that_keeps_a_delta_goes_on(
    program: ModuleType, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(override(yaml.safe_load(preset.read_text()), QUICK), SdConfig)
    with monkeypatch.context() as patch:
        patch.setattr(program, "make_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            program.main(config, tmp_path / "out", form="delta", say=lambda line: None)
    before = sha256(tmp_path / "out/delta.safetensors")
    shutil.rmtree(tmp_path / "out/model")  # as if stopped once more, while it was removed
    program.main(config, tmp_path / "out", form="delta", resume=True, say=lambda line: None)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("run.json", "metrics.jsonl", "saliency.safetensors", "delta.safetensors", "report.json", "report.html")
    }
    assert sha256(tmp_path / "out/delta.safetensors") == before


def test_a_card_of_the_base_is_kept(micro_sd: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(micro_sd, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: x\ntags: [cats]\n---\nhello")
    meta = {"erase": "0", "erase_method": "sfron", "erase_base": "a/b"}
    folders.save(locate(base), {}, tmp_path / "once", meta)
    folders.save(locate(tmp_path / "once"), {}, tmp_path / "twice", meta)
    for name in ("once", "twice"):
        card = yaml.safe_load((tmp_path / name / "README.md").read_text().split("---")[1])
        assert (card["license"], card["license_name"], card["base_model"]) == ("other", "x", "a/b")
        assert (tmp_path / name / "README.base.md").read_text().endswith("hello")
    folders.save(locate(tmp_path / "twice"), {}, tmp_path / "undone", {})
    assert sha256(tmp_path / "undone/README.md") == sha256(base / "README.md")
    assert not (tmp_path / "undone/README.base.md").exists()


# --- counting -------------------------------------------------------------------------------------


def plan_of(program: ModuleType, *lines: str) -> Any:
    """`prompt, object, style, forgotten` a line; the prompts marked with ! are the forget prompts."""
    rows = [[part.strip() for part in line.split(",")] for line in lines]
    return program.Plan(
        forget=[prompt.removeprefix("!") for prompt, *_ in rows if prompt.startswith("!")],
        anchors=["a dog"],
        remain=["a dog"],
        rows=[
            PromptRow(prompt.removeprefix("!"), number, object=thing, style=style)
            for number, (prompt, thing, style, _) in enumerate(rows)
        ],
        forgotten=[gone == "gone" for *_, gone in rows],
    )


PAIRS = tuple(f"{thing}/{style}" for thing in ("cat", "dog", "car") for style in ("plain", "sepia"))
SEEN = {  # by the row's number: what its two pictures show after erasure
    "photo of cat": "cat/plain dog/plain",
    "sepia cat": "dog/sepia dog/sepia",
    "photo of dog": "dog/plain cat/plain",
    "photo of dog again": "dog/plain dog/sepia",
    "photo of car": "car/plain car/plain",
    "sepia dog": "dog/sepia dog/plain",
}
AXES = {
    "object": (
        ["!a photo of a cat, cat, plain, gone", "a sepia cat, cat, sepia, gone", "a photo of a dog, dog, plain, stays"],
        [
            "a photo of a dog, dog, plain, stays",
            "a photo of a car, car, plain, stays",
            "a sepia dog, dog, sepia, stays",
        ],
        {"a photo of a cat": "forget", "a sepia cat": "form"},
        # plain dogs 3 of 4 and cars 2 of 2 stay; of the sepia dogs both are dogs, one is a sepia dog
        {
            "forget": 0.5,
            "forms": 0.0,
            "remain": 0.875,
            "drop": 12.5,
            "worst": 25.0,
            "pairs_drop": 50.0,
            "ua": 1 - (0.5 + 0) / 2,
            "ira": (0.75 + 1 + 1) / 3,
            "cra": (1 + 1 + 0.75 + 1 + 0.5) / 5,
            "shows": "dog",
        },
    ),
    "style": (
        [
            "a photo of a cat, cat, plain, stays",
            "!a sepia cat, cat, sepia, gone",
            "a photo of a dog, dog, plain, stays",
        ],
        ["a photo of a dog, dog, plain, stays", "a photo of a car, car, plain, stays", "a sepia dog, dog, sepia, gone"],
        {"a sepia cat": "forget", "a sepia dog": "form"},
        # the plain cat is plain in both pictures; of the plain dogs 2 of 4 are right on both axes, of the cars all
        {
            "forget": 1.0,
            "forms": 0.5,
            "remain": 1.0,
            "drop": 0.0,
            "worst": 0.0,
            "pairs_drop": 25.0,
            "ua": 1 - (1 + 0.5) / 2,
            "ira": (1 + 0.75 + 1) / 3,
            "cra": (0.5 + 0 + 0.75 + 1 + 1) / 5,
            "shows": "sepia",
        },
    ),
}


@pytest.mark.parametrize("axis", AXES)
def test_a_report_is_summed_up(program: ModuleType, preset: Path, monkeypatch: pytest.MonkeyPatch, axis: str) -> None:
    first, last, sides, expected = AXES[axis]
    plan = plan_of(program, *first, *last)
    config = parse(override(yaml.safe_load(preset.read_text()), [f"forget.axis={axis}"]), SdConfig)
    right = [f"{row.object}/{row.style}" for row in plan.rows for _ in range(2)]
    after = [pair for pairs in SEEN.values() for pair in pairs.split()]
    found = []
    for shown in (right, after):
        guess = classes.ClassPredictions(
            np.eye(len(PAIRS))[[PAIRS.index(pair) for pair in shown]], PAIRS, tuple(map(Path, shown)), "mine", "0"
        )
        monkeypatch.setattr(classes, "classify", lambda *_, guess=guess: guess)
        paths = [Path(str(i)) for i in range(len(shown))]
        wanted = [gone for gone in plan.forgotten for _ in range(2)]
        counts, each = program.count_classes(config, plan, paths, wanted)
        found.append(counts)
        assert each.keys() == {"forget", "forget_pairs", "remain", "remain_pairs"}
        for what, hits in each.items():  # in the paired test, what is in the counts
            assert (sum(hits), len(hits)) == (counts[what]["correct"], counts[what]["n"])
    scores = found[1]["per_prompt"]
    assert list(scores) == list(dict.fromkeys(row.prompt for row in plan.rows))
    assert {prompt: row["side"] for prompt, row in scores.items() if row["side"] != "remain"} == sides
    dog = scores["a photo of a dog"]  # two rows
    assert (dog["n"], dog["object"], dog["style"], dog["pair_accuracy"]) == (4, "dog", "plain", 0.5)
    assert dog["correct"] == 3  # on either axis
    report = {"before": {"classes": found[0]}, "after": {"classes": found[1]}, "timing": {"erase_s": 2.0}}
    summary = program.summary(report)
    assert [summary.pop(key) for key in ("saliency_s", "erase_s", "rte_s")] == [None, 2.0, 2.0]
    kept = [row["other_accuracy"] for row in scores.values() if row["side"] != "remain"]
    assert summary.pop("kept") == pytest.approx(sum(kept) / len(kept))
    assert summary == pytest.approx(expected)
    counted = {
        "before": {**report["before"], "nudity": {"rate": 0.9}},
        "after": {**report["after"], "nudity": {"rate": 0.1}},
    }
    both = program.summary({**report, **counted})
    assert [both.pop(key) for key in ("saliency_s", "erase_s", "rte_s")] == [None, 2.0, 2.0]
    assert 0 <= both.pop("kept") <= 1
    assert both == pytest.approx({**expected, "flagged_before": 0.9, "flagged": 0.1})


def test_a_report_without_a_classifier_is_summed_up(program: ModuleType, finished: Path) -> None:
    report = {"before": {"nudity": {"rate": 0.9}}, "after": {"nudity": {"rate": 0.1}}, "timing": {"erase_s": None}}
    time = dict.fromkeys(("saliency_s", "erase_s", "rte_s"))
    assert program.summary(report) == {"forget": 0.1, "flagged_before": 0.9, "flagged": 0.1, **time}
    assert program.summary({**report, "before": {}, "after": {}}) == time
    whole = read(finished / "report.json")
    summary = program.summary(whole)
    assert summary["forget"] == whole["after"]["classes"]["forget"]["accuracy"]
    assert summary["flagged"] == whole["after"]["nudity"]["rate"]
    assert (summary["forms"], summary["pairs_drop"]) == (None, None)  # there are no such rows


def test_nudity_is_counted_by_prompt_where_rows_share_one(program: ModuleType) -> None:
    plan = plan_of(program, "!a, x, x, gone", "!a, x, x, gone", "b, x, x, stays", "a, x, x, gone")
    flagged = [True, False, True, True, False, True, False, False]
    images = tuple(
        detections.ImageDetections(Path(f"{i}.png"), (detections.Detection("FACE_FEMALE", 0.9, (0, 0, 1, 1)),) * shown)
        for i, shown in enumerate(flagged)
    )
    found = detections.Detections(images, "3.4.2", "0", "corrected", 320)
    result, flags = program.count_nudity(found, nudity.custom_preset(["FACE_FEMALE"], 0.5), plan, 2)
    assert result["by_prompt"] == {"a": 3, "b": 1}
    assert (result["images"], result["flagged"]) == (6, 3)
    assert flags == [True, False, True, True, False, False]


# --- comparing ------------------------------------------------------------------------------------


def test_base_pictures_of_an_earlier_run_are_copied(
    program: ModuleType, start: Run, preset: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a run that is gone on with; what the earlier run has not is drawn."""
    drawn: list[list[str]] = []
    sampler = program.sd.sampler

    def counting(*args: Any, **settings: Any) -> Any:
        sample = sampler(*args, **settings)
        drawn.append([])
        return lambda prompts, generators, **row: drawn[-1].extend(prompts) or sample(prompts, generators, **row)

    monkeypatch.setattr(program.sd, "sampler", counting)
    words = ["forget.prompts=a photo of a dog", "forget.anchors=a photo of a cat", "eval.classifier=null"]
    words += [f"eval.base={finished / 'images/base'}", f"eval.prompts=[a boat, {preset.with_name('set.csv')}]"]
    with monkeypatch.context() as patch:
        patch.setattr(program, "cache", stop)
        with pytest.raises(StopError):
            start(tmp_path / "out", *words)
    assert drawn == [["a boat"] * 4]  # a batch, half of it padding
    out = start(tmp_path / "out", *words, resume=True)
    assert drawn[1] == []
    assert len(drawn[2]) == 12
    own, theirs = (
        {(r.prompt, r.seed, r.index): (folder / r.file).read_bytes() for r in read_manifest(folder)}
        for folder in (out / "images/base", finished / "images/base")
    )
    assert own.items() > theirs.items()
    assert len(own) == len(theirs) + 2


def test_base_pictures_by_another_path_do_not_make_another_run(
    program: ModuleType, start: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a comparison that is gone on with from another working folder."""
    monkeypatch.chdir(finished)
    words = ("eval.classifier=null", "eval.images=1")
    with monkeypatch.context() as patch:
        patch.setattr(program, "cache", stop)
        with pytest.raises(StopError):
            start(tmp_path / "out", *words, "eval.base=images/base")
    start(tmp_path / "out", *words, f"eval.base={finished}/images/base", resume=True)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("draw.steps=3", r"settings\.draw\.steps was 2, now 3"),
        ("precision=bf16", r"settings\.precision was \"no\", now \"bf16\""),
        ("model={}/model", r"settings\.weights\.unet/diffusion_pytorch_model\.safetensors was"),
    ],
)
def test_base_pictures_of_another_model_or_way_to_draw_are_refused(
    start: Run, finished: Path, tmp_path: Path, word: str, said: str
) -> None:
    with pytest.raises(ValueError, match=f"base: made with other settings, so its images cannot be used again: {said}"):
        start(tmp_path / "out", f"eval.base={finished / 'images/base'}", word.format(finished))


def test_a_comparison_from_end_to_end(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    targets = {
        name: {"forget": {"prompts": [f"a photo of a {name}"], "anchors": ["a photo of a boat"]}}
        for name in ("cat", "dog")
    }
    settings = {"eval": {"images": 1}, "train": {"steps": 1}, "saliency": {"kind": "none", "density": None}}
    spec = {"pipeline": "sd", "preset": str(preset), "settings": settings, "targets": targets}
    Path("mine.yaml").write_text(yaml.safe_dump(spec))
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["erase", "compare", "mine.yaml", "forget.count=1", "--out", "out"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        shown = capsys.readouterr().out
        assert shown.endswith(Path("out/table.md").read_text())
        monkeypatch.setattr(runs, "unlearn", stop)  # the second time nothing is left to do
    assert {p.name for p in Path("out").iterdir()} == {
        *("compare.json", "runs", "table.md", "table.csv", "results.json", "forgetting.svg")
    }
    header, _, *lines = shown.splitlines()
    assert header.startswith(
        "| method | target | forget | forms | kept | remain | drop | worst | pairs_drop | ua | ira | cra |"
    )
    assert [line.split(" | ")[:2] for line in lines] == [["| sfron", name] for name in ("cat", "dog", "all")]
    cat, dog = (Path(f"out/runs/sfron/{name}/0") for name in ("cat", "dog"))
    assert read(dog / "run.json")["config"]["eval"]["base"] == str(cat / "images/base")
    pictures = [
        {r.prompt: (run / "images/base" / r.file).read_bytes() for r in read_manifest(run / "images/base")}
        for run in (cat, dog)
    ]
    assert pictures[0] == pictures[1]
    for result, name in zip(read(Path("out/results.json"))["runs"], ("cat", "dog"), strict=True):
        after = read(Path(f"out/runs/sfron/{name}/0/report.json"))["after"]["classes"]
        assert result["forget"] == after["forget"]["accuracy"]
        assert result["remain"] == pytest.approx(after["remain"]["accuracy"])


# --- stopping and going on ------------------------------------------------------------------------


class StopError(Exception):
    pass


def stop(*_: Any, **__: Any) -> None:
    raise StopError


def test_a_run_ends_when_a_look_is_enough(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone and the rest right, not gone alone; killed in a look it goes on to the same end."""
    verdicts = {2: ("cat", "dog", "car"), 4: ("dog", "dog", "dog"), 6: ("dog", "dog", "car")}
    looks: list[int] = []
    killed = [False]

    def judged(config: SdConfig, plan: Any, folder: Path) -> Any:
        looks.append(int(folder.name.rpartition(" ")[2]))
        manifest = read_manifest(folder)
        assert [row.prompt[-3:] for row in manifest] == ["cat", "cat", "dog", "car"]  # of three that stay
        counted = {(row.prompt, row.seed) for row in plan.rows}
        assert not counted & {(row.prompt, row.seed) for row in manifest}  # those that end a run do not judge it
        if killed[0] and looks[-1] == 4:
            killed[0] = False
            raise StopError
        first, *others = verdicts[looks[-1]]
        return [first == "cat", False, False, False], [first, "dog", *others]

    monkeypatch.setattr(program, "judged", judged)
    words = ("eval.images=0", "train.steps=9", "checkpoint_every=1", "until={every: 2, images: 2, remain: 0.6}")
    straight = start(tmp_path / "straight", *words)
    assert looks == [2, 4, 6]
    report = read(straight / "report.json")
    assert report["until"].pop("seconds") > 0
    assert report["until"] == {
        "every": 2,
        "images": 2,
        "forget": 0.0,
        "remain": 0.6,
        "ended": 6,
        "why": "after step 6 of 9 0 of its pictures showed the concept, 1 of the others' were right",
        "looks": {
            "2": {"forget": 0.5, "remain": 1.0},
            "4": {"forget": 0.0, "remain": 0.5},
            "6": {"forget": 0.0, "remain": 1.0},
        },
    }
    assert report["timing"]["steps"] == program.summary(report)["steps"] == 6
    with safe_open(straight / "model/unet/diffusion_pytorch_model.safetensors", framework="pt") as f:
        assert f.metadata()["erase_train"] == "xattn, 6 of 9 steps, seed 0"
    killed[0] = True
    with pytest.raises(StopError):
        start(tmp_path / "killed", *words)
    start(tmp_path / "killed", *words, resume=True)
    assert looks == [2, 4, 6, 2, 4, 4, 6]
    assert digest(tmp_path / "killed") == digest(straight)
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(6))
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {p.name for p in straight.iterdir()}


def test_a_run_that_no_look_ends_says_so(start: Run, tmp_path: Path) -> None:
    """Judged for real, by a judge that knows one class; the training is that of a run that does not look."""
    words = ("eval.images=0", "train.steps=2")
    out = start(tmp_path / "looks", *words, "until={every: 1, images: 3, remain: 1.0}")
    report = read(out / "report.json")["until"]
    assert report["looks"].keys() == {"1"}
    assert (report["ended"], report["why"]) == (None, "none of 1 looks was enough: all 2 steps were done")
    assert digest(out) == digest(start(tmp_path / "plain", *words))


ATTACKED = (  # and nothing else of a run that takes time
    "eval.images=0",
    "saliency={kind: none, density: null}",
    "train.steps=1",
    "eval.attacks=[paraphrases, inversion, relearn]",
    "attack.count=2",
    "attack.paraphrases.images=1",
    "attack.inversion={steps: 2, batch_size: 2, images: 2}",
    "attack.relearn={at: [1, 2], batch_size: 2, images: 1}",
)


def test_an_erasure_is_attacked(
    program: ModuleType, start: Run, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a part of the run, and by `erase attack` on one that is there, killed and gone on with: the same figures."""
    lines = ["a cat,cat,plain,7", "cat,cat,sepia,8", "a dog,dog,plain,9", "a photo of a cat,cat,plain,3"]
    (tmp_path / "words.csv").write_text("\n".join(["prompt,object,style,seed", *lines]))
    words = (*ATTACKED, f"attack.paraphrases.prompts={tmp_path / 'words.csv'}")
    out = start(tmp_path / "out", *words)
    robust = read(out / "report.json")["robustness"]
    assert (robust["concept"], robust["seconds"] > 0) == (["cat"], True)
    assert robust["paraphrases"]["by_prompt"].keys() == {"a cat", "cat"}  # not the dog, nor the forget prompt
    for when in ("base", "erased"):
        assert robust["paraphrases"][when]["n"] == robust["inversion"][when]["n"] == 2
        one = robust["paraphrases"][when]
        assert one["ci95"][0] <= one["rate"] == one["shown"] / 2 <= one["ci95"][1]
        assert one["shown"] == sum(row[when]["shown"] for row in robust["paraphrases"]["by_prompt"].values())
        paths = sorted((out / "attacks/inversion" / when).glob("*.png"))
        named = classes.axis(classes.classify(paths, Path(robust["judge"])), 0).predicted
        assert robust["inversion"][when]["shown"] == named.count("cat")
    assert [(point["steps"], point["n"]) for point in robust["relearn"]["curve"]] == [(0, 1), (1, 1), (2, 1)]
    summary = program.summary(read(out / "report.json"))
    assert summary["inverted"] == robust["inversion"]["erased"]["rate"]
    assert summary["relearned_2"] == robust["relearn"]["curve"][-1]["rate"]
    page = (out / "report.html").read_text()
    assert "Robustness" in page
    assert "a photo of *" in page
    relearned = {p.name: sha256(p / "00000-00.png") for p in (out / "attacks/relearn").iterdir()}
    assert relearned.keys() == {"00000", "00001", "00002"}
    assert len(set(relearned.values())) == 3

    attack = cli.program("attack").attack_run
    again, attacks_only = tmp_path / "again", [f"eval.classifier={robust['judge']}"]
    with monkeypatch.context() as patch:
        patch.setattr(learning, "relearn", stop)
        with pytest.raises(StopError):
            attack(out, attacks_only, again, say=lambda line: None)
    with monkeypatch.context() as patch:
        patch.setattr(learning, "learn_word", stop)  # the words are kept
        attack(out, attacks_only, again, resume=True, say=lambda line: None)
    found = read(again / "report.json")["robustness"]
    assert {**found, "seconds": 0} == {**robust, "seconds": 0}
    assert (again / "report.html").exists()
    with pytest.raises(ValueError, match=r"train\.steps belongs to the run; erase attack takes attack"):
        attack(out, ["train.steps=1"], tmp_path / "other")
    with pytest.raises(ValueError, match=f"{again} is no finished run of erase run sd"):
        attack(again, [], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_run_json_comes_before_anything(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "draw_images", stop)
    with pytest.raises(StopError):
        start(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["run.json"]


def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*QUICK, "train.steps=5", "checkpoint_every=2")
    whole = start(tmp_path / "whole", *words)
    call = training.JsonlTracker.__call__

    def killed(self: Any, row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise StopError
        call(self, row)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(training.JsonlTracker, "__call__", killed)
        with pytest.raises(StopError):
            start(out, *words)
    assert [row["step"] for row in rows(out)] == [0, 1, 2]
    assert not (out / "model").exists()
    mask = (out / "saliency.safetensors").stat().st_mtime_ns
    start(out, *words, resume=True)
    assert (out / "saliency.safetensors").stat().st_mtime_ns == mask
    assert digest(out) == digest(whole)
    same = ("step", "forget_loss", "remain_loss", "fast_rate")
    assert [[row[k] for k in same] for row in rows(out)] == [[row[k] for k in same] for row in rows(whole)]
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_a_run_stopped_after_training_does_not_train_again(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", ("eval.classifier=null", "eval.images=1")
    with monkeypatch.context() as patch:
        patch.setattr(program.folders, "save", stop)
        with pytest.raises(StopError):
            start(out, *words)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "unlearn", stop)
        patch.setattr(program, "make_report", stop)
        with pytest.raises(StopError):
            start(out, *words, resume=True)
        weights = digest(out)
        patch.setattr(program.folders, "save", stop)
        patch.setattr(program, "cache", stop)  # nor is its data drawn again
        patch.undo()
        patch.setattr(runs, "unlearn", stop)
        start(out, *words, resume=True)
    assert digest(out) == weights
    timing = read(out / "report.json")["timing"]
    assert timing["steps"] == 2
    assert timing["erase_s"] > 0
    assert len(rows(out)) == 2
    assert not (out / "trained.safetensors").exists()


def test_lost_parts_are_made_again(start: Run, tmp_path: Path) -> None:
    out = start(tmp_path / "out", "eval.classifier=null", "eval.images=1")
    weights = digest(out)
    base = {p.name: p.stat().st_mtime_ns for p in (out / "images/base").glob("*.png")}
    (out / "report.json").unlink()
    shutil.rmtree(out / "model")
    next((out / "images/erased").glob("*.png")).write_bytes(b"broken")
    start(out, "eval.classifier=null", "eval.images=1", resume=True)
    assert digest(out) == weights
    assert (out / "report.json").exists()
    assert {p.name: p.stat().st_mtime_ns for p in (out / "images/base").glob("*.png")} == base
    assert all(sha256(out / "images/erased" / r.file) == r.sha256 for r in read_manifest(out / "images/erased"))
    assert [row["step"] for row in rows(out)] == [0, 1]


def test_a_finished_run_is_left_as_it_is(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = start(tmp_path / "out", *QUICK)
    report = (out / "report.json").read_bytes()
    monkeypatch.setattr(runs, "unlearn", stop)
    start(out, *QUICK, resume=True)
    assert (out / "report.json").read_bytes() == report


def test_resume_wants_the_same_run(start: Run, preset: Path, micro_sd: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(micro_sd, tmp_path / "model"))
    pictures = folder_of_pictures(tmp_path / "pictures", "a photo of a cat")
    words = (*QUICK, f"model={model}", f"forget.images={pictures}")
    out = start(tmp_path / "out", *words)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for other in ("train.steps=3", "seed=1", "method.lambd=0", "eval.images=1"):
        with pytest.raises(ValueError, match=r"holds a run with another config \(.*, now .*\): resume with the same"):
            start(out, *words, other, resume=True)
    Image.new("RGB", (16, 16)).save(next(pictures.glob("*.png")))
    with pytest.raises(ValueError, match="holds a run with another data"):
        start(out, *words, resume=True)
    (model / "vae/diffusion_pytorch_model.safetensors").write_bytes(
        (model / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    )
    weights = load_file(micro_sd / "vae/diffusion_pytorch_model.safetensors")
    from safetensors.torch import save_file

    weights["decoder.conv_in.bias"] += 1
    save_file(weights, model / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds a run with another base"):
        start(out, *words, resume=True)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_folder_in_use_is_not_touched(start: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    for resume, said in (
        (False, "is not empty: choose another --out"),
        (True, "holds no run to go on with: choose an"),
    ):
        with pytest.raises(ValueError, match=f"mine {said}"):
            start(tmp_path / "mine", *QUICK, resume=resume)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file: --out names a folder"):
        start(tmp_path / "file", *QUICK)
    (tmp_path / "empty").mkdir()
    start(tmp_path / "empty", *QUICK)


# --- refusals -------------------------------------------------------------------------------------

REFUSED = {
    "no anchor": (["forget.anchors=[]"], "forget.anchors has 0 prompts for 1 forget prompts: give one for each"),
    "anchors do not match": (
        ["forget.prompts=[a cat, a car, a boat]", "forget.anchors=[a dog, a dog]"],
        "forget.anchors has 2 prompts for 3 forget prompts",
    ),
    "nothing to forget": (["forget.prompts=[]"], "forget.prompts is empty"),
    "nothing remains": (["remain.prompts=a photo of a cat"], "remain.prompts holds nothing but forgotten prompts"),
    "ascent on the anchor's pictures": (
        ["forget.loss=ascent", "forget.pictures=anchor"],
        "forget.pictures=anchor needs anchors, and forget.loss=ascent has none: own",
    ),
    "ascent on both": (["forget.loss=ascent", "forget.pictures=both"], "forget.pictures=both needs anchors"),
    "surrogate of the concept itself": (
        ["forget.loss=surrogate"],
        "forget.loss=surrogate learns from pictures of the anchors: set forget.pictures=anchor; got own",
    ),
    "own loss on the anchor's pictures": (
        ["method={name: esd, fast_rate: 1}", "forget.pictures=both"],
        "forget.pictures=both needs anchors, and method esd has none: own",
    ),
    "anchor that is forgotten": (
        ["forget.anchors=a photo of a cat"],
        "forget.anchors has 'a photo of a cat', which is to be forgotten or was before: choose what stays",
    ),
    "no new network": (
        ["method={name: bad_teacher}"],
        "bad_teacher needs a network with new weights, which this program",
    ),
    "given pictures that are not used": (
        ["forget.pictures=anchor", "forget.images=empty"],
        "forget.images are not used with forget.pictures=anchor: take one back, or use both",
    ),
    "no base pictures": (["eval.base=none"], "none: has no settings.json, so its images cannot be used again"),
    "training": (["method={name: retrain}"], "retrain"),
    "unknown method": (["method.name=sfro"], "no method 'sfro', did you mean sfron"),
    "no method": (["method={}"], "no method ''"),
    "method setting": (["method.lambdda=1"], "unknown setting method.lambdda; did you mean method.lambd"),
    "method range": (["method.slow_steps=-1"], "needs slow_steps ≥ 0"),
    "method combination": (["method.published=true", "method.slow_steps=3"], "published=True"),
    "unknown model": (["model=none"], "no model 'none'"),
    "unknown parameters": (["train.parameters=qqqq"], "train.parameters 'qqqq' matches no parameter"),
    "broken parameters": (["train.parameters='('"], "is neither full, xattn, noxattn nor a regular expression"),
    "unknown preset": (["eval.nudity.preset=i2pp"], "no counting preset 'i2pp'; presets: i2p"),
    "no way to count": (["eval.nudity={}"], "eval.nudity needs a preset"),
    "unknown class": (["eval.nudity={classes: [FACE], threshold: 0.5}"], "classes are ['FACE']"),
    "too low a threshold": (["eval.nudity={classes: [FACE_FEMALE], threshold: 0.1}"], "expected 0.25 to 1"),
    "no judge of looks": (["until={}", "eval.classifier=null"], "until needs eval.classifier or eval.nudity"),
    "no judge of what stays": (
        ["until={}", "eval.classifier=null", "eval.nudity={preset: i2p}"],
        "until.remain needs eval.classifier, and prompts in eval.prompts that are not forgotten",
    ),
    "no judge of attacks": (["eval.attacks=[relearn]", "eval.classifier=null"], "eval.attacks need eval.classifier"),
    "no other words": (["eval.attacks=[paraphrases]"], "attack.paraphrases.prompts has 0 prompts, none of them of cat"),
    "no learned word": (
        ["eval.attacks=[inversion]", "attack.inversion.prompt=a cat"],
        r"attack.inversion.prompt must hold the word * once, such as 'a photo of *'; got 'a cat'",
    ),
    "relearned parameters": (
        ["eval.attacks=[relearn]", "attack.relearn.parameters=qqqq"],
        "train.parameters 'qqqq' matches no parameter",
    ),
    "missing classifier": (["eval.classifier=photos-clasifier"], "no embedded model 'photos-clasifier'"),
    "no classifier": (["eval.classifier=."], "no config.json there"),
    "prompt without a label": (
        ["forget.prompts=a cat"],
        "needs to know what a picture should show; the prompt 'a cat' is labelled None",
    ),
    "axis without a label": (
        ["forget.axis=style", "eval.prompts=[a cat]", "remain.prompts=[a dog]"],
        "'a photo of a cat' is labelled None",
    ),
    "no mask": (["saliency.density=null"], "saliency.threshold or saliency.density"),
    "two masks": (["saliency.threshold=1"], "saliency.threshold or saliency.density"),
    "long prompt": (["forget.prompts=a photo of a grandiloquent cat"], "tokens, this model takes 16: shorten it"),
    "missing set": (["remain.prompts=none.csv"], "no prompt set file 'none.csv'"),
    "missing pictures": (["forget.images=none"], "no such image folder: none"),
    "no pictures": (["remain.images=empty"], "empty has no images"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_anything(
    start: Run, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, said = REFUSED[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        start(tmp_path / "out", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- data of one's own ----------------------------------------------------------------------------


def folder_of_pictures(folder: Path, *prompts: str, name: str | None = None) -> Path:
    """Two random pictures a prompt, with their prompts in a file of that name."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for number in range(2 * len(prompts)):
        file = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / file)
        lines.append(json.dumps({"file_name": file, "text": prompts[number // 2]}))
    if name:
        (folder / name).write_text("\n".join(lines))
    return folder


def test_given_pictures_take_the_place_of_drawn_ones(
    program: ModuleType, start: Run, tmp_path: Path, micro_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = folder_of_pictures(tmp_path / "forget", "a cat")
    remain = folder_of_pictures(tmp_path / "remain", "a dog", "a boat", name="metadata.jsonl")
    made: list[Any] = []
    cache = program.cache
    monkeypatch.setattr(program, "cache", lambda *args: made.append(cache(*args)) or made[-1])
    monkeypatch.setattr(program.sd, "draw_latents", stop)
    out = start(tmp_path / "out", *QUICK, f"forget.images={forget}", f"remain.images={remain}")
    (forgotten, kept, null), *_ = made
    assert (len(forgotten), len(kept)) == (2, 4)
    assert forgotten.std is not None
    assert forgotten.anchor is not None
    assert kept.anchor is None
    # the one forget prompt is theirs; each remain picture has its own
    assert torch.equal(forgotten.cond, forgotten.cond[:1].expand(2))
    assert len(set(kept.cond.tolist())) == 2
    assert not torch.equal(forgotten.table[forgotten.cond[0]], forgotten.table[forgotten.anchor[0]])
    assert null.shape == (1, micro.MAX_TOKENS, micro.WIDTH)
    assert moved(out, micro_sd)
    assert set(read(out / "run.json")["data"]) == {"forget", "remain"}


@pytest.mark.parametrize("pictures", ["own", "anchor", "both"])
def test_pictures_that_a_redirect_is_learned_on(
    program: ModuleType, preset: Path, monkeypatch: pytest.MonkeyPatch, pictures: str
) -> None:
    """Whatever they show, the condition is the forget prompt's and the target its anchor's."""
    words = ["forget.prompts=[a cat, a car]", "forget.anchors=[a dog, a boat]", f"forget.pictures={pictures}"]
    names = [
        "",
        "a cat",
        "a car",
        "a dog",
        "a boat",
        *(f"a photo of a {name}" for name in ("cat", "dog", "car", "boat")),
    ]

    def draw(pipe: Any, prompts: list[str], generators: list[torch.Generator], **_: Any) -> torch.Tensor:
        seeds.append([g.initial_seed() for g in generators])
        return torch.tensor([float(names.index(p)) for p in prompts]).reshape(-1, 1, 1, 1)

    seeds: list[list[int]] = []
    monkeypatch.setattr(program.sd, "resolution", lambda pipe: 16)
    monkeypatch.setattr(program.sd, "draw_latents", draw)
    monkeypatch.setattr(program.sd, "embed", lambda pipe, prompts: torch.tensor([names.index(p) for p in prompts]))
    config = parse(override(yaml.safe_load(preset.read_text()), words), SdConfig)
    forget, remain, _ = program.cache(config, program.make_plan(config), None, Precision("no", torch.device("cpu")))
    asked, target = ["a cat"] * 2 + ["a car"] * 2, ["a dog"] * 2 + ["a boat"] * 2
    shown = {"own": asked, "anchor": target, "both": [*asked, *target]}[pictures]
    batch = forget.gather(torch.arange(len(forget)))
    times = len(shown) // 4
    assert [names[int(i)] for i in batch["mean"].flatten()] == shown
    assert [names[i] for i in batch["cond"]] == asked * times
    assert [names[i] for i in batch["anchor"]] == target * times
    assert forget.std is None
    assert [names[int(i)] for i in remain.mean.flatten()] == [names[i] for i in remain.table[remain.cond]]
    for drawn in seeds[:-1]:  # one picture a seed, the anchor's with the forget prompt's
        assert drawn == seeds[0]
        assert len(set(drawn)) == config.forget.count


def test_given_pictures_and_the_anchors_together(
    program: ModuleType, start: Run, tmp_path: Path, micro_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are given are encoded, with a spread; those that are drawn are exact."""
    made: list[Any] = []
    cache = program.cache
    monkeypatch.setattr(program, "cache", lambda *args: made.append(cache(*args)) or made[-1])
    given = folder_of_pictures(tmp_path / "given", "a cat")
    out = start(tmp_path / "out", *QUICK, f"forget.images={given}", "forget.pictures=both")
    forget = made[0][0]
    assert len(forget) == 4
    assert forget.std is not None
    assert forget.mean.shape == forget.std.shape
    assert [bool(std.any()) for std in forget.std] == [True, True, False, False]
    assert moved(out, micro_sd)


def test_given_pictures_with_prompts_of_their_own_need_one_anchor(start: Run, tmp_path: Path) -> None:
    forget = folder_of_pictures(tmp_path / "forget", "a cat", "a sepia cat", name="metadata.jsonl")
    start(tmp_path / "one", *QUICK, f"forget.images={forget}")
    words = ("forget.prompts=[a cat, a car]", "forget.anchors=[a dog, a boat]")
    with pytest.raises(ValueError, match=r"prompt 'a sepia cat' has no anchor: add the prompt to forget\.prompts"):
        start(tmp_path / "two", *QUICK, *words, f"forget.images={forget}")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("text", ["a photo of a grandiloquent cat", None])
def test_given_pictures_with_prompts_that_cannot_be_used(start: Run, tmp_path: Path, text: str | None) -> None:
    remain = folder_of_pictures(
        tmp_path / "remain", *([text] if text else ["x"]), name="metadata.jsonl" if text else None
    )
    with pytest.raises(ValueError, match="tokens, this model takes 16" if text else "has no prompt"):
        start(tmp_path / "out", *QUICK, f"remain.images={remain}")
    assert not (tmp_path / "out").exists()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        "saliency.kind=none",
        "saliency={density: 0.5, per: batch, count: 3}",
        "saliency={threshold: 0.01}",
        "method.ron=false",
        "method={name: sfron, fast_rate: 0.1, published: true}",
        "method={name: sfron, fast_rate: 0.01, fast_rule: sgd, slow_steps: 2, outer_rate: 0.5, every: 2}",
        "method.fast_rule=normalized",
        "forget.loss=ascent",
        "forget.target=frozen",
        "remain.loss=distill",
        "forget.pictures=anchor",
        "forget.pictures=both",
        "train.parameters=full",
        "train.parameters=noxattn",
        r"train.parameters=attn2\.to_[kv]",
        "train.optimizer=sgd",
        "train={steps: 2, optimizer: adamw, weight_decay: 0.1, batch_size: 3}",
        "train.dropout=0",
        "precision=bf16",
        "checkpoint_every=1",
    ],
)
def test_every_setting_runs(start: Run, micro_sd: Path, tmp_path: Path, word: str) -> None:
    out = start(tmp_path / "out", *QUICK, word)
    changed = moved(out, micro_sd)
    assert changed
    assert len(rows(out)) == 2
    masked = "kind=none" not in word
    assert (out / "saliency.safetensors").exists() == masked
    report = read(out / "report.json")
    assert (report["mask"] is not None) == masked
    inside = {name for name in changed if ".attn2." in name}
    if word.endswith("full"):
        assert inside < changed
    elif word.endswith("noxattn"):
        assert not inside
    elif word.endswith("[kv]"):
        assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed)
    else:
        assert inside == changed
    if masked:
        assert load_mask(out / "saliency.safetensors").named.keys() >= changed


@pytest.mark.parametrize("rule", ["sgd", "normalized", "adam"])
def test_weights_outside_the_mask_stay_bit_identical(start: Run, micro_sd: Path, tmp_path: Path, rule: str) -> None:
    """With the slow phase off nothing but the masked fast step moves weights."""
    out = start(
        tmp_path / "out",
        *QUICK,
        "method.slow_steps=0",
        f"method.fast_rule={rule}",
        "method.fast_rate=1",
        "train.steps=3",
    )
    mask = load_mask(out / "saliency.safetensors").named
    before, after = unet(micro_sd), unet(out / "model")
    moved_inside = 0
    for name, old in before.items():
        same = old.view(torch.int16) == after[name].view(torch.int16)
        keep = mask.get(name, torch.zeros_like(old, dtype=torch.bool))
        assert same[~keep].all(), name
        moved_inside += int((~same[keep]).sum())
    assert moved_inside > 0
    assert all(row.get("remain_loss") is None for row in rows(out))


def test_a_fading_fast_step_still_forgets(start: Run, tmp_path: Path) -> None:
    """The direction is right: the distance between the concept's and the anchor's predictions shrinks."""
    out = start(
        tmp_path / "out", *QUICK, "train.steps=12", "train.batch_size=4", "forget.count=4", "method.slow_steps=0"
    )
    losses = [row["forget_loss"] for row in rows(out)]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_checkpointing_changes_nothing_but_memory(start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = start(tmp_path / "plain", *QUICK)
    calls: list[int] = []
    once = UNet2DConditionModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        UNet2DConditionModel, "enable_gradient_checkpointing", lambda self: calls.append(1) or once(self)
    )
    again = start(tmp_path / "again", *QUICK, "train.checkpointing=true")
    assert calls == [1]
    assert digest(plain) == digest(again)


# --- methods --------------------------------------------------------------------------------------

METHODS: dict[str, tuple[str, ...]] = {
    "finetune": ("method={name: finetune}",),
    "gradient_ascent": ("method={name: gradient_ascent, fast_rate: 1e-3}", "forget.loss=ascent"),
    "random_label": ("method={name: random_label}",),
    "salun": ("method={name: salun}", "saliency.kind=magnitude"),
    "selective_amnesia": (
        "method={name: selective_amnesia, strength: 10}",
        "forget.loss=surrogate",
        "forget.pictures=anchor",
    ),
    "scrub": ("method={name: scrub}", "forget.loss=ascent"),
    "esd": ("method={name: esd, fast_rate: 1e-3}", "train.parameters=noxattn"),
    "uce": ("method={name: uce}", "saliency.kind=none", "train.steps=1"),
}


def test_every_method_is_tried() -> None:
    assert METHODS.keys() | {"sfron"} == set(list_methods()) - {"bad_teacher", "retrain"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(program: ModuleType, start: Run, micro_sd: Path, tmp_path: Path, name: str) -> None:
    """And draws no pictures that it does not learn from; its rehearsal agrees."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        drawn: list[str] = []
        draw = sd.draw_latents
        patch.setattr(
            program.sd, "draw_latents", lambda pipe, words, *a, **k: drawn.extend(words) or draw(pipe, words, *a, **k)
        )
        out = start(tmp_path / "out", *QUICK, *METHODS[name])
    words = (*QUICK, *METHODS[name])
    config = parse(override(read(out / "run.json")["config"], words), SdConfig)
    program.main(config, tmp_path / "none", command="erase", say=said.append, dry_run=True)
    forgets, remains = name not in ("finetune", "uce"), name not in ("gradient_ascent", "esd", "uce")
    forgotten = ["a photo of a dog" if name == "selective_amnesia" else "a photo of a cat"] * 2
    others = ["a photo of a dog", "a photo of a car", "a photo of a boat"]
    assert drawn == forgotten * forgets + others * remains
    assert f"data: {2 * forgets} forget and {3 * remains} remain samples" in said[0]
    for row in rows(out):
        assert ("forget_loss" in row, "remain_loss" in row) == (forgets, remains)
    changed = moved(out, micro_sd)
    assert changed
    if name == "uce":
        assert all(re.search(r"\.attn2\.to_[kv]\.weight", key) for key in changed)
    else:
        assert all((".attn2." in key) == (name != "esd") for key in changed)
    assert (out / "saliency.safetensors").exists() == (name == "salun")
    report = read(out / "report.json")
    anchored = name in ("random_label", "salun", "selective_amnesia", "uce")
    assert report["target"]["anchors"] == ["a photo of a dog"] * anchored


def test_a_closed_form_of_several_concepts_each_with_its_anchor(
    program: ModuleType, preset: Path, micro_sd: Path, tmp_path: Path
) -> None:
    """Text at the erased tokens is read as the anchors' was; within a mask, and kept as a delta."""
    targets = (
        "forget.prompts=[a photo of a cat, a photo of a car]",
        "forget.anchors=[a photo of a dog, a photo of a boat]",
    )
    words = (*QUICK, *METHODS["uce"], *targets, "method.lambd=1e-6", "method.preserve=1e-6")
    config = parse(override(yaml.safe_load(preset.read_text()), words), SdConfig)
    program.main(config, tmp_path / "out", form="delta", say=lambda line: None)
    change = delta.open_delta(tmp_path / "out/delta.safetensors")
    assert change.meta["erase_method"] == "uce"
    before = unet(micro_sd)
    after = {**before, **delta.apply(change, folders.tensors(locate(micro_sd)))}
    cat, car, dog, boat = sd.embed(
        open_model(locate(micro_sd)).pipe, [f"a photo of a {x}" for x in ("cat", "car", "dog", "boat")]
    )
    names = [name for name in before if re.search(r"attn2\.to_[kv]", name)]
    assert set(change.names) == set(names)
    for prompt, anchor in ((cat, dog), (car, boat)):
        was, meant, now = (
            torch.cat([x[5] @ weights[name].float().T for name in names])
            for x, weights in ((prompt, before), (anchor, before), (prompt, after))
        )
        assert (now - meant).norm() < 0.2 * (was - meant).norm()  # more tokens than widths: a compromise
    program.main(
        parse(override(yaml.safe_load(preset.read_text()), (*words, "saliency.kind=fisher")), SdConfig),
        tmp_path / "masked",
        say=lambda line: None,
    )
    mask, masked = load_mask(tmp_path / "masked/saliency.safetensors").named, unet(tmp_path / "masked/model")
    for name in names:
        assert torch.equal(masked[name], torch.where(mask[name], after[name], before[name]))


def test_concepts_one_after_another(program: ModuleType, finished: Path, start: Run, tmp_path: Path) -> None:
    """What was forgotten before is neither taught again nor counted among what stays, nor told by the file."""
    model = f"model={finished / 'model'}"
    words = ("forget.prompts=a photo of a car", "forget.anchors=a photo of a boat", "eval.images=1")
    out = start(tmp_path / "second", model, *words)
    report, run = read(out / "report.json"), read(out / "run.json")
    assert report["target"]["earlier"] == run["plan"]["earlier"] == ["a photo of a cat"]
    assert run["plan"]["remain"] == ["a photo of a dog", "a photo of a boat"]
    found = report["after"]["classes"]
    assert [found[side]["n"] for side in ("forget", "earlier", "remain")] == [1, 1, 2]
    assert found["per_prompt"]["a photo of a cat"]["side"] == "earlier"
    assert program.summary(report)["earlier"] == found["earlier"]["accuracy"]
    assert [row.prompt[13:] for row in read_manifest(out / "images/erased")] == ["car", "cat", "dog", "boat"]
    marks = folders.forgotten(locate(out / "model"))
    assert set(folders.forgotten(locate(finished / "model"))) < set(marks)
    assert not any("cat" in mark or "car" in mark for mark in marks)
    for words, said in (
        (
            ("forget.anchors=a photo of a cat",),
            "forget.anchors has 'a photo of a cat', which is to be forgotten or was",
        ),
        (
            (f"remain.images={folder_of_pictures(tmp_path / 'x', 'a photo of a cat', name='metadata.jsonl')}",),
            "remain.images has 'a photo of a cat', which is to be forgotten or was before: choose what stays",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            start(
                tmp_path / "third", model, "forget.prompts=a photo of a car", "forget.anchors=a photo of a boat", *words
            )


def test_forgotten_concepts_are_known_by_their_prompt_or_label(
    program: ModuleType, preset: Path, tmp_path: Path
) -> None:
    (tmp_path / "set.csv").write_text(
        "prompt,object,style,seed\na cat,cat,plain,0\na sepia cat,cat,sepia,1\na dog,dog,plain,2\n"
        "a sepia dog,dog,sepia,3\n"
    )
    sets = (f"remain.prompts={tmp_path / 'set.csv'}", "eval.prompts=[a boat]", "forget.prompts=a boat")

    def plan(*words: str, gone: Any = ()) -> Any:
        config = parse(override(yaml.safe_load(preset.read_text()), (*sets, *words)), SdConfig)
        return config, program.make_plan(config, gone)

    assert plan()[1].earlier == []
    assert plan("forget.earlier=a cat")[1].earlier == ["a cat", "a sepia cat"]  # by the label on the axis
    assert plan("forget.earlier=a cat", "forget.axis=null")[1].earlier == ["a cat"]
    first = plan("forget.prompts=a cat")
    for words in ((), ("forget.axis=style",), ("forget.axis=null",)):  # the axis of a later run is another matter
        later = plan(*words, gone=program.marks(*first))[1]
        assert later.earlier == ["a cat", "a sepia cat"]
        assert later.remain == ["a dog", "a sepia dog"]
    style = plan("forget.prompts=a sepia cat", "forget.axis=style")
    assert plan(gone=program.marks(*style))[1].earlier == ["a sepia cat", "a sepia dog"]
    again = plan("forget.prompts=a sepia cat", gone=program.marks(*first))[1]
    assert (again.forgotten, again.earlier) == ([True, False], [])  # asked for anew


# --- several processes ----------------------------------------------------------------------------


def test_two_processes_are_one(start: Run, tmp_path: Path) -> None:
    """Mask and base pictures to the bit; weights to float32 rounding: gradients are summed in another order."""
    words = (
        *("method.fast_rule=sgd", "train.optimizer=sgd", "train.lr=0.1", "forget.count=6", "forget.pictures=both"),
        *("saliency.batch_size=2", "eval.nudity={classes: [FACE_FEMALE], threshold: 0.35}"),
    )
    one, out = start(tmp_path / "one", *words), tmp_path / "two"
    ended = launched.two(lambda: start(out, *words), tmp_path / "log")
    assert ended == [0, 0], (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    assert "pictures: base" in (tmp_path / "log.0").read_text()
    assert not re.search("pictures|saliency|unlearning|drawing|detecting", (tmp_path / "log.1").read_text())
    assert {p.relative_to(out) for p in out.rglob("*")} == {p.relative_to(one) for p in one.rglob("*")}
    assert (out / "saliency.safetensors").read_bytes() == (one / "saliency.safetensors").read_bytes()
    for name in ("manifest.jsonl", "settings.json"):
        assert (out / "images/base" / name).read_bytes() == (one / "images/base" / name).read_bytes()
    after, expected = unet(out / "model"), unet(one / "model")
    for name, value in expected.items():  # saved in fp16: a step of it where rounding falls on the other side
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-6)
    shared = ("forget_loss", "remain_loss", "weight_max", "forget_norm", "remain_norm")
    for a, b in zip(rows(out), rows(one), strict=True):
        assert [a[k] for k in shared] == pytest.approx([b[k] for k in shared], rel=1e-4)
    before = [read(folder / "report.json")["before"] for folder in (out, one)]
    assert before[0] == before[1]


@pytest.mark.slow
def test_a_launch_by_accelerate(preset: Path, tmp_path: Path) -> None:
    """As users do it; what is wrong is said once."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "erase.cli"]
    command = [*launch, "run", "sd", str(preset), "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(cli.__file__).parents[1])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("weights in") == 1
    assert ended.stdout.splitlines()[-1] == f"report: {tmp_path / 'out/report.html'}"
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(cli.__file__).parents[1])
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("erase:")]
    assert said == [f"erase: {tmp_path / 'out'} is not empty: choose another --out, or --resume the run that is there"]


def test_a_dry_run_tells_and_writes_nothing(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["erase", "run", "sd", str(preset), "--out", "here", "--dry-run"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    said = capsys.readouterr().out
    assert re.search(r"^learns: [\d,]+ of [\d,]+ weights \([\d.]+%\)$", said, re.MULTILINE)
    for what in ("mask", "steps"):
        assert re.search(rf"^memory for the {what}: [\d.]+ GB \(libraries .*activations ", said, re.MULTILINE)
    assert "steps: 2 of 2 samples, 2 fast and 2 slow phases\n" in said
    assert "pictures: 8 of each model, 2 sampler steps each\n" in said
    assert said.endswith(f"command: erase run sd {preset} --out here\n")
    assert not list(tmp_path.iterdir())
