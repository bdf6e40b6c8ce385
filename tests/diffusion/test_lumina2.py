"""What Lumina Image 2.0 alone has: a system prompt, no linear map of the text, time and velocity turned round."""

import json
from pathlib import Path
from typing import Any

import micro_lumina2
import pytest
import torch
from diffusers.models.transformers.transformer_lumina2 import Lumina2Transformer2DModel
from diffusers.pipelines.lumina2.pipeline_lumina2 import Lumina2Pipeline

from erase.diffusion import text
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.families import lumina2
from erase.diffusion.lora.read import pipeline_class
from erase.diffusion.model import Model, open_model
from erase.diffusion.parameters import select

PROMPTS = ["a photo of a cat", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("lumina2")
    micro_lumina2.pipeline(work).save_pretrained(work / "model")
    return work / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(locate(folder))


def rename(folder: Path, kind: str) -> None:
    """Have a checkpoint name another pipeline."""
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": kind}))


def test_guidance_is_between_the_two_conditions(model: Model) -> None:
    """The stock pipeline, given prompts, passes each condition by itself: `call` must say the same of both."""
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []
    hook = model.net.register_forward_hook(lambda _, args, kw, out: seen.append((kw, out[0])), with_kwargs=True)
    model.pipe(PROMPTS, num_inference_steps=1, height=64, width=64, guidance_scale=3.0)
    hook.remove()
    assert len(seen) == 2
    for (given, out), prompts in zip(seen, (PROMPTS, ["", ""]), strict=True):
        asked = model.embed(prompts)
        assert torch.equal(given["encoder_attention_mask"], asked["mask"])
        with torch.no_grad():
            mine = model.family.call(model.net, given["hidden_states"], 1000 * (1 - given["timestep"]), asked)
        torch.testing.assert_close(mine, -out, rtol=1e-5, atol=1e-6)


def test_the_empty_prompt_has_no_system_prompt(model: Model) -> None:
    """Alone, and among others; its one token is that of the beginning."""
    mask = model.embed(["", "a photo of a cat", ""])["mask"].sum(1).tolist()
    assert mask == [1, model.count_tokens("a photo of a cat"), 1]
    assert mask[1] > 100  # the system prompt's letters
    assert torch.equal(model.embed(["", "a cat"])["text"][:1], model.embed([""])["text"])


def test_the_system_prompt_counts(model: Model) -> None:
    model.check_prompts(["cat " * 90])
    with pytest.raises(ValueError, match="this model takes 256"):
        model.check_prompts(["cat " * 110])


def test_padding_is_not_read(model: Model) -> None:
    latents, _ = model.family.example(model.configs)
    asked = model.embed(PROMPTS[:1])
    other = {**asked, "text": torch.where(asked["mask"][..., None] > 0, asked["text"], 7.0)}
    with torch.no_grad():
        a, b = (model.family.call(model.net, latents + 1, torch.tensor([500.0]), c) for c in (asked, other))
    assert torch.equal(a, b)


def test_closed_forms_have_nothing_to_edit(model: Model) -> None:
    with pytest.raises(ValueError, match=r"Lumina Image 2\.0 has none"):
        text.concepts(model, ["a cat"], ["a dog"], ["car"])


def test_sets_of_the_published_architecture() -> None:
    """Two blocks of the text's own; of the rest, no weight reads the text alone."""
    with torch.device("meta"):
        net = Lumina2Transformer2DModel(num_layers=2, cap_feat_dim=2304)
    chosen = {name: set(select(net, name, lumina2.PARAMETERS)) for name in lumina2.PARAMETERS}
    assert chosen["kv"] == {f"context_refiner.{k}.attn.to_{kind}.weight" for k in (0, 1) for kind in "kv"}
    assert {name.split(".")[0] for name in chosen["xattn"]} == {"context_refiner", "time_caption_embed"}
    assert not any("timestep" in name for name in chosen["xattn"])


def test_older_folders_name_another_class(folder: Path, tmp_path: Path, model: Model) -> None:
    """Before diffusers renamed the pipeline."""
    micro_lumina2.pipeline(tmp_path).save_pretrained(tmp_path / "old")
    rename(tmp_path / "old", "Lumina2Text2ImgPipeline")
    old = open_model(locate(tmp_path / "old"))
    for name, p in model.net.named_parameters():
        assert torch.equal(old.net.get_parameter(name), p)
    assert pipeline_class(locate(tmp_path / "old")) is Lumina2Pipeline


def test_other_pipelines_are_refused(tmp_path: Path) -> None:
    micro_lumina2.pipeline(tmp_path).save_pretrained(tmp_path / "model")
    rename(tmp_path / "model", "LuminaPipeline")
    with pytest.raises(ValueError, match="LuminaPipeline; supported pipelines: "):
        locate(tmp_path / "model")


@pytest.mark.parametrize(("taken", "given"), [(9, 4), (4, 8)])
def test_another_number_of_channels_is_refused(tmp_path: Path, taken: int, given: int) -> None:
    micro_lumina2.pipeline(tmp_path, in_channels=taken, out_channels=given).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"{taken} input and {given} output channels for 4 latent channels"):
        open_model(locate(tmp_path / "model"))
