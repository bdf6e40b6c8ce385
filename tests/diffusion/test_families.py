"""Every family on a micro pipeline of its real classes: the same questions for all.

A family's row says how to build its pipeline (`micro_<name>.pipeline`) and, where its network takes something else
than latents as they are, how to read latents, times and predictions from what the stock pipeline passes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import micro
import micro_ddpm
import micro_dit
import micro_flux
import micro_lumina2
import micro_pixart
import micro_sd3
import micro_sdxl
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from erase.diffusion import condition, loading
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.families import FAMILIES
from erase.diffusion.live import model_of
from erase.diffusion.model import Model, open_model
from erase.diffusion.nearness import nearness
from erase.diffusion.parameters import Learning
from erase.diffusion.process import Discrete, Flow
from erase.programs import saving
from erase.store.safetensors import digest


@dataclass(frozen=True)
class Row:
    """What a test must know of a family."""

    pipeline: Callable[[Path], Any]
    """Writes what it needs into a folder; a pipeline of random weights."""
    prompts: tuple[str, str] = ("a photo of a cat", "a dog")
    latents: Callable[[Tensor], Tensor] = lambda x: x
    """From what the network takes."""
    clock: Callable[[Tensor], Tensor] = lambda t: t
    """`Process.clock`'s times from the network's."""
    prediction: Callable[[Tensor], Tensor] = lambda x: x
    """As `Family.call` gives it, from what the network gives."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the stock pipeline is told so that it generates as `Family.generate` has it."""
    guidance: float = 3.0
    """The scale of a generation whose forward passes are those of `call`."""
    rounding: int = 0
    """Levels of 255 by which its pixels may differ from the stock pipeline's."""


PIXART: dict[str, Any] = {
    "prediction": lambda x: x.chunk(2, 1)[0],  # the other half is a variance
    "given": {"use_resolution_binning": False, "clean_caption": False},
}
FLUX: dict[str, Any] = {
    "latents": micro_flux.unpacked,
    "clock": micro_flux.clock,
    "prediction": micro_flux.unpacked,
    "guidance": 1.0,
}
LUMINA2: dict[str, Any] = {  # time and velocity run the other way
    "clock": lambda t: 1000 * (1 - t.double()),
    "prediction": lambda x: -x,
    "guidance": 1.0,  # conditions in passes of their own; `test_lumina2` asks for the null one's
}
ROWS = {  # by family, and after a dash a variant
    "sd": Row(micro.pipeline),
    "sdxl": Row(micro_sdxl.pipeline),
    "sd3": Row(micro_sd3.pipeline),
    "sd3-without_t5": Row(partial(micro_sd3.pipeline, t5=False), rounding=1),
    "flux": Row(micro_flux.pipeline, **FLUX),
    "flux-schnell": Row(partial(micro_flux.pipeline, schnell=True), **FLUX, given={"max_sequence_length": 256}),
    "pixart": Row(micro_pixart.pipeline, **PIXART),
    "pixart-alpha": Row(micro_pixart.alpha, **PIXART),
    "lumina2": Row(micro_lumina2.pipeline, **LUMINA2),
    "ddpm": Row(micro_ddpm.pipeline, prompts=("cat", "dog")),
    "dit": Row(micro_dit.pipeline, prompts=("Tinca tinca", "corn, maize"), prediction=lambda x: x[:, :4]),
}


@dataclass(frozen=True)
class Case:
    row: Row
    source: Source
    model: Model


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * ("-" in name)) for name in ROWS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    work = tmp_path_factory.mktemp(request.param)
    ROWS[request.param].pipeline(work).save_pretrained(work / "pipeline")
    source = locate(work / "pipeline")
    assert isinstance(source, Source)
    assert source.family == request.param.split("-")[0]
    return Case(ROWS[request.param], source, open_model(source))


def often(*names: str) -> pytest.MarkDecorator:
    """What is the same code for all is asked of some; of the others it is a slow test."""
    rows = [pytest.param(name, marks=[pytest.mark.slow] * (name not in names)) for name in ROWS]
    return pytest.mark.parametrize("case", rows, indirect=True)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(count)]


def draw(model: Model, prompts: tuple[str, ...], **given: Any) -> Any:
    return model.generate(prompts, generators(len(prompts)), **{"steps": 2, "guidance": 3.0, **given})


def test_every_family_has_a_row() -> None:
    assert FAMILIES.keys() == {name.split("-")[0] for name in ROWS}


def test_decoding_is_the_stock_pipelines(case: Case) -> None:
    """Latents as the network sees them become the images that the pipeline makes of them."""
    model, row = case.model, case.row
    if model.family.CONDITION == "label":
        return
    latents = draw(model, row.prompts, guidance=row.guidance, latents=True)
    images = draw(model, row.prompts, guidance=row.guidance)
    for ours, theirs in zip(model.decode(latents), images, strict=True):
        apart = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int))
        assert int(apart.max()) <= 1


def test_call_is_the_stock_pipelines_forward_pass(case: Case) -> None:
    """What the pipeline passes to its network, and gets, is recorded; `call` must say the same of the same latents."""
    model, row, seen = case.model, case.row, []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x = kwargs.get("hidden_states", kwargs.get("sample", args[0] if args else None))
        t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        seen.append((x, t, out[0] if isinstance(out, tuple) else out.sample))

    hook = model.net.register_forward_hook(record, with_kwargs=True)
    drawn = draw(model, row.prompts, guidance=row.guidance, latents=True)
    hook.remove()
    assert len(seen) >= 2
    asked = condition.to(model.embed(row.prompts), model.device)
    for x, t, out in seen:
        latents = row.latents(x)
        assert latents.shape[1:] == drawn.shape[1:]
        time = row.clock(torch.as_tensor(t)).float().expand(len(latents))
        cond = asked
        if len(latents) > len(row.prompts):
            null = condition.to(model.embed([""] * len(row.prompts)), model.device)
            cond = condition.cat([null, asked])
        with torch.no_grad():
            mine = model.family.call(model.net, latents, time, cond)
        assert mine.shape == latents.shape
        torch.testing.assert_close(mine, row.prediction(out), rtol=1e-5, atol=1e-6)


def test_noise_and_target_are_the_schedulers(case: Case) -> None:
    model = case.model
    process = model.family.process(model.pipe)
    latents, _ = model.family.example(model.configs)
    generator = torch.Generator().manual_seed(0)
    shape = (8, *latents.shape[1:])
    z0, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    t = process.times(8, generator, torch.device("cpu"))
    noisy, target = process.noisy(z0, noise, t), process.target(z0, noise, t)
    if isinstance(process, Discrete):
        added = DDPMScheduler.from_config(model.pipe.scheduler.config).add_noise(z0, noise, t)
        torch.testing.assert_close(noisy, added, rtol=1e-6, atol=1e-6)  # the scheduler's ᾱ are float32
        solver = DDIMScheduler.from_config(model.pipe.scheduler.config, clip_sample=False, thresholding=False)
        solver.set_timesteps(4)
        for i in range(8):  # what a step from z_t takes for the data
            found = solver.step(target[i], int(t[i]), noisy[i]).pred_original_sample
            torch.testing.assert_close(found, z0[i], rtol=1e-3, atol=1e-3)  # √ᾱ of the last steps is near 0
        return
    assert isinstance(process, Flow)
    stock = FlowMatchEulerDiscreteScheduler.from_config(model.pipe.scheduler.config)
    stock.sigmas, stock.timesteps = t.double(), process.clock(t)
    torch.testing.assert_close(noisy, stock.scale_noise(z0, stock.timesteps, noise), rtol=1e-6, atol=1e-6)
    sigma = t.double().view(-1, *[1] * (z0.ndim - 1))
    torch.testing.assert_close(noisy + (0 - sigma) * target, z0)  # one Euler step from σ to 0


def test_a_prompt_is_nearest_to_itself(case: Case) -> None:
    """By whatever the family embeds of it."""
    first, second = case.row.prompts
    if case.model.family.CONDITION == "label":
        return
    found = nearness(case.model.embed, [second, first, ""], [first])
    assert found[1] == pytest.approx(1)
    assert max(found[0], found[2]) < found[1] - 1e-5  # micro encoders of random weights tell little apart


def test_training_needs_neither_vae_nor_encoders(case: Case) -> None:
    """They are freed once latents and conditions are cached."""
    model = open_model(case.source)
    null, process, side = model.null(), model.family.process(model.pipe), model.resolution
    model.free("vae", *model.family.ENCODERS)
    for found, known in ((model.family.process(model.pipe), process), (model.denoiser(null).process, process)):
        assert repr(found) == repr(known)
    assert model.resolution == side


def test_times_are_stratified(case: Case) -> None:
    process = case.model.family.process(case.model.pipe)
    t = process.times(20, torch.Generator().manual_seed(0), torch.device("cpu")).sort().values
    assert t.unique().numel() == 20
    bins = process.bins(t, 4)
    assert int(bins.min()) >= 0
    assert int(bins.max()) == 3


def test_example_is_shaped_as_a_sample(case: Case) -> None:
    """Of configurations alone, for a dry run."""
    model = case.model
    latents, cond = model.family.example(model.configs)
    asked = model.embed(case.row.prompts[:1])
    assert {name: (x.shape, x.dtype) for name, x in cond.items()} == {n: (x.shape, x.dtype) for n, x in asked.items()}
    assert latents.shape == draw(model, case.row.prompts[:1], latents=True).shape


def test_drawing_from_conditions_is_drawing_from_prompts(case: Case) -> None:
    """The stock pipeline, given the prompts themselves, makes the same pixels."""
    model = case.model
    if model.family.CONDITION == "label":
        pytest.skip("its prompts are classes")
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pil", **case.row.given}
    side, stride = model.resolution, model.family.STRIDE
    for size in (None, (side + 4 * stride, side + 2 * stride)):
        asked = dict(zip(("height", "width"), size or (side, side), strict=True))
        stock = model.pipe(list(case.row.prompts), generator=generators(2), **asked, **given).images
        for mine, theirs in zip(draw(model, case.row.prompts, size=size), stock, strict=True):
            assert mine.size == (size or (side, side))[::-1]
            apart = np.abs(np.asarray(mine, np.int16) - np.asarray(theirs, np.int16))
            assert apart.max() <= case.row.rounding


def test_everything_in_a_condition_changes_the_prediction(case: Case) -> None:
    model = case.model
    latents, _ = model.family.example(model.configs)
    x = torch.randn((2, *latents.shape[1:]), generator=torch.Generator().manual_seed(0))
    process = model.family.process(model.pipe)
    t = process.clock(process.times(2, torch.Generator().manual_seed(0), torch.device("cpu")))
    asked = model.embed(case.row.prompts)
    with torch.no_grad():
        before = model.family.call(model.net, x, t, asked)
        for name, leaf in asked.items():
            other = leaf.flip(0) if not torch.equal(leaf[0], leaf[1]) else 2 * leaf
            after = model.family.call(model.net, x, t, {**asked, name: other})
            assert not torch.allclose(before, after, rtol=1e-4, atol=1e-4), name
        assert not torch.allclose(before, model.family.call(model.net, x, t.flip(0), asked), rtol=1e-4, atol=1e-4)


def test_encoding_undoes_the_stock_pipelines_scale_and_shift(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.model
    vae = getattr(model.pipe, "vae", None)
    if vae is None:
        pytest.skip("its latents are pixels")
    latents, decode, seen = draw(model, case.row.prompts, latents=True), vae.decode, []

    def record(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(z)
        return decode(z, *args, **kwargs)

    monkeypatch.setattr(vae, "decode", record)
    draw(model, case.row.prompts)
    z = torch.cat(seen)
    posterior = SimpleNamespace(mean=z, std=torch.ones_like(z))
    monkeypatch.setattr(vae, "encode", lambda pixels: SimpleNamespace(latent_dist=posterior))
    mean, std = model.encode(torch.zeros(2, 3, 8, 8))
    torch.testing.assert_close(mean, latents.float(), rtol=1e-5, atol=1e-5)
    posterior.mean = z + 1
    torch.testing.assert_close(model.encode(torch.zeros(2, 3, 8, 8))[0] - mean, std, rtol=1e-3, atol=1e-4)  # rounding


def test_an_image_depends_on_its_own_generator_alone(case: Case) -> None:
    both = draw(case.model, case.row.prompts, latents=True)
    again = case.model.generate(case.row.prompts[::-1], generators(2)[::-1], steps=2, guidance=3.0, latents=True)
    torch.testing.assert_close(both, again.flip(0), rtol=1e-4, atol=1e-4)


def test_saved_after_no_step_it_is_the_same(case: Case, tmp_path: Path) -> None:
    """Every tensor, and every pixel."""
    saving.write(case.source, {}, tmp_path / "model", {})
    for path in sorted(case.source.folder.rglob("*.safetensors")):
        other = tmp_path / "model" / path.relative_to(case.source.folder)
        assert digest(load_file(path)) == digest(load_file(other))
    again = open_model(locate(tmp_path / "model"))
    for mine, theirs in zip(draw(case.model, case.row.prompts), draw(again, case.row.prompts), strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


@often("sd", "flux", "dit")
@pytest.mark.parametrize("variant", [None, "fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_shards_and_variants_open(case: Case, tmp_path: Path, variant: str | None) -> None:
    """The trained network's shards, each in 16 bits where the variant says so; other components may be another."""
    shutil.copytree(case.source.folder, tmp_path / "model")
    there = [part for part in case.model.family.ENCODERS if (case.source.folder / part).is_dir()]
    for part in there if variant is None else ():
        (tmp_path / "model" / part / "model.safetensors").rename(tmp_path / "model" / part / "model.fp16.safetensors")
    dtype = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    net = type(case.model.net).from_pretrained(case.source.folder, subfolder=case.source.trained, dtype=dtype)
    shutil.rmtree(tmp_path / "model" / case.source.trained)
    net.save_pretrained(tmp_path / "model" / case.source.trained, variant=variant, max_shard_size="40KB")
    source = locate(tmp_path / "model")
    assert isinstance(source, Source)
    assert (source.variant, len(source.weights) > 1) == (variant, True)
    model = open_model(source)
    for name, p in net.named_parameters():
        assert torch.equal(model.net.get_parameter(name), p.float())
    saving.write(source, {}, tmp_path / "again", {})
    assert tree(tmp_path / "again" / source.trained) == tree(tmp_path / "model" / source.trained)


def tree(folder: Path) -> dict[str, str]:
    """Digests of weights, by file."""
    return {path.name: digest(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}


def test_parameter_sets_choose_something(case: Case) -> None:
    from erase.diffusion.parameters import select

    sets = case.model.family.PARAMETERS
    assert "full" in sets
    chosen = {name: set(select(case.model.net, name, sets)) for name in sets}
    case.model.net.requires_grad_(False)
    if "xattn" in sets:
        assert chosen["xattn"] < chosen["full"]
        assert chosen["noxattn"] == chosen["full"] - chosen["xattn"]
        assert chosen["kv"] < chosen["xattn"]
    if "esd_u" in sets:  # dense layers and convolutions outside cross-attention, and nothing else
        xl = case.model.family.NAME == "Stable Diffusion XL"
        own = {
            f"{name}.{key}"
            for name, module in case.model.net.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and "attn2" not in name
            if not xl or ("emb" not in name and "block" in name)
            for key, _ in module.named_parameters(recurse=False)
        }
        assert chosen["esd_u"] == own < chosen["noxattn"]


def test_losses_have_gradients(case: Case) -> None:
    """The denoising loss of a drawn batch, one number a sample, reaches the parameters."""
    model = case.model
    latents = draw(model, case.row.prompts, latents=True)
    backend = model.denoiser(model.null())
    batch = {"mean": latents, "cond": condition.to(model.embed(case.row.prompts), model.device)}
    model.net.requires_grad_(True)
    try:
        losses = backend.losses(batch, torch.Generator().manual_seed(0))
        assert losses.shape == (2,)
        losses.sum().backward()
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.net.parameters())
    finally:
        model.net.zero_grad(set_to_none=True)
        model.net.requires_grad_(False)


@pytest.mark.parametrize("precision", [pytest.param("no", marks=pytest.mark.slow), "bf16"])
def test_a_hollow_model_has_the_shapes_and_no_weights(case: Case, precision: str) -> None:
    model, whole = open_model(case.source, precision=precision, hollow=True), case.model
    if model.family.CONDITION == "label" and not loading.is_hollow(model.net):
        pytest.skip("it is small, and always whole")
    for name, net in loading.networks(model.pipe).items():
        assert all(p.is_meta for p in net.parameters())
        shapes = {key: p.shape for key, p in loading.networks(whole.pipe)[name].named_parameters()}
        assert {key: p.shape for key, p in net.named_parameters()} == shapes
    assert model.resolution == whole.resolution
    for mine, theirs in zip(model.family.example(model.configs), model.family.example(whole.configs), strict=True):
        assert condition.shapes(mine) == condition.shapes(theirs)


@often("sd", "flux")
def test_a_lean_model_says_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders come and go, the network comes when it is needed; what learns is float32, by the file's values."""
    whole = case.model
    if whole.family.CONDITION == "label":
        pytest.skip("it has no encoders")
    monkeypatch.setattr(loading, "held_dtype", lambda *_: torch.float32)
    model = open_model(case.source)
    model = Model(model.family, whole.family.open(case.source, "cpu", torch.float32, hollow_parts(whole)), case.source)
    model.lean = True
    asked, expected = model.embed(case.row.prompts), condition.cat([whole.embed([p]) for p in case.row.prompts])
    for name, x in expected.items():
        assert torch.equal(asked[name], x)
    for name in model.family.ENCODERS:
        net = getattr(model.pipe, name)
        assert net is None or loading.is_hollow(net)
    chosen = model.choose(Learning("full"))
    assert loading.is_hollow(model.net)
    latents = draw(model, case.row.prompts, latents=True)
    torch.testing.assert_close(latents, draw(whole, case.row.prompts, latents=True), rtol=1e-3, atol=1e-3)
    assert not loading.is_hollow(model.net)
    assert [name for name, p in model.net.named_parameters() if p.requires_grad] == chosen


def hollow_parts(model: Model) -> tuple[str, ...]:
    return (model.family.TRAINED, *model.family.ENCODERS)


@often("sd", "sd3", "dit")
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16])
def test_frozen_weights_in_16_bits(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    """A step of training and a generation work; masters are the file's own values, not those of 16 bits."""
    name = case.model.family.TRAINED
    monkeypatch.setattr(loading, "held_dtype", lambda *_: dtype)
    model = open_model(case.source, precision="bf16")
    if model.family.CONDITION == "label" and next(model.net.parameters()).dtype == torch.float32:
        pytest.skip("it is small, and always float32")
    sets = model.family.PARAMETERS
    chosen = model.choose(Learning("xattn" if "xattn" in sets else "full"))
    null, asked = model.null(), model.embed(case.row.prompts)
    model.ready(name)
    for key, p in model.net.named_parameters():
        assert p.dtype == (torch.float32 if key in chosen else dtype)
    for key in chosen:
        assert torch.equal(model.net.get_parameter(key), case.model.net.get_parameter(key))
    backend = model.denoiser(null)
    latents, _ = model.family.example(model.configs)
    batch = {"mean": latents.expand(2, *latents.shape[1:]), "cond": asked}
    with torch.autocast("cpu", dtype):
        losses = backend.losses(batch, torch.Generator().manual_seed(0))
        exact = case.model.denoiser().losses(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses, exact, rtol=0.1, atol=0.02)  # of eight bits
    losses.sum().backward()
    grads = [model.net.get_parameter(key).grad for key in chosen]
    assert any(g is not None and bool(g.abs().sum() > 0) for g in grads)
    model.net.requires_grad_(False)
    with torch.autocast("cpu", dtype):
        drawn = draw(model, case.row.prompts, latents=True)
    assert bool(drawn.isfinite().all())


class BrokenHereError(RuntimeError):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdxl", "pixart", "dit"])
def test_images_of_a_pipeline_in_memory_do_not_overflow(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """`force_upcast`: in float16 they do. The VAE is as it was afterwards, to the tensor, even after an error."""
    pipe = ROWS[name].pipeline(tmp_path)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.decoder.conv_in.weight.data.mul_(3e5)
    pipe.vae.to(dtype)
    pipe.vae.post_quant_conv.float()
    pipe.vae.decode = given = pipe.vae.decode
    kept = {key: (p, p.data_ptr(), p.dtype) for key, p in pipe.vae.named_parameters()}
    seen: list[Tensor] = []
    inside = pipe.vae.decoder.conv_in.register_forward_hook(lambda module, args, out: seen.append(out))
    model, (prompt, _) = model_of(pipe), ROWS[name].prompts
    sample = model.sampler(steps=1, guidance=2.0, autocast=partial(torch.autocast, "cpu", torch.float16))

    def check() -> None:
        assert {key: (p, p.data_ptr(), p.dtype) for key, p in pipe.vae.named_parameters()} == kept
        assert (pipe.vae.decode, pipe.vae.use_slicing) == (given, False)
        assert "encode" not in vars(pipe.vae)

    sample([prompt] * 2, generators(2))
    check()
    assert seen
    assert all(x.dtype == torch.float32 and bool(x.isfinite().all()) and float(x.abs().max()) > 65504 for x in seen)
    inside.remove()

    def fail(*_: Any) -> None:
        raise BrokenHereError

    pipe.vae.decoder.conv_in.register_forward_hook(fail)
    with pytest.raises(BrokenHereError):
        sample([prompt], generators(1))
    check()
