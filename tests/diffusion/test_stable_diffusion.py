import errno
import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import micro
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase import resources
from erase.diffusion import text
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.describe import describe
from erase.diffusion.model import Model, open_model
from erase.diffusion.parameters import select
from erase.diffusion.process import Discrete
from erase.evaluation.generate import image_generator
from erase.methods.uce import Reading
from erase.store import weights

UNET = "unet/diffusion_pytorch_model.safetensors"
MOVED = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def model(micro_sd: Path) -> Model:
    """Opened once; tests do not change it."""
    return open_model(locate(micro_sd))


@pytest.fixture(scope="module")
def pipe(model: Model) -> StableDiffusionPipeline:
    opened: StableDiffusionPipeline = model.pipe
    return opened


@pytest.fixture
def copy(micro_sd: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(micro_sd, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("prompt", "anchor", "expected"),
    [
        ("a b cat .", "a b dog .", {2: 2, 3: 3, 4: 4, 5: 5}),
        ("a cup of tea .", "a cat .", {1: 1, 2: 1, 3: 1, 4: 2, 5: 3}),  # words that are more become the first
        ("a cat .", "a cup of tea .", {1: 3, 2: 4, 3: 5}),
        ("cat .", ".", {0: 0, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4}),  # the empty prompt
    ],
)
def test_tokens_are_paired_by_the_last_word(prompt: str, anchor: str, expected: dict[int, int]) -> None:
    a, b = ([sum(map(ord, word)) for word in text.split()] for text in (prompt, anchor))
    assert dict(text.paired_tokens(a, b, 6)) == expected
    with pytest.raises(ValueError, match="its own anchor: choose another anchor"):
        text.paired_tokens(a, a, 6)


def test_concepts_are_the_tokens_that_differ(model: Model) -> None:
    """What a prompt that stays begins with is left to it."""
    forget, anchors, kept = ["a photo of a cat", "sepia cat"], ["a photo of a dog", "dog"], ["", "a sepia dog", "sepia"]
    found = text.concepts(model, forget, anchors, kept)
    cat, sepia, dog, alone = model.embed([*forget, *anchors])["text"]
    assert torch.equal(found.kept, model.embed(kept)["text"].flatten(0, 1))
    assert torch.equal(found.kept_of, torch.arange(3).repeat_interleave(cat.shape[0]))
    assert torch.equal(found.empty, model.embed([""])["text"][0])
    torch.testing.assert_close(found.begin, found.empty[:1])
    assert torch.equal(text.concepts(model, forget, anchors, kept[1:], "last").kept_of, torch.tensor([1, 2]))
    # begin, a photo of a, cat; begin, sepia, cat: the second sepia is the third that stays
    assert torch.equal(found.erased, torch.cat([cat[5:], sepia[2:]]))
    assert torch.equal(found.targets, torch.cat([dog[5:], alone[1:-1]]))


@pytest.mark.parametrize("tokens", ["all", "last", "padding"])
def test_closed_forms_against_a_plain_solve(model: Model, tokens: Any) -> None:
    """`(λ W + Σ v* cᵀ + p Σ v cᵀ) (λ I + Σ c cᵀ + p Σ c cᵀ)⁻¹`, a matrix and a token after the other, in float64."""
    forget, anchors, kept, p, lambd = (
        ["a photo of a cat", "sepia cat"],
        ["a photo of a dog", ""],
        ["", "a boat"],
        0.7,
        0.5,
    )
    net = deepcopy(model.net).double()
    select(net, "kv", model.family.PARAMETERS)
    found = text.concepts(model, forget, anchors, kept, tokens)
    ours = Reading(found, p, lambd, tokens)(net).weights

    cat, sepia, dog, empty, boat = (model.embed([x])["text"][0].double() for x in (*forget, *anchors, "a boat"))
    # begin, a photo of a cat, end; begin, sepia cat, end: what is more than the anchor has becomes its end
    pairs = {
        "all": [*zip(cat[5:], dog[5:], strict=True), *zip(sepia[1:], [empty[1], empty[1], *empty[1:-2]], strict=True)],
        "last": [(cat[5], dog[5]), (sepia[2], empty[0])],
        "padding": [*zip(cat[6:], dog[6:], strict=True), *zip(sepia[3:], empty[1:-2], strict=True)],
    }[tokens]
    stay = {"all": [*empty, *boat], "last": [empty[0], boat[2]], "padding": [*empty[1:], *boat[3:]]}[tokens]
    for name, weight in net.named_parameters():
        if not weight.requires_grad:
            continue
        W = weight.detach()
        left, right = lambd * W, lambd * torch.eye(W.shape[1], dtype=torch.float64)
        for factor, c, target in [*((1.0, *pair) for pair in pairs), *((p, c, c) for c in stay)]:
            left = left + factor * torch.outer(W @ target, c)
            right = right + factor * torch.outer(c, c)
        torch.testing.assert_close(ours[name], left @ torch.linalg.inv(right), rtol=1e-9, atol=1e-11)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def pictures(model: Model, **kwargs: Any) -> list[bytes]:
    draw = model.sampler(steps=2, guidance=3.0)
    images = draw(["a cat", "a photo of a dog"], [image_generator(1, 0), image_generator(1, 1)], **kwargs)
    return [image.tobytes() for image in images]


def some_change(folder: Path, subfolder: str = "unet", variant: str | None = None) -> dict[str, Tensor]:
    net = UNet2DConditionModel.from_pretrained(folder, subfolder=subfolder, variant=variant, dtype=torch.float32)
    return {name: p.detach() + 0.25 for name, p in net.named_parameters() if ".attn2." in name}


def saved_unet(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in (folder / "unet").glob("*.safetensors") for k, v in load_file(path).items()}


# --- finding a checkpoint -------------------------------------------------------------------------


def test_locate_finds_a_folder(micro_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = locate(micro_sd)
    assert (source.folder, source.trained, source.variant) == (micro_sd, "unet", None)
    assert source.weights == [micro_sd / UNET]
    monkeypatch.chdir(micro_sd.parent)
    assert locate("micro-sd").folder == Path("micro-sd")


def remove(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)

    return damage


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


DAMAGE = {
    "no index": (remove("model_index.json"), "is not a diffusers pipeline: it has no model_index.json"),
    "index cut short": (write("model_index.json", b'{"_class_name": '), "model_index.json: not JSON, or cut short"),
    "index is a list": (write("model_index.json", b"[]"), "is not a diffusers pipeline"),
    "another pipeline": (
        lambda folder: edit(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        "holds a StableDiffusionInpaintPipeline; supported pipelines: .*StableDiffusionPipeline",
    ),
    "unet config": (write("unet/config.json", b"{"), "unet/config.json: not JSON, or cut short"),
    "scheduler config": (write("scheduler/scheduler_config.json", b"{"), "scheduler_config.json: not JSON"),
    "unet cut short": (cut(UNET), f"{UNET} is cut short or not a safetensors file"),
    "unet empty": (write(UNET, b""), f"{UNET} is cut short or not a safetensors file"),
    "unet header": (write(UNET, b"\xff" * 64), f"{UNET} is cut short or not a safetensors file"),
    "unet is a note of git-lfs": (write(UNET, b"version https://git-lfs.github.com/spec/v1\n"), "is cut short or not"),
    "text encoder cut short": (cut("text_encoder/model.safetensors", 0.9), "text_encoder/model.safetensors is cut"),
    "vae cut short": (cut("vae/diffusion_pytorch_model.safetensors", 0.9), "is cut short"),
    "no unet weights": (remove(UNET), r"unet has no weights \(diffusion_pytorch_model.safetensors\)"),
    **{
        f"no {part}": (remove(part), f"is incomplete: the subfolder {part} is missing")
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    },
}
UNLOADABLE = {
    "no unet config": (remove("unet/config.json"), "cannot be loaded"),
    "no vae weights": (remove("vae/diffusion_pytorch_model.safetensors"), "cannot be loaded"),
    "no text weights": (remove("text_encoder/model.safetensors"), "cannot be loaded"),
    "tokenizer cut short": (cut("tokenizer/tokenizer.json"), "cannot be loaded"),
    "tokenizer empty": (write("tokenizer/tokenizer.json", b""), "cannot be loaded"),
    "unet of another width": (
        lambda folder: edit(folder / "unet/config.json", cross_attention_dim=24),
        "cannot be loaded",
    ),
    "unet of another kind": (lambda folder: edit(folder / "unet/config.json", down_block_types=["X"]), "cannot be"),
    "unknown scheduler": (
        lambda folder: edit(folder / "model_index.json", scheduler=["diffusers", "NoScheduler"]),
        "cannot be loaded",
    ),
    "pickled vae cut short": (
        lambda folder: (
            (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
            and None
        ),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_refused(copy: Path, how: str) -> None:
    damage, said = DAMAGE[how]
    damage(copy)
    with pytest.raises(ValueError, match=said) as caught:
        locate(copy)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("how", UNLOADABLE)
def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(copy: Path, how: str) -> None:
    damage, said = UNLOADABLE[how]
    damage(copy)
    with pytest.raises(ValueError, match=said) as caught:
        open_model(locate(copy))
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_weights_that_are_missing_in_a_file_are_refused(copy: Path) -> None:
    weights = load_file(copy / UNET)
    del weights[MOVED]
    save_file(weights, copy / UNET, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"unet: 1 weights are missing, such as {MOVED}"):
        open_model(locate(copy))


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_no_weights_are_made_up(copy: Path, name: str) -> None:
    weights = load_file(copy / name)
    weights.popitem()
    save_file(weights, copy / name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name.partition('/')[0]}: 1 weights are missing") as caught:
        open_model(locate(copy))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard(copy)
    (copy / "unet/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model-00002-of-00003\.safetensors is missing"):
        locate(copy)


def test_wrong_names_are_refused(micro_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a model: a single file is \.safetensors or \.ckpt"):
        locate(micro_sd / "model_index.json")
    for name in (tmp_path / "none", "none", "./none", "~/none", f"{tmp_path.name}/a/b"):
        with pytest.raises(
            ValueError, match=r"no model '.*': there is no such folder; give a diffusers folder, a hub id"
        ) as caught:
            locate(name)
        assert "\n" not in str(caught.value)


def test_a_hub_id_offline_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^model 'nobody/nothing' is not a folder") as caught:
        locate("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_wrong_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **_: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="no model 'runs/none'"):
        locate("runs/none")


# --- opening --------------------------------------------------------------------------------------


def test_a_pipeline_opens_in_float32_and_learns_nothing(model: Model, pipe: StableDiffusionPipeline) -> None:
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in part.parameters())
        assert not part.training
    assert model.resolution == micro.SIZE


def test_the_safety_checker_is_never_loaded(copy: Path) -> None:
    edit(
        copy / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker/config.json").write_text("{}")
    pipe = open_model(locate(copy)).pipe
    assert pipe.safety_checker is None
    assert pipe.feature_extractor is None


def test_an_inpainting_unet_is_refused(copy: Path) -> None:
    micro.unet(in_channels=9).save_pretrained(copy / "unet")
    with pytest.raises(ValueError, match="a UNet of 9 input channels for 4 latent channels: inpainting"):
        open_model(locate(copy))


def test_describe_and_fingerprint(micro_sd: Path, copy: Path) -> None:
    source = locate(micro_sd)
    found = describe(source)
    assert found["unet_weights"] == sum(p.numel() for p in micro.unet().parameters())
    assert (found["dtype"], found["resolution"], found["text_width"]) == ("F16", micro.SIZE, micro.WIDTH)
    assert (found["prediction_type"], found["ema"]) == ("epsilon", False)
    assert found["index"]["_class_name"] == "StableDiffusionPipeline"
    prints = folders.fingerprint(source)
    assert set(prints) == {
        UNET,
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert prints == folders.fingerprint(locate(copy))
    weights = load_file(copy / UNET)
    weights[MOVED][0, 0] += 1
    save_file(weights, copy / UNET, metadata={"format": "pt"})
    assert {k for k, v in folders.fingerprint(locate(copy)).items() if prints[k] != v} == {UNET}


# --- text and images ------------------------------------------------------------------------------


def test_embeddings_are_those_of_the_text_encoder(model: Model, pipe: StableDiffusionPipeline) -> None:
    prompts = ["a cat", "", "a photo of a dog"]
    found = model.embed(prompts, batch_size=2)["text"]
    assert found.shape == (3, micro.MAX_TOKENS, micro.WIDTH)
    assert found.dtype == torch.float32
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=micro.MAX_TOKENS, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(found, pipe.text_encoder(ids).last_hidden_state, atol=1e-6)  # another batch size


def test_long_prompts_are_refused_with_their_length(model: Model) -> None:
    longest = "a " * (micro.MAX_TOKENS - 2)  # begin and end are tokens too
    model.check_prompts(["a cat", longest])
    assert model.count_tokens(longest) == micro.MAX_TOKENS
    for refuse in (Model.check_prompts, Model.embed):
        with pytest.raises(ValueError, match=r"the prompt 'a a .*' has 17 tokens, this model takes 16: shorten it"):
            refuse(model, ["a cat", longest + "cat"])
    with pytest.raises(ValueError, match=r"'x{60}'… has 92 tokens"):
        model.check_prompts(["x" * 90])


def test_encode_is_the_scaled_posterior(model: Model, pipe: StableDiffusionPipeline) -> None:
    pixels = torch.rand(3, 3, micro.SIZE, micro.SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode(pixels)
    assert std is not None
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (3, 4, micro.LATENT, micro.LATENT)
    assert torch.equal(mean, posterior.mean * 0.6)  # micro's scaling factor
    assert torch.equal(std, posterior.std * 0.6)


def test_drawn_latents_decode_to_the_pipelines_pictures(model: Model, pipe: StableDiffusionPipeline) -> None:
    prompts, seeds = ["a cat", "a dog", "a photo of a cat"], (3, 4, 5)
    generators = [image_generator(s, 0) for s in seeds]
    latents = model.generate_latents(prompts, generators, steps=2, guidance=3.0, batch_size=2)
    assert latents.shape == (3, 4, micro.LATENT, micro.LATENT)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    expected = pipe(
        prompts,
        generator=[image_generator(s, 0) for s in seeds],
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="np",
    ).images
    found = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert found == pytest.approx(expected, abs=1e-4)  # float32, another batch size
    assert expected.std() > 0.05


def test_the_sampler_takes_a_rows_settings(model: Model) -> None:
    assert pictures(model) == pictures(model, guidance=3.0)
    assert pictures(model) != pictures(model, guidance=1.0)
    draw = model.sampler(steps=1, guidance=3.0)
    (image,) = draw(["a cat"], [image_generator(0, 0)], width=32, height=16)
    assert isinstance(image, Image.Image)
    assert image.size == (32, 16)


# --- the backend ----------------------------------------------------------------------------------


def test_the_denoiser_is_the_unet_on_its_own_schedule(model: Model, pipe: StableDiffusionPipeline) -> None:
    backend = model.denoiser()
    assert isinstance(backend.process, Discrete)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    assert backend.net is pipe.unet
    assert backend.process.prediction == "epsilon"
    assert torch.equal(backend.process.alphas_cumprod, schedule.alphas_cumprod)
    z, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 700])
    noisy = backend.noisy({"z0": z, "noise": noise, "t": t})
    assert torch.allclose(noisy, schedule.add_noise(z, noise, t), atol=1e-6)
    cond = model.embed(["a cat", "a dog"])
    with torch.no_grad():
        assert torch.equal(backend.predict(noisy, t, cond), pipe.unet(noisy, t, cond["text"]).sample)


def test_v_prediction_is_honoured(copy: Path) -> None:
    edit(copy / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    source = locate(copy)
    model = open_model(source)
    process = model.denoiser().process
    assert isinstance(process, Discrete)
    assert process.prediction == describe(source)["prediction_type"] == "v_prediction"
    z, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 700])
    expected = DDPMScheduler.from_config(model.pipe.scheduler.config).get_velocity(z, noise, t)
    assert torch.allclose(process.target(z, noise, t), expected, atol=1e-6)


# --- saving ---------------------------------------------------------------------------------------


def test_saving_without_a_change_changes_nothing(micro_sd: Path, model: Model, tmp_path: Path) -> None:
    folders.save(locate(micro_sd), dict(model.net.named_parameters()), tmp_path / "out", {"erase": "x"})
    assert tree(tmp_path / "out") == tree(micro_sd)
    for name in tree(micro_sd) - {UNET}:
        assert (tmp_path / "out" / name).read_bytes() == (micro_sd / name).read_bytes(), name
    before, after = load_file(micro_sd / UNET), load_file(tmp_path / "out" / UNET)
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == before[name].dtype == torch.float16
        assert torch.equal(after[name], before[name]), name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert pictures(open_model(locate(tmp_path / "out"))) == pictures(model)


def test_saving_a_change_changes_that_alone(micro_sd: Path, model: Model, tmp_path: Path) -> None:
    change = some_change(micro_sd)
    folders.save(locate(micro_sd), change, tmp_path / "deep/out", {"erase": "x"})
    before, after = load_file(micro_sd / UNET), load_file(tmp_path / "deep/out" / UNET)
    for name in before:
        assert after[name].dtype == torch.float16
        expected = change[name].half() if name in change else before[name]
        assert torch.equal(after[name], expected), name
    # plain diffusers reads it, and shows the change
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "deep/out", dtype=torch.float32, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    assert pictures(micro.model(plain)) == pictures(open_model(locate(tmp_path / "deep/out")))
    assert pictures(micro.model(plain)) != pictures(model)
    from safetensors import safe_open

    with safe_open(tmp_path / "deep/out" / UNET, framework="pt") as f:
        assert f.metadata() == {"format": "pt", "erase": "x"}


def test_a_variant_keeps_its_names(micro_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp16"
    shutil.copytree(micro_sd, folder)
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    source = locate(folder)
    assert source.variant == "fp16"
    folders.save(source, some_change(folder, variant="fp16"), tmp_path / "out", {})
    assert tree(tmp_path / "out") == tree(folder)
    StableDiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16", safety_checker=None)
    assert pictures(open_model(locate(tmp_path / "out"))) != pictures(open_model(source))


def shard(folder: Path, variant: str | None = None) -> None:
    net = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float16)
    (folder / UNET).unlink()
    net.save_pretrained(folder / "unet", max_shard_size="40KB", variant=variant)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_stay_shards(micro_sd: Path, copy: Path, tmp_path: Path, variant: str | None) -> None:
    shard(copy, variant)
    source = locate(copy)
    assert source.variant == variant
    assert len(source.weights) == 3
    change = some_change(copy, variant=variant)
    folders.save(source, change, tmp_path / "out", {})
    assert tree(tmp_path / "out") == tree(copy)
    (index,) = (tmp_path / "out/unet").glob("*.index*.json")
    assert index.read_bytes() == (copy / "unet" / index.name).read_bytes()
    whole, after = load_file(micro_sd / UNET), saved_unet(tmp_path / "out")
    assert after.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(after[name], change[name].half() if name in change else tensor), name
    net = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet", variant=variant, dtype=torch.float16)
    assert torch.equal(net.get_parameter(MOVED), change[MOVED].half())
    assert describe(source)["unet_weights"] == sum(p.numel() for p in net.parameters())


def test_pickled_weights_are_read_and_written_as_safetensors(micro_sd: Path, copy: Path, tmp_path: Path) -> None:
    for path in copy.glob("*/*.safetensors"):
        weights = load_file(path)
        name = "pytorch_model.bin" if path.parent.name == "text_encoder" else f"{path.stem}.bin"
        torch.save(weights, path.with_name(name))
        path.unlink()
    source = locate(copy)
    assert source.weights[0].suffix == ".bin"
    change = some_change(copy)
    assert pictures(open_model(source)) == pictures(open_model(locate(micro_sd)))
    found = describe(source)
    assert (found["unet_weights"], found["dtype"]) == (sum(p.numel() for p in micro.unet().parameters()), "F16")
    assert len(folders.fingerprint(source)) == 3
    folders.save(source, change, tmp_path / "out", {})
    assert [p.name for p in (tmp_path / "out/unet").glob("diffusion*")] == ["diffusion_pytorch_model.safetensors"]
    after = load_file(tmp_path / "out" / UNET)
    assert torch.equal(after[MOVED], change[MOVED].half())
    assert pictures(open_model(locate(tmp_path / "out"))) != pictures(open_model(source))


def test_a_pickle_that_runs_code_is_refused(copy: Path, tmp_path: Path) -> None:
    import os
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "trapped"),)

    (copy / UNET).unlink()
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": Trap()}, protocol=2))
    source = locate(copy)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin holds more than weights"):
        open_model(source)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin"):
        folders.save(source, {}, tmp_path / "out", {})
    assert not (tmp_path / "trapped").exists()
    assert not (tmp_path / "out").exists()


def test_ema_weights_are_started_from_and_not_left_behind(micro_sd: Path, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy / "unet", copy / "unet_ema")
    ema = {k: v + 0.125 for k, v in load_file(copy / UNET).items()}
    save_file(ema, copy / "unet_ema" / Path(UNET).name, metadata={"format": "pt"})
    source = locate(copy)
    assert source.trained == "unet_ema"
    assert describe(source)["ema"]
    assert torch.equal(open_model(source).net.get_parameter(MOVED), ema[MOVED].float())
    change = some_change(copy, "unet_ema")
    folders.save(source, change, tmp_path / "out", {})
    assert tree(tmp_path / "out") == tree(micro_sd)
    after = load_file(tmp_path / "out" / UNET)
    for name, tensor in ema.items():
        assert torch.equal(after[name], change[name].half() if name in change else tensor), name


def test_weights_that_would_still_hold_the_concept_are_left_out(micro_sd: Path, copy: Path, tmp_path: Path) -> None:
    weights = (copy / UNET).read_bytes()
    for name in (
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "v1-5-pruned.safetensors",
        "old/unet/diffusion_pytorch_model.safetensors",
        "unet/old/diffusion_pytorch_model.safetensors",
        "unet_old/diffusion_pytorch_model.safetensors",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(weights)
    for name in (
        "v1-5-pruned.ckpt",
        "v1-5.pt",
        "v1-5.PTH",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.bin",
        "unet/diffusion_flax_model.msgpack",
        "unet/model.onnx",
        "unet/diffusion_pytorch_model.safetensors.index.non_ema.json",
        ".git/objects/pack",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"{}")
    (copy / "README.md").write_text("kept")
    folders.save(locate(copy), some_change(copy), tmp_path / "out", {})
    assert tree(tmp_path / "out") == tree(micro_sd) | {"README.md"}


def test_links_become_files(micro_sd: Path, tmp_path: Path) -> None:
    """The hub's cache is a tree of links: the output must not write through them, nor need them."""
    cache, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    shutil.copytree(micro_sd, blobs)
    for name in tree(micro_sd):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(blobs / name)
    before = (micro_sd / UNET).read_bytes()
    folders.save(locate(cache), some_change(cache), tmp_path / "out", {})
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert (micro_sd / UNET).read_bytes() == (blobs / UNET).read_bytes() == before


def test_saving_refuses(micro_sd: Path, tmp_path: Path) -> None:
    source = locate(micro_sd)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"there exists: choose another folder"):
        folders.save(source, {}, tmp_path / "there", {})
    with pytest.raises(ValueError, match=r"unet has no tensor named 'qqqq'"):
        folders.save(source, {"qqqq": torch.zeros(1)}, tmp_path / "out", {})
    with pytest.raises(ValueError, match=r"has shape \[16, 16\], got \[1\]"):
        folders.save(source, {MOVED: torch.zeros(1)}, tmp_path / "out", {})
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


def test_a_full_disk_leaves_nothing_behind(micro_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        folders.save(locate(micro_sd), some_change(micro_sd), tmp_path / "out", {})
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    folders.save(locate(micro_sd), some_change(micro_sd), tmp_path / "out", {})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_that_overflow_half_precision_are_refused(micro_sd: Path, tmp_path: Path) -> None:
    change = some_change(micro_sd)
    change[MOVED] = change[MOVED].clone()
    change[MOVED][0, 0] = 1e6
    with pytest.raises(ValueError, match=f"{MOVED}.*float16"):
        folders.save(locate(micro_sd), change, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_draws_with_plain_diffusers() -> None:
    """Without a dtype: the files are half precision, and diffusers and transformers read that differently."""
    pipe = StableDiffusionPipeline.from_pretrained(resources.tiny_path("photos-sd"))
    assert pipe("a photo of a cat", num_inference_steps=1).images[0].size == (64, 64)
