"""What a run on a text-to-image model counts: judges, tampered images, the numbers of comparisons."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jobs import COUNTED, NAMES, Runner, read, stop

from erase import cli
from erase.diffusion.model import Model
from erase.engine.saliency import load_mask
from erase.evaluation import classes, detections, nudity, report
from erase.evaluation.axes import axes_of
from erase.evaluation.manifest import generated_by, read_manifest
from erase.evaluation.page.names import name_of
from erase.evaluation.prompt_files import PromptRow
from erase.programs.run import Learned
from erase.programs.text import job as jobs
from erase.programs.text.judges import labels
from erase.programs.text.judges import nudity as nudity_judge
from erase.programs.text.plan import Plan
from erase.programs.text.report import summarise


@pytest.fixture
def copied(text_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_run, tmp_path / "run"))


# --- the report -----------------------------------------------------------------------------------


def test_the_report_holds_the_keys_that_stay(text_run: Path) -> None:
    found = read(text_run / "report.json")
    assert found.keys() >= {"schema", "command", "method", "seed", "target", "mask", "before", "after", "timing"}
    assert found["method"]["name"] == "sfron"
    assert found["target"] == {"forget": ["a photo of a cat"], "anchors": ["a photo of a dog"], "earlier": []}
    assert found["timing"].keys() == {"data_s", "saliency_s", "erase_s", "steps", "step_s"}
    assert found["timing"]["erase_s"] == pytest.approx(2 * found["timing"]["step_s"])
    assert found["mask"]["density"] == load_mask(text_run / "saliency.safetensors").density
    for when in ("before", "after"):
        flagged, named = found[when]["nudity"], found[when]["classes"]
        assert flagged.keys() >= {"images", "flagged", "rate", "ci95", "counts"}
        assert (flagged["images"], len(flagged["by_prompt"])) == (2, 4)  # of the erased concept
        assert (named["forget"]["n"], named["remain"]["n"], named["axis"]) == (2, 6, "object")
    sides = ("nudity", "forget", "forget_pairs", "remain", "remain_pairs")
    assert found["paired"].keys() == {f"{what}_mcnemar_p" for what in sides}
    summary = summarise(found)
    assert summary["forget"] == found["after"]["classes"]["forget"]["accuracy"]
    assert summary["flagged"] == found["after"]["nudity"]["rate"]
    assert (summary["forms"], summary["pairs_drop"]) == (None, None)  # there are no such rows


def test_images_of_both_models_are_of_the_same_prompts_and_seeds(text_run: Path) -> None:
    base, erased = (read_manifest(text_run / "images" / name) for name in ("base", "erased"))
    assert [(r.file, r.prompt, r.seed, r.index) for r in base] == [(r.file, r.prompt, r.seed, r.index) for r in erased]
    assert [row.prompt for row in base][::2] == [f"a photo of a {name}" for name in NAMES]  # forgotten ones first
    assert [r.sha256 for r in base] != [r.sha256 for r in erased]


def test_images_are_blurred_without_a_count_of_nudity(
    text_runs: Runner, text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(report, "write_html", lambda out, blur: seen.append(blur))
    out = Path(shutil.copytree(text_run / "images", tmp_path / "images")).parent
    (out / "report.json").write_text("{}")  # no attacks, whose images are looked at too
    for kept in (out / "images").glob("*-detections.json"):
        kept.unlink()
    words = ("eval.classifier=null", "eval.blur=true")
    text_runs.job(*words, "forget.anchors=a woman", out=out).page()
    assert len(seen[0]) == 16  # every image was looked at
    assert (out / "grid.png").exists()

    def detect(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing asks for a person")

    monkeypatch.setattr("erase.evaluation.detector.detect", detect)
    for kept in (out / "images").glob("*-detections.json"):
        kept.unlink()
    text_runs.job(*words, out=out).page()
    assert seen[1] is None


def count_again(text_runs: Runner, out: Path, text_run: Path, *words: str) -> Any:
    """Count a run's images anew, as by the weights that the finished run had, and write the page."""
    job = text_runs.job(*COUNTED, *words, out=out)
    job.weights = {name: generated_by(text_run / "images" / name) for name in ("base", "erased")}
    result = job.report(Learned({}, None, {"erase_s": 1.0}))
    (out / "report.json").write_text(json.dumps(result))
    job.page()
    return result


@pytest.mark.parametrize("every", [1, 2])
def test_an_image_that_the_detector_failed_on_is_not_safe(
    text_runs: Runner, text_run: Path, copied: Path, every: int
) -> None:
    """It is an error in the report, not a count of 0; a comparison has no number; the image is hidden whole."""
    for path in (copied / "images").glob("*-detections.json"):
        found = detections.load_detections(path)
        images = [replace(x, error="out of memory") if i % every == 0 else x for i, x in enumerate(found.images)]
        detections.save_detections(replace(found, images=tuple(images)), path)
    result, seen = count_again(text_runs, copied, text_run), every - 1
    for when in ("before", "after"):
        counted = result[when]["nudity"]
        assert (counted["images"], len(counted["errors"])) == (seen, 2 - seen)
        assert set(counted["by_prompt"].values()) == {None}
        assert counted["rate"] == (None if every == 1 else 0)
    assert result["paired"]["nudity_mcnemar_p"] == (None if every == 1 else 1)
    summary = summarise(result)
    assert (summary["flagged_before"], summary["flagged"]) == (None, None)
    assert "out of memory" in (copied / "report.html").read_text()
    strict = nudity_judge.look_for_nudity
    with pytest.raises(ValueError, match="out of memory"):
        strict(text_runs.config(*COUNTED), [], copied / "images/base")


def test_a_failure_of_the_detector_that_passes_is_not_kept(
    text_runs: Runner, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where images must be judged: a run that is resumed looks at them again."""
    folder, kept = copied / "images/base", copied / "images/base-detections.json"
    whole = detections.load_detections(kept)
    failed = replace(whole, images=tuple(replace(image, error="out of memory") for image in whole.images))
    kept.unlink()
    answers = [failed, whole]
    monkeypatch.setattr("erase.evaluation.detector.detect", lambda *given, **named: answers.pop(0))
    config, paths = text_runs.config(*COUNTED), sorted(folder.glob("*.png"))
    with pytest.raises(ValueError, match="out of memory"):
        nudity_judge.look_for_nudity(config, paths, folder)
    assert not kept.exists()
    assert nudity_judge.look_for_nudity(config, paths, folder).images == whole.images
    assert kept.exists()


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_without_its_classifier_nothing_is_counted(
    text_runs: Runner, text_run: Path, copied: Path, micro_classifier: Path, tmp_path: Path, lost: str
) -> None:
    lame = Path(shutil.copytree(micro_classifier, tmp_path / "lame"))
    (lame / lost).unlink()
    (copied / "report.json").unlink()
    with pytest.raises(ValueError, match="lame"):
        count_again(text_runs, copied, text_run, f"eval.classifier={lame}")
    assert not (copied / "report.json").exists()


def shuffle(out: Path, key: str) -> None:
    """Exchange a value of two rows of the erased images' manifest."""
    path = out / "images/erased/manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0][key], lines[2][key] = lines[2][key], lines[0][key]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def exchange(a: Path, b: Path) -> None:
    a.rename(a.with_name("between"))
    b.rename(a)
    a.with_name("between").rename(b)


def exchange_models(out: Path) -> None:
    exchange(out / "images/base", out / "images/erased")


def exchange_numbers(out: Path) -> None:
    found = read(out / "report.json")
    found["before"], found["after"] = found["after"], found["before"]
    (out / "report.json").write_text(json.dumps(found))
    shutil.rmtree(out / "images")


LIES: dict[str, Callable[[Path], None]] = {
    "prompt": lambda out: shuffle(out, "prompt"),
    "seed": lambda out: shuffle(out, "seed"),
    "image": lambda out: exchange(out / "images/erased/00000-00.png", out / "images/erased/00001-00.png"),
    "model": exchange_models,
    "numbers": exchange_numbers,
}


@pytest.mark.parametrize("lie", LIES)
def test_images_that_are_not_what_they_seem(text_runs: Runner, text_run: Path, copied: Path, lie: str) -> None:
    """Neither counted nor put on a page: shuffled prompts, exchanged files, base and erased swapped."""
    (copied / "report.html").unlink()
    LIES[lie](copied)
    with pytest.raises(ValueError, match=r"images|run\.json"):
        report.write_html(copied)
    if lie != "numbers":
        with pytest.raises(ValueError, match="images"):
            count_again(text_runs, copied, text_run)
    assert not (copied / "report.html").exists()


def test_shuffled_and_swapped_images_of_a_run_without_records(copied: Path) -> None:
    """As of an earlier version: what the folders themselves say is enough."""
    found = read(copied / "report.json")
    for when in ("before", "after"):
        del found[when]["pictures"]
    (copied / "report.json").write_text(json.dumps(found))
    report.write_html(copied)
    exchange_models(copied)
    with pytest.raises(ValueError, match=r"images/base .* run\.json"):
        report.write_html(copied)
    exchange_models(copied)
    shuffle(copied, "prompt")
    with pytest.raises(ValueError, match="images/base and images/erased"):
        report.write_html(copied)


def plan_of(*lines: str) -> Plan:
    """`prompt, object, style, forgotten` a line; the prompts marked with ! are the forget prompts."""
    parts = [[part.strip() for part in line.split(",")] for line in lines]
    return Plan(
        forget=[prompt.removeprefix("!") for prompt, *_ in parts if prompt.startswith("!")],
        anchors=["a dog"],
        remain=["a dog"],
        rows=[
            PromptRow(prompt.removeprefix("!"), number, object=thing, style=style)
            for number, (prompt, thing, style, _) in enumerate(parts)
        ],
        forgotten=[gone == "gone" for *_, gone in parts],
    )


PAIRS = tuple(f"{thing}/{style}" for thing in ("cat", "dog", "car") for style in ("plain", "sepia"))
SEEN = (  # what the two images of each row show after erasure
    "cat/plain dog/plain",  # asked: a photo of a cat
    "dog/sepia dog/sepia",  # a sepia cat
    "dog/plain cat/plain",  # a photo of a dog
    "dog/plain dog/sepia",  # a photo of a dog, again
    "car/plain car/plain",  # a photo of a car
    "dog/sepia dog/plain",  # a sepia dog
)
ROWS = (
    "a photo of a cat, cat, plain",
    "a sepia cat, cat, sepia",
    "a photo of a dog, dog, plain",
    "a photo of a dog, dog, plain",
    "a photo of a car, car, plain",
    "a sepia dog, dog, sepia",
)
KEYS = ("forget", "forms", "kept", "remain", "drop", "worst", "pairs_drop", "ua", "ira", "cra", "shows")
AXES: dict[str, tuple[tuple[str, ...], dict[str, str], tuple[Any, ...]]] = {
    "object": (
        (f"!{ROWS[0]}, gone", f"{ROWS[1]}, gone", *(f"{row}, stays" for row in ROWS[2:])),
        {"a photo of a cat": "forget", "a sepia cat": "form"},
        # plain dogs 3 of 4 and cars 2 of 2 stay; of the sepia dogs both are dogs, one is a sepia dog
        (0.5, 0, 1, 0.875, 12.5, 25, 50, 1 - (0.5 + 0) / 2, (0.75 + 1 + 1) / 3, (1 + 1 + 0.75 + 1 + 0.5) / 5, "dog"),
    ),
    "style": (
        (f"{ROWS[0]}, stays", f"!{ROWS[1]}, gone", *(f"{row}, stays" for row in ROWS[2:5]), f"{ROWS[5]}, gone"),
        {"a sepia cat": "forget", "a sepia dog": "form"},
        # the plain cat is plain in both images; of the plain dogs 2 of 4 are right on both axes, of the cars all
        (1, 0.5, 0.5, 1, 0, 0, 25, 1 - (1 + 0.5) / 2, (1 + 0.75 + 1) / 3, (0.5 + 0 + 0.75 + 1 + 1) / 5, "sepia"),
    ),
}


@pytest.mark.parametrize("axis", AXES)
def test_a_report_is_summed_up(text_runs: Runner, monkeypatch: pytest.MonkeyPatch, axis: str) -> None:
    lines, sides, numbers = AXES[axis]
    expected = dict(zip(KEYS, numbers, strict=True))
    if axis == "object":
        expected["anchor"] = 3 / 4  # of the four images of cats, those that show a dog; no anchor names a style
    plan, config = plan_of(*lines), text_runs.config(f"forget.axis={axis}")
    right = [f"{row.object}/{row.style}" for row in plan.rows for _ in range(2)]
    found = []
    for shown in (right, " ".join(SEEN).split()):
        paths = tuple(Path(str(i)) for i in range(len(shown)))
        guess = classes.ClassPredictions(np.eye(len(PAIRS))[[PAIRS.index(p) for p in shown]], PAIRS, paths, "mine", "0")
        monkeypatch.setattr(classes, "classify", lambda *_, guess=guess: guess)
        counted = labels.count_classes(config, plan, list(paths))
        counts, each = counted.numbers, counted.outcomes
        found.append(counts)
        assert each.keys() == {"forget", "forget_pairs", "remain", "remain_pairs"}
        for what, hits in each.items():  # in the paired test, what is in the counts
            assert (sum(hits), len(hits)) == (counts[what]["correct"], counts[what]["n"])
    scores = found[1]["per_prompt"]
    assert {prompt: row["side"] for prompt, row in scores.items() if row["side"] != "remain"} == sides
    dog = scores["a photo of a dog"]  # two rows
    assert (dog["n"], dog["correct"], dog["object"], dog["style"], dog["pair_accuracy"]) == (4, 3, "dog", "plain", 0.5)
    whole: Any = {"before": {"classes": found[0]}, "after": {"classes": found[1]}, "timing": {"erase_s": 2.0}}
    times = {"data_s": None, "saliency_s": None, "erase_s": 2.0, "rte_s": 2.0}
    assert summarise(whole) == pytest.approx({**expected, **times})
    whole["before"]["nudity"], whole["after"]["nudity"] = {"rate": 0.9}, {"rate": 0.1}
    assert summarise(whole) == pytest.approx({**expected, **times, "flagged_before": 0.9, "flagged": 0.1})


def test_of_two_objects_the_one_that_stays_is_right(text_runs: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a classifier of several axes: with the concept in an image, or without it."""
    known = ("object=cat", "object=dog", "object=car", "style=plain", "style=sepia")
    lines = (
        "!a cat, cat, plain, gone",
        "a cat and a dog, cat+dog, plain, stays",
        "a car and a dog, car+dog, plain, stays",
    )
    plan = plan_of(*lines)
    config = text_runs.config("forget.axis=object", "eval.images=1", "eval.flag=[object=cat/style=plain]")
    seen = np.array([[0.2, 0.6, 0, 0.9, 0.1], [0.1, 0.9, 0, 0.9, 0.1], [0, 0.9, 0.3, 0.9, 0.1]])
    paths = tuple(Path(str(i)) for i in range(3))
    guess = classes.ClassPredictions(seen, known, paths, "mine", "0", axes=axes_of(known, ["object"]))
    monkeypatch.setattr(classes, "classify", lambda *_, **__: guess)
    monkeypatch.setattr(classes, "labels_of", lambda _: known)
    judge, flags = labels.Labels(config, plan), labels.Flags(config, plan)
    judge.check()
    flags.check()
    counted = judge.count(paths)
    assert counted.outcomes["forget"] == counted.outcomes["forget_pairs"] == [False]
    assert counted.outcomes["remain"] == counted.outcomes["remain_pairs"] == [True, False]
    assert counted.numbers["forget_shows"] == {"dog": 1}
    assert counted.numbers["per_prompt"]["a cat and a dog"]["pair_accuracy"] == 1
    said = judge.judge(paths, plan.rows)
    assert (said.shows, said.right) == ([False, False, False], [False, True, False])
    bare = labels.Labels(config, replace(plan, rows=[replace(row, style=None) for row in plan.rows]))
    bare.check()
    assert bare.count(paths).outcomes == {"forget": [False], "remain": [True, False]}
    seen[1, 0] = 0.7  # the cat is still there; its partner is, too
    assert judge.count(paths).outcomes["remain"] == [True, False]
    assert judge.judge(paths, plan.rows).shows == [False, True, False]
    assert flags.judge(paths, plan.rows).shows == [False, True, False]
    odd = labels.Labels(config, plan_of("!a cat, cat, plain, gone", "a hat and a dog, hat+dog, plain, stays"))
    with pytest.raises(ValueError, match="labelled 'hat\\+dog', the classifier knows cat, dog, car"):
        odd.check()
    with pytest.raises(ValueError, match=r"eval\.flag has 'object=cat/style=old'"):
        labels.Flags(text_runs.config("eval.flag=[object=cat/style=old]"), plan).check()


def test_what_is_near_far_and_beside_the_concept_is_summed_up(
    text_runs: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ("cat", "dog", "car")
    plan = plan_of(
        "!a cat, cat, , gone", "a dog, dog, , stays", "a car, car, , stays", "a dog and a cat, dog+cat, , stays"
    )
    kinds = ("animal", "animal", "thing", None)
    plan = replace(plan, rows=[replace(row, group=kind) for row, kind in zip(plan.rows, kinds, strict=True)])
    config = text_runs.config("forget.axis=object", "eval.images=2")
    monkeypatch.setattr(labels, "wanted", lambda row, *_: row.object.split("+")[0])
    counts = []
    for shown in ("cat cat dog dog car car dog cat", "dog dog dog cat car car dog dog"):
        hits = np.eye(3)[[known.index(name) for name in shown.split()]]
        guess = classes.ClassPredictions(hits, known, tuple(Path(str(i)) for i in range(8)), "mine", "0")
        monkeypatch.setattr(classes, "classify", lambda *_, guess=guess: guess)
        counts.append(labels.count_classes(config, plan, list(guess.files)).numbers)
    assert [row.get("part") for row in counts[0]["per_prompt"].values()] == [None, "near", "far", "partner"]
    summary = summarise({"before": {"classes": counts[0]}, "after": {"classes": counts[1]}, "timing": {"erase_s": 1.0}})
    assert {key: summary[key] for key in ("near", "near_kept", "far", "far_kept")} == {
        "near": 0.5,
        "near_kept": 0.5,
        "far": 1.0,
        "far_kept": 1.0,
    }
    assert (summary["partner"], summary["partner_kept"]) == (1.0, 2.0)
    for part in (
        "near",
        "far",
        "partner",
    ):  # more than all of the base's is possible, and an interval must not end at 1
        assert (name_of("summary", part).most, name_of("summary", f"{part}_kept").most) == (1.0, None)
    counts[0]["per_prompt"]["a dog"]["accuracy"] = 0.0  # the base knows none of the group
    summary = summarise({"before": {"classes": counts[0]}, "after": {"classes": counts[1]}, "timing": {"erase_s": 1.0}})
    assert (summary["near"], summary["near_kept"]) == (0.5, None)


@pytest.mark.parametrize(
    ("thing", "group", "groups", "part"),
    [
        ("dog", "animal", {"animal"}, "near"),
        ("dog", "animal", {"thing"}, "far"),
        ("dog", None, {"animal"}, None),
        ("dog", "animal", set(), None),  # the erased concept's group is not known: nothing is far from it
        ("dog+cat", None, {"animal"}, "partner"),
        ("dog+cat", "animal", set(), "partner"),
        ("cat+tiger", None, set(), None),  # nothing of it stays
        ("dog+car", "animal", {"animal"}, "near"),
    ],
)
def test_parts_of_what_stays(thing: str, group: str | None, groups: set[str], part: str | None) -> None:
    row = PromptRow("a prompt", 0, object=thing, group=group)
    assert labels.part_of(row, {"cat", "tiger"}, groups) == part


def test_a_report_without_a_classifier_is_summed_up() -> None:
    found = {"before": {"nudity": {"rate": 0.9}}, "after": {"nudity": {"rate": 0.1}}, "timing": {"erase_s": None}}
    time = dict.fromkeys(("data_s", "saliency_s", "erase_s", "rte_s"))
    assert summarise(found) == {"forget": 0.1, "flagged_before": 0.9, "flagged": 0.1, **time}
    assert summarise({**found, "before": {}, "after": {}}) == time


def test_nudity_is_counted_by_prompt_where_rows_share_one() -> None:
    plan = plan_of("!a, x, x, gone", "!a, x, x, gone", "b, x, x, stays", "a, x, x, gone")
    flagged = [True, False, True, True, False, True, False, False]
    images = tuple(
        detections.ImageDetections(Path(f"{i}.png"), (detections.Detection("FACE_FEMALE", 0.9, (0, 0, 1, 1)),) * shown)
        for i, shown in enumerate(flagged)
    )
    found = detections.Detections(images, "3.4.2", "0", "corrected", 320)
    result, flags = nudity_judge.count_nudity(found, nudity.custom_preset(["FACE_FEMALE"], 0.5), plan, 2)
    assert result["by_prompt"] == {"a": 3, "b": 1}
    assert (result["images"], result["flagged"]) == (6, 3)
    assert flags == [True, False, True, True, False, False]


# --- comparing ------------------------------------------------------------------------------------


def test_base_images_of_an_earlier_run_are_copied(
    text_runs: Runner, text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the earlier run has not is generated; other settings or weights are refused."""
    drawn: list[str] = []
    draw, base = Model.generate, text_run / "images/base"
    monkeypatch.setattr(
        Model, "generate", lambda self, words, *a, **k: drawn.extend(words) or draw(self, words, *a, **k)
    )
    words = ("forget.prompts=a photo of a dog", "forget.anchors=a photo of a cat", "eval.classifier=null")
    words = (*words, f"eval.base={base}", "eval.prompts=[a boat, {work}/set.csv]")
    job = text_runs.job(*words, out=tmp_path)
    job.record()
    job.measure_base()
    assert drawn == ["a boat"] * 4  # a batch, half of it padding
    own, theirs = (
        {(r.prompt, r.seed, r.index): (folder / r.file).read_bytes() for r in read_manifest(folder)}
        for folder in (tmp_path / "images/base", base)
    )
    assert own.items() > theirs.items()
    assert len(own) == len(theirs) + 2
    other = Path(shutil.copytree(text_runs.config().model, tmp_path / "other"))
    scheduler = other / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**read(scheduler), "prediction_type": "v_prediction"}))
    for number, (word, key) in enumerate(
        {
            "draw.steps=3": r"settings\.draw\.steps",
            "draw.sampler=euler_a": r"settings\.scheduler.*settings\.draw\.sampler",
            "precision=bf16": r"settings\.precision",
            f"model={text_run / 'model'}": r"settings\.weights",
            f"model={other}": r"settings\.configs\.scheduler",
        }.items()
    ):
        job = text_runs.job(f"eval.base={base}", word, out=tmp_path / str(number))
        job.record()
        with pytest.raises(ValueError, match=key):
            job.measure_base()


def test_a_comparison_from_end_to_end(text_runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    targets = {
        name: {"forget": {"prompts": [f"a photo of a {name}"], "anchors": ["a photo of a boat"]}}
        for name in ("cat", "dog")
    }
    settings = {"eval": {"images": 1}, "train": {"steps": 1}, "saliency": {"kind": "none", "density": None}}
    spec = {"pipeline": "sd", "preset": str(text_runs.preset), "settings": settings, "targets": targets}
    Path("mine.yaml").write_text(yaml.safe_dump(spec))
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["erase", "compare", "mine.yaml", "forget.count=1", "--out", "out"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        monkeypatch.setattr(jobs.Job, "lesson", stop)  # the second time nothing is left to do
    header, _, *lines = Path("out/table.md").read_text().splitlines()
    assert header.startswith("| method | target | forget | forms | kept | remain | drop | worst | pairs_drop | ua |")
    cells = [line.split(" | ")[:2] for line in lines if line.startswith("|")]
    assert cells == [["| sfron", name] for name in ("cat", "dog", "all")]
    cat, dog = (Path(f"out/runs/sfron/{name}/0") for name in ("cat", "dog"))
    assert read(dog / "run.json")["config"]["eval"]["base"] == str(cat / "images/base")
    assert len(list(Path("out/drawn").iterdir())) == 4  # each concept's own, and what stays with each
    for result, run in zip(read(Path("out/results.json"))["runs"], (cat, dog), strict=True):
        after = read(run / "report.json")["after"]["classes"]
        assert (result["forget"], result["remain"]) == (
            after["forget"]["accuracy"],
            pytest.approx(after["remain"]["accuracy"]),
        )
