import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import micro_ddpm
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeScheduler
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase.diffusion import class_conditional, samplers
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.losses import Denoise
from erase.diffusion.model import open_model
from erase.diffusion.process import Discrete
from erase.evaluation.generate import generate, image_generator
from erase.evaluation.prompt_files import PromptRow
from erase.store.labelled import scaled

FILE = "diffusion_pytorch_model.safetensors"
GREY, COLOUR = (1, 8, 8), (3, 8, 12)
Pipe = class_conditional.ClassConditionalPipeline
KINDS: dict[str, dict[str, Any]] = {
    "grey": {},
    "unguided": {"guidance": 1.0},
    "v": {"prediction": "v_prediction"},
    "patches": {"shape": (1, 12, 12), "patch": 2, "channels": [8, 8]},
    "colour, wide, attention": {"shape": COLOUR, "patch": 2, "attention": [False, True], "prediction": "v_prediction"},
    "one resolution": {"channels": [8], "layers": 2, "schedule": "linear"},
}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Pipe]:
    """Tests do not change them."""
    return {name: micro_ddpm.model(**kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def pipe(pipes: dict[str, Pipe]) -> Pipe:
    return pipes["grey"]


@pytest.fixture(scope="module")
def saved(pipe: Pipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("ddpm") / "saved"
    class_conditional.save_new(pipe, folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def gens(*seeds: int) -> list[torch.Generator]:
    return [image_generator(seed, 0) for seed in seeds]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def opened(folder: Path, *labels: str) -> Pipe:
    return open_model(locate(folder, "label", labels=labels)).pipe


def pictures(pipe: Pipe) -> list[bytes]:
    return [i.tobytes() for i in pipe([0, 2, 1], gens(1, 2, 3), num_inference_steps=2).images]


def refused(message: str, do: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        do()
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


# --- drawing --------------------------------------------------------------------------------------

SAMPLERS: list[Any] = [None, "ddim", "ddpm", "dpm"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [  # each model by its own sampler, and each sampler by one model
        pytest.param(kind, name, marks=[pytest.mark.slow] * (name is not None and kind != "grey"))
        for kind in KINDS
        for name in SAMPLERS
    ],
)
def test_an_image_depends_on_its_label_and_generator_alone(pipes: dict[str, Pipe], kind: str, name: Any) -> None:
    pipe = micro_ddpm.with_sampler(pipes[kind], name)
    labels, seeds = [0, 1, 2, 1], [5, 6, 7, 8]

    def draw(labels: list[int], seeds: list[int]) -> Tensor:
        # untrained, an epsilon model runs away at the noisy end: compared as they become pictures
        return pipe.generate(labels, gens(*seeds), 3).clamp(-1, 1)

    whole = draw(labels, seeds)
    assert whole.shape == (4, pipe.unet.config.in_channels, *pipe.unet.config.sample_size)
    assert whole.std() > 0.1
    order = [2, 0, 3, 1]
    shuffled = draw([labels[i] for i in order], [seeds[i] for i in order])
    alone = torch.cat([draw([label], [seed]) for label, seed in zip(labels, seeds, strict=True)])
    # float32, another batch size or place in it; DPM's first steps are large where nothing was learnt
    close = {"rtol": 0, "atol": 2e-3}
    torch.testing.assert_close(shuffled, whole[order], **close)
    torch.testing.assert_close(alone, whole, **close)
    other_label, other_seed = draw([0, 1, 1, 1], seeds), draw(labels, [5, 6, 9, 8])
    for other in (other_label, other_seed):
        moved = (other - whole).flatten(1).abs().amax(1)
        assert moved[2] > 0.01
        assert moved[[0, 1, 3]].max() < 2e-3


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm"])
@pytest.mark.parametrize(("kind", "scale"), [("grey", 3.0), ("v", 0.0), ("patches", 1.0)])
def test_drawing_is_the_plain_loop(pipes: dict[str, Pipe], kind: str, scale: float, name: Any) -> None:
    """One image at a time, both predictions at every step, `null + s (class - null)`, diffusers' own scheduler."""
    pipe, labels, seeds = pipes[kind], [2, 0], (3, 4)
    found = micro_ddpm.with_sampler(pipe, name).generate(labels, gens(*seeds), 4, scale)
    made: Any = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm": DPMSolverMultistepScheduler}[name]
    for image, label, generator in zip(found, labels, gens(*seeds), strict=True):
        scheduler = made.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(4)
        x = torch.randn((1, *image.shape), generator=generator)
        for t in scheduler.timesteps:
            with torch.no_grad():
                null, own = (pipe.unet(x, t, class_labels=torch.tensor([k])).sample for k in (3, label))
            x = scheduler.step(null + scale * (own - null), t, x, generator=generator).prev_sample
        # float32 through some passes in other batches, relative to the size of what an untrained model draws
        assert float((x[0] - image).abs().max()) < 1e-3 * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize(("kind", "scale", "passes"), [("grey", None, 2), ("grey", 1.0, 1), ("unguided", None, 1)])
def test_guidance_1_makes_no_second_pass(pipes: dict[str, Pipe], kind: str, scale: float | None, passes: int) -> None:
    pipe, sizes = pipes[kind], []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        one = pipe.generate([0, 1], gens(1, 2), 2, scale)
    finally:
        hook.remove()
    assert sizes == [2 * passes] * 2
    if passes == 1:
        near = pipe.generate([0, 1], gens(1, 2), 2, 1 + 1e-6)  # by way of the guided pass
        torch.testing.assert_close(one, near, rtol=0, atol=1e-3)
    else:
        assert torch.equal(one, pipe.generate([0, 1], gens(1, 2), 2, 2.0))  # the model's own standard
        assert not torch.allclose(one, pipe.generate([0, 1], gens(1, 2), 2, 1.0), atol=1e-2)


def test_pictures_are_those_that_are_drawn(pipes: dict[str, Pipe]) -> None:
    for kind, mode, size in (("grey", "L", (8, 8)), ("colour, wide, attention", "RGB", (12, 8)), ("v", "L", (8, 8))):
        pipe = pipes[kind]
        images = pipe([1, 2], gens(1, 2), num_inference_steps=2).images
        assert [(i.mode, i.size) for i in images] == [(mode, size)] * 2
        x = pipe.generate([1, 2], gens(1, 2), 2)
        height, width = size[::-1]
        for image, drawn in zip(images, x, strict=True):
            array = np.asarray(image).reshape(height, width, -1)
            p = pipe.patch
            for row, column, channel in ((0, 0, 0), (3, 5, 0), (height - 1, width - 1, array.shape[2] - 1)):
                depth = channel * p * p + (row % p) * p + column % p
                value = float(drawn[depth, row // p, column // p].clamp(-1, 1))
                assert int(array[row, column, channel]) == round((value + 1) * 127.5)


def test_bytes_and_their_scale_are_inverse() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(class_conditional.to_uint8(scaled(every)), every)
    x = torch.tensor([-7.0, -1.0, -0.999, 0.0039, 0.999, 1.0, 7.0])
    assert class_conditional.to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255, 255]
    assert class_conditional.to_uint8(x).dtype == torch.uint8


def test_patches_go_into_channels_and_back() -> None:
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    assert class_conditional.from_pixels(x, 1) is x
    assert class_conditional.to_pixels(x, 1) is x
    deep = class_conditional.from_pixels(x, 2)
    assert deep.shape == (2, 12, 2, 3)
    assert deep[1, 4:8, 1, 2].tolist() == x[1, 1, 2:, 4:].flatten().tolist()  # a channel's patch, row by row
    assert torch.equal(class_conditional.to_pixels(deep, 2), x)
    with pytest.raises(RuntimeError):
        class_conditional.from_pixels(torch.zeros(1, 1, 3, 4), 2)


def test_latents_are_drawn_in_batches(pipe: Pipe) -> None:
    pipe = micro_ddpm.with_sampler(pipe, "dpm")  # which does not clip by itself
    entered = list[int]()

    @contextmanager
    def autocast() -> Any:
        entered.append(1)
        yield

    settings: dict[str, Any] = {"steps": 2, "guidance": 3.0, "batch_size": 2, "autocast": autocast}
    draw, names = micro_ddpm.wrap(pipe).generate_latents, ["ant", "cow", "bee"]
    found = draw(names, gens(1, 2, 3), **settings)
    assert len(entered) == 2
    assert found.shape == (3, *GREY)
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float32, "cpu", False)
    assert found.abs().max() == 1 < pipe.generate([0], gens(1), 2).abs().max()
    expected = torch.cat([pipe.generate([0, 2], gens(1, 2), 2, 3.0), pipe.generate([1], gens(3), 2, 3.0)]).clamp(-1, 1)
    assert torch.equal(found, expected)
    own = draw(names, gens(1, 2, 3), **{**settings, "guidance": None})
    assert torch.equal(own, draw(names, gens(1, 2, 3), **{**settings, "guidance": 2.0}))
    assert not torch.equal(own, found)


def test_latents_drawn_in_half_precision_are_kept_in_float32(pipe: Pipe) -> None:
    bf16 = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    draw = micro_ddpm.wrap(pipe).generate_latents
    found = draw(["ant"], gens(1), steps=2, guidance=3.0, autocast=bf16)
    exact = draw(["ant"], gens(1), steps=2, guidance=3.0)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert float((found - exact).abs().mean()) < 0.1


# --- the sampler of the evaluation ----------------------------------------------------------------


def test_the_sampler_takes_names_and_a_rows_guidance(pipe: Pipe) -> None:
    draw = micro_ddpm.wrap(pipe).sampler(steps=2, guidance=3.0)

    def pixels(pipe: Pipe, scale: float | None, steps: int = 2) -> list[bytes]:
        return [i.tobytes() for i in pipe([2, 0], gens(1, 2), steps, scale).images]

    def drawn(draw: Any, **row: Any) -> list[bytes]:
        return [i.tobytes() for i in draw(["cow", "ant"], gens(1, 2), **row)]

    assert drawn(draw) == drawn(draw, guidance=None, width=None, height=None) == pixels(pipe, 3.0)
    assert drawn(draw, guidance=1.0) == pixels(pipe, 1.0) != pixels(pipe, 3.0)
    own = micro_ddpm.wrap(pipe).sampler(steps=2, guidance=None)
    assert drawn(own) == pixels(pipe, 2.0) != pixels(pipe, 3.0)
    ancestral = micro_ddpm.with_sampler(pipe, "ddpm")
    other = micro_ddpm.wrap(ancestral).sampler(steps=3, guidance=3.0)
    assert drawn(other) == pixels(ancestral, 3.0, 3) != pixels(pipe, 3.0, 3)


def test_the_sampler_draws_the_evaluations_folders(pipe: Pipe, tmp_path: Path) -> None:
    """Whatever the batch size; padding is thrown away."""
    rows = [PromptRow(name, seed) for seed, name in enumerate(pipe.labels)]
    draw = micro_ddpm.wrap(pipe).sampler(steps=2, guidance=None)
    found = generate(draw, rows, tmp_path / "out", per_prompt=2, batch_size=4)
    assert [(row.prompt, row.seed, row.index) for row in found] == [
        (name, seed, index) for seed, name in enumerate(pipe.labels) for index in range(2)
    ]
    for row in found:
        pixels = np.asarray(Image.open(tmp_path / "out" / row.file), np.int64)
        label, generator = pipe.labels.index(row.prompt), image_generator(row.seed, row.index)
        alone = np.asarray(pipe([label], [generator], 2).images[0], np.int64)
        assert np.abs(pixels - alone).max() <= 1  # float rounding of another batch


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm"])
def test_another_sampler_is_the_same_model(pipes: dict[str, Pipe], name: Any) -> None:
    for pipe in (pipes["grey"], pipes["colour, wide, attention"]):
        before = pipe.scheduler
        other = micro_ddpm.with_sampler(pipe, name)
        assert type(other.scheduler) is samplers.SCHEDULERS[name]
        assert torch.equal(other.scheduler.alphas_cumprod, before.alphas_cumprod)
        assert other.scheduler.config.prediction_type == before.config.prediction_type
        assert other.unet is pipe.unet
        assert (other.labels, other.guidance, other.patch) == (pipe.labels, pipe.guidance, pipe.patch)
        assert (other.null, other.shape) == (pipe.null, pipe.shape)
        assert pipe.scheduler is before


def test_guidance_needs_a_null_class(pipe: Pipe, copy: Path) -> None:
    class_conditional.check_guidance(pipe, None)
    class_conditional.check_guidance(pipe, 7.0)
    bare = lone(copy, "a", "b", "c", "d")
    assert bare.null is None
    class_conditional.check_guidance(bare, None)
    class_conditional.check_guidance(bare, 1.0)
    for scale in (0.0, 2.0):
        said = (
            rf"guidance {scale} needs a null class, which this model lacks \(it has 4 class embeddings for 4 labels\)"
            r": set draw\.guidance=1"
        )
        refused(said, lambda scale=scale: class_conditional.check_guidance(bare, scale))
        draw = micro_ddpm.wrap(bare).sampler(steps=2, guidance=scale)
        refused(said, lambda draw=draw: draw(["d"], gens(0)))
    assert len(micro_ddpm.wrap(bare).sampler(steps=1, guidance=None)(["d"], gens(0))) == 1


def test_drawing_with_guidance_and_without_a_null_class_is_refused(copy: Path) -> None:
    bare = lone(copy, "a", "b", "c", "d")
    with pytest.raises(ValueError, match="needs a null class"):
        bare([0], gens(0), 1, guidance_scale=2.0)


# --- the backend ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grey", "patches", "colour, wide, attention"])
def test_the_denoiser_is_the_unet_on_its_own_schedule(pipes: dict[str, Pipe], kind: str) -> None:
    pipe, prediction = pipes[kind], KINDS[kind].get("prediction", "epsilon")
    backend = micro_ddpm.wrap(pipe).denoiser()
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    assert backend.net is pipe.unet
    assert isinstance(backend.process, Discrete)
    assert backend.process.prediction == prediction
    assert torch.equal(backend.process.alphas_cumprod, schedule.alphas_cumprod)
    shape = (2, pipe.unet.config.in_channels, *pipe.unet.config.sample_size)
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    t, cond = torch.tensor([3, 700]), {"label": torch.tensor([2, 0])}
    noisy = schedule.add_noise(z, noise, t)
    with torch.no_grad():
        out = pipe.unet(noisy, t, class_labels=cond["label"]).sample
        assert torch.allclose(backend.predict(noisy, t, cond), out, atol=1e-6)
        target = schedule.get_velocity(z, noise, t) if prediction == "v_prediction" else noise
        losses = backend.losses({"mean": z, "z0": z, "noise": noise, "t": t, "cond": cond}, g)
    torch.testing.assert_close(losses, (out - target).square().mean((1, 2, 3)))


def test_dropped_labels_are_the_null_class(pipe: Pipe, copy: Path) -> None:
    model = micro_ddpm.wrap(pipe)
    backend = model.denoiser(model.null())
    assert backend.null is not None
    assert backend.null["label"].tolist() == [3] == [pipe.null]
    g = torch.Generator().manual_seed(0)
    batch = backend.draw({"mean": torch.randn(3, *GREY, generator=g), "cond": {"label": torch.tensor([0, 1, 2])}}, g)
    batch["drop_draw"] = torch.tensor([0.0, 0.5, 0.05])
    with torch.no_grad():
        found = Denoise(0.1)(backend, batch, g)
        expected = backend.losses({**batch, "cond": {"label": torch.tensor([3, 1, 3])}}, g)
        kept = backend.losses(batch, g)
    assert torch.equal(found, expected)
    assert not torch.isclose(found, kept)[[0, 2]].any()
    model = micro_ddpm.wrap(lone(copy, "a", "b", "c", "d"))
    bare = model.denoiser(model.null())
    assert bare.null is None
    with pytest.raises(ValueError, match=r"dropout 0\.1 needs a null condition, which this model lacks"):
        Denoise(0.1)(bare, batch, g)


# --- new models -----------------------------------------------------------------------------------


def test_a_new_model_is_what_was_asked_for() -> None:
    settings: dict[str, Any] = {
        "channels": [4, 8, 8],
        "layers": 2,
        "attention": [False, True, True],
        "groups": 4,
        "head": 4,
        "prediction": "v_prediction",
        "schedule": "linear",
        "guidance": 1.5,
        "patch": 2,
    }
    pipe = micro_ddpm.model(("x", "y"), (3, 16, 24), **settings)
    config = pipe.unet.config
    assert pipe.shape == (3, 16, 24)
    assert (config.in_channels, config.out_channels, config.sample_size) == (12, 12, (8, 12))
    assert (config.block_out_channels, config.layers_per_block) == ((4, 8, 8), 2)
    assert (config.attention_head_dim, config.norm_num_groups) == (4, 4)
    assert config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    assert config.up_block_types == ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert (config.num_class_embeds, pipe.null, pipe.labels) == (3, 2, ["x", "y"])
    assert (pipe.guidance, pipe.patch, pipe.unet.training) == (1.5, 2, False)
    schedule = pipe.scheduler.config
    assert (type(pipe.scheduler), schedule.prediction_type) == (DDIMScheduler, "v_prediction")
    assert (schedule.beta_schedule, schedule.timestep_spacing) == ("linear", "trailing")
    assert pipe.generate([0, 1], gens(0, 1), 1).shape == (2, 12, 8, 12)
    assert micro_ddpm.model(attention=[]).unet.config.down_block_types == ("DownBlock2D",) * 2


def same(a: Any, b: Any) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_new_weights_are_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = micro_ddpm.model(seed=3).unet
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(micro_ddpm.model(seed=3).unet, first)
    assert not same(micro_ddpm.model(seed=4).unet, first)


def test_renewed_weights_are_those_of_a_new_model_of_that_seed() -> None:
    pipe = micro_ddpm.model(seed=3)
    pipe.unet.requires_grad_(False)
    torch.manual_seed(1)
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in pipe.unet.named_parameters()}
    fresh = class_conditional.renew(pipe.unet, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(fresh, micro_ddpm.model(seed=5).unet)
    assert fresh.config == pipe.unet.config
    assert not fresh.training
    assert all(torch.equal(p, weights[n]) for n, p in pipe.unet.named_parameters())  # the old one stays
    moved = {n for n, p in fresh.named_parameters() if not torch.equal(p, weights[n])}
    assert {"class_embedding.weight", "conv_in.weight", "mid_block.attentions.0.to_k.weight"} <= moved


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": (1, 8, 9)}, "images of 8×9 cannot be halved to 2 resolutions at patch 1"),
        ({"shape": (1, 6, 8), "patch": 2}, "images of 6×8 cannot be halved to 2 resolutions at patch 2"),
        ({"shape": (1, 28, 28), "channels": [8] * 4}, "images of 28×28 cannot be halved to 4 resolutions"),
        ({"groups": 3}, r"architecture\.groups 3 must divide every number of channels; got \[8, 16\]"),
        ({"groups": 16}, r"architecture\.groups 16 must divide every .* got \[8, 16\]"),
        ({"attention": [True]}, r"architecture\.attention has 1 values for 2 resolutions"),
        ({"attention": [True] * 3}, r"architecture\.attention has 3 values for 2 resolutions"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    refused(said, lambda: micro_ddpm.model(**change))


def test_a_head_wider_than_the_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"architecture\.head 32"):
        micro_ddpm.model(head=32)


# --- writing and reading --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_draws_the_same_pictures(pipes: dict[str, Pipe], kind: str, tmp_path: Path) -> None:
    pipe = pipes[kind]
    class_conditional.save_new(pipe, tmp_path / "deep/out")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    source = locate(tmp_path / "deep/out", "label")
    assert isinstance(source, folders.Source)
    assert (source.trained, source.variant, list(folders.fingerprint(source))) == ("unet", None, [f"unet/{FILE}"])
    other = open_model(source).pipe
    assert (other.labels, other.guidance, other.patch) == (pipe.labels, pipe.guidance, pipe.patch)
    assert (other.null, other.shape) == (pipe.null, pipe.shape)
    assert type(other.scheduler) is DDIMScheduler
    for key in ("beta_schedule", "prediction_type", "timestep_spacing", "clip_sample", "num_train_timesteps"):
        assert other.scheduler.config[key] == pipe.scheduler.config[key]
    assert pictures(other) == pictures(pipe)
    for name in ("ddpm", "dpm"):
        one, two = (micro_ddpm.with_sampler(p, name) for p in (other, pipe))  # type: ignore[arg-type]
        assert pictures(one) == pictures(two)
    assert not any(p.requires_grad for p in other.unet.parameters())
    assert not other.unet.training


def test_a_model_is_saved_whole_or_not_at_all(pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    refused("there exists: choose another folder", lambda: class_conditional.save_new(pipe, tmp_path / "there"))
    assert not list((tmp_path / "there").iterdir())

    def full(self: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Pipe, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        class_conditional.save_new(pipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_plain_diffusers_reads_the_saved_unet(pipe: Pipe, saved: Path) -> None:
    for net in (UNet2DModel.from_pretrained(saved, subfolder="unet"), UNet2DModel.from_pretrained(saved / "unet")):
        assert same(net, pipe.unet)
        x, t, labels = torch.ones(2, *GREY), torch.tensor([3, 700]), torch.tensor([0, 3])
        with torch.no_grad():
            assert torch.equal(net(x, t, class_labels=labels).sample, pipe.unet(x, t, class_labels=labels).sample)
    assert type(DDIMScheduler.from_pretrained(saved, subfolder="scheduler")) is DDIMScheduler


def lone(copy: Path, *labels: str) -> Pipe:
    """The UNet's own folder, as `UNet2DModel.save_pretrained` writes it."""
    return opened(copy / "unet", *labels)


def test_a_lone_unet_opens_with_labels(pipe: Pipe, tmp_path: Path) -> None:
    pipe.unet.save_pretrained(tmp_path / "lone")
    assert {p.name for p in (tmp_path / "lone").iterdir()} == {"config.json", FILE}
    source = locate(tmp_path / "lone", "label")
    assert isinstance(source, folders.Source)
    assert (source.trained, source.name) == (".", str(tmp_path / "lone"))
    model = open_model(replace(source, labels=("x", "y", "z")))
    other, process = model.pipe, model.denoiser().process
    assert (other.labels, other.null, other.guidance, other.patch) == (["x", "y", "z"], 3, 1.0, 1)
    assert other.shape == pipe.shape
    assert same(other.unet, pipe.unet)
    assert isinstance(process, Discrete)
    assert torch.equal(process.alphas_cumprod, DDPMScheduler().alphas_cumprod)
    assert len(pictures(other)) == 3
    whole = opened(tmp_path / "lone", "w", "x", "y", "z")  # every row a class
    assert (whole.labels, whole.null) == (["w", "x", "y", "z"], None)


def test_a_lone_unet_is_saved_as_one(copy: Path, tmp_path: Path) -> None:
    source = locate(copy / "unet", "label")
    name = "class_embedding.weight"
    values = {name: torch.full((4, 32), 0.5)}
    folders.save(source, values, tmp_path / "out", {})
    net = opened(tmp_path / "out", "a", "b", "c").unet
    assert torch.equal(net.get_parameter(name), values[name])


def test_a_plain_ddpm_pipeline_opens_with_labels(pipe: Pipe, tmp_path: Path) -> None:
    schedule = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", variance_type="fixed_large"
    )
    DDPMPipeline(pipe.unet, schedule).save_pretrained(tmp_path / "plain")
    other = opened(tmp_path / "plain", "x", "y", "z")
    assert (other.labels, other.null, other.guidance, other.patch) == (["x", "y", "z"], 3, 1.0, 1)
    assert type(other.scheduler) is DDPMScheduler
    assert other.scheduler.config.variance_type == "fixed_large"
    process = micro_ddpm.wrap(other).denoiser().process
    assert isinstance(process, Discrete)
    assert process.prediction == "v_prediction"
    assert torch.equal(process.alphas_cumprod, schedule.alphas_cumprod)
    assert same(other.unet, pipe.unet)
    # drawn as diffusers' own pipeline would draw a class, if it could be told one
    schedule.set_timesteps(3)
    (generator,) = gens(4)
    x = torch.randn((1, *GREY), generator=generator)
    for t in schedule.timesteps:
        with torch.no_grad():
            out = pipe.unet(x, t, class_labels=torch.tensor([1])).sample
        x = schedule.step(out, t, x, generator=generator).prev_sample
    torch.testing.assert_close(other.generate([1], gens(4), 3), x)
    folders.save(locate(tmp_path / "plain", "label"), {}, tmp_path / "out", {})
    again = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert same(again.unet, pipe.unet)


def test_ema_weights_are_started_from(copy: Path) -> None:
    shutil.copytree(copy / "unet", copy / "unet_ema")
    ema = {k: v + 0.125 for k, v in load_file(copy / "unet" / FILE).items()}
    save_file(ema, copy / "unet_ema" / FILE, metadata={"format": "pt"})
    source = locate(copy, "label")
    assert isinstance(source, folders.Source)
    assert source.trained == "unet_ema"
    assert torch.equal(open_model(source).pipe.unet.conv_in.weight, ema["conv_in.weight"])


def test_old_names_of_attention_are_refused_before_training(pipes: dict[str, Pipe], tmp_path: Path) -> None:
    """What diffusers before 0.14 wrote: it loads, but could not be written again."""
    class_conditional.save_new(pipes["colour, wide, attention"], tmp_path / "old")
    file = tmp_path / "old/unet" / FILE
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    held = {}
    for name, value in load_file(file).items():
        for new, old in names.items():
            name = name.replace(f".{new}.", f".{old}.")
        held[name] = value
    assert any(".query." in name for name in held)
    save_file(held, file, metadata={"format": "pt"})
    refused("names its attention weights as old versions of diffusers did", lambda: opened(tmp_path / "old"))


def test_half_precision_opens_in_float32(pipe: Pipe, copy: Path) -> None:
    half = {k: v.half() for k, v in load_file(copy / "unet" / FILE).items()}
    save_file(half, copy / "unet" / FILE, metadata={"format": "pt"})
    net = opened(copy).unet
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.conv_in.weight, pipe.unet.conv_in.weight.half().float())


@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_the_models_own_sampler_is_kept(pipe: Pipe, tmp_path: Path, kind: Any) -> None:
    own = Pipe(pipe.unet, kind.from_config(pipe.scheduler.config), dict(enumerate("abc")), 1.5, 1)
    class_conditional.save_new(own, tmp_path / "out")
    other = opened(tmp_path / "out")
    assert type(other.scheduler) is kind
    assert (other.guidance, other.labels) == (1.5, ["a", "b", "c"])
    assert pictures(other) == pictures(own)


# --- refusals -------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    path = folder / "unet" / FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_kind(folder: Path) -> None:
    edit(folder / "model_index.json", unet=["diffusers", "UNet2DConditionModel"], _class_name="StableDiffusionPipeline")


def a_transformers_model(folder: Path) -> None:
    shutil.rmtree(folder)
    micro_ddpm.write_classifier(folder)


def lone_of_another_kind(folder: Path) -> None:
    edit(folder / "unet/config.json", _class_name="UNet2DConditionModel")
    (folder / "model_index.json").unlink()
    shutil.copytree(folder / "unet", folder, dirs_exist_ok=True)


def missing_weights(folder: Path) -> None:
    weights = load_file(folder / "unet" / FILE)
    del weights["conv_in.weight"], weights["conv_in.bias"]
    save_file(weights, folder / "unet" / FILE, metadata={"format": "pt"})


def index(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **values)


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "unet/config.json", **values)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut, f"unet/{FILE} is cut short or not a safetensors file"),
    "empty": (lambda f: (f / "unet" / FILE).write_bytes(b""), f"{FILE} is cut short or not a safetensors file"),
    "no weights": (lambda f: (f / "unet" / FILE).unlink(), rf"unet has no weights \({FILE}\)"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "is incomplete: the subfolder unet is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "is incomplete: the subfolder scheduler is missing"),
    "nothing": (lambda f: [shutil.rmtree(f), f.mkdir()], "is not a diffusers pipeline: it has no model_index.json"),
    "index cut short": (lambda f: (f / "model_index.json").write_text("{"), "not JSON, or cut short"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "is not a diffusers pipeline"),
    "unet config cut short": (lambda f: (f / "unet/config.json").write_text("{"), "config.json: not JSON"),
    "scheduler config": (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "not JSON"),
    "another pipeline": (of_another_kind, "holds a StableDiffusionPipeline, Stable Diffusion: .* erase run sd"),
    "no unet in the index": (index(unet=[None, None]), r"has no unet \(null in its model_index.json\)"),
    "a pipeline of nobody's": (
        index(unet=["diffusers", "UNet1DModel"], _class_name="DanceDiffusionPipeline"),
        "holds a DanceDiffusionPipeline; supported pipelines: .*ClassConditionalPipeline",
    ),
    "a classifier": (a_transformers_model, "holds an image classifier: use erase run classify"),
    "another lone unet": (lone_of_another_kind, "holds a UNet2DConditionModel without its pipeline"),
    "missing weights": (missing_weights, "2 weights are missing, such as conv_in.weight: get it again"),
    "no classes": (
        config(num_class_embeds=None),
        r"has a UNet without classes \(num_class_embeds\): it has no class to forget",
    ),
    "other width": (config(block_out_channels=[16, 16]), "cannot be loaded"),
    "unknown block": (config(down_block_types=["X", "Y"]), "cannot be loaded"),
    "too few names": (
        index(id2label={"0": "a", "1": "b"}),
        "has 4 class embeddings, null class included; got 2 names",
    ),
    "too many names": (
        index(id2label={str(i): str(i) for i in range(5)}),
        "has 4 class embeddings, null class included; got 5 names",
    ),
    "no names": (index(id2label={}), r"names no classes and has 4 class embeddings: give labels=4 .* labels=3"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_refused(copy: Path, how: str) -> None:
    damage, said = DAMAGE[how]
    damage(copy)
    refused(said, lambda: opened(copy))
    with pytest.raises(ValueError, match=str(copy)):
        opened(copy)


def test_names_that_do_not_fit_are_refused(copy: Path) -> None:
    for labels, said in (
        ((), r"unet names no classes and has 4 class embeddings: give labels=4 .* labels=3"),
        (("a", "b"), "unet has 4 class embeddings, null class included; got 2 names"),
        (tuple("abcde"), "unet has 4 class embeddings, null class included; got 5 names"),
    ):
        refused(said, lambda labels=labels: lone(copy, *labels))
    assert opened(copy, *micro_ddpm.LABELS).labels == list(micro_ddpm.LABELS)  # the same ones do no harm
    for labels in (("cow", "bee", "ant"), ("a", "b", "c", "d")):
        said = "copy names its classes itself: leave out labels; they are ant, bee, cow"
        refused(said, lambda labels=labels: opened(copy, *labels))


def test_names_that_lead_nowhere_are_refused(saved: Path, tmp_path: Path) -> None:
    for name in (tmp_path / "none", "none"):
        refused(
            rf"no model '{name}': there is no such folder; give a diffusers folder, a hub id",
            lambda name=name: locate(name, "label"),
        )
    refused("model 'nobody/nothing' is not a folder", lambda: locate("nobody/nothing", "label"))
    refused(
        "model_index.json is a file, and no model",
        lambda: locate(saved / "model_index.json", "label"),
    )


@pytest.mark.parametrize("text", ["null", "[1, 2]", "3"])
def test_a_config_that_is_no_mapping_is_refused(copy: Path, text: str) -> None:
    (copy / "unet/config.json").write_text(text)
    refused(f"holds a {type(json.loads(text)).__name__} without its pipeline", lambda: locate(copy / "unet", "label"))


def test_a_name_given_twice_is_refused(copy: Path) -> None:
    """Drawing by name and forgetting by name would mean different classes."""
    with pytest.raises(ValueError, match=r"twice|differ"):
        lone(copy, "a", "a", "b")


def test_a_noise_schedule_of_another_kind_is_refused(copy: Path) -> None:
    """Consistency models have sigmas and no betas: 40 linear betas would be made up for this one."""
    CMStochasticIterativeScheduler().save_pretrained(copy / "scheduler")
    edit(copy / "model_index.json", scheduler=["diffusers", "CMStochasticIterativeScheduler"])
    with pytest.raises(ValueError, match="CMStochasticIterativeScheduler"):
        opened(copy)


def test_a_network_that_predicts_variances_is_refused(pipe: Pipe, copy: Path) -> None:
    config = dict(pipe.unet.config)
    twice = type(pipe.unet).from_config({**config, "out_channels": 2 * config["out_channels"]})
    twice.save_pretrained(copy / "unet")
    with pytest.raises(ValueError, match="predict variances"):
        opened(copy)
