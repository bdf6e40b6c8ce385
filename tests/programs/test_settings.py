"""What is said of settings before a model is opened."""

from collections.abc import Sequence
from typing import Any

import pytest

from erase import config, resources
from erase.programs import settings
from erase.store.files import paths

ONE_STEP = ("method.ron=false", "method.slow_steps=1")


def parsed(preset: str, words: Sequence[str]) -> Any:
    data = config.read_preset(resources.preset_path(preset))
    return config.parse(config.override(data, words), config.PIPELINES[data["pipeline"]])


def unused(preset: str, *words: str) -> list[str]:
    """The keys that are told of."""
    whole = parsed(preset, words)
    lines = settings.unused(whole, *settings.read_method(whole), paths(dict(config.read_words(words))))
    assert all("\n" not in line for line in lines)
    return [line.split()[0] for line in lines]


@pytest.mark.parametrize(
    ("preset", "words", "idle"),
    [
        ("sd_photos_sfron", ["saliency.density=0.5", "forget.anchors=a", "train.lr=1e-3", "saliency.count=3"], []),
        ("sd_photos_sfron", ["saliency.kind=none", "saliency.density=0.5"], ["saliency.density"]),
        ("sd_photos_sfron", ["saliency={kind: none, count: 3}"], ["saliency.count"]),
        ("sd_photos_sfron", ["forget.loss=ascent", "forget.pictures=own", "forget.anchors=a"], ["forget.anchors"]),
        ("sd_photos_sfron", ["attack.inversion.steps=3"], ["attack.inversion.steps"]),
        ("sd_photos_sfron", ["attack.inversion.steps=3", "eval.attacks=[inversion]"], []),
        ("sd_photos_sfron", ["attack.p4d.steps=3", "eval.attacks=[inversion]"], ["attack.p4d.steps"]),
        ("sd_photos_sfron", ["train.lr=1e-5", "train.dropout=0.2"], []),
        ("sd_photos_esd_x", ["train.lr=1", "train.optimizer=sgd"], ["train.lr", "train.optimizer"]),
        ("sd_photos_esd_x", ["train.dropout=0.5"], ["train.dropout"]),
        ("sd_photos_sfron", ["remain.count=9", "remain.total=90"], ["remain.count"]),
        ("sd_photos_sfron", ["eval.images=0", "eval.nudity.threshold=0.6"], ["eval.nudity.threshold"]),
        ("sd_photos_finetune", ["saliency.kind=fisher", "saliency.count=3"], ["saliency.kind", "saliency.count"]),
        ("sd_photos_finetune", ["forget.anchors=a", "forget.count=3"], ["forget.anchors", "forget.count"]),
        ("sd_photos_finetune", ["saliency.kind=none", "saliency.density=null", "forget.anchors=[]"], []),
        ("sd_photos_gradient_ascent", ["remain.near=0.5", "remain.total=8"], ["remain.near", "remain.total"]),
        ("sd_photos_gradient_ascent", ["remain.count=3", "remain.loss=distill"], ["remain.count", "remain.loss"]),
        ("sd_photos_selective_amnesia", ["saliency.count=3", "saliency.density=0.5"], ["saliency.density"]),
        ("sd_photos_esd_x", ["forget.loss=ascent", "forget.count=3"], ["forget.loss"]),
        ("sd_photos_uce", ["forget.anchors=a", "train.parameters=kv", "train.batch_size=3"], ["train.batch_size"]),
        ("ddpm_fashion_sfron", ["forget.anchors=bag", "forget.labels=trouser"], []),
        ("ddpm_fashion_train", ["forget.count=3", "saliency.density=0.5"], ["forget.count", "saliency.density"]),
        ("sd_photos_sfron", ["method.clip_forget=1", "method.fast_rule=sgd"], []),
        (
            "sd_photos_sfron",
            [*ONE_STEP, "method.clip_forget=1", "method.clip_remain=1", "method.fast_rule=sgd"],
            ["method.clip_forget", "method.fast_rule"],
        ),
        (
            "classify_fashion_sfron",
            [*ONE_STEP, "method.fast_rule=sgd"],
            ["method.fast_rule"],
        ),
        ("classify_fashion_sfron", ["saliency.threshold=0.5", "train.lr=1"], []),
        ("classify_fashion_finetune", ["saliency.density=0.5"], ["saliency.density"]),
    ],
)
def test_settings_that_the_run_does_not_read(preset: str, words: list[str], idle: list[str]) -> None:
    assert unused(preset, *words) == idle


@pytest.mark.parametrize("preset", resources.list_presets())
def test_settings_of_every_preset_can_be_read(preset: str) -> None:
    """And a preset's own are not told of."""
    own = {"sd_concept_sfron": ["forget.prompts=a cat"], "classify_sfron": ["model=mine", "data.source=images"]}
    assert unused(preset, *own.get(preset, [])) == []


def test_without_prompts_only_the_forget_prompts_are_judged() -> None:
    whole = parsed("sd_photos_sfron", ["eval.prompts=[]", "eval.classifier=null"])
    settings.read_method(whole)
    assert len(settings.notices(whole)) == 1
    assert settings.notices(parsed("sd_photos_sfron", [])) == []
    assert settings.notices(parsed("sd_photos_sfron", ["eval.prompts=[]", "eval.images=0"])) == []
    with pytest.raises(ValueError, match=r"eval\.prompts"):
        settings.read_method(parsed("sd_photos_sfron", ["eval.prompts=[]"]))


@pytest.mark.parametrize(
    ("preset", "words", "named"),
    [
        ("sd_photos_sfron", ["forget.target=online"], "forget.target=frozen"),
        ("sd_photos_sfron", ["forget.dropout=0.1"], "forget.dropout=0"),
        ("sd_photos_sfron", ["forget.loss=ascent", "forget.pictures=own"], "forget.loss=redirect"),
        ("sd_photos_sfron", ["method.robust.images=2"], "images"),
        ("sd_photos_sfron", ["method.robust.image=1"], "robust"),
        ("ddpm_fashion_sfron", [], "erase run sd"),
    ],
)
def test_robust_is_for_redirects_of_text_to_image_models(preset: str, words: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings.read_method(parsed(preset, ["method.robust={steps: 1}", *words]))


def test_robust_is_read_from_settings() -> None:
    _, method = settings.read_method(parsed("sd_photos_sfron", ["method.robust.steps=1", "method.robust.radius=1"]))
    assert method.forget is not None
