"""Stable Diffusion 3 and Flux.1: what `test_families` does not ask of every family."""

import copy
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import micro
import micro_flux
import micro_sd3
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from erase.diffusion import condition
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.families import flux, sd3
from erase.diffusion.live import model_of
from erase.diffusion.losses import Exchanged
from erase.diffusion.model import Model, open_model
from erase.diffusion.parameters import select
from erase.diffusion.text import concepts
from erase.programs import saving

LONG = "a photo of a cat " * 4  # more tokens than CLIP reads, fewer than T5
PIPELINES = {
    "sd3": lambda work: micro_sd3.pipeline(work),
    "without_t5": lambda work: micro_sd3.pipeline(work, t5=False),
    "dev": lambda work: micro_flux.pipeline(work),
    "schnell": lambda work: micro_flux.pipeline(work, schnell=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, pipeline in PIPELINES.items():
        work = tmp_path_factory.mktemp(name)
        pipeline(work).save_pretrained(work / "pipeline")
        found[name] = work / "pipeline"
    return found


def opened(folder: Path) -> Model:
    return open_model(locate(folder))


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: opened(folder) for name, folder in folders.items()}


def told(model: Model, **given: Any) -> list[dict[str, Any]]:
    """What the stock pipeline passes to its network in one generation."""
    seen: list[dict[str, Any]] = []
    hook = model.net.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model.pipe(num_inference_steps=1, generator=torch.Generator().manual_seed(0), height=16, width=16, **given)
    hook.remove()
    return seen


def draw(model: Model, **given: Any) -> Tensor:
    """Latents of one prompt."""
    asked = {"steps": 2, "guidance": 3.0, "latents": True, **given}
    found: Tensor = model.generate(["a cat"], [torch.Generator().manual_seed(0)], **asked)
    return found


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "without_t5"])
def test_the_null_condition_is_the_stock_negative_one_with_its_own_pooled_embedding(
    models: dict[str, Model], name: str
) -> None:
    model = models[name]
    (passed,) = told(model, prompt="a cat", guidance_scale=3.0)
    null, asked = model.embed([""]), model.embed(["a cat"])
    both = condition.cat([null, asked])
    rows = both["text"].shape[1]
    torch.testing.assert_close(passed["encoder_hidden_states"][:, :rows], both["text"])
    assert not passed["encoder_hidden_states"][:, rows:].any()  # of T5, which is not there
    torch.testing.assert_close(passed["pooled_projections"], both["pooled"])
    assert not torch.allclose(null["pooled"], asked["pooled"])


def test_the_null_condition_of_flux_is_the_stock_negative_one(models: dict[str, Model]) -> None:
    model = models["dev"]
    _, passed = told(model, prompt="a cat", negative_prompt="", true_cfg_scale=2.0)
    null = model.embed([""])
    torch.testing.assert_close(passed["encoder_hidden_states"], null["text"])
    torch.testing.assert_close(passed["pooled_projections"], null["pooled"])


def test_without_t5_its_rows_are_one_of_zeros(models: dict[str, Model]) -> None:
    text = models["without_t5"].embed(["a cat"])["text"]
    assert text.shape[1] == micro.MAX_TOKENS + 1
    assert not text[:, micro.MAX_TOKENS :].any()
    assert models["sd3"].embed(["a cat"])["text"][:, micro.MAX_TOKENS :].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_row_of_zeros_counts_as_all_of_t5(checkpointing: bool) -> None:
    """Predictions and gradients, in float64, against diffusers' own attention to 256 rows of zeros."""
    torch.manual_seed(0)
    net = micro_sd3.transformer().double()
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    other = copy.deepcopy(net)
    config = net.config
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size).double()
    t = torch.tensor([900.0, 100.0]).double()
    pooled = torch.randn(2, config.pooled_projection_dim).double()
    clip = torch.randn(2, 16, config.joint_attention_dim).double()
    if checkpointing:
        net.enable_gradient_checkpointing()
    net.train()
    one = sd3.call(net, x, t, {"text": F.pad(clip, (0, 0, 0, 1)), "pooled": pooled})
    many = other(x, F.pad(clip, (0, 0, 0, sd3.T5_TOKENS)), pooled, t).sample
    torch.testing.assert_close(one, many)
    assert not torch.allclose(one, other(x, F.pad(clip, (0, 0, 0, 1)), pooled, t).sample, rtol=1e-3)
    for out in (one, many):
        out.square().mean().backward()
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_one_row_counts_in_a_network_that_borrows_weights() -> None:
    net = micro_sd3.transformer()
    x, asked = sd3.example({"transformer": net.config, "text_encoder": {"max_position_embeddings": 4}})
    names = [name for name, _ in net.named_parameters()][:3]
    changed = {name: 2 * net.get_parameter(name).detach() for name in names}
    found = sd3.call(Exchanged(net, changed), x + 1, torch.ones(1), asked)
    for name, value in changed.items():
        net.get_parameter(name).data.copy_(value)
    torch.testing.assert_close(found, sd3.call(net, x + 1, torch.ones(1), asked))


def test_without_t5_attention_of_another_kind_stays_and_reads_every_row() -> None:
    class Other(JointAttnProcessor2_0):
        """Such as one that a user has put there."""

    net = micro_sd3.transformer()
    x, asked = sd3.example({"transformer": net.config, "text_encoder": {"max_position_embeddings": 4}})
    x, asked = x + 1, {name: value + 0.5 for name, value in asked.items()}
    stock = sd3.call(net, x, torch.ones(1), asked)
    net.set_attn_processor(Other())
    torch.testing.assert_close(sd3.call(net, x, torch.ones(1), asked), stock)
    assert {type(each) for each in net.attn_processors.values()} == {Other}


def test_without_t5_images_are_the_stock_pipelines(models: dict[str, Model]) -> None:
    """Before and after its attention is told to count."""
    pipe = models["without_t5"].pipe
    asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "height": 16, "width": 16}
    stock = [pipe("a cat", generator=torch.Generator().manual_seed(0), **asked).images]
    torch.testing.assert_close(draw(models["without_t5"]), stock[0])
    stock += [pipe("a cat", generator=torch.Generator().manual_seed(0), **asked).images]
    torch.testing.assert_close(*stock)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_encoder_changes_the_prediction(models: dict[str, Model], name: str) -> None:
    model = models[name]
    latents, _ = model.family.example(model.configs)
    x, t = latents + 1, torch.tensor([500.0])

    def predicted() -> Tensor:
        with torch.no_grad():
            return model.family.call(model.net, x, t, model.embed(["a cat"]))

    before = predicted()
    for encoder in filter(None, (getattr(model.pipe, part) for part in model.family.ENCODERS)):
        kept = {n: p.clone() for n, p in encoder.state_dict().items()}
        for p in encoder.parameters():
            p.mul_(0.5)
        assert not torch.allclose(predicted(), before, rtol=1e-3)
        encoder.load_state_dict(kept)
    assert not torch.allclose(model.family.call(model.net, x, t / 2, model.embed(["a cat"])), before, rtol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "dev", "schnell"])
def test_a_prompt_too_long_for_clip_is_read_by_t5(models: dict[str, Model], name: str) -> None:
    model = models[name]
    prompts = [LONG + "dog", LONG + "car"]
    model.check_prompts(prompts)
    one, two = model.embed(prompts)["text"]
    assert not torch.allclose(one, two)
    pooled = model.embed(prompts)["pooled"]
    assert torch.equal(pooled[0], pooled[1])  # CLIP reads the same of both
    with pytest.raises(ValueError, match="512" if name == "dev" else "256"):
        model.check_prompts([LONG * 40])


def test_without_t5_clip_is_the_limit(models: dict[str, Model]) -> None:
    with pytest.raises(ValueError, match="16"):
        models["without_t5"].check_prompts([LONG])


def test_concepts_are_the_tokens_of_every_tokenizer(models: dict[str, Model]) -> None:
    """Rows of `text` from where the prompts differ to the end, of CLIP and of T5: 'a cat' against 'a dog'."""
    model = models["sd3"]
    found = concepts(model, ["a cat"], ["a dog"], ["car"])
    asked, anchor = model.embed(["a cat", "a dog"])["text"]
    clip, t5 = 2, micro.MAX_TOKENS + 1  # after the beginning and 'a'; T5 has no token of a beginning
    rows = [*range(clip, micro.MAX_TOKENS), *range(t5, len(asked))]
    assert torch.equal(found.erased, asked[rows])
    assert torch.equal(found.targets, anchor[rows])
    far = concepts(model, [LONG + "cat"], [LONG + "dog"], ["car"])  # CLIP reads no difference
    assert 0 < len(far.erased) < sd3.T5_TOKENS
    assert len(concepts(models["without_t5"], ["a cat"], ["a dog"], ["car"]).erased) == micro.MAX_TOKENS - clip
    with pytest.raises(ValueError, match="its own anchor"):
        concepts(model, ["a cat"], ["a cat"], ["car"])


# --- latents, process, resolution -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_latents_are_shifted_and_scaled_as_the_stock_pipeline_decodes_them(models: dict[str, Model], name: str) -> None:
    model = models[name]
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode(pixels)
    vae = model.pipe.vae
    assert vae.config.shift_factor
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean / vae.config.scaling_factor + vae.config.shift_factor, posterior.mean)
    assert std is not None
    torch.testing.assert_close(std / vae.config.scaling_factor, posterior.std)


def test_a_shift_that_was_set_by_hand_is_kept(models: dict[str, Model]) -> None:
    pipe = copy.copy(models["sd3"].pipe)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pipe.scheduler.set_shift(7.0)
    found = model_of(pipe)
    assert found.family.process(found.pipe).shift == 7.0


def test_the_shift_is_the_schedulers(models: dict[str, Model]) -> None:
    shifts = {name: model.family.process(model.pipe).shift for name, model in models.items()}
    # 4 × 4 tokens: μ on the line from 0.5 at 256 tokens to 1.15 at 4096
    mu = 0.5 + 0.65 * (16 - 256) / (4096 - 256)
    assert shifts == {"sd3": 3.0, "without_t5": 3.0, "dev": pytest.approx(math.exp(mu)), "schnell": 1.0}


def test_published_configurations_have_their_shapes() -> None:
    """Stable Diffusion 3.5 and Flux.1 dev, by the values of their configurations that matter here."""
    net: dict[str, Any] = {"sample_size": 128, "in_channels": 16, "joint_attention_dim": 4096}
    net["pooled_projection_dim"] = 2048
    x, asked = sd3.example({"transformer": net, "text_encoder": {"max_position_embeddings": 77}})
    assert x.shape == (1, 16, 128, 128)
    assert {n: tuple(c.shape) for n, c in asked.items()} == {"text": (1, 78, 4096), "pooled": (1, 2048)}
    _, asked = sd3.example({"transformer": net, "text_encoder": {}, "text_encoder_3": {}})
    assert asked["text"].shape == (1, 333, 4096)
    net = {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True}
    for size in ({"sample_size": 1024}, {}, {"sample_size": 32, "_use_default_values": ["sample_size"]}):
        x, asked = flux.example({"transformer": net, "vae": {"block_out_channels": [128, 256, 512, 512], **size}})
        assert x.shape == (1, 16, 128, 128)
        assert asked["text"].shape == (1, 512, 4096)


def test_flux_is_of_1024_pixels_where_the_vae_names_no_size(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["dev"], tmp_path / "m")
    file = tmp_path / "m/vae/config.json"
    config = json.loads(file.read_text())
    assert opened(tmp_path / "m").resolution == config.pop("sample_size") == 16
    file.write_text(json.dumps(config))
    model = opened(tmp_path / "m")
    assert model.resolution == 1024
    assert model.family.example(model.configs)[0].shape[2:] == (512, 512)  # this VAE halves


def test_other_sizes_than_square(models: dict[str, Model]) -> None:
    for model in (models["sd3"], models["dev"]):
        latents = draw(model, size=(16, 32))
        assert latents.shape == (1, 4, 8, 16)
        asked = model.embed(["a cat"])
        assert model.family.call(model.net, latents, torch.tensor([500.0]), asked).shape == latents.shape


# --- guidance of Flux -----------------------------------------------------------------------------


def test_flux_is_told_the_users_guidance_when_drawing_and_1_in_training(models: dict[str, Model]) -> None:
    model, seen = models["dev"], []
    hook = model.net.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["guidance"]), with_kwargs=True)
    low, high, own = (draw(model, guidance=scale) for scale in (1.5, 4.0, None))
    backend, cond = model.denoiser(model.null()), model.embed(["a cat"])
    backend.losses({"mean": low, "cond": cond}, torch.Generator().manual_seed(0))
    hook.remove()
    assert [float(g) for g in seen] == [1.5, 1.5, 4.0, 4.0, 3.5, 3.5, 1.0]
    assert not torch.allclose(low, high)
    assert not torch.allclose(high, own)


def test_schnell_is_told_no_guidance(models: dict[str, Model]) -> None:
    model = models["schnell"]
    assert model.embed(["a cat"]).keys() == {"text", "pooled"}
    assert torch.equal(draw(model, guidance=0.0), draw(model, guidance=4.0))


# --- parameters -----------------------------------------------------------------------------------


def test_sets_of_the_published_architectures() -> None:
    """Of the whole networks, without weights: three or two projections a block that reads text, each with a bias."""
    with torch.device("meta"):
        medium = SD3Transformer2DModel(num_layers=24, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
        dev = FluxTransformer2DModel(guidance_embeds=True, num_single_layers=4)
    for net, family, blocks in ((medium, sd3, 24), (dev, flux, 19)):
        chosen = {name: set(select(net, name, family.PARAMETERS)) for name in family.PARAMETERS}
        assert len(chosen["xattn"]) == 3 * 2 * blocks
        assert len(chosen["kv"]) == 2 * 2 * blocks
        assert not any("attn2" in name or "single" in name for name in chosen["xattn"])
        assert family.TEXT_KV is not None
        (reads,) = [p for name, p in net.named_parameters() if re.search(family.TEXT_KV, name)]
        assert reads.shape[1] == 4096


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants_and_shards_open_and_are_saved_as_they_are(tmp_path: Path, variant: str) -> None:
    pipe = micro_sd3.pipeline(tmp_path)
    pipe.to(torch.float16 if variant == "fp16" else torch.bfloat16)
    pipe.save_pretrained(tmp_path / "m", variant=variant, max_shard_size="20KB")
    # one component has no such variant
    shutil.rmtree(tmp_path / "m/text_encoder")
    pipe.text_encoder.save_pretrained(tmp_path / "m/text_encoder")
    source = locate(tmp_path / "m")
    assert isinstance(source, Source)
    assert source.variant == variant
    assert len(source.weights) > 1
    model = open_model(source)
    assert {p.dtype for p in model.net.parameters()} == {torch.float32}
    saving.write(source, {}, tmp_path / "again", {})
    for path in source.weights:
        old, new = load_file(path), load_file(tmp_path / "again/transformer" / path.name)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[n], new[n]) and old[n].dtype == new[n].dtype for n in old)
    assert torch.equal(draw(model), draw(opened(tmp_path / "again")))


@pytest.mark.parametrize(
    ("name", "transformer"),
    [("sd3", lambda: micro_sd3.transformer(in_channels=9)), ("dev", lambda: micro_flux.transformer(in_channels=96))],
)
def test_a_transformer_of_more_channels_is_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, transformer: Any
) -> None:
    shutil.copytree(folders[name], tmp_path / "m")
    transformer().save_pretrained(tmp_path / "m/transformer")
    with pytest.raises(ValueError, match="input channels"):
        opened(tmp_path / "m")


@pytest.mark.parametrize(
    "kind", ["StableDiffusion3InpaintPipeline", "StableDiffusion3ControlNetPipeline", "FluxFillPipeline"]
)
def test_other_pipelines_are_refused(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    shutil.copytree(folders["sd3"], tmp_path / "m")
    file = tmp_path / "m/model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": kind}))
    with pytest.raises(ValueError, match=kind):
        locate(tmp_path / "m")


def test_a_t5_tokenizer_that_needs_sentencepiece_says_how_to_install_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with `spiece.model` alone, as published before `tokenizers` had its own format."""
    shutil.copytree(folders["dev"], tmp_path / "m")
    (tmp_path / "m/tokenizer_2/tokenizer.json").unlink()
    (tmp_path / "m/tokenizer_2/spiece.model").write_bytes(b"")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else found(name))
    with pytest.raises(ValueError, match=r"tokenizer_2.*sentencepiece.*erase\[t5\]"):
        opened(tmp_path / "m")
