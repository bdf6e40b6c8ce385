"""`erase run ddpm` from end to end, on a model of random weights: folders, methods, resuming, refusals."""

import gc
import json
import re
import shlex
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import launched
import micro_ddpm
import numpy as np
import pytest
import torch
import toys
import yaml
from diffusers.models.unets.unet_2d import UNet2DModel
from micro_ddpm import LABELS
from PIL import Image
from safetensors.torch import load_file, save_file

from erase import cli
from erase.cli import common
from erase.config import DdpmConfig, override, parse
from erase.diffusion import class_conditional
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.data import LatentSet
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.model import open_model
from erase.engine.precision import Precision
from erase.engine.saliency import load_mask
from erase.engine.state import load_state
from erase.evaluation import classes, fidelity
from erase.evaluation.generate import image_generator
from erase.evaluation.manifest import read_manifest
from erase.methods import builder, list_methods
from erase.programs import training
from erase.store import delta
from erase.store.files import sha256
from erase.store.labelled import LabelledImages, read_labelled, scaled

FILE = "unet/diffusion_pytorch_model.safetensors"
QUICK = ("eval.images=0",)
NEW = ("model=new", f"architecture={{channels: {micro_ddpm.ARCHITECTURE['channels']}, layers: 1, groups: 4}}")
TRAIN = (*NEW, "method={name: retrain}", "eval.images=0")
MASKED = ("sfron", "salun")
METHODS: dict[str, tuple[str, ...]] = {
    "sfron": (),
    "finetune": ("method={name: finetune}",),
    "gradient_ascent": ("method={name: gradient_ascent, fast_rate: 1e-3}",),
    "random_label": ("method={name: random_label}", "forget.loss=redirect"),
    "salun": ("method={name: salun}", "forget.loss=redirect", "saliency.kind=magnitude"),
    "selective_amnesia": ("method={name: selective_amnesia, strength: 10}", "forget.loss=surrogate"),
    "bad_teacher": ("method={name: bad_teacher}",),
    "scrub": ("method={name: scrub}",),
    "esd": ("method={name: esd, fast_rate: 1e-3}",),
    "retrain": ("method={name: retrain}",),
}
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    found = cli.program("ddpm")
    gc.freeze()  # a run collects garbage, a third of a second with all libraries in sight
    yield found
    gc.unfreeze()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, models and a judge; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("work")
    micro_ddpm.write_images(folder / "data/train")
    micro_ddpm.write_images(folder / "data/test", seed=1)
    micro_ddpm.write_classifier(folder / "judge")
    class_conditional.save_new(micro_ddpm.model(), folder / "base")
    class_conditional.save_new(micro_ddpm.model(seed=5), folder / "retrained")
    micro_ddpm.model().unet.save_pretrained(folder / "lone")
    settings = {
        "pipeline": "ddpm",
        "model": str(folder / "base"),
        "method": {"name": "sfron", "fast_rate": 1e-2},
        "saliency": {"density": 0.3, "count": 4, "draws": 1, "batch_size": 4},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "parameters": "full"},
        "forget": {"labels": ["bee"], "count": 4},
        "draw": {"steps": 2, "batch_size": 8},
        "data": {"source": str(folder / "data")},
        "eval": {"images": 6, "classifier": str(folder / "judge"), "blur": False},
    }
    (folder / "micro.yaml").write_text(yaml.safe_dump(settings))
    return folder


Configure = Callable[..., DdpmConfig]


@pytest.fixture(scope="module")
def configure(work: Path) -> Configure:
    """A configuration with `key=value` words; `{work}` in them is the folder of `work`."""
    settings = yaml.safe_load((work / "micro.yaml").read_text())
    return lambda *words: parse(override(settings, [w.replace("{work}", str(work)) for w in words]), DdpmConfig)


@pytest.fixture(scope="module")
def start(program: ModuleType, configure: Configure) -> Run:
    """Run in this process."""

    def start(out: Path, *words: str, resume: bool = False) -> Path:
        program.main(configure(*words), out, resume=resume, command="erase run", say=lambda line: None)
        return out

    return start


@pytest.fixture(scope="module")
def finished(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, by the command, with a retrained model to compare with."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    words = ["erase", "run", "ddpm", str(work / "micro.yaml"), f"eval.retrained={work / 'retrained'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*words, "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def unet(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / FILE)


def same(a: Path, b: Path) -> bool:
    """Bit for bit."""
    one, two = unet(a), unet(b)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def moved(out: Path, base: Path) -> set[str]:
    before, after = unet(base), unet(out / "model")
    assert before.keys() == after.keys()
    assert all(t.isfinite().all() and t.dtype == before[n].dtype for n, t in after.items())
    return {name for name in before if not torch.equal(before[name], after[name])}


def tree(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


class StopError(Exception):
    pass


def stop(*_: Any, **__: Any) -> None:
    raise StopError


# --- the folder -----------------------------------------------------------------------------------


def test_a_run_leaves_the_folder_that_is_promised(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {
        *("run.json", "metrics.jsonl", "saliency.safetensors", "model", "images", "grid.png", "report.json"),
        "report.html",
    }
    assert {p.name for p in (finished / "images").iterdir()} == {"base", "erased", "retrained"}
    assert [row["step"] for row in rows(finished)] == [0, 1]
    for row in rows(finished):
        assert row["forget_loss"] > 0
        assert row["remain_loss"] > 0
        assert row["skipped_fast"] == row["skipped_slow"] == 0
    page = (finished / "report.html").read_text()
    assert "bee" in page
    assert "data:image/png;base64" in page


def test_the_grid_has_a_row_for_each_class_and_model(
    program: ModuleType, configure: Configure, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.open(finished / "grid.png").verify()
    seen: list[Any] = []
    grid = program.grid.grid
    monkeypatch.setattr(
        program.grid, "grid", lambda rows, **kw: seen.append((kw["title"], kw["columns"], rows)) or grid(rows, **kw)
    )
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    config = configure("eval.retrained={work}/retrained")
    program.draw_report(config, program.Plan(list(LABELS), [1], [], None), out)
    assert [(title.split(",")[0], [name for name, _ in rows]) for title, _, rows in seen] == [
        (name, ["base", "erased", "retrained"]) for name in ("bee", "ant", "cow")
    ]
    by_file = {
        out / "images" / m / r.file: (m, r) for m in ("base", "erased") for r in read_manifest(out / "images" / m)
    }
    for title, columns, rows in seen:
        assert columns == [f"sample {i}" for i in range(6)]
        for model, paths in rows[:2]:
            assert [by_file[p][0] for p in paths] == [model] * 6
            assert [f"{by_file[p][1].prompt}, seed {by_file[p][1].seed}" for p in paths] == [title] * 6
            assert [by_file[p][1].index for p in paths] == list(range(6))


def test_run_json_tells_how_to_do_it_again(finished: Path, work: Path) -> None:
    run = read(finished / "run.json")
    assert run["command"].startswith(f"erase run ddpm {work}/micro.yaml ")
    config = parse(run["config"], DdpmConfig)
    assert (config.train.steps, config.forget.labels, run["seed"]) == (2, ["bee"], 0)
    assert run["base"] == {"model": str(work / "base"), "weights": {FILE: sha256(work / "base" / FILE)}}
    assert run["plan"] == {"forget": [1], "anchors": [], "earlier": [], "labels": list(LABELS)}
    assert run["data"]["images"] == 24
    assert len(run["data"]["sha256"]) == 64


@pytest.mark.parametrize("model", ["base", "lone"])
def test_a_run_that_keeps_a_delta(
    program: ModuleType, configure: Configure, work: Path, tmp_path: Path, model: str
) -> None:
    words = [*QUICK, f"model={{work}}/{model}", *(["labels=[ant, bee, cow]"] if model == "lone" else [])]
    for form in ("full", "delta"):
        program.main(configure(*words), tmp_path / form, form=form, preset="mine.yaml", say=lambda line: None)
    assert not (tmp_path / "delta/model").exists()
    change = delta.open_delta(tmp_path / "delta/delta.safetensors")
    assert (change.meta["erase_base"], change.meta["erase_preset"]) == (model, "mine")
    source = locate(work / model, "label")
    folders.save(source, delta.apply(change, folders.tensors(source)), tmp_path / "again", change.meta)
    trees = [
        {p.relative_to(top): sha256(p) for p in top.rglob("*") if p.is_file()}
        for top in (tmp_path / "again", tmp_path / "full/model")
    ]
    assert trees[0] == trees[1]
    if model == "base":  # and once more, on what was erased already
        first = tmp_path / "full/model"
        words = ["forget.labels=[cow]", f"model={first}"]
        program.main(configure(*QUICK, *words), tmp_path / "twice", form="delta", say=lambda line: None)
        change, source = delta.open_delta(tmp_path / "twice/delta.safetensors"), locate(first, "label")
        folders.save(source, delta.apply(change, folders.tensors(source)), tmp_path / "two", change.meta)
        assert folders.forgotten(locate(tmp_path / "two", "label")) == ["cow", "bee"]
        both = locate(tmp_path / "two", "label")
        back = delta.apply(change, folders.tensors(both), undo=True)
        folders.save(both, back, tmp_path / "one", change.base_meta)
        assert folders.forgotten(locate(tmp_path / "one", "label")) == ["bee"]
        assert (tmp_path / "one" / FILE).read_bytes() == (first / FILE).read_bytes()
        assert (tmp_path / "one/README.md").read_text() == (first / "README.md").read_text()
    with pytest.raises(ValueError, match="--save delta needs a base; model=new has none"):
        program.main(configure(*TRAIN), tmp_path / "new", form="delta")


def test_the_model_is_the_same_kind_of_folder(finished: Path, work: Path) -> None:
    names = {p.relative_to(work / "base") for p in (work / "base").rglob("*")} | {Path("README.md")}
    assert {p.relative_to(finished / "model") for p in (finished / "model").rglob("*")} == names
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (finished / "model" / name).read_bytes() == (work / "base" / name).read_bytes()
    assert moved(finished, work / "base") >= {"conv_in.weight", "class_embedding.weight", "conv_out.weight"}
    net = UNet2DModel.from_pretrained(finished / "model", subfolder="unet")
    assert torch.equal(net.conv_in.weight, unet(finished / "model")["conv_in.weight"])
    assert open_model(locate(finished / "model", "label")).pipe.labels == list(LABELS)


def test_the_mask_has_the_density_asked_for(finished: Path) -> None:
    mask = load_mask(finished / "saliency.safetensors")
    assert mask.density == pytest.approx(0.3, abs=0.01)
    assert mask.named.keys() == unet(finished / "model").keys()
    report = read(finished / "report.json")["mask"]
    assert (report["density"], report["per"]) == (mask.density, "sample")
    assert report["per_layer"] == pytest.approx(mask.per_layer())


def test_pictures_of_all_models_share_their_seeds(finished: Path, work: Path) -> None:
    manifests = {what: read_manifest(finished / "images" / what) for what in ("base", "erased", "retrained")}
    for what, manifest in manifests.items():
        assert [(r.prompt, r.seed, r.index) for r in manifest] == [
            (name, LABELS.index(name), index) for name in ("bee", "ant", "cow") for index in range(6)
        ]
        for row in manifest:
            assert sha256(finished / "images" / what / row.file) == row.sha256
    for other in ("erased", "retrained"):
        pairs = zip(manifests["base"], manifests[other], strict=True)
        assert all(a.sha256 != b.sha256 for a, b in pairs)
    pipe = open_model(locate(work / "base", "label")).pipe  # as the model itself draws them, at its own guidance
    row = manifests["base"][7]
    alone = np.asarray(pipe([0], [image_generator(0, 1)], 2).images[0], np.int64)
    drawn = np.asarray(Image.open(finished / "images/base" / row.file), np.int64)
    assert (row.prompt, row.index) == ("ant", 1)
    assert np.abs(drawn - alone).max() <= 1  # float rounding of another batch


def test_the_report_holds_the_keys_that_stay(finished: Path) -> None:
    report = read(finished / "report.json")
    assert report.keys() == {
        *("schema", "command", "method", "seed", "target", "mask", "before", "after", "retrained", "paired", "gap"),
        *("timing", "memory", "versions"),
    }
    assert report["method"] == {"name": "sfron", "fast_rate": 0.01}
    assert report["target"] == {"forget": ["bee"], "anchors": [], "earlier": []}
    assert report["timing"].keys() == {"data_s", "saliency_s", "erase_s", "steps", "step_s"}
    assert report["timing"]["steps"] == 2
    assert report["timing"]["erase_s"] == pytest.approx(2 * report["timing"]["step_s"])
    assert report["paired"].keys() == {"forget_mcnemar_p", "remain_mcnemar_p"}
    assert report["gap"].keys() == {"fa", "ra", "frechet", "mean", "kl", "forget_frechet_ratio"}
    for when in ("before", "after", "retrained"):
        scores, near = report[when]["classes"], report[when]["fidelity"]
        assert scores["classifier"] == "judge"
        assert (scores["forget"]["n"], scores["remain"]["n"]) == (6, 12)
        assert set(scores["per_label"]) == set(LABELS)
        assert sum(scores["forget_shows"].values()) == pytest.approx(1)
        assert scores["forget_confidence"].keys() == {"bee"}
        assert near.keys() == {"remain", "forget_to_remain", "coverage"}
        assert near["coverage"].keys() == {"ant", "cow"}
        assert (near["remain"]["n_real"], near["remain"]["n_fake"]) == (12, 12)
        assert (near["forget_to_remain"]["n_real"], near["forget_to_remain"]["n_fake"]) == (12, 6)


def test_the_report_is_of_the_pictures_that_are_there(finished: Path, work: Path) -> None:
    """Judged again, by hand."""
    report = read(finished / "report.json")
    test = read_labelled(work / "data", "test")
    real = fidelity.features(test.pixels[test.labels != 1], work / "judge")
    real = real.take(np.concatenate([chosen(test, 0, 6), 8 + chosen(test, 2, 6)]))
    for key, what in (("before", "base"), ("after", "erased"), ("retrained", "retrained")):
        manifest = read_manifest(finished / "images" / what)
        guess = classes.classify([finished / "images" / what / r.file for r in manifest], work / "judge", features=True)
        hits = [p == r.prompt for p, r in zip(guess.predicted, manifest, strict=True)]
        found = report[key]["classes"]
        assert (found["forget"]["correct"], found["remain"]["correct"]) == (sum(hits[:6]), sum(hits[6:]))
        assert found["forget_confidence"]["bee"]["probability"] == pytest.approx(guess.probabilities[:6, 1].mean())
        drawn = fidelity.features_of(guess)
        near = report[key]["fidelity"]
        # float32 features of other batches
        for name, part in (("remain", slice(6, 18)), ("forget_to_remain", slice(0, 6))):
            expected = fidelity.frechet(real.values, drawn.values[part])
            assert near[name]["frechet"] == pytest.approx(expected, rel=1e-3)
        expected = fidelity.coverage(real.values[6:], drawn.values[12:], k=5)
        assert near["coverage"]["cow"] == pytest.approx(expected)


def chosen(data: LabelledImages, label: int, count: int) -> Any:
    """Which images of a class `subset` of seed 0 takes."""
    n = len(data.of([label]))
    every = LabelledImages(torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1), torch.zeros(n).long(), ("x",))
    return every.subset(count, 0).pixels.flatten().numpy().astype(int)


def test_the_command_says_what_it_does(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, names, first in (
        (["forget.labels=[bee, ant]"], {"saliency.safetensors"}, "forgetting bee, ant"),
        (["forget.labels=[bee]", *METHODS["retrain"]], set(), "training without bee"),
        (["forget.labels=[]", *METHODS["retrain"]], set(), "training without nothing"),
    ):
        argv = ["erase", "run", "ddpm", str(work / "micro.yaml"), *QUICK, "train.steps=1", *words, "--out", first]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf"{work}/base: 41,737 weights in 115 tensors learn; {first}", lines[0])
        assert lines[-1] == f"report: {first}/report.html"
        assert {p.name for p in Path(first).iterdir()} == names | {
            *("run.json", "metrics.jsonl", "model", "report.json", "report.html")
        }


# --- methods --------------------------------------------------------------------------------------


def test_every_method_is_tried() -> None:
    assert METHODS.keys() == set(list_methods()) - {"uce"}  # there are no texts


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(start: Run, work: Path, tmp_path: Path, name: str) -> None:
    out = start(tmp_path / "out", *QUICK, *METHODS[name])
    report, steps = read(out / "report.json"), rows(out)
    assert moved(out, work / "base")
    assert (report["method"]["name"], len(steps)) == (name, 2)
    assert all(("forget_loss" in row) == (name not in ("finetune", "retrain")) for row in steps)
    assert all(("remain_loss" in row) == (name not in ("gradient_ascent", "esd")) for row in steps)
    assert (out / "saliency.safetensors").exists() == (name in MASKED)
    assert (report["mask"] is not None) == (name in MASKED)
    assert (report["before"], report["after"], report["paired"]) == ({}, {}, {})
    assert ("saliency_s" in report["timing"]) == (name != "retrain")
    if name == "salun":
        mask, before, after = load_mask(out / "saliency.safetensors"), unet(work / "base"), unet(out / "model")
        assert mask.meta["source"] == "magnitude"
        for key, keep in mask.named.items():
            assert torch.equal(before[key][~keep], after[key][~keep])
        assert sum(int((before[key] != after[key]).sum()) for key in before) > 0.9 * 0.3 * 41737


def test_a_fast_step_moves_nothing_outside_the_mask(start: Run, work: Path, tmp_path: Path) -> None:
    out = start(tmp_path / "out", *QUICK, "method.slow_steps=0", "train.steps=3")
    mask, before, after = load_mask(out / "saliency.safetensors"), unet(work / "base"), unet(out / "model")
    assert all(torch.equal(before[key][~keep], after[key][~keep]) for key, keep in mask.named.items())
    assert moved(out, work / "base")


@pytest.mark.parametrize(
    "words",
    [
        ("method.slow_steps=0",),
        ("method={name: gradient_ascent, fast_rate: 1e-2}",),
    ],
)
def test_ascent_forgets(start: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    out = start(tmp_path / "out", *QUICK, *words, "train.steps=12", "train.batch_size=4", "saliency.kind=none")
    losses = [row["forget_loss"] for row in rows(out)]
    assert np.mean(losses[-3:]) > 1.3 * np.mean(losses[:3])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("random_label", ("forget.target=frozen", "forget.anchors=[ant]")),
        ("selective_amnesia", ()),
    ],
)
def test_targets_are_learnt(start: Run, tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    settings = ("train.steps=30", "train.batch_size=4", "train.lr=1e-2")
    out = start(tmp_path / "out", *QUICK, *METHODS[name], *words, *settings)
    losses = [row["forget_loss"] for row in rows(out)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_selective_amnesia_holds_on(start: Run, work: Path, tmp_path: Path) -> None:
    """With the pull, weights stay nearer to where they were."""
    plain = ("train={steps: 8, batch_size: 2, lr: 1e-2, optimizer: sgd, momentum: 0, parameters: full, dropout: 0}",)
    gone = {}
    for strength in (0, 100):
        words = (*METHODS["selective_amnesia"], f"method.strength={strength}", *plain)
        out = start(tmp_path / str(strength), *QUICK, *words)
        before, after = unet(work / "base"), unet(out / "model")
        gone[strength] = float(torch.cat([(after[n] - before[n]).flatten() for n in before]).norm())
    assert 0 < gone[100] < 0.95 * gone[0]


def test_several_labels_by_name_and_by_number(start: Run, tmp_path: Path) -> None:
    by_name = start(tmp_path / "names", *QUICK, "forget.labels=[cow, ant]")
    by_number = start(tmp_path / "numbers", *QUICK, "forget.labels=[2, ant]")
    assert read(by_name / "run.json")["plan"]["forget"] == [2, 0]
    assert read(by_name / "report.json")["target"]["forget"] == ["cow", "ant"]
    assert same(by_name / "model", by_number / "model")
    alone = start(tmp_path / "alone", *QUICK, "forget.labels=2")
    assert read(alone / "run.json")["plan"]["forget"] == [2]
    assert not same(alone / "model", by_name / "model")


def test_classes_one_after_another(start: Run, finished: Path, tmp_path: Path) -> None:
    """What was forgotten before is neither taught again nor counted among what stays."""
    out = start(tmp_path / "second", f"model={finished / 'model'}", "forget.labels=[ant]")
    report = read(out / "report.json")
    assert report["target"] == {"forget": ["ant"], "anchors": [], "earlier": ["bee"]}
    assert report["after"]["classes"]["forget"]["n"] == 2 * report["after"]["classes"]["remain"]["n"] == 12
    assert report["after"]["fidelity"]["coverage"].keys() == {"cow"}
    assert [row.prompt for row in read_manifest(out / "images/erased")][::6] == ["ant", "bee", "cow"]
    source = locate(out / "model", "label")
    assert folders.forgotten(source) == ["ant", "bee"]
    with pytest.raises(ValueError, match=r"every class is named in forget\.labels or was forgotten before"):
        start(tmp_path / "third", f"model={out / 'model'}", "forget.labels=[cow]")
    again = start(tmp_path / "again", f"model={out / 'model'}", "forget.labels=[bee]", "eval.images=0")
    assert read(again / "report.json")["target"]["earlier"] == ["ant"]


def test_classes_that_another_tool_forgot_are_named(
    gather: Callable[..., Any], start: Run, tmp_path: Path, work: Path
) -> None:
    report = read(start(tmp_path / "out", "forget.earlier=[0]", "eval.images=0") / "report.json")
    assert report["target"]["earlier"] == ["ant"]
    with pytest.raises(ValueError, match="no class 'dog'"):
        start(tmp_path / "none", "forget.earlier=[dog]")
    _, remain = gather(forget=[1], earlier=[0])
    assert set(remain.cond.tolist()) == {2}


@pytest.mark.parametrize("text", ["bee", "3", "{"])
def test_a_header_that_names_no_classes_is_refused(work: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(work / "base", tmp_path / "model")
    weights = unet(tmp_path / "model")
    save_file(weights, tmp_path / "model" / FILE, metadata={"format": "pt", folders.FORGOTTEN: text})
    with pytest.raises(ValueError, match="is no JSON list of names"):
        folders.forgotten(locate(tmp_path / "model", "label"))


def test_the_same_seed_gives_the_same_weights(start: Run, tmp_path: Path) -> None:
    a, b, c = (start(tmp_path / n, *QUICK, f"seed={s}", "data=null") for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert (a / "model" / FILE).read_bytes() == (b / "model" / FILE).read_bytes()
    assert not same(a / "model", c / "model")


@pytest.mark.parametrize(
    "word",
    [
        "train.parameters=down_blocks|class_embedding",
        "precision=bf16",
        "train={steps: 2, batch_size: 3, parameters: full, optimizer: sgd, lr: 1e-2, dropout: 0}",
        "method={name: sfron, fast_rate: 1e-3, published: true}",
        "saliency={threshold: 0.5, per: batch, count: 3}",
        "remain.loss=distill",
        "model={work}/lone",
    ],
)
def test_every_setting_runs(start: Run, work: Path, tmp_path: Path, word: str) -> None:
    lone = word.endswith("lone")
    out = start(tmp_path / "out", *QUICK, word, *(["labels=[ant, bee, cow]"] if lone else []))
    if lone:
        before, after = load_file(work / "lone" / Path(FILE).name), load_file(out / "model" / Path(FILE).name)
        there = {p.name for p in (work / "lone").iterdir()}
        assert {p.name for p in (out / "model").iterdir()} == there | {"README.md"}
        assert any(not torch.equal(before[n], after[n]) for n in before)
        return
    changed = moved(out, work / "base")
    inside = {n for n in unet(work / "base") if re.search(r"down_blocks|class_embedding", n)}
    assert changed <= inside if "down_blocks" in word else changed > inside
    assert load_mask(out / "saliency.safetensors").named.keys() >= changed


def test_a_lone_unet_is_judged_by_the_names_it_is_given(start: Run, tmp_path: Path) -> None:
    out = start(tmp_path / "out", "model={work}/lone", "labels=[ant, bee, cow]", "eval.retrained={work}/lone")
    report = read(out / "report.json")
    assert set(report["after"]["classes"]["per_label"]) == set(LABELS)
    assert report["retrained"] == report["before"]


# --- training -------------------------------------------------------------------------------------


def test_a_new_model_is_trained(start: Run, work: Path, tmp_path: Path) -> None:
    out = start(tmp_path / "out", *NEW, *METHODS["retrain"], "forget.labels=[]", "train.steps=3")
    assert {p.name for p in out.iterdir()} == {
        *("run.json", "metrics.jsonl", "model", "images", "grid.png", "report.json", "report.html")
    }
    assert [p.name for p in (out / "images").iterdir()] == ["erased"]
    report = read(out / "report.json")
    assert report["target"] == {"forget": [], "anchors": [], "earlier": []}
    assert (report["before"], report["paired"], report["mask"]) == ({}, {}, None)
    assert report["after"]["classes"]["forget"] == {"n": 0, "correct": 0, "accuracy": None, "ci95": None}
    assert report["after"]["classes"]["remain"]["n"] == 18
    assert "forget_to_remain" not in report["after"]["fidelity"]
    assert read(out / "run.json")["base"] == {"model": "new", "weights": {}}
    pipe = open_model(locate(out / "model", "label")).pipe
    assert (pipe.labels, pipe.null, pipe.shape) == (list(LABELS), 3, (1, 8, 8))
    start_weights = micro_ddpm.model(schedule="linear", guidance=1.0).unet.state_dict()
    assert all(not torch.equal(start_weights[n], t) for n, t in unet(out / "model").items() if n.endswith("weight"))
    again = start(tmp_path / "again", *NEW, *METHODS["retrain"], "forget.labels=[]", "train.steps=3", *QUICK)
    assert same(again / "model", out / "model")


def test_a_new_model_learns(start: Run, tmp_path: Path) -> None:
    """Against the first steps; with patches, in colour, its images 12×12."""
    micro_ddpm.write_images(tmp_path / "data", size=12, mode="RGB")
    words = [*TRAIN, "architecture.patch=2", "architecture.channels=[8,8]", "architecture.prediction=v_prediction"]
    words += [f"data.source={tmp_path / 'data'}", "forget.labels=[cow]"]
    out = start(tmp_path / "out", *words, "train.steps=40", "train.batch_size=8", "train.lr=1e-2", "train.dropout=0.3")
    losses = [row["remain_loss"] for row in rows(out)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    pipe = open_model(locate(out / "model", "label")).pipe
    assert (pipe.shape, pipe.patch, pipe.unet.config.in_channels) == ((3, 12, 12), 2, 12)
    (image,) = pipe([0], [image_generator(0, 0)], 2).images
    assert (image.mode, image.size) == ("RGB", (12, 12))


def test_training_is_the_plain_loop(start: Run, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam on the denoising loss of what remains, from the weights of the seed; the forgotten class is never seen."""
    seen: list[Any] = []
    losses = ddpm.Denoiser.losses
    monkeypatch.setattr(ddpm.Denoiser, "losses", lambda self, b, g: seen.append(b) or losses(self, b, g))
    words = ("method.average=0", "train.dropout=0.5", "train.steps=4", "train.batch_size=6")
    out = start(tmp_path / "out", *TRAIN, *words)
    data = read_labelled(work / "data", "train")
    known = {tuple(x.flatten().tolist()): int(k) for x, k in zip(scaled(data.pixels), data.labels, strict=True)}
    shown = [known[tuple(x.flatten().tolist())] for b in seen for x in b["mean"]]
    given = [int(k) for b in seen for k in b["cond"]]
    assert set(shown) == {0, 2}
    assert len(shown) == 24 > len(set(given)) == 3
    assert all(b in (a, 3) for a, b in zip(shown, given, strict=True))  # its own label, or the null class
    assert 4 < given.count(3) < 20

    net = micro_ddpm.model(schedule="linear", guidance=1.0).unet
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    backend = replace(ddpm.denoiser(micro_ddpm.model(schedule="linear")), net=net)
    for batch in seen:
        optimizer.zero_grad()
        losses(backend, batch, torch.Generator()).mean().backward()
        optimizer.step()
    after = unet(out / "model")
    for name, p in net.named_parameters():
        # float32; Adam divides by the size of a gradient, which magnifies the rounding of small ones
        torch.testing.assert_close(after[name], p.detach(), rtol=1e-3, atol=1e-4)


def test_retraining_starts_from_new_weights_of_the_models_own_shape(start: Run, work: Path, tmp_path: Path) -> None:
    out = start(tmp_path / "out", *QUICK, *METHODS["retrain"], "method.average=0", "train.lr=1e-9")
    fresh = micro_ddpm.model(seed=0).unet.state_dict()  # the base model's seed is the run's, too
    for name, t in unet(out / "model").items():
        torch.testing.assert_close(t, fresh[name], rtol=0, atol=1e-6)
    other = start(tmp_path / "other", *QUICK, *METHODS["retrain"], "method.average=0", "train.lr=1e-9", "seed=9")
    old = unet(work / "base")
    for name, t in unet(other / "model").items():
        torch.testing.assert_close(t, micro_ddpm.model(seed=9).unet.get_parameter(name).detach(), rtol=0, atol=1e-6)
        assert t.ndim == 1 or not torch.allclose(t, old[name], atol=1e-3)
    assert (out / "model/model_index.json").read_bytes() == (work / "base/model_index.json").read_bytes()


def test_retraining_some_weights_keeps_none_of_the_old(start: Run, work: Path, tmp_path: Path) -> None:
    words = (*METHODS["retrain"], "train.parameters=down_blocks", "seed=9")
    try:
        out = start(tmp_path / "out", *QUICK, *words)
    except ValueError:
        return  # a refusal is as good
    fresh = micro_ddpm.model(seed=9).unet.state_dict()
    old = unet(work / "base")
    left = {n for n, t in unet(out / "model").items() if torch.equal(t, old[n]) and not torch.equal(t, fresh[n])}
    assert not left


def test_a_new_model_of_which_some_weights_learn_is_saved_or_refused(start: Run, tmp_path: Path) -> None:
    try:
        start(tmp_path / "out", *TRAIN, "train.parameters=down_blocks")
    except ValueError:
        assert not (tmp_path / "out").exists()


# --- data -----------------------------------------------------------------------------------------


class NoModel:
    patch = 1


@pytest.fixture(scope="module")
def gather(program: ModuleType, configure: Configure, work: Path) -> Callable[..., Any]:
    """The program's own, of the work's images; labels of images are known by their brightness."""
    data = read_labelled(work / "data", "train")

    def gather(*words: str, forget: tuple[int, ...] = (1,), anchors: tuple[int, ...] = (), **settings: Any) -> Any:
        kept = {name: settings.get(name, []) for name in ("earlier", "among")}
        plan = program.Plan(list(LABELS), list(forget), list(anchors), settings.get("data", data), **kept)
        pipe, fresh = settings.get("pipe", NoModel), settings.get("fresh", False)
        return program.gather(configure(*words), plan, pipe, Precision("no", torch.device("cpu")), fresh)

    return gather


def shown(mean: torch.Tensor) -> list[int]:
    """The classes of the images."""
    return ((mean + 1) * 127.5).round().flatten(1).amin(1).div(60, rounding_mode="floor").long().tolist()


def test_both_sides_come_from_the_data(gather: Callable[..., Any]) -> None:
    forget, remain = gather("forget.count=5")
    assert shown(forget.mean) == forget.cond.tolist() == [1] * 5
    assert shown(remain.mean) == remain.cond.tolist() == [0] * 3 + [2] * 3  # as many in all, rounded up
    assert len({x.numpy().tobytes() for x in forget.mean}) == 5
    assert forget.mean.abs().max() <= 1
    assert (forget.anchor, forget.std, remain.anchor) == (None, None, None)
    assert torch.equal(forget.table, torch.arange(3))
    several, rest = gather("forget.count=3", "remain.count=4", forget=(2, 0))
    assert shown(several.mean) == several.cond.tolist() == [2] * 3 + [0] * 3
    assert shown(rest.mean) == [1] * 4
    every, rest = gather("forget.count=100", "remain.count=100")  # no more than there are
    assert (len(every), len(rest)) == (8, 16)


def test_training_takes_all_of_what_remains(gather: Callable[..., Any]) -> None:
    forget, remain = gather("forget.count=1", fresh=True)
    assert forget is None
    assert shown(remain.mean) == remain.cond.tolist() == [0] * 8 + [2] * 8
    assert len(gather(forget=(), fresh=True)[1]) == 24
    assert shown(gather("remain.count=2", fresh=True)[1].mean) == [0, 0, 2, 2]


def test_which_images_are_taken_is_of_the_seed(gather: Callable[..., Any]) -> None:
    one, two, other = (gather("forget.count=4", f"seed={seed}")[0].mean for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_anchors_go_with_their_labels(gather: Callable[..., Any]) -> None:
    words = ("forget.count=2", "forget.loss=redirect")
    forget, _ = gather(*words, forget=(2, 0), anchors=(1, 1))
    assert (forget.cond.tolist(), forget.anchor.tolist()) == ([2, 2, 0, 0], [1] * 4)
    names = [*LABELS, "dog"]
    data = LabelledImages(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) % 4, tuple(names))
    config_words = ("forget.count=2", "forget.loss=redirect")
    forget, _ = gather(*config_words, forget=(2, 0), anchors=(1, 3), data=data, pipe=NoModel)
    assert (forget.cond.tolist(), forget.anchor.tolist()) == ([2, 2, 0, 0], [1, 1, 3, 3])


def test_without_anchors_each_image_has_another_class_by_lot(gather: Callable[..., Any]) -> None:
    words = ("forget.count=8", "forget.loss=redirect")
    one, two, other = (gather(*words, f"seed={seed}")[0].anchor.tolist() for seed in (0, 0, 1))
    assert set(one) == {0, 2}
    assert one == two != other
    assert gather("forget.count=8", "forget.loss=ascent")[0].anchor is None


def test_the_lot_is_among_named_classes(gather: Callable[..., Any]) -> None:
    words = ("forget.count=8", "forget.loss=redirect", "forget.among=[cow]")
    for pictures, seen in (("own", {1}), ("anchor", {2})):
        forget, remain = gather(*words, f"forget.pictures={pictures}", among=[2])
        assert (set(shown(forget.mean)), set(forget.anchor.tolist()), set(forget.cond.tolist())) == (seen, {2}, {1})
        assert set(remain.cond.tolist()) == {0, 2}  # slow steps hold on to all


def test_far_classes_are_those_whose_predictions_differ_much(
    program: ModuleType, gather: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that says `label`, a constant, to everything: classes are as far apart as their numbers."""

    class Constant(torch.nn.Module):
        def forward(self, x: Any, t: Any, class_labels: torch.Tensor, return_dict: bool) -> Any:
            return (torch.ones_like(x) * class_labels.view(-1, 1, 1, 1),)

    model = Denoiser(Constant(), ddpm._predict, torch.linspace(0.9, 0.1, 10))
    g = torch.Generator().manual_seed(0)
    remain = LatentSet(torch.randn(40, 1, 8, 8, generator=g), torch.arange(40) % 5, torch.arange(5))
    exact = Precision("no", torch.device("cpu"))
    for label, forgotten, expected in ((0, [0], [3, 4]), (4, [4], [0, 1]), (2, [2, 1], [0, 4]), (1, [1], [3, 4])):
        plan = program.Plan(list("abcde"), forgotten, [], None)
        apart = program.distances(plan, model, remain, label, exact, 0)
        assert apart == {other: pytest.approx((other - label) ** 2) for other in plan.remain}
        assert program.far(apart) == expected
    monkeypatch.setattr(program, "distances", lambda plan, model, remain, label, precision, seed: {0: 3.0, 2: 1.0})
    monkeypatch.setattr(ddpm, "denoiser", lambda pipe: None)
    forget, even = gather("forget.count=8", "forget.loss=redirect", "forget.among=far")
    assert set(forget.anchor.tolist()) == {0}
    # What must stay leans to the near class, and is as much in all.
    _, remain = gather("forget.count=8", "forget.loss=redirect", "remain.share=near")
    assert [(even.cond == c).sum() for c in (0, 2)] == [4, 4]
    assert [(remain.cond == c).sum() for c in (0, 2)] == [2, 6]
    assert remain.gather(torch.arange(8))["mean"].shape == even.mean.shape
    for c in (0, 2):
        assert set(shown(remain.mean[remain.cond == c])) == {c}


def test_of_several_forgotten_classes_the_nearest_one_counts(program: ModuleType) -> None:
    remain = LatentSet(torch.arange(60.0).view(60, 1, 1, 1), torch.arange(60) % 3, torch.arange(5))
    leaned = program.leaning(remain, [{0: 1.0, 1: 4.0, 2: 8.0}, {0: 2.0, 1: 2.0, 2: 4.0}])
    assert torch.bincount(leaned.cond).tolist() == [34, 17, 9]
    assert (leaned.mean.flatten() % 3 == leaned.cond).all()
    assert len(set(leaned.mean.flatten()[:34].tolist())) == 20  # all there are, some twice


def test_a_surrogate_is_uniform_noise_under_the_forgotten_label(gather: Callable[..., Any]) -> None:
    forget, remain = gather("forget.count=8", "forget.loss=surrogate")
    assert forget.cond.tolist() == [1] * 8
    assert forget.mean.shape == (8, 1, 8, 8)
    assert forget.anchor is None
    x = forget.mean.flatten().sort().values
    assert float((x - torch.linspace(-1, 1, len(x))).abs().max()) < 0.12  # 512 values: the Kolmogorov distance
    assert len({i.numpy().tobytes() for i in forget.mean}) == 8
    assert shown(remain.mean) == [0] * 4 + [2] * 4  # the replay is not noise


def test_patches_are_made_of_the_data(gather: Callable[..., Any]) -> None:
    pipe = micro_ddpm.model(shape=(1, 8, 8), patch=2, channels=[8, 8])
    deep, _ = gather("forget.count=3", pipe=pipe)
    flat, _ = gather("forget.count=3")
    assert deep.mean.shape == (3, 4, 4, 4)
    assert torch.equal(class_conditional.to_pixels(deep.mean, 2), flat.mean)


def test_without_data_the_model_draws_its_own(gather: Callable[..., Any]) -> None:
    """One generator an image, the same on both sides; at the settings of the run."""
    pipe = micro_ddpm.model()
    words = ("draw={steps: 3, batch_size: 2, guidance: 4, sampler: ddpm}", "forget.count=3")
    forget, remain = gather(*words, data=None, pipe=pipe, forget=(2,))
    assert (forget.cond.tolist(), remain.cond.tolist()) == ([2] * 3, [0, 0, 1, 1])
    for side in (forget, remain):
        drawn = ddpm.draw_latents(
            class_conditional.with_sampler(pipe, "ddpm"),
            side.cond.tolist(),
            [image_generator(0, n) for n in range(len(side))],
            steps=3,
            guidance=4.0,
            batch_size=2,
            autocast=torch.no_grad,
        )
        assert torch.equal(side.mean, drawn)
    other, _ = gather(*words, "seed=1", data=None, pipe=pipe, forget=(2,))
    assert not torch.equal(other.mean, forget.mean)


def test_a_run_without_data(start: Run, work: Path, tmp_path: Path) -> None:
    """What the base drew stands in for real images."""
    out = start(tmp_path / "out", "data=null")
    assert moved(out, work / "base")
    assert read(out / "run.json")["data"] == {}
    report = read(out / "report.json")
    before = report["before"]["fidelity"]
    assert before["remain"]["frechet"] == pytest.approx(0, abs=1e-6)  # to itself; rounding
    assert (before["remain"]["precision"], before["coverage"]) == (1, {"ant": 1, "cow": 1})
    assert report["after"]["fidelity"]["remain"]["frechet"] > 1e-3


def test_there_is_no_ratio_to_a_distance_of_nothing(program: ModuleType, start: Run, tmp_path: Path) -> None:
    summary = program.summary(read(start(tmp_path / "out", "data=null") / "report.json"))
    assert summary["frechet"] is None


def judged(program: ModuleType, config: DdpmConfig, data: LabelledImages | None, seen: Any = None) -> Any:
    plan = program.Plan(list(data.names) if data else list(LABELS), [1], [], data)
    return program.reference(config, plan, Path(config.eval.classifier or ""), seen or {})


def test_real_images_are_those_of_the_test_split(program: ModuleType, configure: Configure, work: Path) -> None:
    config = configure("eval.images=3")
    features, labels = judged(program, config, read_labelled(work / "data", "train"))
    assert labels == [name for name in LABELS for _ in range(3)]
    test = read_labelled(work / "data", "test")
    pixels = torch.cat([test.of([k]).subset(3, 0).pixels for k in range(3)])
    np.testing.assert_allclose(features.values, fidelity.features(pixels, work / "judge").values, rtol=1e-5)
    every, labels = judged(program, configure("eval.images=100"), read_labelled(work / "data", "train"))
    assert len(every) == len(labels) == 24  # no more than there are


def test_without_a_test_split_they_are_training_images(program: ModuleType, configure: Configure, work: Path) -> None:
    train = read_labelled(work / "data/train", "train")
    features, labels = judged(program, configure("data.source={work}/data/train", "eval.images=3"), train)
    pixels = torch.cat([train.of([k]).subset(3, 0).pixels for k in range(3)])
    np.testing.assert_allclose(features.values, fidelity.features(pixels, work / "judge").values, rtol=1e-5)
    assert labels == [name for name in LABELS for _ in range(3)]


def test_real_images_have_the_models_order_of_classes(program: ModuleType, configure: Configure, work: Path) -> None:
    """For a folder that names no classes, `labels` says which is which, in the data too."""
    config = configure("model={work}/lone", "labels=[cow, ant, bee]", "eval.images=8")
    data = program.read_data(config, locate(work / "lone", "label"))
    assert data.names == ("cow", "ant", "bee")
    features, labels = judged(program, config, data)
    test = read_labelled(work / "data", "test", names=("cow", "ant", "bee"))
    assert labels == [name for name in ("cow", "ant", "bee") for _ in range(8)]
    np.testing.assert_allclose(features.values, fidelity.features(test.pixels, work / "judge").values, rtol=1e-5)


def test_a_broken_test_split_is_not_passed_over(program: ModuleType, configure: Configure, tmp_path: Path) -> None:
    micro_ddpm.write_images(tmp_path / "train")
    micro_ddpm.write_images(tmp_path / "test", seed=1)
    (tmp_path / "test/ant/0.png").write_bytes(b"no")
    config = configure(f"data.source={tmp_path}", "eval.images=3")
    with pytest.raises(ValueError, match=r"0\.png is no image"):
        judged(program, config, read_labelled(tmp_path, "train"))


def test_the_datas_hash_is_of_images_and_labels(program: ModuleType, work: Path) -> None:
    data = read_labelled(work / "data", "train")
    other = LabelledImages(data.pixels, data.labels.flip(0), data.names)
    darker = LabelledImages(data.pixels // 2, data.labels, data.names)
    assert data.digest == read_labelled(work / "data", "train").digest
    assert len({d.digest for d in (data, other, darker)}) == 3


# --- judging --------------------------------------------------------------------------------------


def guess_of(*shown: str, features: Any = None) -> classes.ClassPredictions:
    """Predictions of 0.8 for what is shown."""
    probabilities = np.full((len(shown), 3), 0.1)
    for row, name in enumerate(shown):
        probabilities[row, LABELS.index(name)] = 0.8
    return classes.ClassPredictions(
        probabilities, LABELS, tuple(Path(str(i)) for i in range(len(shown))), "mine", "0", features, "layer"
    )


def test_classes_are_judged(program: ModuleType) -> None:
    asked = ["bee", "bee", "bee", "cow", "ant", "ant", "cow"]
    found = program.judge_classes(guess_of("bee", "cow", "cow", "cow", "ant", "bee", "cow"), asked, ["bee", "cow"])
    assert (found["forget"]["n"], found["forget"]["correct"]) == (5, 3)
    assert (found["remain"]["n"], found["remain"]["correct"]) == (2, 1)
    assert found["forget_shows"] == {"bee": 0.2, "cow": 0.8}
    assert found["forget_confidence"]["bee"]["probability"] == pytest.approx((0.8 + 0.1 + 0.1) / 3)
    assert found["forget_confidence"]["bee"]["n"] == 3
    assert found["forget_confidence"]["cow"]["probability"] == pytest.approx(0.8)
    assert found["classifier"] == "mine"
    nothing = program.judge_classes(guess_of("ant"), ["ant"], [])
    assert "forget_shows" not in nothing
    assert nothing["remain"]["accuracy"] == 1


def features_of(values: Any) -> fidelity.Features:
    return fidelity.Features(np.asarray(values, np.float64), "mine", "0", "layer")


def test_fidelity_is_to_what_remains(program: ModuleType) -> None:
    rng = np.random.default_rng(0)
    asked = ["bee"] * 6 + ["ant"] * 6 + ["cow"] * 6
    real_labels = ["ant"] * 8 + ["bee"] * 8 + ["cow"] * 8
    drawn, real = rng.normal(size=(18, 2)), rng.normal(size=(24, 2))
    drawn[asked.index("cow") :] += 100  # cows are nowhere near
    found = program.judge_fidelity(features_of(drawn), asked, ["bee"], features_of(real), real_labels)
    staying = real[[0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23]]
    assert found["remain"]["frechet"] == pytest.approx(fidelity.frechet(staying, drawn[6:]))
    assert found["forget_to_remain"]["frechet"] == pytest.approx(fidelity.frechet(staying, drawn[:6]))
    assert found["coverage"] == {"ant": fidelity.coverage(real[:8], drawn[6:12], k=5), "cow": 0.0}
    assert found["coverage"]["ant"] > 0.5
    all_stays = program.judge_fidelity(features_of(drawn), asked, [], features_of(real), real_labels)
    assert all_stays["remain"]["n_fake"] == 18
    assert all_stays["coverage"].keys() == {"ant", "bee", "cow"}
    assert "forget_to_remain" not in all_stays


def test_the_gap_to_the_retrained_model(program: ModuleType) -> None:
    asked = ["bee", "bee", "ant", "cow"]
    seen = {"after": guess_of("ant", "bee", "ant", "cow"), "retrained": guess_of("ant", "ant", "ant", "ant")}
    report = {
        key: {
            "classes": program.judge_classes(guess, asked, ["bee"]),
            "fidelity": {"remain": {"frechet": near}, "forget_to_remain": {"frechet": far}},
        }
        for (key, guess), near, far in zip(seen.items(), (3.0, 2.0), (5.0, 10.0), strict=True)
    }
    found = program.gap(report, seen, asked, ["bee"])
    assert found.pop("kl") == pytest.approx(0.8 * np.log(0.8 / 0.45) + 0.1 * np.log(0.1 / 0.45), rel=1e-4)
    assert found == pytest.approx({"fa": 50, "ra": 50, "frechet": 50, "mean": 50, "forget_frechet_ratio": 0.5})
    for key in seen:  # pictures at no distance to real ones: there is no ratio
        report[key]["fidelity"]["remain"]["frechet"] = 0.0
    report["after"]["classes"]["remain"]["accuracy"] = report["retrained"]["classes"]["remain"]["accuracy"]
    bare = program.gap(report, seen, asked, ["bee"])
    assert (bare["frechet"], bare["mean"]) == (None, 25)
    for key in seen:
        report[key]["fidelity"]["remain"]["frechet"] = 2.0
    level = program.gap({**report, "after": report["retrained"]}, {**seen, "after": seen["retrained"]}, asked, ["bee"])
    assert level == pytest.approx({"fa": 0, "ra": 0, "frechet": 0, "mean": 0, "kl": 0, "forget_frechet_ratio": 1})


def side(forget: float, frechet: float, **labels: float) -> dict[str, Any]:
    return {
        "classes": {
            "forget": {"accuracy": forget},
            "remain": {"accuracy": sum(labels.values()) / len(labels)},
            "per_label": {"bee": {"accuracy": forget}, **{k: {"accuracy": v} for k, v in labels.items()}},
            "forget_shows": {"ant": 0.2, "cow": 0.5, "bee": 0.3},
        },
        "fidelity": {"remain": {"frechet": frechet}, "coverage": dict.fromkeys(labels, 0.9) | {"cow": 0.4}},
    }


def test_a_report_is_summed_up(program: ModuleType, finished: Path) -> None:
    report = {
        "target": {"forget": ["bee"], "earlier": []},
        "before": side(1.0, 2.0, ant=1.0, cow=0.75),
        "after": side(0.25, 3.0, ant=0.5, cow=1.0),
        "timing": {"erase_s": 2.0, "saliency_s": 3.0},
    }
    assert program.summary(report) == pytest.approx(
        {
            "forget": 0.25,
            "remain": 0.75,
            "drop": 12.5,
            "worst": 50.0,
            "frechet": 1.5,
            "coverage": 0.4,
            "shows": "cow",
            "saliency_s": 3.0,
            "erase_s": 2.0,
            "rte_s": 5.0,
        }
    )
    compared = program.summary({**report, "gap": {"fa": 1.0, "kl": 0.5}})
    assert (compared["gap_fa"], compared["gap_kl"]) == (1.0, 0.5)
    trained = program.summary(
        {**report, "before": {}, "target": {"forget": [], "earlier": []}, "timing": {"erase_s": None}}
    )
    assert trained.keys() == {"forget", "remain", "coverage", "shows", "saliency_s", "erase_s", "rte_s"}
    whole = read(finished / "report.json")
    summary = program.summary(whole)
    assert summary["forget"] == whole["after"]["classes"]["forget"]["accuracy"]
    assert summary["remain"] == whole["after"]["classes"]["remain"]["accuracy"]
    assert summary["gap_ra"] == whole["gap"]["ra"]
    assert summary["erase_s"] == whole["timing"]["erase_s"]
    assert all(isinstance(value, int | float | str) for value in summary.values())


def test_a_report_without_a_judge_is_summed_up(program: ModuleType) -> None:
    """As that of `erase run sd` is: `erase compare` sums up every report."""
    summary = program.summary(
        {
            "target": {"forget": ["bee"], "earlier": []},
            "before": {},
            "after": {},
            "timing": {"erase_s": 2.0, "saliency_s": 1.0},
        }
    )
    assert summary["erase_s"] == 2.0


def test_pictures_of_what_stays_are_paired(
    program: ModuleType, configure: Configure, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All forgotten pictures turn wrong, three of the others, and one of those turns right."""
    rng, asked = np.random.default_rng(0), ["bee"] * 6 + ["ant"] * 6 + ["cow"] * 6
    shown = {"base": [*asked[:-1], "ant"], "erased": ["ant"] * 6 + ["bee"] * 3 + ["ant"] * 3 + ["cow"] * 6}
    shown["retrained"] = asked

    def classify(paths: list[Path], *_: Any, **__: Any) -> classes.ClassPredictions:
        return guess_of(*shown[paths[0].parent.name], features=rng.normal(size=(18, 2)))

    monkeypatch.setattr(program.classes, "classify", classify)
    monkeypatch.setattr(program, "reference", lambda *_: (features_of(rng.normal(size=(18, 2))), asked))
    plan = program.Plan(list(LABELS), [1], [], None)
    report = program.make_report(configure(), plan, finished, None, {"erase_s": 1.0}, "", {})
    assert report["paired"] == {
        "forget_mcnemar_p": 2 / 2**6,  # all six
        "remain_mcnemar_p": pytest.approx(0.625),  # 3 against 1: 2 · 5 / 16
    }
    assert [report[key]["classes"]["forget"]["correct"] for key in ("before", "after", "retrained")] == [6, 0, 6]
    assert [report[key]["classes"]["remain"]["correct"] for key in ("before", "after", "retrained")] == [11, 9, 12]
    assert (report["gap"]["fa"], report["gap"]["ra"]) == (100, pytest.approx(25))


# --- base pictures --------------------------------------------------------------------------------


def test_base_pictures_of_an_earlier_run_are_copied(
    program: ModuleType, start: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another target too: only the order of the rows is another."""
    drawn: list[int] = []
    draw = class_conditional.ClassConditionalPipeline.draw
    monkeypatch.setattr(
        program.class_conditional.ClassConditionalPipeline,
        "draw",
        lambda self, labels, *rest: drawn.extend(labels) or draw(self, labels, *rest),
    )
    base = finished / "images/base"
    out = start(tmp_path / "out", "forget.labels=[ant]", f"eval.base={base}", "train.steps=1", "eval.classifier=null")
    assert len(drawn) == 24  # of the erased model, with padding
    files = [
        {(r.prompt, r.seed, r.index): (folder / r.file).read_bytes() for r in read_manifest(folder)}
        for folder in (out / "images/base", base)
    ]
    assert files[0] == files[1]
    for word, said in (
        ("draw.steps=3", r"settings\.draw\.steps was 2, now 3"),
        (f"model={finished / 'model'}", r"settings\.weights\.unet/diffusion_pytorch_model\.safetensors was"),
    ):
        with pytest.raises(ValueError, match=f"base: made with other settings, .*: {said}"):
            start(tmp_path / "other" / word[:5], f"eval.base={base}", word)


def test_pictures_of_a_retrained_model_are_copied(
    start: Run, finished: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = list[str]()
    call = class_conditional.ClassConditionalPipeline.__call__

    def counted(self: Any, labels: Any, *rest: Any) -> Any:
        drawn.extend(map(str, labels))
        return call(self, labels, *rest)

    monkeypatch.setattr(class_conditional.ClassConditionalPipeline, "__call__", counted)
    taken = f"eval.retrained_base={finished / 'images/retrained'}"
    words = ("train.steps=1", "eval.classifier=null", f"eval.base={finished / 'images/base'}")
    out = start(tmp_path / "out", f"eval.retrained={work / 'retrained'}", taken, *words)
    assert len(drawn) == 24  # of the erased model, with padding
    assert {p.name: p.read_bytes() for p in (out / "images/retrained").glob("*.png")} == {
        p.name: p.read_bytes() for p in (finished / "images/retrained").glob("*.png")
    }
    with pytest.raises(ValueError, match=r"name it by eval\.retrained"):
        start(tmp_path / "two", taken)
    assert not (tmp_path / "two").exists()


# --- stopping and going on ------------------------------------------------------------------------


def killed_at(step: int) -> Callable[..., None]:
    call = training.JsonlTracker.__call__

    def killed(self: Any, row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise StopError
        call(self, row)

    return killed


@pytest.mark.parametrize(
    "words",
    [("data=null",), METHODS["salun"], METHODS["selective_amnesia"], METHODS["retrain"], (*NEW, *METHODS["retrain"])],
    ids=["sfron without data", "salun", "selective_amnesia", "retrain", "new"],
)
def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    words = (*QUICK, *words, "train.steps=5", "checkpoint_every=2")
    whole, out = start(tmp_path / "whole", *words), tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(training.JsonlTracker, "__call__", killed_at(3))
        with pytest.raises(StopError):
            start(out, *words)
    assert [row["step"] for row in rows(out)] == [0, 1, 2]
    assert not (out / "model").exists()
    start(out, *words, resume=True)
    toys.close(unet(out / "model"), unet(whole / "model"), rtol=0, atol=0)  # says where and how far
    assert (out / "model" / FILE).read_bytes() == (whole / "model" / FILE).read_bytes()
    shared = ("step", "forget_loss", "remain_loss", "fast_rate")
    assert [[row.get(k) for k in shared] for row in rows(out)] == [[row.get(k) for k in shared] for row in rows(whole)]
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def stopped_drawing(program: ModuleType, what: str) -> tuple[Any, str, Any]:
    draw = program.draw_images

    def draw_images(*args: Any, **settings: Any) -> Any:
        return stop() if args[5] == what else draw(*args, **settings)

    return program, "draw_images", draw_images


def test_a_run_stopped_at_every_stage_comes_to_the_same_end(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, stopped again and again: it goes on each time, and does nothing twice that is there."""
    words = ("eval.retrained={work}/retrained", "train.steps=5", "checkpoint_every=2")
    whole, out = start(tmp_path / "whole", *words), tmp_path / "out"
    stages: list[tuple[tuple[Any, str, Any], set[str]]] = [
        (stopped_drawing(program, "base"), {"run.json"}),
        ((program, "gather", stop), {"images"}),
        ((runs, "save_mask", stop), {"fisher-forget.safetensors", "fisher-remain.safetensors"}),
        ((program, "run_steps", stop), {"saliency.safetensors"}),
        ((training.JsonlTracker, "__call__", killed_at(3)), {"metrics.jsonl", "state.safetensors"}),
        ((program, "write_safetensors", stop), set()),
        ((program.folders, "save", stop), {"trained.safetensors"}),
        (stopped_drawing(program, "erased"), {"model"}),
        (stopped_drawing(program, "retrained"), set()),
        ((program, "make_report", stop), set()),
        ((program, "draw_report", stop), {"report.json"}),
    ]
    there: set[str] = set()
    for number, (target, more) in enumerate(stages):
        with monkeypatch.context() as patch:
            if (out / "trained.safetensors").exists():
                patch.setattr(program, "gather", lambda *_: pytest.fail("trained again"))
            patch.setattr(*target)
            with pytest.raises(StopError):
                start(out, *words, resume=number > 0)
        there |= more
        if "saliency.safetensors" in there:
            there -= {"fisher-forget.safetensors", "fisher-remain.safetensors"}
        if (out / "model").exists():
            there -= {"state.safetensors"}
        if (out / "report.json").exists():
            there -= {"trained.safetensors"}
        assert {p.name for p in out.iterdir()} == there, f"stage {number}"
    with monkeypatch.context() as patch:
        for name in ("gather", "run_steps", "make_report"):
            patch.setattr(program, name, stop)
        start(out, *words, resume=True)
    assert (out / "model" / FILE).read_bytes() == (whole / "model" / FILE).read_bytes()
    assert (out / "saliency.safetensors").read_bytes() == (whole / "saliency.safetensors").read_bytes()
    for what in ("base", "erased", "retrained"):
        assert (out / "images" / what / "manifest.jsonl").read_bytes() == (
            whole / "images" / what / "manifest.jsonl"
        ).read_bytes()
    assert [row["forget_loss"] for row in rows(out)] == [row["forget_loss"] for row in rows(whole)]
    reports = [read(folder / "report.json") for folder in (out, whole)]
    for report in reports:
        timing = report.pop("timing")
        assert report.pop("memory")["ram_bytes"] > 1e8
        assert (timing["steps"], timing["erase_s"] is None) == (5, False)
    assert reports[0] == reports[1]
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_training_stopped_at_every_stage_comes_to_the_same_end(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*TRAIN, "train.steps=4", "checkpoint_every=1")
    whole, out = start(tmp_path / "whole", *words), tmp_path / "out"
    for number, target in enumerate(
        (
            (program, "gather", stop),
            (training.JsonlTracker, "__call__", killed_at(2)),
            (program, "write_safetensors", stop),
            (program.ddpm, "save_new", stop),
            (program, "make_report", stop),
        )
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*target)
            with pytest.raises(StopError):
                start(out, *words, resume=number > 0)
    start(out, *words, resume=True)
    assert (out / "model" / FILE).read_bytes() == (whole / "model" / FILE).read_bytes()
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_a_finished_run_is_not_done_again(
    program: ModuleType, configure: Configure, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "grid.png").unlink()
    for name in ("draw_images", "gather", "run_steps", "make_report"):
        monkeypatch.setattr(program, name, stop)
    said: list[str] = []
    program.main(configure("eval.retrained={work}/retrained"), out, resume=True, say=said.append)
    assert said == [f"finished before: {out / 'report.html'}"]
    assert (out / "grid.png").exists()


def test_another_run_is_not_gone_on_with(start: Run, work: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(work / "data/train", tmp_path / "data"))
    model = Path(shutil.copytree(work / "base", tmp_path / "model"))
    words = (*QUICK, f"data.source={data}", f"model={model}", "train.steps=1")
    out = start(tmp_path / "out", *words)
    before = tree(out)
    for other in ("train.steps=3", "seed=1", "method.lambd=0", "forget.labels=[cow]", "eval.classifier=null"):
        with pytest.raises(ValueError, match=r"holds a run with another config \(.*, now .*\): resume with the same"):
            start(out, *words, other, resume=True)
    Image.new("L", (8, 8)).save(data / "cow/7.png")
    with pytest.raises(ValueError, match="holds a run with another data"):
        start(out, *words, resume=True)
    shutil.copyfile(work / "retrained" / FILE, model / FILE)
    with pytest.raises(ValueError, match="holds a run with another base"):
        start(out, *words, resume=True)
    with pytest.raises(ValueError, match="out is not empty: choose another --out, or --resume"):
        start(out, *words)
    assert tree(out) == before


# --- refusals -------------------------------------------------------------------------------------


def idx(folder: Path, images: bytes, labels: bytes) -> None:
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)


@pytest.fixture(scope="module")
def odd(work: Path) -> Path:
    """Data, models and judges that do not fit."""
    folder = work / "odd"
    folder.mkdir()
    micro_ddpm.write_images(folder / "others", labels=("ant", "bee", "dog"))
    micro_ddpm.write_images(folder / "fewer", labels=("ant", "bee"))
    micro_ddpm.write_images(folder / "large", size=12)
    micro_ddpm.write_images(folder / "colour", mode="RGB")
    shutil.rmtree(micro_ddpm.write_images(folder / "one empty") / "cow")
    (folder / "one empty/cow").mkdir()
    micro_ddpm.write_images(folder / "one broken")
    (folder / "one broken/cow/3.png").write_bytes(b"no")
    micro_ddpm.write_images(folder / "mixed")
    Image.new("RGB", (8, 8)).save(folder / "mixed/cow/3.png")
    micro_ddpm.write_images(folder / "palette")
    Image.new("P", (8, 8)).save(folder / "palette/ant/0.png")
    (folder / "nothing").mkdir()
    images = struct.pack(">4I", 0x803, 6, 8, 8) + bytes(6 * 64)
    labels = struct.pack(">2I", 0x801, 6) + bytes([0, 1, 2] * 2)
    idx(folder / "magic", struct.pack(">I", 0x802) + images[4:], labels)
    idx(folder / "short", images[:-5], labels)
    idx(folder / "header", images[:9], labels)
    idx(folder / "fewer labels", images, struct.pack(">2I", 0x801, 5) + bytes([0, 1, 2, 0, 1]))
    idx(folder / "no such label", images, labels[:-1] + bytes([7]))
    micro_ddpm.write_classifier(folder / "judge of others", ("ant", "bee", "dog"))
    (folder / "judge cut").mkdir()
    for path in (work / "judge").iterdir():
        (folder / "judge cut" / path.name).write_bytes(path.read_bytes()[:5000])
    shutil.copytree(work / "base", folder / "cut")
    (folder / "cut" / FILE).write_bytes((work / "base" / FILE).read_bytes()[:-9])
    return folder


BARE = ("model={work}/lone", "labels=[a, b, c, d]", "data=null", "train.dropout=0")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    # labels
    "unknown label": (("forget.labels=[wasp]",), "no class 'wasp'; the model's classes are: 0 ant, 1 bee, 2 cow"),
    "label out of range": (("forget.labels=[3]",), "no class 3; the model's classes are: 0 ant, 1 bee, 2 cow"),
    "negative label": (("forget.labels=[-1]",), "no class -1; the model's classes are"),
    "all labels": (("forget.labels=[0, 1, 2]",), "every class is named in forget.labels"),
    "label twice": (("forget.labels=[bee, cow, bee]",), "forget.labels names a class twice: ['bee', 'cow', 'bee']"),
    "label twice, by number": (("forget.labels=[bee, 1]",), "forget.labels names a class twice: ['bee', 1]"),
    "no label": (("forget.labels=[]",), "forget.labels is empty: name what to forget"),
    "training without any": ((*TRAIN, "forget.labels=[0, 1, 2]"), "every class is named in forget.labels"),
    "unknown anchor": (("forget.loss=redirect", "forget.anchors=[wasp]"), "no class 'wasp'"),
    "forgotten anchor": (
        ("forget.loss=redirect", "forget.anchors=[bee]"),
        "a forgotten class cannot be an anchor: choose one that stays",
    ),
    "a lot of forgotten classes": (
        ("forget.loss=redirect", "forget.among=[ant, bee]"),
        "forget.among names a forgotten class: choose classes that stay",
    ),
    "a lot for ascent": (("forget.among=far",), "forget.among is for forget.loss=redirect without forget.anchors"),
    "a lot beside anchors": (
        ("forget.loss=redirect", "forget.anchors=[ant]", "forget.among=[cow]"),
        "forget.among is for forget.loss=redirect without forget.anchors",
    ),
    "anchors do not match": (
        ("forget.loss=redirect", "forget.labels=[bee]", "forget.anchors=[ant, cow]"),
        "forget.anchors has 2 labels for 1: give one for each, or one for all",
    ),
    # the null class
    "dropout without null class": (
        (*BARE, "forget.labels=[a]", "train.dropout=0.1"),
        "train.dropout 0.1 needs a null class, which {work}/lone lacks: set it to 0",
    ),
    "guidance without null class": (
        (*BARE, "forget.labels=[a]", "draw.guidance=2", "eval.classifier=null"),
        "guidance 2.0 needs a null class, which this model lacks (it has 4 class embeddings for 4 labels)",
    ),
    "drawing data with guidance": (
        (*BARE, "forget.labels=[a]", "draw.guidance=2", "eval.images=0"),
        "guidance 2.0 needs a null class",
    ),
    # the judge
    "judge of other labels": (
        ("eval.classifier={work}/odd/judge of others",),
        "judge of others knows ant, bee, dog; the model's classes are ant, bee, cow: name a classifier of",
    ),
    "missing judge": (("eval.classifier=fashion-clasifier",), "no embedded model 'fashion-clasifier'"),
    "no judge": (("eval.classifier={work}/odd/nothing",), "no config.json there"),
    # data
    "other classes": (
        ("data.source={work}/odd/others",),
        "the data's classes are ant, bee, dog, the model's are ant, bee, cow: give data.names in the model's order",
    ),
    "fewer classes": (("data.source={work}/odd/fewer",), "the data's classes are ant, bee, the model's are"),
    "other order": (("data.names=[cow, bee, ant]",), "the data's classes are cow, bee, ant, the model's are ant, bee"),
    "unknown names": (("data.names=[a, b, c]",), "names must be its class folders, ant, bee, cow; got a, b, c"),
    "other size": (
        ("data.source={work}/odd/large",),
        "the data's images are [1, 12, 12] (channels, height, width), the model takes [1, 8, 8]",
    ),
    "other mode": (("data.source={work}/odd/colour",), "the data's images are [3, 8, 8] (channels, height, width)"),
    "empty class": (("data.source={work}/odd/one empty",), "one empty/cow has no images"),
    "broken image": (("data.source={work}/odd/one broken",), "one broken/cow/3.png is no image or is cut short"),
    "mixed modes": (("data.source={work}/odd/mixed",), "mixed/cow/3.png is 8×8 RGB, expected 8×8 L"),
    "palette": (("data.source={work}/odd/palette",), "palette/ant/0.png has mode P, allowed are L and RGB"),
    "empty folder": (("data.source={work}/odd/nothing",), "nothing has neither IDX files"),
    "missing folder": (("data.source={work}/none",), "no such folder: {work}/none"),
    "IDX of another magic": (("data.source={work}/odd/magic",), "starts with 00000802, must be 00000803"),
    "IDX cut short": (("data.source={work}/odd/short",), "cut short or damaged, 379 bytes for a size of 6×8×8"),
    "IDX header cut short": (("data.source={work}/odd/header",), "cut short, 9 bytes where the header alone has 16"),
    "IDX of fewer labels": (
        ("data.source={work}/odd/fewer labels", "data.names=[ant, bee, cow]"),
        "6 images but 5 labels: use files of one data set",
    ),
    "IDX label out of range": (
        ("data.source={work}/odd/no such label", "data.names=[ant, bee, cow]"),
        "label 7 is out of range, 3 names (0–2)",
    ),
    # the model
    "architecture of a model that is there": (
        ("architecture={channels: [8]}",),
        "architecture is for model=new; {work}/base has its own: take one of the two back",
    ),
    "no architecture": (
        ("model=new", *METHODS["retrain"]),
        "model=new needs an architecture: give architecture.channels=[64,128] and so on",
    ),
    "nothing to train on": ((*TRAIN, "data=null"), "model=new needs data.source: labelled images to train on"),
    "groups": ((*TRAIN, "architecture.groups=3"), "architecture.groups 3 must divide every number of channels"),
    "odd size": ((*TRAIN, "architecture.channels=[8,8,8,8,8]"), "images of 8×8 cannot be halved to 5 resolutions"),
    "attention": ((*TRAIN, "architecture.attention=[true]"), "architecture.attention has 1 values for 2 resolutions"),
    "missing model": (("model={work}/none",), "no model '{work}/none': not a folder, not one of: "),
    "model cut short": (("model={work}/odd/cut",), "is cut short or no safetensors file"),
    "another kind of model": (("model=photos-sd",), "holds a StableDiffusionPipeline; erase run ddpm takes"),
    "a lone unet without names": (("model={work}/lone",), "names no classes: give labels="),
    "names of a model that has some": (("labels=[a, b, c]", "data=null"), "names its classes itself: leave out labels"),
    "missing retrained model": (("eval.retrained={work}/none",), "no model '{work}/none'"),
    "retrained model cut short": (("eval.retrained={work}/odd/cut",), "is cut short or no safetensors file"),
    # settings
    "unknown method": (("method.name=sfro",), "no method 'sfro', did you mean sfron"),
    "method setting": (("method.lambdda=1",), "unknown setting method.lambdda; did you mean method.lambd"),
    "closed form of texts": (("method={name: uce}",), "uce needs text embeddings, which this program does not make"),
    "negative strength": (("method={name: selective_amnesia, strength: -1}",), "strength must be ≥ 0; got -1.0"),
    "no mask": (("saliency.density=null",), "saliency.threshold or saliency.density"),
    "magnitude without density": (("saliency={kind: magnitude, threshold: 1}",), "needs saliency.density"),
    "unknown parameters": (("train.parameters=qqqq",), "train.parameters 'qqqq' matches no parameter of UNet2DModel"),
    "parameters of another model": (("train.parameters=xattn",), "matches no parameter of UNet2DModel"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_anything(
    start: Run, work: Path, odd: Path, tmp_path: Path, what: str
) -> None:
    words, said = REFUSED[what]
    with pytest.raises(ValueError, match=re.escape(said.replace("{work}", str(work)))) as caught:
        start(tmp_path / "out", *words)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_judge_cut_short_is_refused(start: Run, odd: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="judge cut: not a transformers image classifier"):
        start(tmp_path / "out", f"eval.classifier={odd / 'judge cut'}")
    assert not list(tmp_path.iterdir())


LATE: dict[str, tuple[tuple[str, ...], str]] = {
    "base pictures that are not there": (("eval.base={work}/none",), "none: has no settings.json"),
    "retraining without data": ((*METHODS["retrain"], "data=null"), "training needs data.source: labelled images"),
    "retrained model of other labels": (("eval.retrained={work}/odd/other labels",), "has other classes"),
    "retrained model without null class": (("eval.retrained={work}/odd/bare",), "needs a null class"),
    "retrained model without weights": (("eval.retrained={work}/odd/hollow",), "weights are missing"),
    "too few pictures": (("eval.images=5",), "eval.images must be at least 6 .* or 0; got 5"),
    "one picture": (("eval.images=1",), "eval.images"),
}


@pytest.mark.parametrize("what", LATE)
def test_what_cannot_be_finished_is_not_begun(start: Run, work: Path, odd: Path, tmp_path: Path, what: str) -> None:
    words, said = LATE[what]
    if "{work}/odd/" in words[0]:
        place = Path(words[0].partition("=")[2].replace("{work}", str(work)))
        labels = ("ant", "cow", "bee") if place.name.startswith("other") else LABELS
        class_conditional.save_new(micro_ddpm.model(labels), place)
        if place.name == "bare":
            config = {**read(place / "unet/config.json"), "num_class_embeds": 3}
            (place / "unet/config.json").write_text(json.dumps(config))
            weights = unet(place)
            weights["class_embedding.weight"] = weights["class_embedding.weight"][:3].clone()
            save_file(weights, place / FILE, metadata={"format": "pt"})
        elif place.name == "hollow":
            weights = unet(place)
            del weights["conv_in.weight"]
            save_file(weights, place / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        start(tmp_path / "out", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {*MASKED, "retrain"}))
def test_methods_without_a_mask_need_no_setting_of_one(start: Run, tmp_path: Path, name: str) -> None:
    start(tmp_path / "out", *QUICK, *METHODS[name], "saliency={count: 4, density: null}", "train.steps=1")


@pytest.mark.parametrize("name", ["random_label", "salun", "selective_amnesia"])
def test_methods_that_fit_targets_do_not_ascend(program: ModuleType, configure: Configure, name: str) -> None:
    """Random labels without labels, and a surrogate without a surrogate, are gradient ascent under another name."""
    config = configure(f"method={{name: {name}}}")
    assert config.forget.loss == "ascent"
    plan = program.Plan(list(LABELS), [1], [], None)
    with pytest.raises(ValueError, match=r"forget\.loss"):
        program.check(config, plan, micro_ddpm.model(), builder(name)())


def test_the_model_can_be_inspected(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["erase", "inspect", str(work / "base")])
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals are handled as before, after a test that runs a command."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    yield
    for n, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(n, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_end_of_the_step(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    words = (*QUICK, "train.steps=4")  # fewer than between two checkpoints
    whole, out = start(tmp_path / "whole", *words), tmp_path / "out"
    call = training.JsonlTracker.__call__

    def signalled(self: Any, row: dict[str, Any]) -> None:
        if row["step"] == 1:
            signal.raise_signal(number)
        call(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(training.JsonlTracker, "__call__", signalled)
        common.stoppable()
        ours = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(common.Stopped) as stopped:
            start(out, *words)
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == ours
    assert stopped.value.code == status
    assert load_state(out / "state.safetensors")["done"] == 2
    assert [row["step"] for row in rows(out)] == [0, 1]
    start(out, *words, resume=True)
    assert (out / "model" / FILE).read_bytes() == (whole / "model" / FILE).read_bytes()
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 3]


@pytest.mark.usefixtures("handlers")
def test_a_signal_elsewhere_stops_at_once_and_says_how_to_go_on(
    program: ModuleType, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "program", lambda name: program)
    monkeypatch.setattr(program, "gather", lambda *_: signal.raise_signal(signal.SIGTERM))
    words = ["erase", "run", "ddpm", str(work / "micro.yaml"), *QUICK, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 143
    said = capsys.readouterr().err.splitlines()
    assert said == [f"erase: stopped by SIGTERM; go on with: {shlex.join(words)} --resume"]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("words", "again"),
    [
        ("run sd x 'forget.prompts=a cat' --out y", "erase run sd x 'forget.prompts=a cat' --out y --resume"),
        ("run sd x --resume --out y", "erase run sd x --resume --out y"),
        ("run sd x --out y --dry-run", "erase run sd x --out y --dry-run"),
        ("attack x --out y", "erase attack x --out y --resume"),
        ("generate x z --out y", "erase generate x z --out y --resume"),
        ("compare x --out y", "erase compare x --out y"),
        ("demo --out y", "erase run sd sd_photos_sfron --out y --resume"),
    ],
)
def test_a_stopped_command_says_which_one_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, again: str
) -> None:
    """Stopped as soon as it can be."""
    stoppable = common.stoppable

    def stopped(*args: Any) -> None:
        stoppable(*args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "_stoppable", stopped)
    monkeypatch.setattr("sys.argv", ["erase", *shlex.split(words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == f"erase: stopped by SIGINT; go on with: {again}\n"


def test_what_killed_writes_left_is_swept(start: Run, tmp_path: Path) -> None:
    """Killed before run.json was there, and again while the model was saved."""
    out = tmp_path / "out"
    (out / ".model.abc.tmp/model/unet").mkdir(parents=True)
    for name in (".run.json.abc.tmp", ".model.abc.tmp/model/unet/.x.safetensors.1.tmp", ".state.safetensors.1.tmp"):
        (out / name).write_text("{")
    start(out, *QUICK, resume=True)
    assert not list(out.rglob(".*"))


# --- several processes ----------------------------------------------------------------------------


def test_two_processes_are_one(start: Run, tmp_path: Path) -> None:
    """Mask and base pictures to the bit; weights to float32 rounding: gradients are summed in another order."""
    words = (
        *("data=null", "method.fast_rule=sgd", "train.optimizer=sgd", "train.lr=0.1", "train.batch_size=4"),
        *("saliency.batch_size=2", "draw.batch_size=4"),
    )
    one, out = start(tmp_path / "one", *words), tmp_path / "two"
    ended = launched.two(lambda: start(out, *words), tmp_path / "log")
    assert ended == [0, 0], (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    assert "pictures: base" in (tmp_path / "log.0").read_text()
    assert not re.search("pictures|saliency|unlearning", (tmp_path / "log.1").read_text())
    assert {p.relative_to(out) for p in out.rglob("*")} == {p.relative_to(one) for p in one.rglob("*")}
    assert (out / "saliency.safetensors").read_bytes() == (one / "saliency.safetensors").read_bytes()
    for name in ("manifest.jsonl", "settings.json"):
        assert (out / "images/base" / name).read_bytes() == (one / "images/base" / name).read_bytes()
    toys.close(unet(out / "model"), unet(one / "model"), rtol=1e-5, atol=1e-6)
    shared = ("forget_loss", "remain_loss", "weight_max", "forget_norm", "remain_norm")
    for a, b in zip(rows(out), rows(one), strict=True):
        assert [a[k] for k in shared] == pytest.approx([b[k] for k in shared], rel=1e-4)
    a, b = (read(folder / "report.json") for folder in (out, one))
    assert a["before"]["classes"] == b["before"]["classes"]
    assert a["after"]["classes"]["remain"]["n"] == b["after"]["classes"]["remain"]["n"]


def test_two_processes_go_on_where_they_were_killed(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*QUICK, "train.steps=4", "checkpoint_every=2", "saliency.batch_size=2", "saliency.draws=3")
    assert launched.two(lambda: start(tmp_path / "whole", *words), tmp_path / "log") == [0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(training.JsonlTracker, "__call__", killed_at(3))
        assert launched.two(lambda: start(tmp_path / "out", *words), tmp_path / "log") == [1, 1]
    assert launched.two(lambda: start(tmp_path / "out", *words, resume=True), tmp_path / "log") == [0, 0]
    assert (tmp_path / "out/model" / FILE).read_bytes() == (tmp_path / "whole/model" / FILE).read_bytes()


def test_a_batch_that_does_not_divide_is_refused_at_once(start: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert launched.two(lambda: start(out, "train.batch_size=3"), tmp_path / "log") == [1, 1]
    assert "train.batch_size 3 does not divide over 2 processes" in (tmp_path / "log.0").read_text()
    assert not out.exists()


def test_a_dry_run_tells_and_writes_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["erase", "run", "ddpm", str(work / "micro.yaml"), "--out", "here", "--dry-run"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    said = capsys.readouterr().out
    assert re.search(r"^learns: [\d,]+ of [\d,]+ weights \([\d.]+%\)$", said, re.MULTILINE)
    for what in ("mask", "steps"):
        assert re.search(rf"^memory for the {what}: [\d.]+ GB \(libraries .*activations ", said, re.MULTILINE)
    assert "steps: 2 of 2 samples, 2 fast and 2 slow phases\n" in said
    assert "pictures: 18 of each model, 2 sampler steps each\n" in said
    assert said.endswith(f"command: erase run ddpm {work / 'micro.yaml'} --out here\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_rehearsed(program: ModuleType, configure: Configure, tmp_path: Path, method: str) -> None:
    said: list[str] = []
    program.main(configure(*METHODS[method]), tmp_path / "out", command="erase", say=said.append, dry_run=True)
    assert ("memory for the mask" in said[0]) == (method in (*MASKED, "selective_amnesia"))
    assert not list(tmp_path.iterdir())
