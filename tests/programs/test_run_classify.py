"""`erase run classify` from end to end, on small networks: folders, methods, caches, resuming, refusals, comparing."""

import gc
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import launched
import micro_classify
import numpy as np
import pytest
import torch
import toys
import yaml
from micro_classify import CONVNEXT, LABELS, RESNET, SWIN, VIT
from micro_ddpm import write_images
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from erase import cli
from erase.classification import metrics, models, splits
from erase.classification.backend import logits
from erase.config import ClassifyConfig, override, parse
from erase.engine.batches import Batches
from erase.engine.saliency import load_mask
from erase.methods import list_methods
from erase.programs import saving, training
from erase.store.delta import open_delta
from erase.store.labelled import read_labelled
from erase.store.safetensors import digest, open_safetensors

FILE = "model.safetensors"
QUICK = ("eval.retrained=false", "model={work}/base")
MASKED = ("sfron", "salun")
METHODS: dict[str, tuple[str, ...]] = {
    "sfron": (),
    "finetune": ("method={name: finetune}",),
    "gradient_ascent": ("method={name: gradient_ascent, fast_rate: 1e-3}",),
    "random_label": ("method={name: random_label}",),
    "salun": ("method={name: salun}", "saliency.kind=magnitude", "train.weight_decay=0"),
    "selective_amnesia": ("method={name: selective_amnesia, strength: 10}",),
    "bad_teacher": ("method={name: bad_teacher}",),
    "scrub": ("method={name: scrub}",),
    "retrain": ("method={name: retrain}",),
}
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    found = cli.program("classify")
    gc.freeze()
    yield found
    gc.unfreeze()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and a model; not to be changed by a test, but for the cache."""
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "data/train", count=10)
    write_images(folder / "data/test", count=6, seed=1)
    models.save(micro_classify.model(seed=3), folder / "base")
    settings = {
        "pipeline": "classify",
        "model": "new",
        "architecture": RESNET,
        "data": {"source": str(folder / "data"), "validation": 0.2},
        "recipe": {"epochs": 2, "batch_size": 8, "lr": 0.05},
        "forget": {"fraction": 0.25},
        "method": {"name": "sfron", "fast_rate": 1e-2, "slow_steps": 2},
        "saliency": {"density": 0.3, "count": 4, "draws": 1, "batch_size": 4},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-2, "weight_decay": 1e-3},
        "cache": str(folder / "cache"),
    }
    (folder / "micro.yaml").write_text(yaml.safe_dump(settings))
    return folder


Configure = Callable[..., ClassifyConfig]


@pytest.fixture(scope="module")
def configure(work: Path) -> Configure:
    """A configuration with `key=value` words; `{work}` in them is the folder of `work`."""
    settings = yaml.safe_load((work / "micro.yaml").read_text())

    def make(*words: str) -> ClassifyConfig:
        words = tuple(w.replace("{work}", str(work)) for w in words)
        own = (
            [*words, "architecture=null"] if any(w.startswith("model=") and w != "model=new" for w in words) else words
        )
        return parse(override(settings, own), ClassifyConfig)

    return make


@pytest.fixture(scope="module")
def start(program: ModuleType, configure: Configure) -> Run:
    """Run in this process."""

    def start(out: Path, *words: str, resume: bool = False) -> Path:
        program.main(configure(*words), out, resume=resume, command="erase run", say=lambda line: None)
        return out

    return start


@pytest.fixture(scope="module")
def finished(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, by the command."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["erase", "run", "classify", str(work / "micro.yaml"), "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE)


def same(a: Path, b: Path) -> bool:
    """Bit for bit."""
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


class StopError(Exception):
    pass


def stop(*_: Any, **__: Any) -> None:
    raise StopError


def killed_at(step: int) -> Callable[..., None]:
    call = training.JsonlTracker.__call__

    def killed(self: Any, row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise StopError
        call(self, row)

    return killed


# --- the folder -----------------------------------------------------------------------------------


def test_a_run_leaves_the_folder_that_is_promised(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {
        *("run.json", "split.json", "metrics.jsonl", "saliency.safetensors", "model", "report.json", "report.html")
    }
    assert [row["step"] for row in rows(finished)] == [0, 1]
    assert "25 %, 6 training images" in (finished / "report.html").read_text()
    assert load_mask(finished / "saliency.safetensors").density == pytest.approx(0.3, abs=0.01)
    names = {"config.json", "preprocessor_config.json", "README.md", FILE}
    assert {p.name for p in (finished / "model").iterdir()} == names


def test_the_report_holds_the_keys_that_stay(finished: Path) -> None:
    report = read(finished / "report.json")
    assert report.keys() == {
        *("schema", "command", "method", "seed", "target", "mask", "before", "after", "retrained", "paired", "gap"),
        *("timing", "memory", "versions", "preset"),
    }
    assert report["target"] == {"forget": "25 %, 6 training images", "labels": []}
    assert report["timing"].keys() == {"saliency_s", "erase_s", "steps", "step_s"}
    for key in ("before", "after", "retrained"):
        found = report[key]["metrics"]
        assert found.keys() >= {"FA", "RA", "TA", "VA", "MIA", "MIA_V", "avg_d", "avg_d_v", "kl"}
        counts = {name: part["n"] for name, part in report[key]["classes"].items()}
        assert counts == {"forget": 6, "remain": 18, "validation": 6, "test": 18}
    assert report["paired"].keys() == {f"{name}_mcnemar_p" for name in counts}
    after, ideal = report["after"]["metrics"], report["retrained"]["metrics"]
    assert after["rte_s"] == pytest.approx(report["timing"]["saliency_s"] + report["timing"]["erase_s"])
    assert ideal["rte_s"] > 0
    assert (ideal["avg_d"], ideal["kl"]) == (0, 0)
    assert report["gap"] == {name: pytest.approx(abs(after[name] - ideal[name])) for name in ("FA", "RA", "TA", "MIA")}
    assert after["avg_d"] == pytest.approx(sum(report["gap"].values()) / 4)


def test_the_numbers_are_those_of_the_models_that_are_there(finished: Path, work: Path) -> None:
    """Counted again, by hand."""
    report = read(finished / "report.json")
    data, test = (read_labelled(work / "data", part) for part in ("train", "test"))
    split = splits.read(finished / "split.json", data)
    model = models.open_model(finished / "model")
    with torch.no_grad():
        train, other = (logits(model.net, model.prepare(d.pixels)).numpy() for d in (data, test))
    labels = data.labels.numpy()
    for name, index in (("FA", split.forget), ("RA", split.remain), ("VA", split.validation)):
        hits = train[index].argmax(1) == labels[index]
        assert report["after"]["metrics"][name] == pytest.approx(100 * hits.mean())
    assert report["after"]["metrics"]["TA"] == pytest.approx(100 * (other.argmax(1) == test.labels.numpy()).mean())
    expected = metrics.membership(train[split.forget], train[split.remain], other)
    assert report["after"]["metrics"]["MIA"] == pytest.approx(expected)


def test_run_json_tells_how_to_do_it_again(finished: Path, work: Path) -> None:
    run = read(finished / "run.json")
    assert run["command"] == f"erase run classify {work / 'micro.yaml'} --out {finished}"
    assert parse(run["config"], ClassifyConfig).forget.fraction == 0.25
    assert run["plan"]["split"] == read(finished / "split.json")["sha256"]
    assert run["data"]["sha256"] == read_labelled(work / "data", "train").digest


def test_it_learns_and_forgets(start: Run, tmp_path: Path) -> None:
    """A class that ascent is made on is gone, the others stay."""
    words = ("recipe.epochs=15", "recipe.batch_size=6", "forget={labels: [bee]}", "train.batch_size=6")
    out = start(tmp_path / "out", *words, "train.steps=30", "remain.count=all")
    report = read(out / "report.json")
    assert report["before"]["metrics"]["FA"] == report["before"]["metrics"]["TA"] == 100
    assert report["after"]["metrics"]["FA"] < 20
    assert report["after"]["metrics"]["TA"] > 90
    assert report["retrained"]["metrics"]["FA"] == 0
    assert report["target"] == {"forget": "bee, 8 training images", "labels": ["bee"]}
    assert report["after"]["classes"]["test"]["n"] == 12  # without the bees
    losses = [row["forget_loss"] for row in rows(out)]
    assert losses[-1] > 2 * losses[0]


# --- what is kept of a model ----------------------------------------------------------------------


def test_the_model_says_how_it_was_made(finished: Path, work: Path) -> None:
    """In the header of its weights and in its card; without paths of the machine."""
    meta = read_header(finished / "model")
    assert (meta["erase_method"], meta["erase_preset"]) == ("sfron", "micro")
    assert json.loads(meta["erase_settings"]) == {"name": "sfron", "fast_rate": 1e-2, "slow_steps": 2}
    assert meta["erase_train"] == "full, 2 steps, seed 0"
    assert meta["erase_split_sha256"] == read(finished / "split.json")["sha256"]
    (base,) = [p for p in (work / "cache").glob("*") if f"trained-{p.name}" == meta["erase_base"]]
    assert meta["erase_base_sha256"] == digest(weights(base / "model"))
    assert float(meta["erase_mask_density"]) == pytest.approx(0.3, abs=0.01)
    _, head, text = (finished / "model/README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (card["library_name"], card["base_model"]) == ("transformers", meta["erase_base"])
    assert {"sfron", "machine-unlearning"} <= set(card["tags"])
    assert "UNet" not in text
    assert all(key == "format" or value in text for key, value in meta.items())
    assert not any(str(path) in head + text + json.dumps(meta) for path in (work, finished))


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    """A command: exit status, and what it says on stdout and stderr."""
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["erase", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    found = capsys.readouterr()
    return int(end.value.code or 0), found.out, found.err


def read_header(folder: Path) -> dict[str, str]:
    return open_safetensors(folder / FILE)[1]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["resnet", "vit in fp16"])
def test_a_delta_rebuilds_the_model_and_its_base_bit_for_bit(
    kind: str,
    program: ModuleType,
    configure: Configure,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "base"
    models.save(micro_classify.model(VIT if kind != "resnet" else RESNET, seed=3), base)
    (base / "README.md").write_text("---\nlicense: mit\n---\nhello")
    (base / "checkpoint-1").mkdir()
    (base / "checkpoint-1/model.safetensors").touch()
    (base / "optimizer.pt").touch()
    if kind != "resnet":
        save_file({n: t.half() for n, t in weights(base).items()}, base / FILE, metadata={"format": "pt"})

    def run(form: str, base: Path, *words: str) -> Path:
        out = tmp_path / f"{form} of {base.parent.name}"
        config = configure(f"model={base}", "eval.retrained=false", *words)
        program.main(config, out, form=form, preset="mine.yaml", say=lambda line: None)
        return out

    whole, small = run("full", base), run("delta", base)
    names = {"config.json", "preprocessor_config.json", "README.md", "README.base.md", FILE}
    assert {p.name for p in (whole / "model").iterdir()} == names
    assert {n: (t.dtype, t.shape) for n, t in weights(whole / "model").items()} == {
        n: (t.dtype, t.shape) for n, t in weights(base).items()
    }
    assert {p.name for p in whole.iterdir()} ^ {p.name for p in small.iterdir()} == {"model", "delta.safetensors"}
    reports = [read(out / "report.json") for out in (whole, small)]
    assert reports[0]["after"]["classes"] == reports[1]["after"]["classes"]

    def apply(*words: object) -> tuple[int, str, str]:
        return call(capsys, monkeypatch, "apply", *words)

    delta = small / "delta.safetensors"
    assert apply(base, delta, "--out", tmp_path / "again")[0] == 0
    assert tree(tmp_path / "again") == tree(whole / "model")
    assert apply(tmp_path / "again", delta, "--undo", "--out", tmp_path / "back")[0] == 0
    back = {name: data for name, data in tree(base).items() if "/" not in name and name != "optimizer.pt"}
    assert tree(tmp_path / "back").keys() == back.keys()
    assert same(tmp_path / "back", base)
    assert (tmp_path / "back/README.md").read_bytes() == (base / "README.md").read_bytes()
    code, _, said = apply(tmp_path / "again", delta, "--out", tmp_path / "x")
    assert (code, "takes the weights of its base, base; they are erased already" in said) == (2, True)
    assert "their SHA-256 is" in apply("fashion-classifier", delta, "--out", tmp_path / "x")[2]

    twice = run("delta", whole / "model", "forget.seed=1")  # once more, on what was erased already
    apply(whole / "model", twice / "delta.safetensors", "--out", tmp_path / "two")
    apply(tmp_path / "two", twice / "delta.safetensors", "--undo", "--out", tmp_path / "one")
    assert tree(tmp_path / "one") == tree(whole / "model")

    found = json.loads(call(capsys, monkeypatch, "inspect", whole / "model")[1])
    assert (found["kind"], found["erase_method"]) == ("image classifier of transformers", "sfron")
    assert (found["labels"], found["dtype"]) == (list(LABELS), "F32" if kind == "resnet" else "F16")
    assert found["weights"] == sum(t.numel() for t in weights(base).values())
    found = json.loads(call(capsys, monkeypatch, "inspect", delta)[1])
    assert (found["kind"], found["erase_base"], found["erase_preset"]) == ("delta of erase", "base", "mine")
    assert found["base_sha256"] == digest(weights(base))


def test_the_base_of_a_delta_may_be_one_that_was_trained(
    program: ModuleType,
    configure: Configure,
    finished: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program.main(configure(), tmp_path / "out", form="delta", preset="micro", say=lambda line: None)
    delta = tmp_path / "out/delta.safetensors"
    base = work / "cache" / open_delta(delta).meta["erase_base"].removeprefix("trained-") / "model"
    assert call(capsys, monkeypatch, "apply", base, delta, "--out", tmp_path / "again")[0] == 0
    assert tree(tmp_path / "again") == tree(finished / "model")


def test_retraining_has_no_delta(program: ModuleType, configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--save delta keeps what changed, and retrain makes new weights"):
        program.main(configure("method={name: retrain}"), tmp_path / "out", form="delta")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["write_delta", "settle"])
def test_a_run_that_keeps_a_delta_goes_on(
    program: ModuleType, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def start(out: Path, resume: bool = False) -> None:
        program.main(configure(*QUICK), out, form="delta", resume=resume, say=lambda line: None)

    start(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(saving, where, stop)
        with pytest.raises(StopError):
            start(tmp_path / "out")
    assert (tmp_path / "out/model").exists()
    start(tmp_path / "out", resume=True)
    names = ("run.json", "split.json", "metrics.jsonl", "saliency.safetensors", "delta.safetensors")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*names, "report.json", "report.html"}
    one, two = (tmp_path / name / "delta.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == two.read_bytes()


# --- methods --------------------------------------------------------------------------------------


def test_every_method_is_tried() -> None:
    assert METHODS.keys() == set(list_methods()) - {"esd", "uce"}


@pytest.mark.parametrize(("name", "what"), [("esd, fast_rate: 0.1", "a diffusion model"), ("uce", "text embeddings")])
def test_methods_of_diffusion_are_refused_before_anything(start: Run, tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"needs {what}, which this program does not make"):
        start(tmp_path / "out", f"method={{name: {name}}}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(start: Run, work: Path, tmp_path: Path, name: str) -> None:
    out = start(tmp_path / "out", *QUICK, *METHODS[name])
    report = read(out / "report.json")
    before, after = weights(work / "base"), weights(out / "model")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert all(t.isfinite().all() for t in after.values())
    assert (out / "saliency.safetensors").exists() == (name in MASKED)
    assert report["method"]["name"] == name
    assert report["after"]["metrics"]["rte_s"] > 0
    if name == "retrain":
        assert not (out / "metrics.jsonl").exists()  # it is in the cache
        return
    steps = rows(out)
    assert len(steps) == 2
    assert all(("forget_loss" in row) == (name != "finetune") for row in steps)
    assert all(("remain_loss" in row) == (name != "gradient_ascent") for row in steps)
    if name == "salun":
        for key, keep in load_mask(out / "saliency.safetensors").named.items():
            assert torch.equal(before[key][~keep], after[key][~keep])


@pytest.mark.parametrize(
    "words",
    [
        ("model=new", "architecture={work}/vit.yaml"),
        ("precision=bf16",),
        ("data.shift=1", "data.flip=true"),
        ("forget.statistics=update",),
        ("forget={ids: [0, 5, 7]}",),
        ("saliency.kind=none", "method.ron=false", "method.slow_steps=1"),
        ("method={name: sfron, fast_rate: 1.0, published: true}", "saliency={threshold: 1.0, per: batch, count: 4}"),
        ("train={steps: 2, optimizer: adamw, lr: 1e-3, batch_size: 4}",),
        ("data.validation=0",),
    ],
    ids=str,
)
def test_every_setting_runs(start: Run, configure: Configure, tmp_path: Path, words: tuple[str, ...]) -> None:
    if "vit" in str(words):
        words = ("model=new", f"architecture={json.dumps(VIT)}")
        out = start(tmp_path / "out", *words)
        assert AutoModelForImageClassification.from_pretrained(out / "model").config.model_type == "vit"
        return
    out = start(tmp_path / "out", *QUICK, *words)
    metrics_ = read(out / "report.json")["after"]["metrics"]
    assert (metrics_["VA"] is None) == ("validation=0" in str(words))


def test_statistics_of_forget_passes_are_kept_unless_asked(start: Run, work: Path, tmp_path: Path) -> None:
    """Ascent alone: nothing but the setting updates them."""
    before = weights(work / "base")
    found = {}
    for how in ("batch", "running", "update"):
        words = (*METHODS["gradient_ascent"], f"forget.statistics={how}")
        found[how] = weights(start(tmp_path / how, *QUICK, *words) / "model")
        moved = [n for n in before if "running" in n and not torch.equal(before[n], found[how][n])]
        assert bool(moved) == (how == "update")
    assert not toys.same(found["batch"], found["running"])


# --- architectures --------------------------------------------------------------------------------


def test_the_preset_of_the_vit_runs_on_few_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the ResNet, a smaller network."""
    names = ("boot", "coat", "dress", "shirt")
    for seed, part in enumerate(("train", "test")):
        write_images(tmp_path / "data" / part, count=8, labels=names, size=28, seed=seed)
    small = ("hidden_size=8", "intermediate_size=16", "num_hidden_layers=1", "num_attention_heads=2")
    words = [
        *("classify_fashion_vit", f"data.source={tmp_path / 'data'}", f"cache={tmp_path / 'cache'}"),
        *(f"architecture.{word}" for word in small),
        *("recipe.epochs=1", "recipe.batch_size=8", "train.steps=2", "train.batch_size=4", "saliency.count=4"),
    ]
    whole = tmp_path / "whole"
    code, said, error = call(capsys, monkeypatch, "run", "classify", *words, "--out", whole)
    assert (code, said.splitlines()[-1]) == (0, f"report: {whole / 'report.html'}"), error
    report = read(whole / "report.json")
    assert {"before", "after", "retrained", "gap"} <= report.keys()
    assert (report["preset"], report["target"]["forget"]) == ("classify_fashion_vit", "10 %, 3 training images")
    net = AutoModelForImageClassification.from_pretrained(whole / "model")
    assert (net.config.model_type, list(net.config.id2label.values())) == ("vit", list(names))
    data = read_labelled(tmp_path / "data", "test")
    with torch.no_grad():
        theirs = net(data.pixels.float() / 127.5 - 1).logits.argmax(1)
    accuracy = 100 * float((theirs == data.labels).float().mean())
    assert report["after"]["metrics"]["TA"] == pytest.approx(accuracy)
    small_run = tmp_path / "small"
    assert call(capsys, monkeypatch, "run", "classify", *words, "--out", small_run, "--save", "delta")[0] == 0
    (base,) = [p for p in (tmp_path / "cache").glob("*/model") if p.parent.name in str(read_header(whole / "model"))]
    delta = small_run / "delta.safetensors"
    assert call(capsys, monkeypatch, "apply", base, delta, "--out", tmp_path / "again")[0] == 0
    assert tree(tmp_path / "again") == tree(whole / "model")
    assert call(capsys, monkeypatch, "run", "classify", *words, "--out", whole, "--resume")[0] == 0


@pytest.mark.parametrize("kind", micro_classify.FOREIGN)
def test_a_model_that_transformers_alone_wrote(kind: str, start: Run, tmp_path: Path) -> None:
    """Grey images are shown to a network of three channels."""
    base = micro_classify.write_foreign(kind, tmp_path / kind)
    out = start(tmp_path / "out", f"model={base}", "eval.retrained=false")
    assert {p.name for p in (out / "model").iterdir()} == {p.name for p in base.iterdir()} | {"README.md"}
    for name in ("config.json", "preprocessor_config.json"):
        assert (out / "model" / name).read_bytes() == (base / name).read_bytes()
    assert not same(out / "model", base)
    net, told = AutoModelForImageClassification.from_pretrained(out / "model", output_loading_info=True)
    assert not {*told["missing_keys"], *told["unexpected_keys"]}
    assert net.config.model_type == kind


# --- training, retraining and their cache ---------------------------------------------------------


def test_the_retrained_model_never_sees_what_is_forgotten(
    program: ModuleType, start: Run, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    data = read_labelled(work / "data", "train")
    known = {tuple(p.flatten().tolist()): i for i, p in enumerate(data.pixels)}
    draw = program.Classifier.draw

    def watched(self: Any, batch: Any, generator: torch.Generator) -> Any:
        if "other" not in batch and running:
            seen[-1].update(known[tuple(p.flatten().tolist())] for p in batch["x"])
        return draw(self, batch, generator)

    run_steps = program.run_steps
    running: list[bool] = []

    def watching(*args: Any, **settings: Any) -> Any:
        seen.append(set())
        running.append(True)
        done = run_steps(*args, **settings)
        running.clear()
        return done

    monkeypatch.setattr(program.Classifier, "draw", watched)
    monkeypatch.setattr(program, "run_steps", watching)
    out = start(tmp_path / "out", f"cache={tmp_path / 'cache'}")
    split = splits.read(out / "split.json", data)
    base, retrained, unlearned = seen
    assert base == set(split.train.tolist())
    assert retrained == set(split.remain.tolist())
    assert unlearned <= base


def test_no_model_is_trained_twice(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    run_steps = program.run_steps
    monkeypatch.setattr(program, "run_steps", lambda *a, **k: trained.append(k.get("desc", "")) or run_steps(*a, **k))
    cache = f"cache={tmp_path / 'cache'}"

    def count(name: str, *words: str) -> int:
        trained.clear()
        start(tmp_path / name, cache, *words)
        return len([desc for desc in trained if desc.startswith("training")])

    assert count("a") == 2
    assert count("b", "method.fast_rate=0.1") == 0  # another method's settings
    assert count("c", "method={name: retrain}") == 0
    assert same(
        tmp_path / "c/model", next(p for p in (tmp_path / "cache").glob("*/model") if same(p, tmp_path / "c/model"))
    )
    assert count("d", "forget.fraction=0.5") == 1  # the same base
    assert count("e", "forget.seed=1") == 2  # others are held out
    assert count("f", "recipe.seed=1") == 2
    assert count("h", "seed=1", "recipe.seed=0", "forget.seed=0") == 0  # of unlearning alone
    assert not same(tmp_path / "a/model", tmp_path / "h/model")


def test_training_that_was_killed_goes_on_to_the_same_weights(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics of batch normalisation too, and augmentation."""
    words = ("method={name: retrain}", "checkpoint_every=2", "data.shift=1", "forget.fraction=0.5")
    whole = start(tmp_path / "whole", f"cache={tmp_path / 'a'}", *words)
    with monkeypatch.context() as patch:
        patch.setattr(training.JsonlTracker, "__call__", killed_at(3))
        with pytest.raises(StopError):
            start(tmp_path / "out", f"cache={tmp_path / 'b'}", *words)
    assert list((tmp_path / "b").glob("*/state.safetensors"))
    out = start(tmp_path / "out", f"cache={tmp_path / 'b'}", *words, resume=True)
    assert same(out / "model", whole / "model")
    assert not list((tmp_path / "b").glob("*/state.safetensors"))


def test_training_with_everything(start: Run, tmp_path: Path) -> None:
    out = start(tmp_path / "out", "method={name: retrain}", "forget={}", "eval.retrained=false")
    report = read(out / "report.json")
    assert report["target"] == {"forget": "", "labels": []}
    assert report["after"]["metrics"]["FA"] is report["after"]["metrics"]["MIA"] is None
    assert report["after"]["classes"].keys() == {"remain", "validation", "test"}


def test_a_retrained_model_of_ones_own(start: Run, work: Path, tmp_path: Path) -> None:
    out = start(tmp_path / "out", "model={work}/base", "eval.retrained={work}/base")
    report = read(out / "report.json")
    assert report["before"]["metrics"]["avg_d"] == 0
    assert report["retrained"]["metrics"]["rte_s"] is None


def test_the_recipe_is_a_plain_loop(start: Run, work: Path, tmp_path: Path) -> None:
    """SGD with momentum, weight decay and a cosine, from the weights of the seed: transcribed."""
    cache = tmp_path / "cache"
    words = ("method={name: retrain}", "forget={}", "recipe={epochs: 2, batch_size: 8, lr: 0.05, weight_decay: 1e-2}")
    out = start(tmp_path / "out", f"cache={cache}", *words, "seed=4")
    data = read_labelled(work / "data", "train")
    kept = splits.make(data, validation=0.2, seed=4).remain
    net = micro_classify.model(seed=4).net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    batches = iter(Batches(data.take(kept), 8, 4))
    for step in range(6):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + np.cos(np.pi * step / 6)) / 2
        loss = torch.nn.functional.cross_entropy(net(batch["x"].float() / 127.5 - 1).logits, batch["y"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = weights(out / "model")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)  # float32


@pytest.fixture
def cached(start: Run, tmp_path: Path) -> Callable[..., Path]:
    """A run with a cache of its own, that is there already."""
    start(tmp_path / "before", f"cache={tmp_path / 'cache'}")
    return lambda name="after", *words: start(tmp_path / name, f"cache={tmp_path / 'cache'}", *words)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda p: (p / "model" / FILE).write_bytes((p / "model" / FILE).read_bytes()[:-100]),
    "other weights": lambda p: save_file(
        {n: t + 1 for n, t in weights(p / "model").items()}, p / "model" / FILE, metadata={"format": "pt"}
    ),
    "another model": lambda p: shutil.copytree(micro_saved(p), p / "model", dirs_exist_ok=True),
    "no weights": lambda p: (p / "model" / FILE).unlink(),
    "no folder": lambda p: shutil.rmtree(p / "model"),
    "another file": lambda p: (p / "model/pytorch_model.bin").touch(),
    "other pixels": lambda p: (p / "model/preprocessor_config.json").write_text("{}"),
    "another recipe": lambda p: (p / "key.json").write_text((p / "key.json").read_text().replace("cosine", "linear")),
    "a record without hashes": lambda p: (p / "trained.json").write_text('{"seconds": 1.0, "steps": 6}'),
}


def micro_saved(beside: Path) -> Path:
    models.save(micro_classify.model(seed=9), beside.parent.parent / "nine")
    return beside.parent.parent / "nine"


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_model_of_the_cache_is_not_used(cached: Callable[..., Path], tmp_path: Path, what: str) -> None:
    for number, entry in enumerate(entries(tmp_path)):
        whole = shutil.copytree(entry, tmp_path / f"kept-{number}")
        DAMAGE[what](entry)
        with pytest.raises(ValueError, match=f"{entry} does not hold what was trained there: remove it") as caught:
            cached(f"after-{number}")
        assert "\n" not in str(caught.value)
        shutil.rmtree(entry)
        if number == 0:
            shutil.copytree(whole, entry)
        if what == "another model":
            shutil.rmtree(tmp_path / "nine")
    cached()  # the second is trained again
    assert same(tmp_path / "after/model", tmp_path / "before/model")


def test_a_record_that_is_cut_short_is_one_line(cached: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("trained.json", "key.json"):
        path = entries(tmp_path)[0] / name
        text = path.read_text()
        path.write_text(text[:-5])
        with pytest.raises(ValueError, match=rf"{name}: not JSON, or cut short"):
            cached(name)
        path.write_text(text)


def test_a_model_whose_record_was_never_written_is_trained_again(cached: Callable[..., Path], tmp_path: Path) -> None:
    """Killed between the two."""
    for entry in entries(tmp_path):
        (entry / "trained.json").unlink()
        DAMAGE["other weights"](entry)
    cached()
    assert same(tmp_path / "after/model", tmp_path / "before/model")


@pytest.mark.parametrize("what", ["cut short", "other values"])
def test_damaged_predictions_of_the_cache_are_made_again(
    cached: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    for entry in entries(tmp_path):
        (path,) = entry.glob("predictions-*.safetensors")
        if what == "cut short":
            path.write_bytes(path.read_bytes()[:-50])
        else:
            tensors, meta = open_safetensors(path)
            save_file({n: -t for n, t in tensors.items()}, path, metadata=meta)
    cached()
    before, after = (read(tmp_path / name / "report.json") for name in ("before", "after"))
    for key in ("before", "retrained"):
        assert before[key]["classes"] == after[key]["classes"]


# --- stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), METHODS["scrub"], ("data.shift=1", *METHODS["salun"])], ids=str)
def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    words = (*QUICK, *words, "train.steps=5", "checkpoint_every=2")
    whole, out = start(tmp_path / "whole", *words), tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(training.JsonlTracker, "__call__", killed_at(3))
        with pytest.raises(StopError):
            start(out, *words)
    start(out, *words, resume=True)
    assert same(out / "model", whole / "model")
    assert [row["step"] for row in rows(out)] == list(range(5))
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_a_run_stopped_at_every_stage_comes_to_the_same_end(
    program: ModuleType, start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"cache={tmp_path / 'cache'}"
    whole, out = start(tmp_path / "whole", cache), tmp_path / "out"
    for number, target in enumerate(
        (
            (program.Comparison, "base", stop),
            (program, "unlearn", stop),
            (program, "equip", stop),
            (training.JsonlTracker, "__call__", killed_at(1)),
            (program.saving, "save", stop),
            (program, "make_report", stop),
            (program, "table", stop),
        )
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*target)
            with pytest.raises(StopError):
                start(out, cache, resume=number > 0)
    start(out, cache, resume=True)
    assert same(out / "model", whole / "model")
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}
    reports = [read(folder / "report.json") for folder in (out, whole)]
    for report in reports:
        assert report.pop("timing")["saliency_s"] > 1e-3  # of making the mask, not of reading it
        assert report.pop("memory")["ram_bytes"] > 1e8
        report["after"]["metrics"].pop("rte_s")
    assert reports[0] == reports[1]


def test_another_run_is_not_gone_on_with(start: Run, tmp_path: Path) -> None:
    out = start(tmp_path / "out", *QUICK)
    for other in ("train.steps=3", "forget.fraction=0.5", "forget.seed=4"):
        with pytest.raises(ValueError, match="holds a run with another config"):
            start(out, *QUICK, other, resume=True)
    with pytest.raises(ValueError, match="out is not empty"):
        start(out, *QUICK)


def test_a_split_file_is_taken_as_it_is(start: Run, finished: Path, tmp_path: Path) -> None:
    out = start(tmp_path / "out", *QUICK, "seed=7", f"forget={{split: {finished / 'split.json'}}}")
    assert (out / "split.json").read_bytes() == (finished / "split.json").read_bytes()


# --- dry runs -------------------------------------------------------------------------------------


def test_a_dry_run_tells_and_writes_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("run", "classify", work / "micro.yaml", f"cache={tmp_path / 'none'}", "--out", "here", "--dry-run")
    code, said, error = call(capsys, monkeypatch, *words)
    assert code == 0, error
    assert re.search(r"^learns: ([\d,]+) of \1 weights \(100\.0%\)$", said, re.MULTILINE)
    for what in ("mask", "steps"):
        assert re.search(rf"^memory for the {what}: [\d.]+ GB \(libraries .*activations ", said, re.MULTILINE)
    assert "data: 6 forget and 6 remain samples; 8 passes for the mask\n" in said
    assert "steps: 2 of 4 samples, 2 fast and 4 slow phases\n" in said
    assert re.search(r"^training: 24 images, 2 epochs; to be done$", said, re.MULTILINE)
    assert re.search(r"^training without 25 %, 6 training images: 18 images, 2 epochs; to be done$", said, re.MULTILINE)
    assert said.endswith(f"command: erase run classify {work / 'micro.yaml'} cache={tmp_path / 'none'} --out here\n")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_knows_what_is_trained_already(
    program: ModuleType, configure: Configure, finished: Path, work: Path
) -> None:
    said: list[str] = []
    program.main(configure(), finished.parent / "none", command="erase", say=said.append, dry_run=True)
    assert said[0].count(f"2 epochs; done, in {work / 'cache'}/") == 2
    assert "to be done" not in said[0]


@pytest.mark.parametrize(
    ("method", "architecture"),
    [*((method, RESNET) for method in METHODS), *(("sfron", other) for other in (VIT, SWIN, CONVNEXT))],
    ids=lambda x: x["model_type"] if isinstance(x, dict) else x,
)
def test_every_method_and_network_can_be_rehearsed(
    program: ModuleType, configure: Configure, tmp_path: Path, method: str, architecture: dict[str, Any]
) -> None:
    said: list[str] = []
    words = (f"architecture={json.dumps(architecture)}", *METHODS[method])
    program.main(configure(*words), tmp_path / "out", command="erase", say=said.append, dry_run=True)
    assert ("memory for the mask" in said[0]) == (method in (*MASKED, "selective_amnesia"))
    assert not list(tmp_path.iterdir())


# --- refusals -------------------------------------------------------------------------------------

BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "fraction of 1": (("forget.fraction=1",), "forget.fraction: input should be less than 1; got 1"),
    "fraction of 0": (("forget.fraction=0",), "forget.fraction: input should be greater than 0; got 0"),
    "negative fraction": (("forget.fraction=-0.1",), "forget.fraction: input should be greater than 0"),
    "nothing": (("forget={}",), "the forget set is empty: name what to forget"),
    "nothing of so few": (("forget.fraction=0.001",), "the forget set is empty"),
    "everything": (
        ("forget={labels: [ant, bee, cow]}",),
        r"the forget set \(\{\"labels\": \[0, 1, 2\]\}\) is all 30 training images but",
    ),
    "two ways": (
        ("forget.labels=[bee]", "forget.fraction=0.1"),
        "forget.fraction and forget.labels both choose what to forget",
    ),
    "unknown class": (("forget={labels: [wasp]}",), "no class 'wasp'; the model's classes are: 0 ant, 1 bee, 2 cow"),
    "class out of range": (("forget={labels: [3]}",), "no class 3"),
    "image out of range": (("forget={ids: [30]}",), "no image 30; the 30 training images are numbered 0–29"),
    "split of other data": (("forget={split: {work}/odd/split.json}",), "is a split of another data set"),
    "label count": (
        ("model=fashion-classifier",),
        "fashion-classifier has 10 classes, the data have 3: they must agree",
    ),
    "other names": (
        ("model={work}/base", "data.names=[bee, ant, cow]"),
        "the data's classes are bee, ant, cow, those of .*base are ant, bee, cow: give data.names",
    ),
    "not a number": (("model={work}/odd/nan",), "holds values that are NaN or infinite"),
    "cut short": (("model={work}/odd/cut",), "is no whole image classifier"),
    "no weights": (("model={work}/odd/bare",), "is no whole image classifier"),
    "retrained model is not a number": (
        ("model={work}/base", "eval.retrained={work}/odd/nan"),
        "holds values that are NaN or infinite",
    ),
    "no recipe": (("recipe=null",), "training and retraining need a recipe"),
    "training by another recipe": (
        ("method={name: retrain, average: 0.9}",),
        r"training goes by the recipe: leave out method\.average",
    ),
    "no steps": (("train=null",), "the setting train.steps is missing"),
    "no architecture": (("architecture=null",), "model=new needs an architecture"),
    "unknown model": (("model=nowhere",), "no model 'nowhere'"),
    "unknown method": (("method.name=sfrom",), "no method 'sfrom', did you mean sfron"),
    "out of range": (("method.outer_rate=2",), r"outer_rate must be in \[0, 1\]; got 2.0"),
    "no mask": (("saliency.density=null",), "the mask needs saliency.threshold or saliency.density"),
    "no test images": (("data.source={work}/data/train",), "has no train/ and test/ with class folders"),
    "unknown setting": (("data.flips=true",), "unknown setting data.flips; did you mean data.flip?"),
}


@pytest.fixture(scope="module")
def odd(work: Path) -> Path:
    """What cannot be used."""
    folder = work / "odd"
    other = read_labelled(write_images(folder / "other", seed=5), "train")
    splits.write(splits.make(other, validation=0.1, seed=0, fraction=0.5), folder / "split.json")
    shutil.copytree(work / "base", folder / "nan")
    broken = weights(work / "base")
    broken["classifier.1.weight"][0, 0] = float("nan")
    save_file(broken, folder / "nan" / FILE, metadata={"format": "pt"})
    shutil.copytree(work / "base", folder / "cut")
    (folder / "cut" / FILE).write_bytes((work / "base" / FILE).read_bytes()[:-10])
    shutil.copytree(work / "base", folder / "bare")
    (folder / "bare" / FILE).unlink()
    return folder


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_done_is_said_in_a_line_before_anything_is_made(
    start: Run, odd: Path, tmp_path: Path, what: str
) -> None:
    words, said = BAD[what]
    with pytest.raises(ValueError, match=said) as caught:
        start(tmp_path / "out", f"cache={tmp_path / 'cache'}", *words)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "what", ["label count", "not a number", "split of other data", "fraction of 1", "fraction of 0", "cut short"]
)
def test_the_command_says_it_in_a_line_and_exits_with_2(
    what: str,
    odd: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, said = BAD[what]
    words = tuple(word.replace("{work}", str(work)) for word in words)
    own = ("architecture=null",) if words[0].startswith("model=") else ()
    code, out, error = call(
        capsys, monkeypatch, "run", "classify", work / "micro.yaml", *words, *own, "--out", tmp_path / "out"
    )
    lines = [line for line in error.splitlines() if line.startswith("erase: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert re.search(said, lines[0])
    assert not list(tmp_path.iterdir())


def test_a_missing_scikit_learn_stops_a_run_before_it_begins(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="membership inference needs scikit-learn: pip install"):
        start(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- several processes ----------------------------------------------------------------------------


def by_two(start: Run, out: Path, *words: str) -> str:
    """A run in two processes; what both said."""
    log = out.with_name("log")
    ended = launched.two(lambda: start(out, *words), log)
    texts = [log.with_name(f"log.{rank}").read_text() for rank in range(2)]
    assert ended == [0, 0], "".join(texts)
    assert not re.search("training|saliency|unlearning|predictions", texts[1])
    return "".join(texts)


SHARED = ("forget_loss", "remain_loss", "weight_max", "forget_norm", "remain_norm")


@pytest.mark.parametrize(
    "words",
    [("data.shift=1", "data.flip=true"), (f"architecture={json.dumps(VIT)}",), METHODS["retrain"]],
    ids=["resnet", "vit", "retrain"],
)
def test_two_processes_are_one_from_training_on(start: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Trained, retrained and unlearned weights, to float32 rounding: sums run in another order.

    Without a mask: rounding moves weights at its edge in or out.
    """
    words = (*words, "saliency.kind=none")
    one, out = tmp_path / "one", tmp_path / "two"
    start(one, f"cache={tmp_path / 'cache-one'}", *words)
    assert "training" in by_two(start, out, f"cache={tmp_path / 'cache-two'}", *words)
    assert tree(out).keys() == tree(one).keys()
    caches = [{p.name: p for p in (tmp_path / f"cache-{name}").iterdir()} for name in ("one", "two")]
    assert caches[0].keys() == caches[1].keys()
    pairs = [(caches[0][name] / "model", caches[1][name] / "model") for name in caches[0]]
    for a, b in [*pairs, (one / "model", out / "model")]:  # running statistics too
        toys.close(weights(b), weights(a), rtol=1e-4, atol=1e-5)
    for key in ("before", "after", "retrained"):
        a, b = (read(folder / "report.json")[key] for folder in (out, one))
        assert a["classes"].keys() == b["classes"].keys()
        assert a["metrics"]["TA"] == pytest.approx(b["metrics"]["TA"], abs=100 / 18)  # one image at most


@pytest.mark.parametrize(
    "words",
    [(), METHODS["salun"], METHODS["scrub"], ("forget.statistics=update", *METHODS["selective_amnesia"])],
    ids=["sfron", "salun", "scrub", "selective_amnesia"],
)
def test_two_processes_are_one_of_one_base(start: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Masks and what is counted to the bit; losses and weights to rounding, which Adam magnifies."""
    words = (*QUICK, "saliency.batch_size=2", "saliency.draws=3", *words)
    one, out = start(tmp_path / "one", *words), tmp_path / "two"
    assert "unlearning" in by_two(start, out, *words)
    assert tree(out).keys() == tree(one).keys()
    if (one / "saliency.safetensors").exists():
        assert (out / "saliency.safetensors").read_bytes() == (one / "saliency.safetensors").read_bytes()
    toys.close(weights(out / "model"), weights(one / "model"), rtol=1e-4, atol=1e-5)
    for a, b in zip(rows(out), rows(one), strict=True):
        shared = [k for k in SHARED if k in b]
        assert [a[k] for k in shared] == pytest.approx([b[k] for k in shared], rel=1e-4)
    a, b = (read(folder / "report.json") for folder in (out, one))
    assert a["before"]["classes"] == b["before"]["classes"]
    assert a["before"]["metrics"] == b["before"]["metrics"]


def test_two_processes_go_on_where_they_were_killed(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a training, and in the unlearning."""
    words = ("checkpoint_every=2", "train.steps=4", "saliency.batch_size=2")

    def two(name: str, resume: bool = False) -> list[int]:
        work = lambda: start(tmp_path / name, f"cache={tmp_path / 'cache'}-{name}", *words, resume=resume)  # noqa: E731
        return launched.two(work, tmp_path / "log")

    assert two("whole") == [0, 0]
    for number, step in enumerate((5, 3)):
        with monkeypatch.context() as patch:
            patch.setattr(training.JsonlTracker, "__call__", killed_at(step))
            assert two("out", resume=number > 0) == [1, 1]
    assert two("out", resume=True) == [0, 0]
    assert same(tmp_path / "out/model", tmp_path / "whole/model")


@pytest.mark.parametrize("part", ["train", "recipe"])
def test_a_batch_that_does_not_divide_is_refused_at_once(start: Run, tmp_path: Path, part: str) -> None:
    out = tmp_path / "out"
    assert launched.two(lambda: start(out, f"{part}.batch_size=3"), tmp_path / "log") == [1, 1]
    assert f"{part}.batch_size 3 does not divide over 2 processes" in (tmp_path / "log.0").read_text()
    assert not out.exists()


# --- comparing ------------------------------------------------------------------------------------


def test_a_comparison_tells_the_table(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {
        "pipeline": "classify",
        "preset": str(work / "micro.yaml"),
        "settings": {"cache": str(tmp_path / "cache"), "train": {"steps": 1}},
        "methods": {"RT": {"method": {"name": "retrain"}}, "SFR-on": {}},
        "targets": {"random 25 %": {}, "bee": {"forget": {"fraction": None, "labels": ["bee"]}}},
        "seeds": [0, 1],
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    monkeypatch.setattr("sys.argv", ["erase", "compare", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert lines[0] == "| method | target | FA | RA | TA | MIA | avg_d | kl | rte_s | avg_d_v | rte_share | front |"
    assert lines[2].startswith("| RT | random 25 % | ")
    assert "0.000 ± 0.000" in lines[2]
    assert len(list((tmp_path / "cache").iterdir())) == 6  # a base, two retrained, of two seeds
    assert "forget accuracy, %" in (tmp_path / "out/forgetting.svg").read_text()
    results = read(tmp_path / "out/results.json")["runs"]
    assert len(results) == 8
    assert {r["avg_d"] for r in results if r["method"] == "RT"} == {0}
    assert {r["rte_share"] for r in results if r["method"] == "RT"} == {1}
    assert LABELS[1] in {r["target"] for r in results}
