"""`erase run` from end to end, by every family and method: folders, weights, resuming, deltas, processes, refusals.

What is asked of all is asked here, of all; what one kind of model alone has is in a file of its own beside this one.
"""

import gc
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from scenarios import FAMILIES, MASKED, ONE_SIDED, Case, read, rows, tensors, write

from erase.engine.saliency import load_mask
from erase.methods import list_methods
from erase.programs import run

CELLS = [(family, method) for family, row in FAMILIES.items() for method in row.methods]


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """A run collects garbage, which takes 0.3 s with all libraries in sight."""
    for pipeline in run.JOBS:
        run.job_of(pipeline)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def finished(case: Case) -> Path:
    """A finished run of `sfron`; not to be changed by a test."""
    case.start(case.work / "finished")
    return case.work / "finished"


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
    check_metrics(finished, "sfron", 4)
    mask, report = load_mask(finished / "saliency.safetensors"), read(finished / "report.json")
    assert mask.density == pytest.approx(0.3, abs=0.01)
    assert all(re.search(case.family.learns, name) for name in mask.named)
    assert (report["method"]["name"], report["timing"]["steps"]) == ("sfron", 4)
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
    assert {"sfron", *FAMILIES["ddpm"].methods} == known - {"uce"}
    assert {"sfron", *FAMILIES["classify"].methods} == known - {"uce", "esd", "retrain"}


@pytest.mark.parametrize(("case", "method"), CELLS, indirect=["case"])
def test_every_method_runs(case: Case, method: str, tmp_path: Path) -> None:
    steps = 1 if method == "uce" else 2
    case.start(tmp_path / "out", *case.without_images, f"train.steps={steps}", *case.family.methods[method])
    report = read(tmp_path / "out/report.json")
    learns = case.family.learns
    if method == "uce":
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


# --- refusals -------------------------------------------------------------------------------------


def test_a_closed_form_without_weights_to_edit_is_refused_before_anything(case: Case, tmp_path: Path) -> None:
    if case.family.text_weights is None:
        pytest.skip("nothing of it reads text")
    words = (*case.family.methods["uce"], "train.parameters=^$|^(?!.*(attn2|context_embedder|caption_projection))")
    with pytest.raises(ValueError, match=r"train\.parameters"):
        case.start(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
