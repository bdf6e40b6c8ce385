"""What Stable Diffusion XL alone has: two encoders, sizes, a null prompt of zeros; and what only looks like it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import micro_sdxl
import pytest
import torch

from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.families import sdxl
from erase.diffusion.model import Model, open_model
from erase.diffusion.text import concepts


def opened(folder: Path, **given: Any) -> Model:
    micro_sdxl.pipeline(folder, **given).save_pretrained(folder / "model")
    return open_model(locate(folder / "model"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize("zeros", [True, False])
def test_the_null_prompt_is_the_pipelines_negative_condition(tmp_path: Path, zeros: bool) -> None:
    model = opened(tmp_path, force_zeros_for_empty_prompt=zeros)
    found = model.embed(["a cat", "", "a dog"])
    with torch.no_grad():
        texts, no_text, pooled, not_pooled = model.pipe.encode_prompt(["a cat", "a dog"])
    assert torch.equal(found["text"], torch.stack([texts[0], no_text[0], texts[1]]))
    assert torch.equal(found["pooled"], torch.stack([pooled[0], not_pooled[0], pooled[1]]))
    assert bool(found["text"][1].any()) is not zeros
    assert bool(found["pooled"][1].any()) is not zeros


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_closed_forms_read_the_empty_prompt_as_the_encoders_do(tokens: Any, tmp_path: Path) -> None:
    """Not as zeros, which would make an erased word mean nothing at all, and leave the beginning of prompts free."""
    model = opened(tmp_path, force_zeros_for_empty_prompt=True)
    assert not model.embed([""])["text"].any()
    found = concepts(model, ["a cat"], [""], ["", "a dog"], tokens)
    asked = {"device": model.pipe.device, "do_classifier_free_guidance": False}
    (said,) = model.pipe.encode_prompt("", **asked)[0].cpu()
    assert all(any(torch.equal(row, own) for own in said) for row in found.targets)
    assert torch.equal(found.empty, said)


def test_both_encoders_are_read(model: Model) -> None:
    first, second = (pipe_part(model, name) for name in sdxl.ENCODERS)
    asked = model.embed(["a photo of a cat"])
    assert asked["text"].shape[-1] == first + second
    for name, changed in zip(sdxl.ENCODERS, (slice(0, first), slice(first, None)), strict=True):
        weight = getattr(model.pipe, name).get_input_embeddings().weight
        kept = weight.detach().clone()
        weight.data.mul_(2)
        after = model.embed(["a photo of a cat"])
        weight.data.copy_(kept)
        same = torch.ones(first + second, dtype=torch.bool)
        same[changed] = False
        assert torch.equal(after["text"][..., same], asked["text"][..., same])
        assert not torch.allclose(after["text"][..., changed], asked["text"][..., changed])
        assert torch.equal(after["pooled"], asked["pooled"]) is (name == "text_encoder")


def pipe_part(model: Model, name: str) -> int:
    return int(getattr(model.pipe, name).config.hidden_size)


def test_sizes_are_the_models_own(model: Model) -> None:
    side = model.resolution
    assert model.embed(["a cat", ""])["time_ids"].tolist() == [[side, side, 0, 0, side, side]] * 2


def test_a_prompt_that_is_too_long_is_refused(model: Model) -> None:
    model.check_prompts(["a cat " * 7])
    with pytest.raises(ValueError, match="has 18 tokens, this model takes 16"):
        model.check_prompts(["a cat " * 8])


def test_the_vae_has_no_autocast(model: Model) -> None:
    """`force_upcast`: what it makes in 16 bits overflows."""
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, _ = model.encode(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(model.encode(pixels)[0], mean)
        half = model.pipe.vae.decode(mean.bfloat16()).sample
    with torch.no_grad():
        assert torch.equal(half, model.pipe.vae.decode(mean.bfloat16().float()).sample)


def test_nothing_is_marked(model: Model) -> None:
    assert model.pipe.watermark is None


def edit(path: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps({**found, **values}))

    return change


def swap_scheduler(folder: Path) -> None:
    from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    edit("model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])(folder)


NOTHING: dict[str, Any] = {}
OTHERS: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, str]] = {
    "inpainting": ({"net": {"in_channels": 9}}, None, "9 input channels for 4 latent channels: inpainting"),
    "depth": ({"net": {"in_channels": 5}}, None, "5 input channels for 4 latent channels"),
    "refiner's network": (
        {"net": {"projection_class_embeddings_input_dim": micro_sdxl.POOLED + 5 * micro_sdxl.SIZE_WIDTH}},
        None,
        "refiners and adapters are not supported",
    ),
    "refiner": (
        NOTHING,
        edit("model_index.json", text_encoder=[None, None], tokenizer=[None, None]),
        "has no text_encoder .null in its model_index.json.: refiners",
    ),
    "refiner's pipeline": (
        NOTHING,
        edit("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"),
        "holds a StableDiffusionXLImg2ImgPipeline; supported pipelines",
    ),
    "latent consistency": ({"net": {"time_cond_proj_dim": 8}}, None, "time_cond_proj_dim.*are not supported"),
    "EDM": (NOTHING, swap_scheduler, "EDMEulerScheduler, which has no betas"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_of_its_kind_are_refused(name: str, tmp_path: Path) -> None:
    given, change, said = OTHERS[name]
    micro_sdxl.pipeline(tmp_path, **given).save_pretrained(tmp_path / "model")
    if change is not None:
        change(tmp_path / "model")
    with pytest.raises(ValueError, match=said) as caught:
        open_model(locate(tmp_path / "model"))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)
