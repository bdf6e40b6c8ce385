"""`erase run classify` from end to end, on small networks: folders, methods, caches, resuming, refusals, comparing."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import micro_classify
import numpy as np
import pytest
import torch
import yaml
from micro_classify import LABELS, RESNET, VIT
from micro_ddpm import write_images
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from erase import cli, runs
from erase.batches import Batches
from erase.classification import metrics, models, splits
from erase.classification.backend import logits
from erase.config import ClassifyConfig, override, parse
from erase.data import read_labelled
from erase.methods import list_methods
from erase.saliency import load_mask

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
    call = runs.JsonlTracker.__call__

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
    names = {"config.json", "preprocessor_config.json", FILE}
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
        ("forget.statistics=true",),
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
    for asked in (False, True):
        words = (*METHODS["gradient_ascent"], f"forget.statistics={str(asked).lower()}")
        after = weights(start(tmp_path / str(asked), *QUICK, *words) / "model")
        moved = [n for n in before if "running" in n and not torch.equal(before[n], after[n])]
        assert bool(moved) == asked


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
        patch.setattr(runs.JsonlTracker, "__call__", killed_at(3))
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


# --- stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), METHODS["scrub"], ("data.shift=1", *METHODS["salun"])], ids=str)
def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    words = (*QUICK, *words, "train.steps=5", "checkpoint_every=2")
    whole, out = start(tmp_path / "whole", *words), tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(runs.JsonlTracker, "__call__", killed_at(3))
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
            (runs.JsonlTracker, "__call__", killed_at(1)),
            (program.models, "save", stop),
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


# --- refusals -------------------------------------------------------------------------------------

BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "fraction of 1": (("forget.fraction=1",), "forget.fraction: input should be less than 1; got 1"),
    "fraction of 0": (("forget.fraction=0",), "forget.fraction: input should be greater than 0; got 0"),
    "negative fraction": (("forget.fraction=-0.1",), "forget.fraction: input should be greater than 0"),
    "nothing": (("forget={}",), "the forget set is empty: name what to forget"),
    "nothing of so few": (("forget.fraction=0.001",), "the forget set is empty"),
    "everything": (("forget={labels: [ant, bee, cow]}",), "the forget set is everything"),
    "two ways": (("forget.labels=[bee]",), "forget.fraction and forget.labels both choose what to forget"),
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


def test_a_missing_scikit_learn_stops_a_run_before_it_begins(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="membership inference needs scikit-learn: pip install"):
        start(tmp_path / "out")
    assert not list(tmp_path.iterdir())


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
