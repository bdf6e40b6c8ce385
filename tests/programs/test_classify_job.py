"""What a classifier adds to a run: what is forgotten, recipes, the cache of trained models, the field's table."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import launched
import micro_classify
import numpy as np
import pytest
import torch
import toys
import yaml
from jobs import Runner, StopError, changed, read, rows, stop, table
from micro_classify import CONVNEXT, LABELS, RESNET, VIT
from micro_ddpm import write_images
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from erase import cli
from erase.classification import metrics, models, splits
from erase.classification.backend import logits
from erase.config import ClassifyConfig, parse, read_preset
from erase.engine import distributed
from erase.engine.batches import Batches
from erase.programs import run, training
from erase.programs.classify import trained
from erase.programs.classify.predictions import kept_logits
from erase.programs.classify.report import summarise
from erase.resources import preset_path
from erase.store import files
from erase.store.labelled import read_labelled
from erase.store.safetensors import digest, open_safetensors

FILE = "model.safetensors"
BASE = ("model={work}/base",)
QUICK = (*BASE, "eval.retrained=false")
RETRAIN = "method={name: retrain}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE)


# --- the report -----------------------------------------------------------------------------------


def test_the_report_holds_the_keys_that_stay(classify_run: Path) -> None:
    assert {p.name for p in classify_run.iterdir()} == {
        *("run.json", "split.json", "metrics.jsonl", "saliency.safetensors", "model", "report.json", "report.html")
    }
    assert "25 %, 6 training images" in (classify_run / "report.html").read_text()
    report = read(classify_run / "report.json")
    assert report.keys() == {
        *("schema", "command", "method", "seed", "target", "mask", "before", "after", "retrained", "paired", "gap"),
        *("timing", "memory", "versions", "preset"),
    }
    assert report["target"] == {"forget": "25 %, 6 training images", "labels": []}
    assert report["timing"].keys() == {"data_s", "saliency_s", "erase_s", "steps", "step_s"}
    counts = {"forget": 6, "remain": 18, "validation": 6, "test": 18}
    for key in ("before", "after", "retrained"):
        assert report[key]["metrics"].keys() >= {"FA", "RA", "TA", "VA", "MIA", "MIA_V", "MIA_SVC", "avg_d", "kl"}
        assert {name: part["n"] for name, part in report[key]["classes"].items()} == counts
    assert report["paired"].keys() == {f"{name}_mcnemar_p" for name in counts}
    after, ideal = report["after"]["metrics"], report["retrained"]["metrics"]
    assert after["rte_s"] == pytest.approx(report["timing"]["saliency_s"] + report["timing"]["erase_s"])
    assert (ideal["rte_s"] > 0, ideal["avg_d"], ideal["kl"]) == (True, 0, 0)
    assert report["gap"] == {name: pytest.approx(abs(after[name] - ideal[name])) for name in ("FA", "RA", "TA", "MIA")}
    assert after["avg_d"] == pytest.approx(sum(report["gap"].values()) / 4)
    summary = summarise(report)
    assert list(summary) == ["FA", "RA", "TA", "MIA", "MIA_SVC", "avg_d", "kl", "rte_s", "avg_d_v", "rte_share"]
    assert summary["rte_share"] == after["rte_s"] / ideal["rte_s"]


def test_the_numbers_are_those_of_the_models_that_are_there(classify_run: Path, classify_runs: Runner) -> None:
    """Counted again, by hand."""
    found = read(classify_run / "report.json")["after"]["metrics"]
    data, test = (read_labelled(classify_runs.work / "data", part) for part in ("train", "test"))
    split, model = splits.read(classify_run / "split.json", data), models.open_model(classify_run / "model")
    with torch.no_grad():
        train, other = (logits(model.net, model.prepare(d.pixels)).numpy() for d in (data, test))
    labels = data.labels.numpy()
    for name, index in (("FA", split.forget), ("RA", split.remain), ("VA", split.validation)):
        assert found[name] == pytest.approx(100 * (train[index].argmax(1) == labels[index]).mean())
    assert found["TA"] == pytest.approx(100 * (other.argmax(1) == test.labels.numpy()).mean())
    parts = [(train[i], data.labels[i].numpy()) for i in (split.forget, split.remain)]
    assert found["MIA_SVC"] == pytest.approx(metrics.membership_svc(*parts, (other, test.labels.numpy()), seed=0))
    assert found["MIA"] == pytest.approx(metrics.membership(train[split.forget], train[split.remain], other))


def test_run_json_and_the_model_say_how_it_was_made(classify_run: Path, classify_runs: Runner) -> None:
    """In the header of its weights and in its card; without paths of the machine."""
    run, work = read(classify_run / "run.json"), classify_runs.work
    assert parse(run["config"], ClassifyConfig).forget.fraction == 0.25
    assert run["plan"]["split"] == read(classify_run / "split.json")["sha256"]
    assert run["data"]["sha256"] == read_labelled(work / "data", "train").digest
    meta = open_safetensors(classify_run / "model" / FILE)[1]
    assert (meta["erase_method"], meta["erase_preset"]) == ("sfron", "micro")
    assert json.loads(meta["erase_settings"]) == {"name": "sfron", "fast_rate": 1e-2, "slow_steps": 2}
    assert meta["erase_train"] == "full, 2 steps, seed 0"
    assert meta["erase_split_sha256"] == run["plan"]["split"]
    base = work / "cache" / meta["erase_base"].removeprefix("trained-") / "model"
    assert meta["erase_base_sha256"] == digest(weights(base))
    assert float(meta["erase_mask_density"]) == pytest.approx(0.3, abs=0.01)
    _, head, text = (classify_run / "model/README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (card["library_name"], card["base_model"]) == ("transformers", meta["erase_base"])
    assert {"sfron", "machine-unlearning"} <= set(card["tags"])
    assert "UNet" not in text
    assert all(key == "format" or value in text for key, value in meta.items())
    assert not any(str(path) in head + text + json.dumps(meta) for path in (work, classify_run))


def test_it_learns_and_forgets(classify_runs: Runner, tmp_path: Path) -> None:
    """A class that ascent is made on is gone, the others stay."""
    words = ("recipe.epochs=15", "recipe.batch_size=6", "forget={labels: [bee]}", "train.batch_size=6")
    out = classify_runs(tmp_path / "out", *words, "train.steps=30", "remain.count=all")
    report = read(out / "report.json")
    assert report["before"]["metrics"]["FA"] == report["before"]["metrics"]["TA"] == 100
    assert report["after"]["metrics"]["FA"] < 20
    assert report["after"]["metrics"]["TA"] > 90
    assert report["retrained"]["metrics"]["FA"] == 0
    assert report["target"] == {"forget": "bee, 10 training images", "labels": ["bee"]}
    assert report["after"]["classes"]["test"]["n"] == 12  # without the bees
    losses = [row["forget_loss"] for row in rows(out)]
    assert losses[-1] > 2 * losses[0]


def test_a_comparison_has_the_fields_table(
    classify_runs: Runner, classify_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retraining is its own ideal; models are trained once for all runs."""
    spec = {
        "pipeline": "classify",
        "preset": str(classify_runs.preset),
        "settings": {"train": {"steps": 1}},
        "methods": {"RT": {"method": {"name": "retrain"}}, "SFR-on": {}},
        "targets": {"random 25 %": {}},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    monkeypatch.setattr("sys.argv", ["erase", "compare", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(trained, "run_steps", stop)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    header, _, ideal, *_ = (tmp_path / "out/table.md").read_text().splitlines()
    assert (
        header
        == "| method | target | FA | RA | TA | MIA | MIA_SVC | avg_d | kl | rte_s | avg_d_v | rte_share | front |"
    )
    assert ideal.startswith("| RT | random 25 % | ")
    first, second = read(tmp_path / "out/results.json")["runs"]
    assert (first["avg_d"], first["rte_share"]) == (0, 1)
    assert second["avg_d"] == pytest.approx(sum(abs(second[k] - first[k]) for k in ("FA", "RA", "TA", "MIA")) / 4)
    assert "Forget accuracy, %" in (tmp_path / "out/forgetting.svg").read_text()
    page = (tmp_path / "out/index.html").read_text()
    assert all(f"runs/{method}/random-25--/0/report.html" in page for method in ("rt", "sfr-on"))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("precision=bf16", "data.shift=1", "data.flip=true", "forget={ids: [0, 5, 7]}", "data.validation=0"),
        ("saliency={threshold: 1.0, per: batch, count: 4}", "method={name: sfron, fast_rate: 1.0, published: true}"),
        (
            "saliency.kind=none",
            "method={name: sfron, fast_rate: 0.1, ron: false}",
            "train={steps: 2, optimizer: adamw, lr: 1e-3, batch_size: 4}",
        ),
        ("method={name: salun, order: mixed}", "saliency={kind: magnitude, density: 0.5}", "forget.relabel=any"),
    ],
    ids=["data", "published", "train", "mixed"],
)
def test_settings_run(classify_runs: Runner, tmp_path: Path, words: tuple[str, ...]) -> None:
    out = classify_runs(tmp_path / "out", *QUICK, *words)
    assert changed(weights(classify_runs.work / "base"), weights(out / "model"))
    found = read(out / "report.json")["after"]["metrics"]
    assert (found["VA"] is None) == ("data.validation=0" in words)


def test_statistics_of_forget_passes_are_kept_unless_asked(classify_runs: Runner, tmp_path: Path) -> None:
    """Ascent alone: nothing but the setting updates them."""
    before, found = weights(classify_runs.work / "base"), {}
    for how in ("batch", "running", "update"):
        words = ("method={name: gradient_ascent, fast_rate: 1e-3}", f"forget.statistics={how}")
        found[how] = weights(classify_runs(tmp_path / how, *QUICK, *words) / "model")
        assert any("running" in name for name in changed(before, found[how])) == (how == "update")
    assert not toys.same(found["batch"], found["running"])


def test_a_split_file_is_taken_as_it_is(classify_runs: Runner, classify_run: Path) -> None:
    ours = classify_runs.job(*QUICK, "seed=7", f"forget={{split: {classify_run / 'split.json'}}}").plan.split
    assert ours.digest == read(classify_run / "split.json")["sha256"]


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_a_model_that_transformers_alone_wrote(kind: str, classify_runs: Runner, tmp_path: Path) -> None:
    """Grey images are shown to a network of three channels."""
    base = micro_classify.write_foreign(kind, tmp_path / kind)
    out = classify_runs(tmp_path / "out", f"model={base}", "eval.retrained=false")
    assert {p.name for p in (out / "model").iterdir()} == {p.name for p in base.iterdir()} | {"README.md"}
    for name in ("config.json", "preprocessor_config.json"):
        assert (out / "model" / name).read_bytes() == (base / name).read_bytes()
    assert changed(weights(base), weights(out / "model"))
    net, told = AutoModelForImageClassification.from_pretrained(out / "model", output_loading_info=True)
    assert not {*told["missing_keys"], *told["unexpected_keys"]}
    assert net.config.model_type == kind


def test_a_class_is_sought_in_data_that_the_model_knows(classify_runs: Runner, tmp_path: Path) -> None:
    """Where the preset's own data are not the model's, that is what is said, not which classes those have."""
    others = write_images(tmp_path / "others", labels=("a", "b", "c", "d"))
    words = (*QUICK, "forget={labels: [be]}")
    with pytest.raises(ValueError, match=r"data\.source") as caught:
        classify_runs.job(*words, f"data.source={others}")
    assert "'be'" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'be'.*did you mean 'bee'.*: 0 ant, 1 bee, 2 cow$"):
        classify_runs.job(*words)


def test_the_preset_of_the_vit_runs_on_few_images(tmp_path: Path) -> None:
    """The settings of the ResNet, a smaller network; the saved model is `transformers`'."""
    names = ("boot", "coat", "dress", "shirt")
    for seed, part in enumerate(("train", "test")):
        write_images(tmp_path / "data" / part, count=8, labels=names, size=28, seed=seed)
    preset = tmp_path / "vit.yaml"
    preset.write_text(yaml.safe_dump(read_preset(preset_path("classify_fashion_vit"))))
    small = ("hidden_size=8", "intermediate_size=16", "num_hidden_layers=1", "num_attention_heads=2")
    words = (
        *("data.source={work}/data", "cache={work}/cache", *(f"architecture.{word}" for word in small)),
        *("recipe.epochs=1", "recipe.batch_size=8", "train.steps=2", "train.batch_size=4", "saliency.count=4"),
    )
    out = Runner(preset, tmp_path)(tmp_path / "out", *words)
    report = read(out / "report.json")
    assert {"before", "after", "retrained", "gap"} <= report.keys()
    assert report["target"]["forget"] == "10 %, 3 training images"
    net = AutoModelForImageClassification.from_pretrained(out / "model")
    assert (net.config.model_type, list(net.config.id2label.values())) == ("vit", list(names))
    data = read_labelled(tmp_path / "data", "test")
    with torch.no_grad():
        theirs = net(data.pixels.float() / 127.5 - 1).logits.argmax(1)
    assert report["after"]["metrics"]["TA"] == pytest.approx(100 * float((theirs == data.labels).float().mean()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_neutral_preset_forgets_a_class_of_any_classifier(kind: str, tmp_path: Path) -> None:
    """Of a folder with a subfolder for each class, without parts; its own steps, on few images."""
    write_images(tmp_path / "images", count=6)
    base = micro_classify.write_foreign(kind, tmp_path / "mine")
    words = ("model={work}/mine", "data.source={work}/images", "forget.labels=[bee]", "precision=no")
    out = Runner(preset_path("classify_sfron"), tmp_path)(tmp_path / "out", *words)
    assert changed(weights(base), weights(out / "model"))
    report = read(out / "report.json")
    assert report["target"]["labels"] == ["bee"]
    assert "retrained" not in report
    before, after = (report[when]["metrics"]["FA"] for when in ("before", "after"))
    assert after <= before


# --- training and its cache -----------------------------------------------------------------------


def test_the_recipe_is_a_plain_loop(classify_runs: Runner, tmp_path: Path) -> None:
    """SGD with momentum, weight decay and a cosine, from the weights of the seed, on what remains: transcribed."""
    words = (RETRAIN, "recipe={epochs: 2, batch_size: 8, lr: 0.05, weight_decay: 1e-2}", "seed=4")
    out = classify_runs(tmp_path / "out", f"cache={tmp_path / 'cache'}", *words)
    assert not (out / "metrics.jsonl").exists()  # it is in the cache
    data = read_labelled(classify_runs.work / "data", "train")
    split = splits.read(out / "split.json", data)
    assert not {*split.remain.tolist()} & {*split.forget.tolist()}
    net = micro_classify.model(seed=4).net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    batches = iter(Batches(data.take(split.remain), 8, 4))
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


def entries(runs: Runner, *words: str) -> dict[str, Path]:
    """Where the cache keeps the models of a run."""
    compared = runs.job(*words).compared
    return {name: compared.entry(index)[0] for name, (_, index) in compared.training().items()}


@pytest.mark.slow
def test_a_model_is_trained_once_for_all_that_it_is_made_of(
    classify_runs: Runner, classify_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = entries(classify_runs)
    for words in (
        ("method.fast_rate=0.1",),  # another method's settings
        (RETRAIN,),
        ("seed=1", "recipe.seed=0", "forget.seed=0"),  # of unlearning alone
    ):
        assert entries(classify_runs, *words) == first
    half = entries(classify_runs, "forget.fraction=0.5")
    assert (half["base"], half["retrained"] != first["retrained"]) == (first["base"], True)
    for word in ("forget.seed=1", "recipe.seed=1", "recipe.epochs=3", "data.flip=true", "precision=bf16"):
        assert not {*entries(classify_runs, word).values()} & {*first.values()}, word
    assert entries(classify_runs, *BASE).keys() == {"retrained"}
    assert entries(classify_runs, *QUICK) == {}
    monkeypatch.setattr(trained, "run_steps", stop)
    out = classify_runs(tmp_path / "out", RETRAIN)
    assert toys.same(weights(out / "model"), weights(first["retrained"] / "model"))
    said: list[str] = []
    classify_runs(tmp_path / "none", say=said.append, dry_run=True)
    assert all(str(entry) in said[0] for entry in first.values())
    classify_runs(tmp_path / "none", f"cache={tmp_path / 'none'}", say=said.append, dry_run=True)
    assert str(tmp_path / "none") not in said[1].partition("command")[0]  # to be done
    assert not (tmp_path / "none").exists()


def test_training_that_was_killed_resumes_to_the_same_weights(
    classify_runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics of batch normalisation too, and augmentation."""
    words = (RETRAIN, "checkpoint_every=2", "data.shift=1", "forget.fraction=0.5")
    whole = classify_runs(tmp_path / "whole", f"cache={tmp_path / 'a'}", *words)
    call = training.JsonlTracker.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            training.JsonlTracker, "__call__", lambda self, row: stop() if row["step"] == 3 else call(self, row)
        )
        with pytest.raises(StopError):
            classify_runs(tmp_path / "out", f"cache={tmp_path / 'b'}", *words)
    assert list((tmp_path / "b").glob("*/state.safetensors"))
    out = classify_runs(tmp_path / "out", f"cache={tmp_path / 'b'}", *words, resume=True)
    assert toys.same(weights(out / "model"), weights(whole / "model"))
    assert not list((tmp_path / "b").glob("*/state.safetensors"))


def test_training_with_everything(classify_runs: Runner, tmp_path: Path) -> None:
    report = read(classify_runs(tmp_path / "out", RETRAIN, "forget={}", "eval.retrained=false") / "report.json")
    assert report["target"] == {"forget": "", "labels": []}
    assert report["after"]["metrics"]["FA"] is report["after"]["metrics"]["MIA"] is None
    assert report["after"]["classes"].keys() == {"remain", "validation", "test"}


def test_a_retrained_model_of_ones_own(classify_runs: Runner, tmp_path: Path) -> None:
    report = read(classify_runs(tmp_path / "out", *BASE, "eval.retrained={work}/base") / "report.json")
    assert report["before"]["metrics"]["avg_d"] == 0
    assert report["retrained"]["metrics"]["rte_s"] is None


def add_one(entry: Path) -> None:
    more = {name: t + 1 for name, t in weights(entry / "model").items()}
    save_file(more, entry / "model" / FILE, metadata={"format": "pt"})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda p: (p / "model" / FILE).write_bytes((p / "model" / FILE).read_bytes()[:-100]),
    "other weights": add_one,
    "no weights": lambda p: (p / "model" / FILE).unlink(),
    "no folder": lambda p: shutil.rmtree(p / "model"),
    "another file": lambda p: (p / "model/pytorch_model.bin").touch(),
    "other pixels": lambda p: (p / "model/preprocessor_config.json").write_text("{}"),
    "another recipe": lambda p: (p / "key.json").write_text((p / "key.json").read_text().replace("cosine", "linear")),
    "a record without hashes": lambda p: (p / "trained.json").write_text('{"seconds": 1.0, "steps": 6}'),
    "a record cut short": lambda p: (p / "trained.json").write_text('{"seconds": 1.0'),
    "a key cut short": lambda p: (p / "key.json").write_text('{"code": '),
}


@pytest.fixture
def entry(classify_runs: Runner, classify_run: Path, tmp_path: Path) -> Path:
    """A copy of a trained model's place in the cache."""
    return Path(shutil.copytree(entries(classify_runs)["base"], tmp_path / "entry"))


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_model_of_the_cache_is_not_used(entry: Path, what: str) -> None:
    made_of = read(entry / "key.json")
    assert trained.kept(entry, made_of) == read(entry / "trained.json")
    DAMAGE[what](entry)
    with pytest.raises(ValueError, match=str(entry)) as caught:
        trained.kept(entry, made_of)
    assert "\n" not in str(caught.value)


def test_a_model_whose_record_was_never_written_is_trained_again(
    classify_runs: Runner, classify_run: Path, tmp_path: Path
) -> None:
    """Killed between the two."""
    cache = Path(shutil.copytree(classify_runs.work / "cache", tmp_path / "cache"))
    for path in entries(classify_runs).values():
        (cache / path.name / "trained.json").unlink()
        add_one(cache / path.name)
    out = classify_runs(tmp_path / "out", f"cache={cache}")
    assert toys.same(weights(out / "model"), weights(classify_run / "model"))


def test_a_model_that_another_process_trains_is_waited_for(
    classify_runs: Runner, classify_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process's lock holds against others alone: this one has it, and the run is a process of its own."""
    cache, at_work = tmp_path / "cache", entries(classify_runs)["base"].name
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:  # the training has ended
            shutil.copytree(classify_runs.work / "cache", cache, dirs_exist_ok=True)

    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setattr(trained, "run_steps", stop)

    def work() -> None:
        classify_runs(tmp_path / "out", f"cache={cache}", say=print)
        assert len(waited) == 3

    with files.claim(cache / trained.LOCK, at_work) as mine:
        assert mine
        assert launched.two(work, tmp_path / "log", 1) == [0], (tmp_path / "log.0").read_text()
    assert (tmp_path / "log.0").read_text().count("waiting") == 1
    assert toys.same(weights(tmp_path / "out/model"), weights(classify_run / "model"))


def test_the_lock_on_a_model_is_kept_until_it_is_trained(
    classify_runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, at_work = tmp_path / "cache", entries(classify_runs)["base"].name

    def ask() -> None:
        with files.claim(cache / trained.LOCK, at_work) as mine:
            print(mine)

    def train(*_: Any, **__: Any) -> None:
        assert launched.two(ask, tmp_path / "during", 1) == [0]
        raise StopError

    monkeypatch.setattr(trained, "run_steps", train)
    with pytest.raises(StopError):
        classify_runs(tmp_path / "out", f"cache={cache}")
    assert launched.two(ask, tmp_path / "after", 1) == [0]
    assert [(tmp_path / f"{when}.0").read_text() for when in ("during", "after")] == ["False\n", "True\n"]


def test_damaged_predictions_of_the_cache_are_made_again(entry: Path) -> None:
    (path,) = entry.glob("predictions-*.safetensors")
    tensors, header = open_safetensors(path)
    meta = {key: value for key, value in header.items() if key != "sha256"}
    found = kept_logits(path, meta)
    assert found is not None
    assert toys.same(found, tensors)
    assert kept_logits(path, {**meta, "data": "another"}) is None
    save_file({name: -t for name, t in tensors.items()}, path, metadata=header)
    assert kept_logits(path, meta) is None
    path.write_bytes(path.read_bytes()[:-50])
    assert kept_logits(path, meta) is None


@pytest.mark.parametrize("architecture", [VIT, CONVNEXT], ids=lambda x: x["model_type"])
def test_every_network_can_be_rehearsed(classify_runs: Runner, tmp_path: Path, architecture: dict[str, Any]) -> None:
    said: list[str] = []
    words = (f"architecture={json.dumps(architecture)}", f"cache={tmp_path / 'cache'}")
    classify_runs(tmp_path / "out", *words, say=said.append, dry_run=True)
    assert "memory for the mask" in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("data.shift=1", "data.flip=true"), (f"architecture={json.dumps(VIT)}",), (RETRAIN,)],
    ids=["resnet", "vit", "retrain"],
)
def test_two_processes_are_one_from_training_on(classify_runs: Runner, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Trained, retrained and unlearned weights, to float32 rounding: sums run in another order.

    Without a mask: rounding moves weights at its edge in or out.
    """
    words = (*words, "saliency.kind=none")
    one = classify_runs(tmp_path / "one", f"cache={tmp_path / 'cache-one'}", *words)
    out, cache = tmp_path / "two", f"cache={tmp_path / 'cache-two'}"
    ended = launched.two(lambda: classify_runs(out, cache, *words), tmp_path / "log")
    assert ended == [0, 0], (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    assert {p.name for p in out.iterdir()} == {p.name for p in one.iterdir()}
    caches = [{p.name: p for p in (tmp_path / f"cache-{name}").glob("*/")} for name in ("one", "two")]
    assert caches[0].keys() == caches[1].keys()
    pairs = [(caches[0][name] / "model", caches[1][name] / "model") for name in caches[0]]
    for a, b in [*pairs, (one / "model", out / "model")]:  # running statistics too
        toys.close(weights(b), weights(a), rtol=1e-4, atol=1e-5)
    a, b = (read(folder / "report.json")["after"]["metrics"]["TA"] for folder in (out, one))
    assert a == pytest.approx(b, abs=100 / 18)  # one image at most


# --- refusals -------------------------------------------------------------------------------------

REFUSED = table("""
fraction of 1 | forget.fraction=1 | forget.fraction
fraction of 0 | forget.fraction=0 | forget.fraction
nothing | forget={} | forget.fraction
nothing of so few | forget.fraction=0.001 | forget set
everything | forget={labels: [ant, bee, cow]} | 30
two ways | forget.labels=[bee] ; forget.fraction=0.1 | forget.labels
unknown class | forget={labels: [wasp]} | 'wasp'
class out of range | forget={labels: [3]} | 0 ant, 1 bee, 2 cow
image out of range | forget={ids: [30]} | 0–29
split of other data | forget={split: '{work}/odd/split.json'} | split.json
label count | model=fashion-classifier | fashion-classifier
other names | model={work}/base ; data.source={work}/odd/wasps | data.names
not a number | model={work}/odd/nan | NaN
cut short | model={work}/odd/cut | odd/cut
no weights | model={work}/odd/bare | odd/bare
retrained model is not a number | eval.retrained={work}/odd/nan | NaN
no recipe | recipe=null | recipe
training by another recipe | method={name: retrain, average: 0.9} | method.average
no steps | train=null | train.steps
no architecture | architecture=null | architecture
architecture of a model that is there | model={work}/base ; architecture={model_type: resnet} | architecture
unknown model | model=nowhere | 'nowhere'
unknown method | method.name=sfrom | sfron
out of range | method.outer_rate=2 | outer_rate
diffusion model | method={name: esd, fast_rate: 0.1} | esd
text embeddings | method={name: uce} | uce
images without timesteps | method={name: selective_amnesia} ; saliency.per=image | saliency.per
a weight in a mixed mean | method={name: random_label, order: mixed, fast_rate: 2} | fast_rate
no mask | saliency.density=null | saliency.density
no training images | data.source={work}/odd/test alone | train/
mixed sizes | data.source={work}/odd/mixed | data.size
unknown setting | data.flips=true | data.flip
""")


@pytest.fixture(scope="module")
def odd(classify_runs: Runner) -> Path:
    """What cannot be used."""
    work, folder = classify_runs.work, classify_runs.work / "odd"
    other = read_labelled(write_images(folder / "other", seed=5), "train")
    splits.write(splits.make(other, validation=0.1, seed=0, fraction=0.5), folder / "split.json")
    write_images(folder / "wasps", labels=("ant", "bee", "wasp"))
    write_images(folder / "test alone/test")
    (write_images(folder / "mixed") / "ant/0.png").write_bytes(
        (write_images(folder / "large", size=12) / "ant/0.png").read_bytes()
    )
    for name in ("nan", "cut", "bare"):
        shutil.copytree(work / "base", folder / name)
    broken = weights(work / "base")
    broken["classifier.1.weight"][0, 0] = float("nan")
    save_file(broken, folder / "nan" / FILE, metadata={"format": "pt"})
    (folder / "cut" / FILE).write_bytes((work / "base" / FILE).read_bytes()[:-10])
    (folder / "bare" / FILE).unlink()
    return folder


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_anything(classify_runs: Runner, tmp_path: Path, what: str) -> None:
    words, named = REFUSED[what]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        classify_runs(tmp_path / "out", f"cache={tmp_path / 'cache'}", *words)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_a_machine_lacks_is_said_before_a_run_begins(
    classify_runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scikit-learn; processes that batches divide over; a form for retrained weights to be kept in."""
    with pytest.raises(ValueError, match="--save delta"):
        classify_runs(tmp_path / "out", RETRAIN, form="delta")
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="scikit-learn"):
            classify_runs(tmp_path / "out")
    monkeypatch.setattr(distributed, "world", lambda: 2)
    for part in ("train", "recipe"):
        with pytest.raises(ValueError, match=rf"{part}\.batch_size"):
            classify_runs(tmp_path / "out", f"{part}.batch_size=3")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_test_part_is_split_by_its_own_seed(classify_runs: Runner) -> None:
    said: list[str] = []
    setting = classify_runs.setting("data.source={work}/data/train", "data.test=0.3", "data.seed=4", "seed=9")
    plan = run.job_of("classify")(replace(setting, say=said.append)).plan
    assert (len(plan.data), torch.bincount(plan.test.labels).tolist()) == (21, [3, 3, 3])
    assert any("data.seed=4" in line for line in said)
    again = classify_runs.job("data.source={work}/data/train", "data.test=0.3", "data.seed=4").plan
    assert again.test.digest == plan.test.digest
    assert not {p.tobytes() for p in plan.data.pixels.numpy()} & {p.tobytes() for p in plan.test.pixels.numpy()}


def test_classes_of_a_model_that_is_there_are_found_by_name(classify_runs: Runner, tmp_path: Path) -> None:
    """It has them in another order than the folders, and with a synonym."""
    models.save(micro_classify.model(labels=("cow", "ant, emmet", "bee")), tmp_path / "other")
    ours, theirs = (
        classify_runs.job(*more, "forget={labels: [cow]}").plan for more in ((), (f"model={tmp_path / 'other'}",))
    )
    assert (theirs.data.names, theirs.split.how) == (("cow", "ant, emmet", "bee"), {"labels": [0]})
    assert torch.equal(theirs.data.pixels, ours.data.pixels)
    for part in ("data", "test"):
        assert (getattr(theirs, part).labels == (getattr(ours, part).labels + 1) % 3).all()
    assert theirs.split.forget.tolist() == ours.split.forget.tolist() == list(range(20, 30))


@pytest.mark.usefixtures("odd")
def test_images_of_any_size_are_resized_on_request(classify_runs: Runner) -> None:
    words = ("data.source={work}/odd/mixed", "data.size=6", "data.test=0.25")
    assert classify_runs.job(*words).plan.data.pixels.shape == (18, 1, 6, 6)


def test_labels_are_those_of_the_data(classify_runs: Runner) -> None:
    assert classify_runs.job("forget={labels: [bee]}").plan.labels == [LABELS[1]]
    assert classify_runs.job().model.config["model_type"] == RESNET["model_type"]
