"""`erase run` from end to end, by every family and method: folders, weights, resuming, deltas, processes, refusals.

What is asked of all is asked here, of all; what one kind of model alone has is in a file of its own beside this one.
"""

import gc
import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import launched
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scenarios import (
    ADAM,
    CLOSED,
    DAMAGE,
    FAMILIES,
    MASKED,
    ONE_SIDED,
    TEXT,
    Case,
    StopError,
    images,
    read,
    rows,
    same,
    same_file,
    stages,
    stop,
    tensors,
    tree,
    write,
)

from erase import cli
from erase.diffusion import loading
from erase.diffusion.model import Model
from erase.engine.saliency import load_mask
from erase.evaluation.manifest import read_manifest
from erase.methods import list_methods
from erase.programs import run

Erase = Callable[..., str]
OFTEN = ("sd", "ddpm", "classify")
"""One family of each kind; the others are marked slow."""
SEEN_BY = {method: name for name in reversed(OFTEN) for method in FAMILIES[name].methods}
"""Of each method the family that is not slow: what it does to the loop is the same by all."""
CELLS = [
    pytest.param(family, method, marks=[pytest.mark.slow] * (SEEN_BY[method] != family))
    for family, row in FAMILIES.items()
    for method in row.methods
]
DAMAGED = [
    pytest.param(family, what, marks=[pytest.mark.slow] * (family not in OFTEN or turn != OFTEN.index(family) % 3))
    for family in FAMILIES
    for turn, what in enumerate(DAMAGE)
]
"""A kind of damage each, of those that are not slow."""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """A run collects garbage, which takes 0.3 s with all libraries in sight."""
    for pipeline in run.JOBS:
        run.job_of(pipeline)
    gc.freeze()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Each family's model and data, made once: a fixture of the module with parameters is made anew at every change."""
    return cache(lambda name: write(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in FAMILIES])
def case(request: pytest.FixtureRequest, made: Callable[[str], Case]) -> Case:
    return made(request.param)


def once(case: Case, name: str, *words: str, **options: Any) -> Path:
    """A run of a family that several tests look at."""
    out = case.work / name
    if not (out / "report.json").exists():
        case.start(out, *words, **options)
    return out


@pytest.fixture
def finished(case: Case) -> Path:
    """A finished run of `sfron`; not to be changed by a test."""
    return once(case, "finished")


@pytest.fixture
def erase(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Erase:
    """A command, which must succeed; what it says."""

    def erase(*words: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["erase", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    return erase


def check_weights(case: Case, out: Path, learns: str) -> set[str]:
    """Some of the chosen weights changed and are finite, and nothing else did; their names."""
    before, after = tensors(case.base), tensors(out / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for name in changed:
        file, _, weight = name.partition(" ")
        assert str(Path(file).parent) == (case.family.trained or ".")
        assert re.search(learns, weight)
        assert after[name].dtype == before[name].dtype
        assert after[name].isfinite().all()
    return changed


def check_metrics(out: Path, method: str, steps: int) -> None:
    """A row a step, with finite losses of the sides that the method learns from."""
    found = rows(out)
    assert [row["step"] for row in found] == list(range(steps))
    for row in found:
        for side in ("forget", "remain"):
            learned = ONE_SIDED.get(method, side) == side
            assert (f"{side}_loss" in row) == learned
            assert not learned or math.isfinite(row[f"{side}_loss"])


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_leaves_the_folder_that_is_promised(case: Case, finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == case.folder
    check_weights(case, finished, case.family.learns)
    check_metrics(finished, "sfron", 3)
    mask, report = load_mask(finished / "saliency.safetensors"), read(finished / "report.json")
    assert mask.density == pytest.approx(0.3, abs=0.01)
    assert all(re.search(case.family.learns, name) for name in mask.named)
    assert (report["method"]["name"], report["timing"]["steps"]) == ("sfron", 3)
    assert report["mask"]["density"] == mask.density
    assert read(finished / "run.json")["config"]["seed"] == 0
    assert {path.name for path in (finished / "model").rglob("*")} == {
        "README.md",
        *(path.name for path in case.base.rglob("*")),
    }
    if case.family.kind != "classify":
        Image.open(finished / "grid.png").verify()
        for name in ("base", "erased"):
            folder = finished / "images" / name
            assert len((folder / "manifest.jsonl").read_text().splitlines()) == len(list(folder.glob("*.png"))) == 3


def test_every_method_is_tried() -> None:
    """By one family at least; each kind says which ones it cannot do."""
    known = set(list_methods())
    assert {"sfron", *FAMILIES["sd"].methods} == known - {"bad_teacher", "retrain"}
    assert {"sfron", *FAMILIES["ddpm"].methods} == known - {*CLOSED}
    assert {"sfron", *FAMILIES["classify"].methods} == known - {*CLOSED, "esd", "retrain"}


@pytest.mark.parametrize(("case", "method"), CELLS, indirect=["case"])
def test_every_method_runs(case: Case, method: str, tmp_path: Path) -> None:
    steps = 1 if method in CLOSED else 2
    words = (*case.without_images, *ADAM, f"train.steps={steps}", *case.family.methods[method])
    case.start(tmp_path / "out", *words)
    report = read(tmp_path / "out/report.json")
    learns = case.family.learns
    if method in CLOSED:
        assert case.family.text_weights is not None
        learns = case.family.text_weights
    elif "train.parameters=noxattn" in case.family.methods[method]:
        learns = f"^(?!.*{learns})"
    elif "train.parameters=full" in case.family.methods[method]:
        learns = ""
    check_weights(case, tmp_path / "out", learns)
    check_metrics(tmp_path / "out", method, steps)
    assert (tmp_path / "out/saliency.safetensors").exists() == (method in MASKED)
    assert (report["method"]["name"], report["mask"] is not None) == (method, method in MASKED)


# --- stopping and resuming ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("sd", "classify"))) for name in FAMILIES],
    indirect=True,
)
def test_a_run_killed_at_every_part_comes_to_the_same_end(
    case: Case, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, killed again and again: it resumes each time, and nothing that is there is done twice."""
    out, job = tmp_path / "out", run.job_of(case.settings["pipeline"])
    mask = 0
    for number, (what, *target) in enumerate(stages(case)):
        with monkeypatch.context() as patch:
            if (out / run.TRAINED).exists():
                patch.setattr(job, "lesson", lambda _: pytest.fail("it is trained already"))
            patch.setattr(*target)
            with pytest.raises(StopError):
                case.start(out, resume=number > 0)
        check_stopped(out, what)
        if (out / "saliency.safetensors").exists():
            mask = mask or (out / "saliency.safetensors").stat().st_mtime_ns
    case.start(out, resume=True)
    assert (out / "saliency.safetensors").stat().st_mtime_ns == mask
    check_same(case, out, finished)


def check_stopped(out: Path, what: str) -> None:
    """What a run leaves that was killed there."""
    names = {path.name for path in out.iterdir()}
    assert ("metrics.jsonl" in names) == ("state.safetensors" in names or run.TRAINED in names or "model" in names)
    if what == "before data":
        assert names <= {"run.json", "split.json", "images"}
    elif what == "in saliency":
        assert "fisher-forget.safetensors" in names
        assert "saliency.safetensors" not in names
    elif what == "between steps":
        assert [row["step"] for row in rows(out)] == [0, 1]
    elif what.startswith("generating "):
        assert len(list((out / "images" / what.rpartition(" ")[2]).glob("*.png"))) == 2


def check_same(case: Case, out: Path, whole: Path) -> None:
    """Bit for bit, but for how long it took and how much memory."""
    assert {path.name for path in out.iterdir()} == case.folder
    assert same(out / "model", whole / "model")
    assert same_file(out, whole, "saliency.safetensors")
    assert rows(out) == rows(whole)
    reports = [read(folder / "report.json") for folder in (out, whole)]
    for report in reports:
        assert report.pop("timing").keys() == {"data_s", "saliency_s", "erase_s", "steps", "step_s"}
        report.pop("memory")
        report["after"].get("metrics", {}).pop("rte_s", None)
    assert reports[0] == reports[1]
    if case.family.kind != "classify":
        assert len(images(whole)) == 6
        assert images(out) == images(whole)


def test_a_finished_run_that_is_resumed_says_so_and_changes_nothing(
    case: Case, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, before = run.job_of(case.settings["pipeline"]), tree(finished)
    for name in ("measure_base", "lesson", "save", "measure_erased", "report"):
        monkeypatch.setattr(job, name, stop)
    said = case.start(finished, resume=True)
    assert len(said) == 1
    assert str(finished / "report.html") in said[0]
    assert tree(finished) == before


def test_another_run_is_not_resumed(case: Case, finished: Path) -> None:
    other = {"text": "prompts=a photo of a car", "labels": "labels=[car]", "classify": "fraction=0.5"}
    before = tree(finished)
    for words in (("seed=1",), (f"forget.{other[case.family.kind]}",), ()):  # nor is a folder in use begun anew
        with pytest.raises(ValueError, match=re.escape(str(finished))):
            case.start(finished, *words, resume=bool(words))
    assert tree(finished) == before


# --- deltas ---------------------------------------------------------------------------------------


@pytest.fixture
def change(case: Case) -> Path:
    """A run as the finished one that keeps a delta alone."""
    return once(case, "change", *case.without_images, form="delta")


def test_a_delta_makes_the_erased_model_of_the_base_and_the_base_of_it(
    case: Case, finished: Path, change: Path, erase: Erase, tmp_path: Path
) -> None:
    assert not (change / "model").exists()
    assert not list(change.glob("*trained*"))
    delta = change / "delta.safetensors"
    erase("apply", case.base, delta, "--out", tmp_path / "erased")
    assert same(tmp_path / "erased", finished / "model")
    erase("apply", tmp_path / "erased", delta, "--undo", "--out", tmp_path / "again")
    assert same(tmp_path / "again", case.base)


# --- micro-batches and processes ------------------------------------------------------------------


def check_close(case: Case, out: Path, whole: Path) -> None:
    """Weights are the same but for rounding, which is small beside what the run changed; losses too."""
    found, expected, base = tensors(out / "model"), tensors(whole / "model"), tensors(case.base)
    changed = [name for name in base if not torch.equal(base[name], expected[name])]
    moved = sum(float((expected[name].double() - base[name].double()).square().sum()) for name in changed)
    apart = sum(float((expected[name].double() - found[name].double()).square().sum()) for name in base)
    assert apart**0.5 < 0.01 * moved**0.5  # a mask's last weights may be others; another batch size gives over 0.3
    for mine, theirs in zip(rows(out), rows(whole), strict=True):
        for key in ("forget_loss", "remain_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)


def test_what_saves_memory_changes_nothing_else(
    case: Case, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample at a time, and activations computed again: in each step, and only there."""
    if case.family.kind == "classify":
        pytest.skip("it has neither: batch normalisation sees whole batches")
    calls: list[str] = []
    real = Model.checkpoint_activations
    monkeypatch.setattr(Model, "checkpoint_activations", lambda self: calls.append("checkpointing") or real(self))
    case.start(tmp_path / "out", *case.without_images, "train.micro_batch=1", "train.checkpointing=true")
    assert calls == ["checkpointing"]
    masks = [load_mask(out / "saliency.safetensors").named for out in (tmp_path / "out", finished)]
    # The softmax cancels a bias of the keys: its gradients are rounding alone. Elsewhere it decides near the threshold.
    told = {name: keep for name, keep in masks[1].items() if not name.endswith("to_k.bias")}
    apart = sum(int((masks[0][name] != keep).sum()) for name, keep in told.items())
    assert apart <= 0.005 * sum(keep.numel() for keep in told.values())
    check_close(case, tmp_path / "out", finished)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (name != "sd")) for name in FAMILIES], indirect=True
)
def test_two_processes_are_one(case: Case, finished: Path, tmp_path: Path) -> None:
    """Images of the base are the same to the bit; weights to rounding, for gradients are summed in another order."""
    out = tmp_path / "out"
    ended = launched.two(lambda: case.start(out), tmp_path / "log")
    assert ended == [0, 0], (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    assert tree(out).keys() == tree(finished).keys()
    check_close(case, out, finished)
    if case.family.kind != "classify":
        assert same_file(out, finished, "images/base/manifest.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sd", "sdxl", "sd3"], indirect=True)
def test_weights_spread_over_two_processes_are_one(case: Case, finished: Path, tmp_path: Path) -> None:
    """By FSDP2: the same files, the model in the form that it came in, weights and losses to rounding."""
    out = tmp_path / "out"
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if case.name == "sdxl":  # what saves more memory changes nothing else
        fsdp |= {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    ended = launched.two(lambda: case.start(out), tmp_path / "log", **fsdp)
    assert ended == [0, 0], (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    assert tree(out).keys() == tree(finished).keys()
    check_close(case, out, finished)


# --- without a run --------------------------------------------------------------------------------


def test_a_dry_run_knows_the_sizes_and_writes_nothing(
    case: Case, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text-to-image models are opened hollow for it: no network is loaded."""
    if case.family.kind == "text":
        monkeypatch.setattr(loading, "load_network", lambda *_: pytest.fail("a network is loaded"))
    whole = case.name in ("pixart", "dit", "classify")  # of large graphs it takes seconds: those try one loss alone
    words = () if whole else case.family.methods.get("finetune", TEXT["finetune"])
    before = tree(case.work)
    said = "\n".join(case.start(tmp_path / "out", *words, dry_run=True))
    assert not (tmp_path / "out").exists()
    assert tree(case.work) == before
    chosen = load_mask(finished / "saliency.safetensors").named
    assert f"{sum(x.numel() for x in chosen.values()):,} of {weights_of(case):,}" in said
    for what in ("mask", "steps") if whole else ("steps",):
        assert re.search(rf"^memory for the {what}: [\d.]+ [GM]B ", said, re.MULTILINE)
    count = 5 if case.family.kind == "classify" else 2
    assert f"{count if whole else 0} forget and {count} remain" in said


def weights_of(case: Case) -> int:
    """How many weights the network that learns has, by its file."""
    found = load_file(case.base / case.weights[0])
    return sum(
        x.numel() for name, x in found.items() if not re.search("running_|num_batches|pos_embed.pos_embed", name)
    )


def test_base_and_erased_model_generate_what_the_run_generated(
    case: Case, finished: Path, erase: Erase, tmp_path: Path
) -> None:
    """By `erase generate`, from the same prompts and seeds, to rounding.

    The run generates the forgotten prompt first, so images stand elsewhere in their batches: on some CPUs a matrix
    product rounds its last rows another way.
    """
    if case.family.kind == "classify":
        pytest.skip("it generates nothing")
    how = ("--steps", 2, "--guidance", 3.0, "--batch-size", 2)
    for name, model in (("base", case.base), ("erased", finished / "model")):
        erase("generate", model, case.work / "set.csv", "--out", tmp_path / name, *how)
        mine, run_s = (
            {(row.prompt, row.seed): np.asarray(Image.open(folder / row.file)) for row in read_manifest(folder)}
            for folder in (tmp_path / name, finished / "images" / name)
        )
        assert len(mine) == 3
        assert mine.keys() == run_s.keys()
        for key, image in mine.items():
            apart = np.abs(image.astype(int) - run_s[key])
            assert (apart.max() <= 1, (apart > 0).mean() < 0.01) == (True, True), key


def test_base_erased_model_and_run_can_be_inspected(case: Case, finished: Path, erase: Erase) -> None:
    base, erased, run_of, mask = (
        json.loads(erase("inspect", path))
        for path in (case.base, finished / "model", finished, finished / "saliency.safetensors")
    )
    assert "erase_method" not in base
    assert erased["erase_method"] == "sfron"
    assert {k for k in erased if not k.startswith("erase")} == set(base)
    changed = {name for name, value in base["sha256"].items() if erased["sha256"][name] != value}
    assert changed == {str(case.weights[0])}
    assert (run_of["finished"], run_of["base"]["weights"]) == (True, base["sha256"])
    assert mask["kept"] == pytest.approx(0.3, abs=0.01)


# --- refusals -------------------------------------------------------------------------------------


def test_a_closed_form_without_weights_to_edit_is_refused_before_anything(case: Case, tmp_path: Path) -> None:
    if case.family.text_weights is None:
        pytest.skip("nothing of it reads text")
    words = (
        *case.family.methods["uce"],
        "train.steps=1",
        "train.parameters=^$|^(?!.*(attn2|context_embedder|caption_projection))",
    )
    with pytest.raises(ValueError, match=r"train\.parameters"):
        case.start(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("case", "what"), DAMAGED, indirect=["case"])
def test_a_damaged_model_is_refused_in_a_line_before_anything(case: Case, tmp_path: Path, what: str) -> None:
    """Whether what learns is damaged or what helps it; the others of these take turns."""
    first, *others = case.weights
    for file in (first, *others[list(DAMAGE).index(what) :: len(DAMAGE)]):
        model = Path(shutil.copytree(case.base, tmp_path / f"model-{file.parent.name}"))
        DAMAGE[what](model / file)
        with pytest.raises(ValueError, match=re.escape(str((model / file).parent))) as refused:
            case.start(tmp_path / "out", f"model={model}")
        assert len(str(refused.value).splitlines()) == 1
        assert not (tmp_path / "out").exists()
