"""What a class-conditional model adds to a run: labels, data, anchors by lot, new models, retrained ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import micro_ddpm
import numpy as np
import pytest
import torch
import toys
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jobs import Runner, StopError, changed, read, rows, stop, table
from micro_ddpm import LABELS
from safetensors.torch import load_file, save_file

import erase
from erase.diffusion import class_conditional
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.data import LatentSet
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.model import Model, open_model
from erase.diffusion.process import Discrete
from erase.engine.image_fisher import image_diagonal
from erase.engine.precision import Precision
from erase.evaluation.generate import image_generator
from erase.evaluation.manifest import read_manifest
from erase.evaluation.prompt_files import PromptRow
from erase.programs import generating, inputs, training
from erase.programs.generating import Wanted
from erase.programs.labels import data as gathering
from erase.programs.labels.plan import Plan
from erase.resources import preset_path
from erase.store.labelled import LabelledImages, read_labelled, scaled

FILE = "unet/diffusion_pytorch_model.safetensors"
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "norm_num_groups": 4,
}
"""Of a `DDPMPipeline`, as diffusers' own training example saves one."""
QUICK = ("eval.images=0",)
NEW = ("model=new", "architecture={channels: [8, 16], layers: 1, groups: 4}", "method={name: retrain}")
RETRAIN = (*QUICK, "method={name: retrain, average: 0}")
LONE = ("model={work}/lone", "labels=[ant, bee, cow]")


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE)


# --- labels ---------------------------------------------------------------------------------------


def test_labels_are_named_or_numbered(label_runs: Runner) -> None:
    for words, forget in (("[cow, ant]", [2, 0]), ("[2, ant]", [2, 0]), ("2", [2])):
        assert label_runs.job(f"forget.labels={words}").plan.forget == forget
    job = label_runs.job("forget.labels=[bee]", "forget.earlier=[0]")  # that another tool forgot
    assert (job.plan.earlier, job.plan.remain, job.plan.gone) == ([0], [2], ["bee", "ant"])
    assert [row.prompt for row in job.plan.rows] == ["bee", "ant", "cow"]
    for words, said in (
        (("forget.labels=[bee, ant]",), "forgetting bee, ant"),
        (("method={name: retrain}",), "without bee"),
        (("method={name: retrain}", "forget.labels=[]"), "without nothing"),
    ):
        assert label_runs.job(*words).announcement().endswith(said)


def test_a_run_that_judges_nothing_says_so_first(label_runs: Runner, tmp_path: Path) -> None:
    for words, why in ((("eval.classifier=null",), "eval.classifier"), (("eval.images=0",), "eval.images=0")):
        said: list[str] = []
        words = (*words, "saliency={kind: none, density: null}", "train.steps=1")
        found = read(label_runs(tmp_path / why, *words, say=said.append) / "report.json")
        assert found["unjudged"] == said[0].splitlines()[0]
        assert why in found["unjudged"]


def test_run_json_holds_the_classes_and_the_data(label_run: Path, label_runs: Runner) -> None:
    run, data = read(label_run / "run.json"), read_labelled(label_runs.work / "data", "train")
    assert run["base"]["weights"] == folders.fingerprint(locate(label_runs.work / "base", "label"))
    assert run["plan"] == {"forget": [1], "anchors": [], "earlier": [], "labels": list(LABELS)}
    assert run["data"] == {"images": 24, "sha256": data.digest}
    others = (
        LabelledImages(data.pixels, data.labels.flip(0), data.names),
        LabelledImages(data.pixels // 2, data.labels, data.names),
    )
    assert len({data.digest, *(other.digest for other in others)}) == 3


def test_classes_one_after_another(label_runs: Runner, label_run: Path, tmp_path: Path) -> None:
    """What was forgotten before is neither taught again nor counted among what stays."""
    out = label_runs(tmp_path / "second", f"model={label_run / 'model'}", "forget.labels=[ant]")
    report = read(out / "report.json")
    assert report["target"] == {"forget": ["ant"], "anchors": [], "earlier": ["bee"]}
    assert [report["after"]["classes"][side]["n"] for side in ("forget", "earlier", "remain")] == [6, 6, 6]
    assert report["after"]["fidelity"]["coverage"].keys() == {"cow"}
    assert [row.prompt for row in read_manifest(out / "images/erased")][::6] == ["ant", "bee", "cow"]
    assert folders.forgotten(locate(out / "model", "label")) == ["ant", "bee"]
    with pytest.raises(ValueError, match=r"forget\.labels"):
        label_runs.job(f"model={out / 'model'}", "forget.labels=[cow]")
    assert label_runs.job(f"model={out / 'model'}", "forget.labels=[bee]").plan.gone == ["bee", "ant"]


@pytest.mark.parametrize("text", ["bee", "3", "{"])
def test_a_header_that_names_no_classes_is_refused(label_runs: Runner, tmp_path: Path, text: str) -> None:
    shutil.copytree(label_runs.work / "base", tmp_path / "model")
    meta = {"format": "pt", folders.FORGOTTEN: text}
    save_file(unet(tmp_path / "model"), tmp_path / "model" / FILE, metadata=meta)
    with pytest.raises(ValueError, match=folders.FORGOTTEN):
        folders.forgotten(locate(tmp_path / "model", "label"))


def test_a_lone_unet_is_judged_by_the_names_it_is_given(label_runs: Runner, tmp_path: Path) -> None:
    """And saved as it came."""
    out = label_runs(tmp_path / "out", *LONE, "eval.retrained={work}/lone")
    report, file = read(out / "report.json"), Path(FILE).name
    assert set(report["after"]["classes"]["per_label"]) == set(LABELS)
    assert report["retrained"] == report["before"]
    assert {p.name for p in (out / "model").iterdir()} == {"config.json", file, "README.md"}
    assert changed(load_file(label_runs.work / "lone" / file), load_file(out / "model" / file))


def test_settings_run(label_runs: Runner, tmp_path: Path) -> None:
    """Parameters by an expression, the published loss scale, a distilled remain loss, half precision."""
    words = (
        *("method={name: sfron, fast_rate: 1e-3, published: true}", "saliency={threshold: 0.5, per: batch, count: 3}"),
        *("train.parameters=down_blocks|class_embedding", "precision=bf16", "remain.loss=distill"),
    )
    out = label_runs(tmp_path / "out", *QUICK, *words)
    names = changed(unet(label_runs.work / "base"), unet(out / "model"))
    assert names
    assert all("down_blocks" in name or "class_embedding" in name for name in names)


def test_selective_amnesia_with_the_sums_of_its_script(
    label_runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an image of each side at every timestep; the forgotten one is true, not the noise that is fitted."""
    seen = list[Any]()

    def watched(backend: Any, batches: Any, **settings: Any) -> Any:
        seen.extend([*batches][:2])
        return image_diagonal(backend, seen, **settings)

    monkeypatch.setattr(inputs, "image_diagonal", watched)
    words = (
        "method={name: selective_amnesia, pull: script, strength: 10, clip_remain: 1}",
        *("saliency={per: image, count: 1, draws: 1, batch_size: 250}", "train.reduction=sum", "forget.loss=surrogate"),
    )
    out = label_runs(tmp_path / "out", *QUICK, *words)
    assert changed(unet(label_runs.work / "base"), unet(out / "model"))
    forget, remain = seen
    assert forget["cond"]["label"].tolist() == [1]
    assert remain["cond"]["label"].tolist() != [1]
    brightness = ((forget["mean"] + 1) * 127.5).round().amin().div(60, rounding_mode="floor")
    assert int(brightness) == 1  # a bee's


def test_lost_parts_of_a_finished_run_are_made_again(label_runs: Runner, label_run: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(label_run, tmp_path / "out"))
    base = {p.name: p.stat().st_mtime_ns for p in (out / "images/base").glob("*.png")}
    (out / "report.json").unlink()
    shutil.rmtree(out / "model")
    next((out / "images/erased").glob("*.png")).write_bytes(b"broken")
    label_runs(out, "eval.retrained={work}/retrained", resume=True)
    assert (out / "model" / FILE).read_bytes() == (label_run / "model" / FILE).read_bytes()
    assert {p.name: p.stat().st_mtime_ns for p in (out / "images/base").glob("*.png")} == base
    whole, again = (read(folder / "report.json")["after"] for folder in (label_run, out))
    assert again == whole


@pytest.mark.slow
@pytest.mark.parametrize("null", [False, True])
def test_a_plain_pipeline_of_diffusers_needs_the_number_of_its_classes(tmp_path: Path, null: bool) -> None:
    """Embeddings alone do not say whether the last one is the null class; the neutral preset does the rest."""
    DDPMPipeline(UNet2DModel(**UNET, num_class_embeds=4), DDPMScheduler()).save_pretrained(tmp_path / "mine")
    small = ("train.steps=1", "forget.count=2", "saliency.count=2", "draw.steps=2", "eval.images=1", "eval.blur=false")
    runs = Runner(preset_path("ddpm_sfron"), tmp_path)
    words = ("model={work}/mine", "forget.labels=[1]", *small)
    with pytest.raises(ValueError, match=r"labels=4 .+labels=3"):
        runs.job(*words)
    out = runs(tmp_path / "out", *words, f"labels={3 if null else 4}")
    assert changed(unet(tmp_path / "mine"), unet(out / "model"))
    assert read(out / "run.json")["plan"]["labels"] == [str(i) for i in range(3 if null else 4)]
    count = 3 if null else 4
    generating.generate(str(out / "model"), None, [PromptRow("2", 0)], tmp_path / "images", Wanted(steps=1))
    assert erase.load(out / "model").labels == [str(i) for i in range(count)]
    assert erase.load(out / "model", names=["a", "b", "c", "d"][:count]).labels[0] == "a"  # numbers give way to names
    with pytest.raises(ValueError, match="labels"):
        erase.load(out / "model", names=7 - count)
    job = runs.job(*words, f"labels={count}")
    assert (job.model.has_null, job.config.train.dropout) == (null, 0.1 if null else 0.0)
    again = runs.job("model={work}/out/model", *words[1:], "forget.labels=[2]", f"labels={count}")
    assert [again.plan.labels[i] for i in again.plan.earlier] == ["1"]


# --- data -----------------------------------------------------------------------------------------


def test_data_are_matched_by_name(label_runs: Runner) -> None:
    """Named by number in another order, as in folders of another model's."""
    write = micro_ddpm.write_images
    folder = write(label_runs.work / "others", labels=("bee", "ant, emmet", "cow"))
    class_conditional.save_new(micro_ddpm.model(("cow", "ant, emmet", "bee")), label_runs.work / "turned")
    words = (f"data.source={folder}", "model={work}/turned", "eval.classifier=null", "forget.labels=[ant]")
    data = label_runs.job(*words).plan.data
    assert data.names == ("cow", "ant, emmet", "bee")
    assert (data.pixels.flatten(1).amin(1) // 60).tolist() == [{0: 2, 1: 1, 2: 0}[k] for k in data.labels.tolist()]


@pytest.mark.parametrize("word", ["data=null", "data=none", "data.source=none", "data.source=null"])
def test_there_may_be_no_data(label_runs: Runner, word: str) -> None:
    assert label_runs.job(word, "eval.labels=null").plan.data is None


def test_a_method_makes_the_images_that_it_reads_alone(label_runs: Runner, tmp_path: Path) -> None:
    words = ("data=null", "forget.count=2", "saliency.kind=none", *QUICK)
    ascent = "method={name: gradient_ascent, fast_rate: 1e-3}"
    for method, expected in (("method={name: finetune}", (0, 2)), (ascent, (2, 0))):
        job = label_runs.job(*words, method)
        lesson = job.lesson()
        there = tuple(0 if side is None else len(side) for side in (lesson.forget, lesson.remain))
        assert there == job.sides() == expected
    label_runs(tmp_path / "out", *words, "method={name: finetune}")


@pytest.mark.slow
def test_runs_share_the_images_that_a_model_generates(
    label_runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of them is the same: the forget side of runs with other anchors, not of other guidance."""
    asked: list[int] = []
    real = Model.generate_latents
    monkeypatch.setattr(
        Model,
        "generate_latents",
        lambda self, prompts, *a, **k: asked.append(len(prompts)) or real(self, prompts, *a, **k),
    )

    def learned(*words: str, out: str) -> dict[str, torch.Tensor]:
        asked.clear()
        words = ("data=null", "remain.count=3", f"draw.cache={tmp_path / 'kept'}", *QUICK, *words)
        return unet(label_runs(tmp_path / out, *words) / "model")

    first = learned(out="first")
    assert sum(asked) == 4 + 2 * 3
    assert toys.same(first, learned(out="again"))
    assert asked == []
    learned("remain.count=2", out="fewer")
    assert sum(asked) == 2 * 2
    learned("draw.guidance=1", out="other")
    assert sum(asked) == 4 + 2 * 3
    assert toys.same(first, learned("draw.cache=null", out="none"))


@pytest.fixture(scope="module")
def gather(label_runs: Runner) -> Callable[..., Any]:
    """The job's own, of the images of `label_runs`, whose classes are known by their brightness."""
    data = read_labelled(label_runs.work / "data", "train")
    micro = micro_ddpm.wrap(micro_ddpm.model())

    def gather(*words: str, forget: tuple[int, ...] = (1,), anchors: tuple[int, ...] = (), **settings: Any) -> Any:
        kept = {name: settings.get(name, []) for name in ("earlier", "among")}
        plan = Plan(list(LABELS), list(forget), list(anchors), settings.get("data", data), **kept)
        model, fresh = settings.get("model", micro), settings.get("fresh", False)
        exact = Precision("no", torch.device("cpu"))
        return gathering.gather(label_runs.config("forget.count=8", *words), plan, model, exact, fresh)

    return gather


def shown(data: LatentSet) -> list[int]:
    """The classes of the images."""
    return ((data.mean + 1) * 127.5).round().flatten(1).amin(1).div(60, rounding_mode="floor").long().tolist()


def test_both_sides_come_from_the_data(gather: Callable[..., Any]) -> None:
    forget, remain = gather("forget.count=5")
    assert shown(forget) == forget.cond.tolist() == [1] * 5
    assert shown(remain) == remain.cond.tolist() == [0] * 3 + [2] * 3  # as many in all, rounded up
    assert len({x.numpy().tobytes() for x in forget.mean}) == 5
    assert forget.mean.abs().max() <= 1
    assert (forget.anchor, forget.std, remain.anchor) == (None, None, None)
    assert torch.equal(forget.table["label"], torch.arange(3))
    several, rest = gather("forget.count=3", "remain.count=4", forget=(2, 0))
    assert shown(several) == several.cond.tolist() == [2] * 3 + [0] * 3
    assert shown(rest) == [1] * 4
    every, rest = gather("forget.count=100", "remain.count=100")  # no more than there are
    assert (len(every), len(rest)) == (8, 16)
    one, two, other = (gather("forget.count=4", f"seed={seed}")[0].mean for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert set(gather(earlier=[0])[1].cond.tolist()) == {2}


def test_training_takes_all_of_what_remains(gather: Callable[..., Any]) -> None:
    forget, remain = gather("forget.count=1", fresh=True)
    assert forget is None
    assert shown(remain) == remain.cond.tolist() == [0] * 8 + [2] * 8
    assert len(gather(forget=(), fresh=True)[1]) == 24
    assert shown(gather("remain.count=2", fresh=True)[1]) == [0, 0, 2, 2]


def test_the_data_are_as_many_as_a_dry_run_says(label_runs: Runner) -> None:
    for words in (
        ("forget.count=5",),
        ("forget.labels=[0, 2]", "forget.count=100", "remain.count=3"),
        ("forget.loss=redirect", "forget.anchors=[ant]", "forget.pictures=both"),
        ("method={name: retrain}",),
        ("data=null", "forget.count=2"),
    ):
        job = label_runs.job(*QUICK, *words)
        sides = job.sides()
        lesson = job.lesson()
        assert sides == (0 if lesson.forget is None else len(lesson.forget), len(lesson.remain))


def test_anchors_go_with_their_labels(gather: Callable[..., Any]) -> None:
    forget, _ = gather("forget.count=2", "forget.loss=redirect", forget=(2, 0), anchors=(1, 1))
    assert (forget.cond.tolist(), forget.anchor.tolist()) == ([2, 2, 0, 0], [1] * 4)


def test_without_anchors_each_image_has_another_class_by_lot(gather: Callable[..., Any]) -> None:
    one, two, other = (gather("forget.loss=redirect", f"seed={seed}")[0].anchor.tolist() for seed in (0, 0, 1))
    assert set(one) == {0, 2}
    assert one == two != other
    for pictures, seen in (("own", {1}), ("anchor", {2})):
        words = ("forget.loss=redirect", "forget.among=[cow]", f"forget.pictures={pictures}")
        forget, remain = gather(*words, among=[2])
        assert (set(shown(forget)), set(forget.anchor.tolist()), set(forget.cond.tolist())) == (seen, {2}, {1})
        assert set(remain.cond.tolist()) == {0, 2}  # slow steps hold on to all


def test_images_are_mirrored_once_by_lot(gather: Callable[..., Any]) -> None:
    for number, (plain, turned) in enumerate(zip(gather(), gather("data.flip=true"), strict=True)):
        assert torch.equal(plain.cond, turned.cond)
        there = [int(torch.equal(a, b)) for a, b in zip(plain.mean, turned.mean, strict=True)]
        for a, b, same in zip(plain.mean, turned.mean, there, strict=True):
            assert torch.equal(b, a if same else a.flip(-1))
        assert 0 < sum(there) < len(there)
        assert torch.equal(gather("data.flip=true")[number].mean, turned.mean)


def test_a_new_network_has_the_dropout_that_is_asked_for(label_runs: Runner) -> None:
    for words, expected in ((NEW, {0.0}), ((*NEW, "architecture.dropout=0.1"), {0.1})):
        net = label_runs.job(*words).model.net
        assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} - {0.0} == expected - {0.0}


def test_far_classes_are_those_whose_predictions_differ_much(
    gather: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that says `label`, a constant, to everything: classes are as far apart as their numbers."""

    def constant(net: Any, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return torch.ones_like(x) * cond["label"].view(-1, 1, 1, 1)

    model = Denoiser(torch.nn.Identity(), constant, Discrete(torch.linspace(0.9, 0.1, 10)))
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, 1, 8, 8, generator=g)
    remain = LatentSet(pixels, torch.arange(40) % 5, {"label": torch.arange(5)})
    exact = Precision("no", torch.device("cpu"))
    for label, forgotten, expected in ((0, [0], [3, 4]), (4, [4], [0, 1]), (2, [2, 1], [0, 4]), (1, [1], [3, 4])):
        plan = Plan(list("abcde"), forgotten, [], None)
        apart = gathering.distances(plan, model, remain, label, exact, 0)
        assert apart == {other: pytest.approx((other - label) ** 2) for other in plan.remain}
        assert gathering.far(apart) == expected
    monkeypatch.setattr(gathering, "distances", lambda *_: {0: 3.0, 2: 1.0})
    forget, even = gather("forget.loss=redirect", "forget.among=far")
    assert set(forget.anchor.tolist()) == {0}
    # What must stay leans to the near class, and is as much in all.
    _, leaning = gather("forget.loss=redirect", "remain.share=near")
    assert [int((even.cond == c).sum()) for c in (0, 2)] == [4, 4]
    assert [int((leaning.cond == c).sum()) for c in (0, 2)] == [2, 6]
    assert shown(leaning) == leaning.cond.tolist()


def test_of_several_forgotten_classes_the_nearest_one_counts() -> None:
    remain = LatentSet(torch.arange(60.0).view(60, 1, 1, 1), torch.arange(60) % 3, {"label": torch.arange(5)})
    leaned = gathering.leaning(remain, [{0: 1.0, 1: 4.0, 2: 8.0}, {0: 2.0, 1: 2.0, 2: 4.0}])
    assert torch.bincount(leaned.cond).tolist() == [34, 17, 9]
    assert (leaned.mean.flatten() % 3 == leaned.cond).all()
    assert len(set(leaned.mean.flatten()[:34].tolist())) == 20  # all there are, some twice


def test_a_surrogate_is_uniform_noise_under_the_forgotten_label(gather: Callable[..., Any]) -> None:
    forget, remain = gather("forget.loss=surrogate")
    assert (forget.cond.tolist(), forget.anchor, forget.mean.shape) == ([1] * 8, None, (8, 1, 8, 8))
    x = forget.mean.flatten().sort().values
    assert float((x - torch.linspace(-1, 1, len(x))).abs().max()) < 0.12  # 512 values: the Kolmogorov distance
    assert len({i.numpy().tobytes() for i in forget.mean}) == 8
    assert shown(remain) == [0] * 4 + [2] * 4  # the replay is not noise


def test_patches_are_made_of_the_data(gather: Callable[..., Any]) -> None:
    pipe = micro_ddpm.model(shape=(1, 8, 8), patch=2, channels=[8, 8])
    deep, flat = gather("forget.count=3", model=micro_ddpm.wrap(pipe))[0], gather("forget.count=3")[0]
    assert deep.mean.shape == (3, 4, 4, 4)
    assert torch.equal(class_conditional.to_pixels(deep.mean, 2), flat.mean)


def test_without_data_the_model_generates_its_own(gather: Callable[..., Any]) -> None:
    """One generator an image, the same on both sides; at the settings of the run."""
    model = micro_ddpm.wrap(micro_ddpm.model())
    words = ("draw={steps: 3, batch_size: 2, guidance: 4, sampler: ddpm}", "forget.count=3")
    forget, remain = gather(*words, data=None, model=model, forget=(2,))
    assert (forget.cond.tolist(), remain.cond.tolist()) == ([2] * 3, [0, 0, 1, 1])
    for side in (forget, remain):
        generators = [image_generator(0, n) for n in range(len(side))]
        names = [LABELS[i] for i in side.cond]
        drawn = model.generate_latents(names, generators, steps=3, guidance=4.0, sampler="ddpm", batch_size=2)
        assert torch.equal(side.mean, drawn)
    other, _ = gather(*words, "seed=1", data=None, model=model, forget=(2,))
    assert not torch.equal(other.mean, forget.mean)


# --- training -------------------------------------------------------------------------------------


def test_a_new_model_is_trained_killed_and_resumed(
    label_runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing before it, and nothing that is forgotten."""
    words = (*NEW, "forget.labels=[]", "train.steps=3", "checkpoint_every=1")
    out = label_runs(tmp_path / "out", *words)
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
    again, call = tmp_path / "again", training.JsonlTracker.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            training.JsonlTracker, "__call__", lambda self, row: stop() if row["step"] == 2 else call(self, row)
        )
        with pytest.raises(StopError):
            label_runs(again, *words, *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(class_conditional, "save_new", stop)
        with pytest.raises(StopError):
            label_runs(again, *words, *QUICK, resume=True)
    assert (again / "trained.safetensors").exists()
    label_runs(again, *words, *QUICK, resume=True)
    assert (again / "model" / FILE).read_bytes() == (out / "model" / FILE).read_bytes()


def test_a_new_model_learns(label_runs: Runner, tmp_path: Path) -> None:
    """Against the first steps; with patches, in colour, its images 12×12."""
    micro_ddpm.write_images(tmp_path / "data", size=12, mode="RGB")
    words = (*NEW, *QUICK, "architecture.patch=2", "architecture.channels=[8,8]", f"data.source={tmp_path / 'data'}")
    words = (*words, "architecture.prediction=v_prediction", "forget.labels=[cow]", "train.dropout=0.3")
    out = label_runs(tmp_path / "out", *words, "train.steps=40", "train.batch_size=8", "train.lr=1e-2")
    losses = [row["remain_loss"] for row in rows(out)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    pipe = open_model(locate(out / "model", "label")).pipe
    assert (pipe.shape, pipe.patch, pipe.unet.config.in_channels) == ((3, 12, 12), 2, 12)
    (image,) = pipe([0], [image_generator(0, 0)], 2).images
    assert (image.mode, image.size) == ("RGB", (12, 12))


def test_training_is_the_plain_loop(label_runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam on the denoising loss of what remains, from the weights of the seed; the forgotten class is never seen."""
    seen: list[Any] = []
    losses = Denoiser.losses
    monkeypatch.setattr(Denoiser, "losses", lambda self, b, g: seen.append(b) or losses(self, b, g))
    words = ("method.average=0", "train.dropout=0.5", "train.steps=4", "train.batch_size=6")
    out = label_runs(tmp_path / "out", *NEW, *QUICK, *words)
    data = read_labelled(label_runs.work / "data", "train")
    known = {tuple(x.flatten().tolist()): int(k) for x, k in zip(scaled(data.pixels), data.labels, strict=True)}
    images = [known[tuple(x.flatten().tolist())] for b in seen for x in b["mean"]]
    given = [int(k) for b in seen for k in b["cond"]["label"]]
    assert set(images) == {0, 2}
    assert len(images) == 24 > len(set(given)) == 3
    assert all(b in (a, 3) for a, b in zip(images, given, strict=True))  # its own label, or the null class
    assert 4 < given.count(3) < 20
    model = micro_ddpm.wrap(micro_ddpm.model(schedule="linear", guidance=1.0))
    optimizer = torch.optim.Adam(model.net.parameters(), lr=1e-3)
    model.net.requires_grad_(True)
    for batch in seen:
        optimizer.zero_grad()
        losses(model.denoiser(), batch, torch.Generator()).mean().backward()
        optimizer.step()
    after = unet(out / "model")
    for name, p in model.net.named_parameters():
        # float32; Adam divides by the size of a gradient, which magnifies the rounding of small ones
        torch.testing.assert_close(after[name], p.detach(), rtol=1e-3, atol=1e-4)


def test_retraining_starts_from_new_weights_of_the_models_own_shape(label_runs: Runner, tmp_path: Path) -> None:
    base, out = label_runs.work / "base", label_runs(tmp_path / "out", *RETRAIN, "train.lr=1e-9", "seed=9")
    old, new = unet(base), dict(micro_ddpm.model(seed=9).unet.named_parameters())
    for name, t in unet(out / "model").items():
        torch.testing.assert_close(t, new[name].detach(), rtol=0, atol=1e-6)
        assert t.ndim == 1 or not torch.allclose(t, old[name], atol=1e-3)
    assert (out / "model/model_index.json").read_bytes() == (base / "model_index.json").read_bytes()


# --- images of models that were measured before ---------------------------------------------------


def test_images_of_the_base_and_of_a_retrained_model_are_copied(
    label_runs: Runner, label_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run of another target too: only the order of the rows is another."""
    drawn: list[str] = []
    draw = Model.generate
    monkeypatch.setattr(
        Model, "generate", lambda self, words, *a, **k: drawn.extend(words) or draw(self, words, *a, **k)
    )
    taken = [
        f"eval.{key}={label_run}/images/{name}" for key, name in (("base", "base"), ("retrained_base", "retrained"))
    ]
    words = ("forget.labels=[ant]", "train.steps=1", "eval.classifier=null", "eval.retrained={work}/retrained")
    out = label_runs(tmp_path / "out", *words, *taken)
    assert len(drawn) == 24  # of the erased model, with padding
    for name in ("base", "retrained"):
        files = [
            {(r.prompt, r.seed, r.index): (folder / r.file).read_bytes() for r in read_manifest(folder)}
            for folder in (out / "images" / name, label_run / "images" / name)
        ]
        assert files[0] == files[1]
    with pytest.raises(ValueError, match=r"eval\.retrained"):
        label_runs.job(*taken)  # of which model?
    other = Path(shutil.copytree(label_runs.work / "base", tmp_path / "other"))
    scheduler = other / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**read(scheduler), "clip_sample_range": 0.5}))
    job = label_runs.job(taken[0], f"model={other}", out=tmp_path / "scheduled")
    job.record()
    with pytest.raises(ValueError, match=r"settings\.configs\.scheduler"):
        job.measure_base()


# --- refusals -------------------------------------------------------------------------------------

REFUSED = table("""
unknown label | forget.labels=[wasp] | 'wasp'
label out of range | forget.labels=[3] | 0 ant, 1 bee, 2 cow
negative label | forget.labels=[-1] | 0 ant, 1 bee, 2 cow
unknown earlier label | forget.earlier=[dog] | 'dog'
all labels | forget.labels=[0, 1, 2] | forget.labels
label twice | forget.labels=[bee, cow, bee] | forget.labels
label twice, by number | forget.labels=[bee, 1] | forget.labels
no label | forget.labels=[] | forget.labels
training without any | method={name: retrain} ; forget.labels=[0, 1, 2] | forget.labels
unknown anchor | forget.loss=redirect ; forget.anchors=[wasp] | 'wasp'
forgotten anchor | forget.loss=redirect ; forget.anchors=[bee] | anchor
anchors do not match | forget.loss=redirect ; forget.anchors=[ant, cow] | forget.anchors
images of anchors for ascent | forget.pictures=anchor | forget.pictures
lot of forgotten classes | forget.loss=redirect ; forget.among=[ant, bee] | forget.among
lot for ascent | forget.among=far | forget.among
lot beside anchors | forget.loss=redirect ; forget.anchors=[ant] ; forget.among=[cow] | forget.among
dropout without null class | model={work}/odd/bare ; train.dropout=0.1 ; draw.guidance=1 | train.dropout
guidance without null class | model={work}/odd/bare ; train.dropout=0 ; draw.guidance=2 | draw.guidance
data with guidance | model={work}/odd/bare ; train.dropout=0 ; draw.guidance=2 ; eval.images=0 ; data=null | draw.guidance
judge of other labels | eval.classifier={work}/odd/judge | eval.classifier
missing judge | eval.classifier=fashion-clasifier | fashion-clasifier
no judge | eval.classifier={work}/odd/nothing | config.json
judge cut short | eval.classifier={work}/odd/judge cut | judge cut
too few images | eval.images=5 | eval.images
no base images | eval.base={work}/none | settings.json
retrained model of other labels | eval.retrained={work}/odd/others | others
retrained model without null class | eval.retrained={work}/odd/bare | null class
retrained model without weights | eval.retrained={work}/odd/hollow | hollow
missing retrained model | eval.retrained={work}/none | none
other classes | data.source={work}/odd/wasps | data.names
other size | data.source={work}/odd/large | data.size=8
other mode | data.source={work}/odd/colour | [3, 8, 8]
broken image | data.source={work}/odd/broken | cow/3.png
missing folder | data.source={work}/none | none
architecture of a model that is there | architecture={channels: [8]} | architecture
no architecture | model=new ; method={name: retrain} | architecture.channels
nothing to train on | model=new ; architecture={channels: [8, 16], groups: 4} ; method={name: retrain} ; data=null | data.source
retraining without data | method={name: retrain} ; data=null | data.source
some weights of a new model | method={name: retrain} ; train.parameters=down_blocks | train.parameters
groups | model=new ; architecture={channels: [8, 16], groups: 3} ; method={name: retrain} | architecture.groups
missing model | model={work}/none | none
another kind of model | model=photos-sd | photos-sd
lone unet without names | model={work}/lone | labels=4
data of other names | model={work}/lone ; labels=3 | data.names
unet without classes | model={work}/odd/plain ; data=null ; labels=3 | num_class_embeds
names of a model that has some | labels=[a, b, c] ; data=null | labels
method setting | method.lambdda=1 | method.lambd
closed form of texts | method={name: uce} | uce
negative strength | method={name: selective_amnesia, strength: -1} | strength
an image's gradients in a mask | saliency.per=image | saliency.per
dropout of a pass that is made again | train.checkpointing=true ; train.network_dropout=true | train.network_dropout
a mean over classes | method={name: bad_teacher, reduction: mean} | method.reduction
both sides mixed | method={name: random_label, order: mixed} ; forget.loss=redirect | method.order
random labels that ascend | method={name: random_label} | forget.loss
salun that ascends | method={name: salun} ; saliency.kind=magnitude | forget.loss
amnesia that ascends | method={name: selective_amnesia} | forget.loss
magnitude without density | method={name: salun} ; saliency={kind: magnitude, threshold: 1} | saliency.density
unknown parameters | train.parameters=qqqq | train.parameters
parameters of another model | train.parameters=xattn | UNet2DModel
""")  # noqa: E501


@pytest.fixture(scope="module")
def odd(label_runs: Runner) -> Path:
    """Data, models and judges that do not fit."""
    folder = label_runs.work / "odd"
    (folder / "nothing").mkdir(parents=True)
    micro_ddpm.write_images(folder / "wasps", labels=("ant", "bee", "wasp"))
    micro_ddpm.write_images(folder / "large", size=12)
    micro_ddpm.write_images(folder / "colour", mode="RGB")
    (micro_ddpm.write_images(folder / "broken") / "cow/3.png").write_bytes(b"no")
    micro_ddpm.write_classifier(folder / "judge", ("ant", "bee", "dog"))
    (folder / "judge cut").mkdir()
    for path in (label_runs.work / "judge").iterdir():
        (folder / "judge cut" / path.name).write_bytes(path.read_bytes()[:5000])
    for name, labels in (("others", ("ant", "cow", "bee")), ("bare", LABELS), ("hollow", LABELS)):
        class_conditional.save_new(micro_ddpm.model(labels), folder / name)
    DDPMPipeline(UNet2DModel(**UNET), DDPMScheduler()).save_pretrained(folder / "plain")
    config = folder / "bare/unet/config.json"
    config.write_text(json.dumps({**read(config), "num_class_embeds": 3}))
    bare, hollow = unet(folder / "bare"), unet(folder / "hollow")
    bare["class_embedding.weight"] = bare["class_embedding.weight"][:3].clone()
    del hollow["conv_in.weight"]
    for name, weights in (("bare", bare), ("hollow", hollow)):
        save_file(weights, folder / name / FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_anything(label_runs: Runner, tmp_path: Path, what: str) -> None:
    words, named = REFUSED[what]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        label_runs(tmp_path / "out", *words)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_new_model_has_no_delta(label_runs: Runner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--save delta"):
        label_runs(tmp_path / "out", *NEW, form="delta")
    assert not list(tmp_path.iterdir())
