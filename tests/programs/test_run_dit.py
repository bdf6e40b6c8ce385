"""`erase run ddpm` on a DiT: what its latents, transformer and names of classes ask of the program."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import micro
import micro_ddpm
import micro_dit
import pytest
import torch
import yaml
from safetensors.torch import load_file

from erase import cli
from erase.config import DdpmConfig, override, parse
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import open_model
from erase.engine.precision import Precision
from erase.engine.saliency import load_mask
from erase.evaluation.manifest import read_manifest
from erase.programs import run, training
from erase.programs.labels.data import gather
from erase.programs.labels.plan import make_plan
from erase.store import delta
from erase.store.class_names import distinct
from erase.store.labelled import read_labelled

FILE = "transformer/diffusion_pytorch_model.safetensors"
NAMES = distinct(micro_dit.LABELS)
METHODS: dict[str, tuple[str, ...]] = {
    "salun": ("method={name: salun}", "forget.loss=redirect", "saliency.kind=magnitude"),
    "gradient_ascent": ("method={name: gradient_ascent, fast_rate: 1e-3}",),
    "finetune": ("method={name: finetune}",),
    "bad_teacher": ("method={name: bad_teacher}",),
    "esd": ("method={name: esd, fast_rate: 1e-3}",),
}
Run = Callable[..., Path]


class StopError(Exception):
    pass


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a judge and labelled images; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("work")
    micro_dit.pipeline(folder).save_pretrained(folder / "base")
    micro.write_classifier(folder / "judge", micro_dit.LABELS, spread=0.5)
    micro_ddpm.write_images(folder / "data/train", 6, tuple(NAMES), micro_dit.SIZE, "RGB")
    settings = {
        "pipeline": "ddpm",
        "model": str(folder / "base"),
        "method": {"name": "sfron", "fast_rate": 1e-2},
        "saliency": {"density": 0.3, "count": 4, "draws": 1, "batch_size": 4},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "parameters": "full"},
        "forget": {"labels": ["Tinca tinca"], "count": 4},
        "draw": {"steps": 2, "batch_size": 8},
        "eval": {"images": 6, "classifier": str(folder / "judge"), "labels": ["corn", 1], "blur": False},
    }
    (folder / "micro.yaml").write_text(yaml.safe_dump(settings))
    return folder


def configure(work: Path, *words: str) -> DdpmConfig:
    return parse(override(yaml.safe_load((work / "micro.yaml").read_text()), list(words)), DdpmConfig)


@pytest.fixture(scope="module")
def start(work: Path) -> Run:
    def start(out: Path, *words: str, **options: Any) -> Path:
        run.main(configure(work, *words), out, command="erase run", say=lambda line: None, **options)
        return out

    return start


@pytest.fixture(scope="module")
def finished(start: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("runs") / "finished")


def erase(*words: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["erase", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)


def moved(model: Path, base: Path) -> set[str]:
    before, after = load_file(base / FILE), load_file(model / FILE)
    assert before.keys() == after.keys()
    assert all(tensor.isfinite().all() for tensor in after.values())
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_class_is_forgotten_on_what_the_model_generates(finished: Path, work: Path) -> None:
    """Of the classes that stay, those are judged that the settings name."""
    assert moved(finished / "model", work / "base")
    assert load_mask(finished / "saliency.safetensors").density == pytest.approx(0.3, abs=0.01)
    report = json.loads((finished / "report.json").read_text())
    assert report["target"]["forget"] == [NAMES[0]]
    for side in ("before", "after"):
        assert list(report[side]["classes"]["per_label"]) == [NAMES[0], NAMES[1], NAMES[4]]
    for name in ("base", "erased"):
        assert len(read_manifest(finished / "images" / name)) == 3 * 6
    assert open_model(locate(finished / "model", "label")).labels == NAMES


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_run(start: Run, work: Path, tmp_path: Path, name: str) -> None:
    out = start(tmp_path / "out", *METHODS[name], "eval.images=0")
    assert moved(out / "model", work / "base")


def test_adaptive_layer_norms_alone_may_learn(start: Run, work: Path, tmp_path: Path) -> None:
    words = ("train.parameters=adaln", "train.checkpointing=true", "eval.images=0")
    out = start(tmp_path / "out", *words)
    assert all(".norm1." in name or name.startswith("proj_out_1.") for name in moved(out / "model", work / "base"))
    with pytest.raises(ValueError, match=r"train\.parameters 'xattn' matches no parameter .* allowed: full, adaln"):
        start(tmp_path / "other", "train.parameters=xattn")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("forget.labels=crane",), r"several classes are called 'crane': 1 crane \(1\), 3 crane \(3\); give a number"),
        (("forget.labels=[tench, 0]",), "names a class twice"),
        (("eval.labels=[tench]",), "eval.labels has only forgotten classes"),
        (("method={name: uce}",), "uce needs text embeddings"),
    ],
)
def test_what_cannot_work_is_refused(start: Run, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        start(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_delta_rebuilds_it_and_its_base(start: Run, finished: Path, work: Path, tmp_path: Path) -> None:
    out = start(tmp_path / "out", form="delta")
    change, base = delta.open_delta(out / "delta.safetensors"), load_file(work / "base" / FILE)
    erased = load_file(finished / "model" / FILE)
    for made, expected in ((delta.apply(change, base), erased), (delta.apply(change, erased, undo=True), base)):
        assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())


def test_images_of_ones_own_are_encoded(work: Path, tmp_path: Path) -> None:
    """By batches; mean and standard deviation of their latents, on both sides."""
    words = (f"data.source={work / 'data'}", f"data.names={json.dumps(NAMES)}", "draw.batch_size=4")
    config = configure(work, *words, "forget.loss=redirect", "forget.pictures=both", "remain.share=near")
    data = read_labelled(work / "data", "train", names=NAMES)
    model = open_model(locate(work / "base"))
    plan = make_plan(config, model, data, False)
    forget, remain = gather(config, plan, model, Precision("no", torch.device("cpu")), False)
    assert forget is not None
    for side in (forget, remain):
        assert side.std is not None
        assert side.std.shape == side.mean.shape == (len(side), 4, micro_dit.LATENT, micro_dit.LATENT)
        assert (side.std > 0).all()
    assert len(forget) == 8


def test_a_stopped_run_is_resumed(start: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before its second step."""
    track, seen = training.JsonlTracker.__call__, []

    def stopped(self: Any, *args: Any) -> None:
        track(self, *args)
        seen.append(args)
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(training.JsonlTracker, "__call__", stopped)
        with pytest.raises(StopError):
            start(tmp_path / "out", "checkpoint_every=1")
    assert len(seen) == 1
    start(tmp_path / "out", "checkpoint_every=1", resume=True)
    one, two = (load_file(out / "model" / FILE) for out in (finished, tmp_path / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_images_of_labels_are_generated(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By any of a class's names or its number, at the model's own guidance."""
    rows = "prompt,seed,guidance\n" + "".join(f"{name},3,{scale}\n" for name, scale in (("tench", ""), ("0", 4)))
    (tmp_path / "rows.csv").write_text(rows)
    assert erase("generate", work / "base", tmp_path / "rows.csv", "--out", tmp_path / "out", "--steps", 2) == 0
    one, two = read_manifest(tmp_path / "out")
    assert one.sha256 == two.sha256
    for row, said in (("crane,", "row 1: several classes"), ("corn,32", "row 1: its size is 32×16")):
        (tmp_path / "bad.csv").write_text(f"prompt,width\n{row}\n")
        assert erase("generate", work / "base", tmp_path / "bad.csv", "--out", tmp_path / "bad") > 0
        assert said in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()
