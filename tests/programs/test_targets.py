"""Forget prompts, anchors, attributes and weights: from settings, from files, and into what a method learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Runner, read

from erase.diffusion import text
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import open_model
from erase.engine.precision import Precision
from erase.programs.text.data import cache
from erase.programs.text.plan import make_plan
from erase.programs.text.targets import make_targets

QUICK = ("saliency.kind=none", "eval.images=0", "train.steps=1")
ESD = ("method={name: esd, fast_rate: 1e-2, fast_rule: sgd}", "forget.anchors=[]", *QUICK)


def test_prompts_anchors_and_weights_of_a_file(text_runs: Runner, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt,anchor,weight\na cat,a dog,3\na car,a boat,\n")
    (tmp_path / "more.txt").write_text("a boat\na photo of a boat\n")
    mine = make_targets(text_runs.config(f"forget.prompts={tmp_path}/mine.csv", "forget.anchors=[]"))
    assert (mine.prompts, mine.anchors, mine.weights) == (["a cat", "a car"], ["a dog", "a boat"], [1.5, 0.5])
    words = (f"forget.prompts=[{tmp_path}/more.txt, a car]", "forget.anchors=a dog", "forget.weights=[1, 1, 4]")
    more = make_targets(text_runs.config(*words))
    assert more.prompts == ["a boat", "a photo of a boat", "a car"]
    assert (more.anchors, more.weights) == (["a dog"] * 3, [0.5, 0.5, 2.0])
    both = text_runs.config("forget.prompts=[a cat, a car]", f"forget.anchors={tmp_path}/more.txt")
    assert make_targets(both).anchors == ["a boat", "a photo of a boat"]


def test_rows_of_a_labelled_set_that_we_ship(text_runs: Runner) -> None:
    birds = ("forget.prompts=emoji-birds.csv", "forget.anchors=[]")
    found = make_targets(text_runs.config(*birds, "forget.only=[owl, icon]"))
    assert "a cartoon of an owl" in found.prompts
    assert all("owl" in prompt or "icon" in prompt for prompt in found.prompts)
    assert len(found.anchors) == len(found.prompts) < len(make_targets(text_runs.config(*birds)).prompts)
    with pytest.raises(ValueError, match=r"forget\.only has 'cat', .* owl"):
        make_targets(text_runs.config(*birds, "forget.only=cat"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("forget.prompts={mine}",), r"forget\.anchors"),
        (("forget.prompts={mine}", "forget.anchors=[]", "forget.weights=[1, 2]"), r"forget\.weights"),
        (("forget.prompts=[{mine}, a boat]", "forget.anchors=[]"), "a boat"),
        (("forget.weights=[1, 2]",), r"forget\.weights has 2 numbers for 1"),
        (("forget.prompts={bad}",), "row 1: weight is '0'"),
        (("forget.prompts=none.csv",), "none.csv"),
        (("forget.erase_from=a dog",), r"forget\.erase_from is for method\.name=esd"),
        ((*ESD, "forget.prompts=[a cat, a car]", "forget.erase_from=a dog"), r"forget\.erase_from has 1"),
        ((*ESD, "forget.erase_from=[a dog, a dog]"), r"forget\.erase_from has 2"),
    ],
)
def test_lists_that_do_not_match(text_runs: Runner, tmp_path: Path, words: tuple[str, ...], named: str) -> None:
    (tmp_path / "mine.csv").write_text("prompt,anchor,weight\na cat,a dog,3\na car,a boat,1\n")
    (tmp_path / "bad.csv").write_text("prompt,weight\na cat,0\n")
    files = {"mine": tmp_path / "mine.csv", "bad": tmp_path / "bad.csv"}
    given = [word if word.startswith("method=") else word.format(**files) for word in words]
    with pytest.raises(ValueError, match=named) as refused:
        make_plan(text_runs.config(*given))
    assert "\n" not in str(refused.value)


def test_a_prompt_that_stands_twice_counts_once(text_runs: Runner, tmp_path: Path) -> None:
    """As a word that is the same in two languages."""
    table = tmp_path / "words.csv"
    table.write_text("prompt,anchor,weight\na cat,a dog,2\na cow,a dog,1\na cat,a dog,2\n")
    found = make_targets(text_runs.config(f"forget.prompts={table}", "forget.anchors=[]"))
    assert (found.prompts, found.anchors, found.weights) == (["a cat", "a cow"], ["a dog"] * 2, [4 / 3, 2 / 3])
    typed = make_targets(text_runs.config("forget.prompts=[a cat, a cow, a cat]", "forget.anchors=[a dog]"))
    assert (typed.prompts, typed.anchors, typed.weights) == (["a cat", "a cow"], ["a dog"] * 2, [])
    table.write_text("prompt,anchor\na cat,a dog\na cat,a boat\n")
    with pytest.raises(ValueError, match=r"'a cat' twice, with the anchors 'a dog' and 'a boat': give it one"):
        make_targets(text_runs.config(f"forget.prompts={table}", "forget.anchors=[]"))


def test_weights_reach_the_samples(text_runs: Runner, tmp_path: Path) -> None:
    words = ("forget.prompts=[a cat, a car]", "forget.weights=[3, 1]", "train.steps=2", *QUICK)
    job: Any = text_runs.job(*words)
    forget, remain, _ = cache(job.config, job.plan, job.model, Precision("no", torch.device("cpu")))
    assert forget is not None
    assert remain is not None
    assert forget.weight is not None
    assert forget.weight.tolist() == [1.5, 1.5, 0.5, 0.5]  # two images each
    assert remain.weight is None
    out = text_runs(tmp_path / "out", *words, "saliency.kind=fisher")
    assert read(out / "run.json")["config"]["forget"]["weights"] == [3.0, 1.0]


def test_weights_of_closed_forms(micro_sd: Path) -> None:
    """They scale the squares in the sums."""
    model = open_model(locate(micro_sd))
    prompts, anchors = ["a photo of a cat", "a photo of a car"], ["a photo of a dog", "a photo of a boat"]
    plain = text.concepts(model, prompts, anchors, [""])
    heavy = text.concepts(model, prompts, anchors, [""], shares=[4.0, 1.0])
    rows = len(plain.erased) // 2
    for one, other in ((plain.erased, heavy.erased), (plain.targets, heavy.targets)):
        torch.testing.assert_close(other[:rows], 2 * one[:rows])
        assert torch.equal(other[rows:], one[rows:])
    assert torch.equal(plain.kept, heavy.kept)


def test_an_attribute_is_erased_from_a_prompt(text_runs: Runner, tmp_path: Path) -> None:
    """The prompt that it is erased from is generated, trained and named; the attribute alone is not marked as gone."""
    words = ("forget.prompts=sepia", "forget.erase_from=a photo of a cat", *ESD)
    job: Any = text_runs.job(*words)
    assert (job.plan.forget, job.plan.attributes) == (["a photo of a cat"], ["sepia"])
    assert "sepia from a photo of a cat" in job.announcement()
    forget, _, _ = cache(job.config, job.plan, job.model, Precision("no", torch.device("cpu")), (True, False))
    assert forget is not None
    batch = forget.gather(torch.tensor([0, 1]))
    embedded = job.model.embed(["a photo of a cat", "sepia"])["text"]
    torch.testing.assert_close(batch["cond"]["text"], embedded[[0, 0]])
    torch.testing.assert_close(batch["attribute"]["text"], embedded[[1, 1]])
    out = text_runs(tmp_path / "out", *words)
    assert read(out / "run.json")["plan"]["attributes"] == ["sepia"]
    assert read(out / "report.json")["target"]["attributes"] == ["sepia"]
    again: Any = text_runs.job(f"model={out}/model", "forget.prompts=a photo of a dog", "forget.anchors=a boat")
    assert "a photo of a cat" in again.plan.remain
    two = text_runs.job(*words, "forget.erase_from=[a photo of a cat, a photo of a dog]").plan
    assert two.attributes == ["sepia", "sepia"]
