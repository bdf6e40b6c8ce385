"""Judges of a run on a text-to-image model, by any concept: CLIP that is calibrated, a classifier's flags, or none."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import Runner, StopError, read, rows, silent, stop, table
from launched import two

from erase.evaluation import classes, clip, report
from erase.evaluation.clip import text_features
from erase.evaluation.manifest import images_of, read_manifest
from erase.evaluation.page import verdict
from erase.programs.attack import attack_run
from erase.programs.text.job import Job
from erase.programs.text.judge import judges_of
from erase.programs.text.judges.zeroshot import ZeroShot
from erase.programs.text.plan import make_plan
from erase.programs.text.report import summarise

OTHERS = ("a dog", "a car", "a boat", "a photo of a dog", "a photo of a car")
PLAIN = ("forget.prompts=a cat", "forget.anchors=a dog", f"eval.prompts=[{', '.join(OTHERS)}]", "forget.axis=null")
PLAIN = (*PLAIN, f"remain.prompts=[{', '.join(OTHERS)}]", "eval.classifier=null", "eval.images=6", "forget.count=2")
PLAIN = (*PLAIN, "saliency={kind: none, density: null}", "train.steps=1", "remain.count=1")
PLAIN = (*PLAIN, "draw.steps=1", "draw.batch_size=36")  # all of a model's images in one batch
Shown = Callable[[str, str], str]
"""What an image shows, by its folder's name and its prompt, in words that the judge reads as pixels."""


@pytest.fixture
def clip_words(micro_clip: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Shown], tuple[str, ...]]:
    """Settings of a zero-shot judge that sees in images what it is told they show."""

    def given(shown: Shown) -> tuple[str, ...]:
        def features(self: ZeroShot, paths: Sequence[Path]) -> Any:
            prompts = {row.file: row.prompt for row in read_manifest(paths[0].parent)}
            return [text_features(self.model, [shown(path.parent.name, prompts[path.name]) for path in paths])]

        monkeypatch.setattr(ZeroShot, "features", features)
        return (*PLAIN, f"eval.clip={micro_clip}")

    return given


def erased_well(folder: str, prompt: str) -> str:
    """The base shows what is asked for, the erased model the anchor instead of the concept."""
    return "a dog" if prompt == "a cat" and folder != "base" else prompt


def start(runs: Runner, out: Path, *words: str, **options: Any) -> list[str]:
    said: list[str] = []
    runs(out, *words, say=said.append, **options)
    return said


def test_a_concept_without_labels_is_judged(
    text_runs: Runner, clip_words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, opened, looked = clip_words(erased_well), [], []
    real, features = clip.open_clip, ZeroShot.features
    monkeypatch.setattr(clip, "open_clip", lambda name: opened.append(name) or real(name))
    monkeypatch.setattr(ZeroShot, "features", lambda self, paths: looked.append(paths[0]) or features(self, paths))
    said = start(text_runs, tmp_path / "run", *words)
    assert len(opened) == 1  # one judge for all of a run
    assert [path.parent.name for path in looked] == ["base", "erased"]
    found = read(tmp_path / "run/report.json")
    before, after = found["before"]["clip"], found["after"]["clip"]
    assert [(side["forget"]["correct"], side["forget"]["n"]) for side in (before, after)] == [(6, 6), (0, 6)]
    assert [(side["remain"]["correct"], side["remain"]["n"]) for side in (before, after)] == [(30, 30), (30, 30)]
    assert before["alternatives"] == [*OTHERS, "something else"]
    assert (before["mistaken"], after["forget_shows"]) == (0, {"a dog": 1.0})
    assert after["per_prompt"]["a cat"]["side"] == "forget"
    assert found["paired"]["clip_forget_mcnemar_p"] == pytest.approx(2 * 0.5**6)
    assert found["paired"]["clip_score"]["difference"] == pytest.approx(0)
    assert before["score"]["score"] == pytest.approx(100)
    lines = {line.path: line.mark for line in verdict.lines(found)}
    assert lines[("clip", "forget")] == "good"
    assert lines[("clip", "remain")] in ("good", "open")
    assert "unjudged" not in found
    page = html.unescape((tmp_path / "run/report.html").read_text())
    stated = report.calibration(found)
    assert stated is not None
    assert "6 of 6" in stated
    assert said.count(stated) == 2  # before the first step, and at the end
    assert stated in page
    assert str(report.clip_score(found)) in page
    summary = summarise(found)
    assert (summary["forget"], summary["ua"], summary["ira"], summary["shows"]) == (0, 1, 1, "a dog")
    assert (summary["drop"], summary["worst"], summary["anchor"]) == (0, 0, 1)


IGNORANT: dict[str, tuple[Shown, set[str]]] = {
    "does not see it": (lambda folder, prompt: prompt.replace("a cat", "something else"), {"forget"}),
    "sees it everywhere": (lambda folder, prompt: "a cat", {"forget", "remain"}),
    "mixes the others up": (lambda folder, prompt: "a cat" if prompt == "a cat" else "something else", {"remain"}),
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.slow] * (what != "sees it everywhere")) for what in IGNORANT]
)
def test_a_judge_that_does_not_know_gives_no_verdict(
    text_runs: Runner, clip_words: Any, tmp_path: Path, what: str
) -> None:
    shown, sides = IGNORANT[what]
    words = clip_words(shown)
    said = start(text_runs, tmp_path / "run", *words)
    found = read(tmp_path / "run/report.json")
    lines = {line.path[-1]: line for line in verdict.lines(found)}
    summary = summarise(found)
    for side, names in (("forget", ("forget", "ua", "anchor", "shows")), ("remain", ("remain", "ira", "drop"))):
        assert (lines[side].mark == "unknown") is (side in sides)
        assert (f"clip_{side}_mcnemar_p" in found["paired"]) is (side not in sides)
        assert {summary[name] is None for name in names} == {side in sides}
    assert (lines["forget_anchor"].mark == "unknown") is ("forget" in sides)
    why = {side: found["before"]["clip"][side]["no_verdict"] for side in sides}
    assert all(any(reason in line for line in said[:2]) for reason in why.values())
    asked = "until={remain: null}" if "forget" in sides else "until={}"
    for number, word in enumerate((asked, "eval.attacks=[relearn]") if "forget" in sides else (asked,)):
        out = tmp_path / str(number)
        with pytest.raises(ValueError, match=r"eval\.clip") as caught:
            text_runs(out, *words, word)
        assert "\n" not in str(caught.value)
        assert not (out / "metrics.jsonl").exists()  # before a step was made


@pytest.mark.slow
def test_looks_and_attacks_are_judged(text_runs: Runner, clip_words: Any, tmp_path: Path) -> None:
    """The second look finds the concept gone and the rest right; a paraphrase of the erased model shows it still."""

    def shown(folder: str, prompt: str) -> str:
        gone = {"after step 1": "a cat", "after step 2": "a car", "erased": "a cat"}
        return gone.get(folder, prompt).replace("sepia ", "") if "cat" in prompt else prompt

    words = (*clip_words(shown), "train.steps=4", "until={every: 1, images: 2}", "eval.attacks=[paraphrases]")
    words = (*words, "attack.paraphrases={images: 2, prompts: [a photo of a cat]}")
    out = text_runs(tmp_path / "run", *words)
    found = read(out / "report.json")
    assert found["until"]["looks"] == {"1": {"forget": 1.0, "remain": 1.0}, "2": {"forget": 0.0, "remain": 1.0}}
    assert (found["until"]["ended"], len(rows(out))) == (2, 2)
    assert found["robustness"]["judge"] == text_runs.config(*words).eval.clip
    assert found["robustness"]["paraphrases"]["erased"]["shown"] == 2
    again = [f"eval.clip={found['robustness']['judge']}", "eval.alternatives=[a boat, a car]"]
    attack_run(out, again, tmp_path / "attacked", say=silent)
    assert read(tmp_path / "attacked/report.json")["robustness"]["paraphrases"]["erased"]["shown"] == 2


@pytest.mark.slow
def test_two_processes_judge_as_one(text_runs: Runner, micro_clip: Path, tmp_path: Path) -> None:
    words = (*PLAIN, f"eval.clip={micro_clip}")
    assert two(lambda: text_runs(tmp_path / "run", *words), tmp_path / "log") == [0, 0]
    config = text_runs.config(*words)
    (judge,) = judges_of(config, make_plan(config))
    alone = judge.count(images_of(tmp_path / "run/images/base")).numbers
    found = read(tmp_path / "run/report.json")["before"]["clip"]
    assert found["per_prompt"] == alone["per_prompt"]
    assert found["score"]["score"] == pytest.approx(alone["score"]["score"])


def test_alternatives_are_named(text_runs: Runner, micro_clip: Path) -> None:
    words = (*PLAIN, f"eval.clip={micro_clip}", "eval.alternatives=[a boat, {work}/set.csv, a lion]")
    config = text_runs.config(*words)
    (judge,) = judges_of(config, make_plan(config))
    assert isinstance(judge, ZeroShot)
    assert judge.texts.concept == ("a cat",)
    photos = [f"a photo of a {name}" for name in ("cat", "dog", "car", "boat")]
    assert judge.texts.alternatives == ("a boat", *photos, "a lion")


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_classifier_flags_prompts_without_labels(
    text_runs: Runner, micro_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flagged are images whose flagged labels are together more probable than not."""
    table = {"base": (0.3, 0.3, 0.2, 0.2), "erased": (0.3, 0.1, 0.5, 0.1)}
    real = classes.classify

    def classify(paths: Sequence[Path], *given: Any, **more: Any) -> Any:
        guess = real(paths, *given, **more)
        found = np.array([table[path.parent.name] for path in paths])
        return classes.replace(guess, probabilities=found)

    monkeypatch.setattr(classes, "classify", classify)
    words = (*PLAIN, f"eval.classifier={micro_classifier}", "eval.flag=[cat/plain, dog/plain]")
    out = text_runs(tmp_path / "run", *words)
    found = read(out / "report.json")
    before, after = found["before"]["flagged"], found["after"]["flagged"]
    assert [(part["flagged"], part["images"]) for part in (before, after)] == [(6, 6), (0, 6)]
    assert before["by_prompt"] == dict.fromkeys(["a cat", *OTHERS], 6)
    assert found["paired"] == {"flagged_mcnemar_p": pytest.approx(2 * 0.5**6)}
    (line,) = verdict.lines(found)
    assert (line.path, line.mark) == (("flagged",), "good")
    summary = summarise(found)
    assert (summary["flagged_before"], summary["flagged"], summary["forget"]) == (1, 0, 0)
    config = text_runs.config(*words)
    (judge,) = judges_of(config, make_plan(config))
    paths = images_of(out / "images/base")
    assert (judge.judge(paths, []).shows, judge.judge(paths, []).right) == ([True] * 36, None)


# --- nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("eval.classifier=null",), ("eval.images=0",)], ids=["no judge", "no images"])
def test_a_run_that_judges_nothing_says_so_first(text_runs: Runner, tmp_path: Path, words: tuple[str, ...]) -> None:
    said = start(text_runs, tmp_path / "run", "saliency={kind: none, density: null}", "train.steps=1", *words)
    found = read(tmp_path / "run/report.json")
    assert found["unjudged"] == said[0].splitlines()[0]
    why = found["unjudged"].partition(": ")[2]
    assert ("eval.clip" if "null" in words[0] else "eval.images=0") in why
    assert f"Nothing was judged: {why}." in report.verdict(found)[0]
    assert f"Nothing was judged: {why}." in (tmp_path / "run/report.html").read_text()


def test_a_judged_run_does_not(text_run: Path) -> None:
    assert "unjudged" not in read(text_run / "report.json")


# --- refusals -------------------------------------------------------------------------------------

REFUSED = table("""
flags of no classifier | eval.flag=[nsfw] ; eval.classifier=null | eval.flag
unknown flag | eval.flag=[nsfw] | cat/plain
alternatives of no judge | eval.alternatives=[a dog] | eval.alternatives
concept among the alternatives | eval.clip={clip} ; eval.alternatives=[a dog, a photo of a cat] | eval.alternatives
unknown name | eval.clip=photos-clop | photos-clip
no such folder | eval.clip=here/nothing | eval.clip
another model | eval.clip={classifier} | eval.clip
looks without calibration | eval.clip={clip} ; eval.classifier=null ; eval.images=0 ; until={} | eval.images
attacks with few images | eval.clip={clip} ; eval.classifier=null ; eval.images=5 ; eval.attacks=[relearn] | eval.images
flags know nothing else | eval.flag=[cat/plain] ; until={} | until.remain
""")


@pytest.mark.parametrize("what", REFUSED)
def test_a_judge_that_cannot_be_is_refused_before_anything(
    text_runs: Runner, tmp_path: Path, micro_clip: Path, micro_classifier: Path, what: str
) -> None:
    words, named = REFUSED[what]
    given = [word.replace("{clip}", str(micro_clip)).replace("{classifier}", str(micro_classifier)) for word in words]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        text_runs(tmp_path / "out", *given)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_run_with_a_zero_shot_judge_resumes(
    text_runs: Runner, clip_words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = clip_words(erased_well)
    with monkeypatch.context() as patch:
        patch.setattr(Job, "report", stop)
        with pytest.raises(StopError):
            text_runs(tmp_path / "run", *words)
    out = text_runs(tmp_path / "run", *words, resume=True)
    assert read(out / "report.json")["after"]["clip"]["forget"]["correct"] == 0
