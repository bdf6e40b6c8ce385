"""`sd_concept_sfron`: a model and a forget prompt are enough, for every family of text-to-image models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import micro
import micro_flux
import micro_lumina2
import micro_pixart
import micro_sd3
import micro_sdxl
import pytest
from jobs import Runner, changed, read
from safetensors.torch import load_file

from erase import resources
from erase.config import SdConfig, over, override, parse, read_preset
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.families import family
from erase.diffusion.model import open_model
from erase.diffusion.parameters import select
from erase.evaluation.manifest import read_manifest
from erase.programs.run import job_of
from erase.programs.text.naming import label_in, names
from erase.programs.text.plan import make_plan

PRESET = resources.preset_path("sd_concept_sfron")
FAMILIES = {
    "sd": micro.pipeline,
    "sdxl": micro_sdxl.pipeline,
    "sd3": micro_sd3.pipeline,
    "flux": micro_flux.pipeline,
    "pixart": micro_pixart.pipeline,
    "lumina2": micro_lumina2.pipeline,
}
OFTEN = ("sd", "flux")
"""An UNet and a transformer; the others are marked slow: the preset and what it plans are the same for all."""
SHORT = (
    *("train.steps=1", "train.batch_size=2", "saliency.count=2", "saliency.draws=1", "saliency.batch_size=2"),
    *("forget.count=2", "draw.steps=2", "eval.images=0"),
)


def config(*words: str, preset: str = "sd_concept_sfron") -> SdConfig:
    return parse(override(read_preset(resources.preset_path(preset)), words), SdConfig)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in OFTEN)) for n in FAMILIES])
def test_every_family_erases_a_concept_by_its_prompt_alone(name: str, tmp_path: Path) -> None:
    FAMILIES[name](tmp_path).save_pretrained(tmp_path / "base")
    (tmp_path / "set.csv").write_text("prompt,seed\na dog,1\na photo of cats,2\na boat,3\n")
    runner = Runner(PRESET, tmp_path)
    out = runner(tmp_path / "out", "model={work}/base", "forget.prompts=a cat", "remain.prompts={work}/set.csv", *SHORT)
    run = read(out / "run.json")
    assert run["plan"]["anchors"] == [""]
    assert run["plan"]["remain"] == ["a dog", "a boat"]
    model = open_model(locate(tmp_path / "base"))
    learned = set(select(model.net, "xattn", family(name).PARAMETERS))
    file = f"{model.family.TRAINED}/diffusion_pytorch_model.safetensors"
    moved = changed(load_file(tmp_path / "base" / file), load_file(out / "model" / file))
    assert moved
    assert moved <= learned


@pytest.mark.slow
def test_a_run_that_nothing_judges_has_its_images_and_report(tmp_path: Path) -> None:
    """At the guidance of the family's own pipeline; rows that name the concept count as forgotten."""
    micro.pipeline(tmp_path).save_pretrained(tmp_path / "base")
    (tmp_path / "set.csv").write_text("prompt,seed\na dog,1\na photo of cats,2\na boat,3\n")
    sets = ("remain.prompts={work}/set.csv", "eval.prompts={work}/set.csv", *SHORT[:-1], "eval.images=1")
    out = Runner(PRESET, tmp_path)(tmp_path / "out", "model={work}/base", "forget.prompts=a cat", *sets)
    for name in ("base", "erased"):
        settings = read(out / "images" / name / "settings.json")["settings"]
        assert settings["draw"]["guidance"] is None
        assert [row.prompt for row in read_manifest(out / "images" / name)] == [
            *("a cat", "a photo of cats", "a dog", "a boat")
        ]
    report = read(out / "report.json")
    assert "nudity" not in report["after"]
    assert "classes" not in report["after"]
    assert (out / "grid.png").exists()
    assert (out / "report.html").exists()


def test_the_shipped_sets_are_what_stays_without_rows_that_name_the_concept() -> None:
    plan = make_plan(config("forget.prompts=a cat"))
    assert len(plan.remain) > 150
    named = {"a tabby cat asleep in a basket", "a cat on a garden wall"}
    assert not named & {*plan.remain}
    assert "a golden retriever lying on a rug" in plan.remain
    forgotten = {row.prompt for row, gone in zip(plan.rows, plan.forgotten, strict=True) if gone}
    assert forgotten == {"a cat", "a tabby cat asleep in a basket"}
    own = make_plan(config("forget.prompts=a cat", "remain.prompts=[a photo of two cats, everyday]")).remain
    assert "a photo of two cats" in own  # written by hand
    assert named & {*own} == set()


def test_images_that_are_counted_have_other_noise_than_images_to_train_on() -> None:
    """The latter come from the run's seed; prompts that are written out had it too."""
    plan = make_plan(config("forget.prompts=a cat", "eval.prompts=[a dog]", f"seed={2**32 - 1}"))
    assert {row.prompt: row.seed for row in plan.rows} == {"a cat": 0, "a dog": 0}
    assert {row.seed for row in make_plan(config("forget.prompts=a cat", "eval.prompts=[a dog]")).rows} == {1}


def test_a_broader_noun_phrase_is_the_anchor_where_it_is_given() -> None:
    plan = make_plan(config("forget.prompts=[a cat, a dog]", "forget.anchors=an animal"))
    assert plan.anchors == ["an animal", "an animal"]
    assert make_plan(config("forget.prompts=[a cat, a dog]")).anchors == ["", ""]


def test_nothing_of_another_concept_is_in_the_preset() -> None:
    found = config("forget.prompts=a cat")
    assert (found.eval.nudity, found.eval.classifier, found.concept) == (None, None, None)
    with pytest.raises(ValueError, match=r"forget\.prompts"):
        make_plan(config())


@pytest.mark.parametrize(
    "preset", [name for name in resources.list_presets() if "_nudity_" in name and not name.startswith("ddpm")]
)
def test_leftovers_of_a_concept_never_apply_to_another(preset: str) -> None:
    """Anchors, remain prompts and NudeNet would stay: refused in one line, which names the preset for anything."""
    data = read_preset(resources.preset_path(preset))
    for words in (["forget.prompts=a cat"], ["forget={prompts: [a cat], anchors: [a dog]}"]):
        with pytest.raises(ValueError, match=r"forget\.prompts.*nudity.*sd_concept_sfron") as refused:
            override(data, words)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="sd_concept_sfron"):
        over(data, {"forget": {"prompts": ["a cat"]}})
    own = data["forget"]["prompts"]
    assert over(data, {"forget": {"prompts": own}})["forget"]["prompts"] == own
    assert override(data, ["forget.prompts=a naked adult", "concept=nudity"])["forget"]["prompts"] == "a naked adult"
    assert config("train.steps=2", preset=preset).concept == "nudity"


def test_presets_of_the_embedded_model_take_any_of_its_concepts() -> None:
    for name in (name for name in resources.list_presets() if name.startswith("sd_photos_")):
        found = config("forget.prompts=a photo of a cat", "forget.anchors=a photo of a horse", preset=name)
        assert found.forget.prompts == ["a photo of a cat"]


@pytest.mark.parametrize(
    ("prompt", "concept", "named"),
    [
        ("a tabby cat asleep", "a cat", True),
        ("Cats, in a basket", "a photo of a cat", True),
        ("the cat's bowl", "cat", True),
        ("a category of things", "a cat", False),
        ("a car", "a red car", False),
        ("two cars, both red", "a red car", True),
        ("a bus stop", "buses", True),
        ("a glass bottle", "glasses", True),
        ("women at a market", "a photo of a woman", True),
        ("a man at a market", "a photo of a woman", False),
        ("sunflowers in the style of Van Gogh", "Van Gogh style", True),
        ("an oil painting of a barn", "painting", True),
        ("an oil painting of a barn", "a painting of a cat", False),
        ("berries on a plate", "a berry", True),
    ],
)
def test_a_prompt_names_a_concept_by_whole_words(prompt: str, concept: str, named: bool) -> None:
    assert names(prompt, [concept]) is named
    assert names(prompt, ["something else entirely", concept]) is named


def test_rows_that_the_model_would_cut_are_left_out(tmp_path: Path) -> None:
    """Of prompt sets, with a line that says so; what is written by hand is refused."""
    micro.pipeline(tmp_path).save_pretrained(tmp_path / "base")
    long = "a photo of a grandiloquent car"
    (tmp_path / "set.csv").write_text(f"prompt,seed\na dog,1\n{long},2\n")
    said: list[str] = []
    words = ("model={work}/base", "forget.prompts=a cat", *SHORT)
    runner = Runner(PRESET, tmp_path)
    setting = runner.setting(*words, "remain.prompts={work}/set.csv")
    job: Any = job_of("sd")(replace(setting, say=said.append))
    assert job.plan.remain == ["a dog"]
    assert any("1 of 2 prompts of remain.prompts" in line for line in said)
    with pytest.raises(ValueError, match="grandiloquent"):
        runner.job(*words, f"remain.prompts=[a dog, {long}]")


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("a 3d render of a light bulb", "light bulb"),  # the longest
        ("a painting of dogs", "dog"),  # not the frame of a prompt
        ("a bulb, light", "light bulb"),
        ("a lighthouse", None),
        ("", None),
    ],
)
def test_the_label_that_an_anchor_names(prompt: str, label: str | None) -> None:
    assert label_in(prompt, ["light", "light bulb", "painting", "dog"]) == label
