"""What a run on a class-conditional model counts: classes, distances to real images, the gap to a retrained model."""

from pathlib import Path
from typing import Any

import micro_ddpm
import numpy as np
import pytest
import torch
from jobs import Runner, read
from micro_ddpm import LABELS
from PIL import Image

from erase.config import DdpmConfig
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import open_model
from erase.engine.saliency import load_mask
from erase.evaluation import classes, fidelity, grid
from erase.evaluation.generate import image_generator
from erase.evaluation.manifest import read_manifest
from erase.programs.labels import report as reports
from erase.programs.labels.plan import Plan, read_data
from erase.programs.labels.report import gap, judge_classes, judge_fidelity, make_report, reference, summarise
from erase.store.labelled import LabelledImages, read_labelled

FOLDERS = {"before": "base", "after": "erased", "retrained": "retrained"}
ASKED = ["bee"] * 6 + ["ant"] * 6 + ["cow"] * 6


def test_the_report_holds_the_keys_that_stay(label_run: Path) -> None:
    report = read(label_run / "report.json")
    assert report.keys() == {
        *("schema", "command", "method", "seed", "target", "mask", "before", "after", "retrained", "paired", "gap"),
        *("timing", "memory", "versions"),
    }
    assert report["method"] == {"name": "sfron", "fast_rate": 0.01}
    assert report["target"] == {"forget": ["bee"], "anchors": [], "earlier": []}
    assert report["timing"].keys() == {"data_s", "saliency_s", "erase_s", "steps", "step_s"}
    assert report["timing"]["erase_s"] == pytest.approx(2 * report["timing"]["step_s"])
    assert report["paired"].keys() == {"forget_mcnemar_p", "remain_mcnemar_p"}
    assert report["gap"].keys() == {"fa", "ra", "frechet", "mean", "kl", "forget_frechet_ratio"}
    mask = load_mask(label_run / "saliency.safetensors")
    assert (report["mask"]["density"], report["mask"]["per"]) == (mask.density, "sample")
    assert report["mask"]["per_layer"] == pytest.approx(mask.per_layer())
    for key in FOLDERS:
        scores, near = report[key]["classes"], report[key]["fidelity"]
        assert (scores["classifier"], scores["forget"]["n"], scores["remain"]["n"]) == ("judge", 6, 12)
        assert set(scores["per_label"]) == set(LABELS)
        assert sum(scores["forget_shows"].values()) == pytest.approx(1)
        assert scores["forget_confidence"].keys() == {"bee"}
        assert near["coverage"].keys() == {"ant", "cow"}
        assert [(near[name]["n_real"], near[name]["n_fake"]) for name in ("remain", "forget_to_remain")] == [
            (12, 12),
            (12, 6),
        ]
    summary = summarise(report)
    assert (summary["forget"], summary["gap_ra"]) == (
        report["after"]["classes"]["forget"]["accuracy"],
        report["gap"]["ra"],
    )
    assert all(isinstance(value, int | float | str) for value in summary.values())


def test_images_of_all_models_share_their_seeds(label_run: Path, label_runs: Runner) -> None:
    manifests = {what: read_manifest(label_run / "images" / what) for what in FOLDERS.values()}
    for manifest in manifests.values():
        assert [(r.prompt, r.seed, r.index) for r in manifest] == [
            (name, LABELS.index(name) + 1, index) for name in ("bee", "ant", "cow") for index in range(6)
        ]
    for other in ("erased", "retrained"):
        assert all(a.sha256 != b.sha256 for a, b in zip(manifests["base"], manifests[other], strict=True))
    pipe = open_model(locate(label_runs.work / "base", "label")).pipe  # as it generates them, at its own guidance
    row = manifests["base"][7]
    alone = np.asarray(pipe([0], [image_generator(1, 1)], 2).images[0], np.int64)
    drawn = np.asarray(Image.open(label_run / "images/base" / row.file), np.int64)
    assert (row.prompt, row.index) == ("ant", 1)
    assert np.abs(drawn - alone).max() <= 1  # float rounding of another batch


def test_the_grid_has_a_row_for_each_class_and_model(
    label_runs: Runner, label_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.open(label_run / "grid.png").verify()
    seen: list[Any] = []
    draw = grid.grid
    monkeypatch.setattr(
        grid, "grid", lambda rows, **kw: seen.append((kw["title"], kw["columns"], rows)) or draw(rows, **kw)
    )
    folders = [label_run / "images" / name for name in FOLDERS.values()]
    grid.grid_from_folders(folders, names=list(FOLDERS.values()), max_columns=12, max_prompts=3, blur=None)
    assert [(title.split(",")[0], [name for name, _ in rows]) for title, _, rows in seen] == [
        (name, list(FOLDERS.values())) for name in ("bee", "ant", "cow")
    ]
    for title, columns, rows in seen:
        assert columns == [f"sample {i}" for i in range(6)]
        for model, paths in rows:
            by_file = {label_run / "images" / model / r.file: r for r in read_manifest(label_run / "images" / model)}
            assert [(f"{by_file[p].prompt}, seed {by_file[p].seed}", by_file[p].index) for p in paths] == [
                (title, i) for i in range(6)
            ]


def chosen(data: LabelledImages, label: int, count: int) -> Any:
    """Which images of a class `subset` of seed 0 takes."""
    n = len(data.of([label]))
    every = LabelledImages(torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1), torch.zeros(n).long(), ("x",))
    return every.subset(count, 0).pixels.flatten().numpy().astype(int)


def test_the_report_is_of_the_images_that_are_there(label_run: Path, label_runs: Runner) -> None:
    """Judged again, by hand."""
    report, judge = read(label_run / "report.json"), label_runs.work / "judge"
    test = read_labelled(label_runs.work / "data", "test")
    real = fidelity.features(test.pixels[test.labels != 1], judge)
    real = real.take(np.concatenate([chosen(test, 0, 6), 8 + chosen(test, 2, 6)]))
    for key, what in FOLDERS.items():
        manifest = read_manifest(label_run / "images" / what)
        guess = classes.classify([label_run / "images" / what / r.file for r in manifest], judge, features=True)
        hits = [p == r.prompt for p, r in zip(guess.predicted, manifest, strict=True)]
        found, near = report[key]["classes"], report[key]["fidelity"]
        assert (found["forget"]["correct"], found["remain"]["correct"]) == (sum(hits[:6]), sum(hits[6:]))
        assert found["forget_confidence"]["bee"]["probability"] == pytest.approx(guess.probabilities[:6, 1].mean())
        drawn = fidelity.features_of(guess)
        # float32 features of other batches
        for name, part in (("remain", slice(6, 18)), ("forget_to_remain", slice(0, 6))):
            expected = fidelity.frechet(real.values, drawn.values[part])
            assert near[name]["frechet"] == pytest.approx(expected, rel=1e-3)
        expected = fidelity.coverage(real.values[6:], drawn.values[12:], k=5)
        assert near["coverage"]["cow"] == pytest.approx(expected)


@pytest.mark.slow
def test_without_data_the_bases_images_stand_in_for_real_ones(label_runs: Runner, tmp_path: Path) -> None:
    report = read(label_runs(tmp_path / "out", "data=null") / "report.json")
    before = report["before"]["fidelity"]
    assert before["remain"]["frechet"] == pytest.approx(0, abs=1e-6)  # to itself; rounding
    assert (before["remain"]["precision"], before["coverage"]) == (1, {"ant": 1, "cow": 1})
    assert report["after"]["fidelity"]["remain"]["frechet"] > 1e-3
    assert summarise(report)["frechet"] is None  # no ratio to a distance of nothing


def real_images(config: DdpmConfig, data: LabelledImages) -> Any:
    plan = Plan(list(data.names), [1], [], data)
    return reference(config, plan, Path(config.eval.classifier or ""), {})


def test_real_images_are_those_of_the_test_split(label_runs: Runner, tmp_path: Path) -> None:
    """Of a source without one they are training images; in the model's order of classes; a broken one is an error."""
    source, judge = label_runs.work / "data", label_runs.work / "judge"
    train, test = (read_labelled(source, part) for part in ("train", "test"))
    for words, expected in ((("eval.images=3",), test), (("data.source={work}/data/train", "eval.images=3"), train)):
        features, labels = real_images(label_runs.config(*words), train)
        assert labels == [name for name in LABELS for _ in range(3)]
        pixels = torch.cat([expected.of([k]).subset(3, 0).pixels for k in range(3)])
        np.testing.assert_allclose(features.values, fidelity.features(pixels, judge).values, rtol=1e-5)
    every, labels = real_images(label_runs.config("eval.images=100"), train)
    assert len(every) == len(labels) == 24  # no more than there are
    order = ("cow", "ant", "bee")  # a folder that names no classes: `labels` says which is which, in the data too
    config = label_runs.config("model={work}/lone", f"labels=[{', '.join(order)}]", "eval.images=8")
    data = read_data(config, locate(label_runs.work / "lone", "label"), print)
    assert data is not None
    features, labels = real_images(config, data)
    assert labels == [name for name in order for _ in range(8)]
    pixels = read_labelled(source, "test", names=order).pixels
    np.testing.assert_allclose(features.values, fidelity.features(pixels, judge).values, rtol=1e-5)
    micro_ddpm.write_images(tmp_path / "train")
    (micro_ddpm.write_images(tmp_path / "test", seed=1) / "ant/0.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"0\.png"):
        real_images(label_runs.config(f"data.source={tmp_path}"), train)


def guess_of(*shown: str, features: Any = None) -> classes.ClassPredictions:
    """Predictions of 0.8 for what is shown."""
    probabilities = np.full((len(shown), 3), 0.1)
    for row, name in enumerate(shown):
        probabilities[row, LABELS.index(name)] = 0.8
    paths = tuple(Path(str(i)) for i in range(len(shown)))
    return classes.ClassPredictions(probabilities, LABELS, paths, "mine", "0", features, "layer")


def test_classes_are_judged() -> None:
    asked = ["bee", "bee", "bee", "cow", "ant", "ant", "cow"]
    found = judge_classes(guess_of("bee", "cow", "cow", "cow", "ant", "bee", "cow"), asked, ["bee", "cow"])
    assert (found["forget"]["n"], found["forget"]["correct"]) == (5, 3)
    assert (found["remain"]["n"], found["remain"]["correct"]) == (2, 1)
    assert found["forget_shows"] == {"bee": 0.2, "cow": 0.8}
    assert found["forget_confidence"]["bee"]["probability"] == pytest.approx((0.8 + 0.1 + 0.1) / 3)
    assert found["forget_confidence"]["bee"]["n"] == 3
    assert found["forget_confidence"]["cow"]["probability"] == pytest.approx(0.8)
    assert found["classifier"] == "mine"
    apart = judge_classes(guess_of("bee", "cow", "cow", "ant"), ["bee", "bee", "cow", "ant"], ["bee"], ["cow"])
    counts = {side: (apart[side]["correct"], apart[side]["n"]) for side in ("forget", "earlier", "remain")}
    assert counts == {"forget": (1, 2), "earlier": (1, 1), "remain": (1, 1)}
    assert apart["forget_shows"] == {"bee": 0.5, "cow": 0.5}
    assert apart["forget_confidence"].keys() == {"bee"}
    nothing = judge_classes(guess_of("ant"), ["ant"], [])
    assert "forget_shows" not in nothing
    assert nothing["remain"]["accuracy"] == 1


def features_of(values: Any) -> fidelity.Features:
    return fidelity.Features(np.asarray(values, np.float64), "mine", "0", "layer")


def test_fidelity_is_to_what_remains() -> None:
    rng = np.random.default_rng(0)
    real_labels = ["ant"] * 8 + ["bee"] * 8 + ["cow"] * 8
    drawn, real = rng.normal(size=(18, 2)), rng.normal(size=(24, 2))
    drawn[ASKED.index("cow") :] += 100  # cows are nowhere near
    found = judge_fidelity(features_of(drawn), ASKED, ["bee"], features_of(real), real_labels)
    staying = np.concatenate([real[:8], real[16:]])
    assert found["remain"]["frechet"] == pytest.approx(fidelity.frechet(staying, drawn[6:]))
    assert found["forget_to_remain"]["frechet"] == pytest.approx(fidelity.frechet(staying, drawn[:6]))
    assert found["coverage"] == {"ant": fidelity.coverage(real[:8], drawn[6:12], k=5), "cow": 0.0}
    assert found["coverage"]["ant"] > 0.5
    all_stays = judge_fidelity(features_of(drawn), ASKED, [], features_of(real), real_labels)
    assert all_stays["remain"]["n_fake"] == 18
    assert all_stays["coverage"].keys() == {"ant", "bee", "cow"}
    assert "forget_to_remain" not in all_stays
    real = (features_of(real), real_labels)
    alone = judge_fidelity(features_of(drawn[:12]), ASKED[:12], ["bee"], *real)["forget_to_remain"]
    earlier = judge_fidelity(features_of(drawn), ASKED, ["bee"], *real, ["cow"])
    assert earlier["forget_to_remain"]["n_fake"] == alone["n_fake"] == 6
    assert (earlier["remain"]["n_fake"], earlier["coverage"].keys()) == (6, {"ant"})


@pytest.mark.parametrize(("count", "said"), [(1, set()), (2, {"remain", "forget_to_remain"})])
def test_fidelity_of_few_real_images(count: int, said: set[str]) -> None:
    """A run does not end for the want of them; what they are too few for is left out."""
    rng = np.random.default_rng(0)
    real = features_of(rng.normal(size=(count, 2)))
    found = judge_fidelity(features_of(rng.normal(size=(18, 2))), ASKED, ["bee"], real, ["ant"] * count)
    assert found.keys() == {"coverage", *said}
    assert found["coverage"].keys() == ({"ant"} if count > 1 else set())
    assert all(found[name]["k"] == 1 for name in said)
    report = {"after": {"fidelity": found}, "before": {"fidelity": found}}
    assert reports.ratio(*(reports.distance(report[key]) for key in ("after", "before"))) == (1 if said else None)


def test_the_gap_to_the_retrained_model() -> None:
    asked = ["bee", "bee", "ant", "cow"]
    seen = {"after": guess_of("ant", "bee", "ant", "cow"), "retrained": guess_of("ant", "ant", "ant", "ant")}
    report = {
        key: {
            "classes": judge_classes(guess, asked, ["bee"]),
            "fidelity": {"remain": {"frechet": near}, "forget_to_remain": {"frechet": far}},
        }
        for (key, guess), near, far in zip(seen.items(), (3.0, 2.0), (5.0, 10.0), strict=True)
    }
    found = gap(report, seen, asked, ["bee"])
    assert found.pop("kl") == pytest.approx(0.8 * np.log(0.8 / 0.45) + 0.1 * np.log(0.1 / 0.45), rel=1e-4)
    assert found == pytest.approx({"fa": 50, "ra": 50, "frechet": 50, "mean": 50, "forget_frechet_ratio": 0.5})
    for key in seen:  # images at no distance to real ones: there is no ratio
        report[key]["fidelity"]["remain"]["frechet"] = 0.0
    report["after"]["classes"]["remain"]["accuracy"] = report["retrained"]["classes"]["remain"]["accuracy"]
    bare = gap(report, seen, asked, ["bee"])
    assert (bare["frechet"], bare["mean"]) == (None, 25)
    for key in seen:
        report[key]["fidelity"]["remain"]["frechet"] = 2.0
    level = gap({**report, "after": report["retrained"]}, {**seen, "after": seen["retrained"]}, asked, ["bee"])
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


def test_a_report_is_summed_up() -> None:
    report: dict[str, Any] = {
        "target": {"forget": ["bee"], "earlier": []},
        "before": side(1.0, 2.0, ant=1.0, cow=0.75),
        "after": side(0.25, 3.0, ant=0.5, cow=1.0),
        "timing": {"data_s": 7.0, "erase_s": 2.0, "saliency_s": 3.0},
    }
    times = {"data_s": 7.0, "saliency_s": 3.0, "erase_s": 2.0, "rte_s": 5.0}
    shown = {"forget": 0.25, "remain": 0.75, "drop": 12.5, "worst": 50.0, "frechet": 1.5, "coverage": 0.4}
    assert summarise(report) == pytest.approx({**shown, "shows": "cow", **times})
    compared = summarise({**report, "gap": {"fa": 1.0, "kl": 0.5}})
    assert (compared["gap_fa"], compared["gap_kl"]) == (1.0, 0.5)
    before: dict[str, Any] = {**report, "target": {"forget": ["bee"], "earlier": ["cow"]}}
    before["after"] = {**report["after"], "classes": {**report["after"]["classes"], "earlier": {"accuracy": 0.125}}}
    assert (summarise(before)["earlier"], summarise(before)["drop"]) == (0.125, 50)
    trained = {**report, "before": {}, "target": {"forget": [], "earlier": []}}
    assert summarise(trained).keys() == {"forget", "remain", "coverage", "shows", *times}
    assert summarise({**report, "before": {}, "after": {}}) == times  # without a judge


def test_images_of_what_stays_are_paired(label_runs: Runner, label_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All forgotten images turn wrong, three of the others, and one of those turns right."""
    rng = np.random.default_rng(0)
    shown = {"base": [*ASKED[:-1], "ant"], "erased": ["ant"] * 6 + ["bee"] * 3 + ["ant"] * 3 + ["cow"] * 6}
    shown["retrained"] = ASKED

    def classify(paths: list[Path], *_: Any, **__: Any) -> classes.ClassPredictions:
        return guess_of(*shown[paths[0].parent.name], features=rng.normal(size=(18, 2)))

    monkeypatch.setattr(classes, "classify", classify)
    monkeypatch.setattr(reports, "reference", lambda *_: (features_of(rng.normal(size=(18, 2))), ASKED))
    plan = Plan(list(LABELS), [1], [], None)
    report = make_report(label_runs.config(), plan, label_run, None, {"erase_s": 1.0}, "", {})
    assert report["paired"] == {
        "forget_mcnemar_p": 2 / 2**6,  # all six
        "remain_mcnemar_p": pytest.approx(0.625),  # 3 against 1: 2 · 5 / 16
    }
    found = [
        (report[key]["classes"]["forget"]["correct"], report[key]["classes"]["remain"]["correct"]) for key in FOLDERS
    ]
    assert found == [(6, 11), (0, 9), (6, 12)]
    assert (report["gap"]["fa"], report["gap"]["ra"]) == (100, pytest.approx(25))
    plan = Plan(list(LABELS), [1], [], None, earlier=[0])
    report = make_report(label_runs.config(), plan, label_run, None, {"erase_s": 1.0}, "", {})
    assert {side: report["after"]["classes"][side]["n"] for side in ("forget", "earlier", "remain")} == {
        "forget": 6,
        "earlier": 6,
        "remain": 6,
    }
    assert report["paired"]["forget_mcnemar_p"] == 2 / 2**6
    assert report["paired"].keys() == {f"{side}_mcnemar_p" for side in ("forget", "earlier", "remain")}
    assert report["gap"]["fa"] == 100
