"""Every family on a micro pipeline of its real classes: the same questions for all.

A family's row says how to build its pipeline (`micro_<name>.pipeline`) and, where its network takes something else
than latents as they are, how to read latents, times and predictions from what the stock pipeline passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import micro
import micro_ddpm
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from erase.diffusion import condition
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.families import FAMILIES
from erase.diffusion.model import Model, open_model
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


ROWS = {
    "sd": Row(micro.pipeline),
    "ddpm": Row(micro_ddpm.pipeline, prompts=("cat", "dog")),
}


@dataclass(frozen=True)
class Case:
    row: Row
    source: Source
    model: Model


@pytest.fixture(scope="module", params=ROWS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    work = tmp_path_factory.mktemp(request.param)
    ROWS[request.param].pipeline(work).save_pretrained(work / "pipeline")
    source = locate(work / "pipeline")
    assert isinstance(source, Source)
    assert source.family == request.param
    return Case(ROWS[request.param], source, open_model(source))


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(count)]


def draw(model: Model, prompts: tuple[str, ...], **given: Any) -> Any:
    return model.draw(prompts, generators(len(prompts)), steps=2, guidance=3.0, **given)


def test_every_family_has_a_row() -> None:
    assert FAMILIES.keys() == ROWS.keys()


def test_call_is_the_stock_pipelines_forward_pass(case: Case) -> None:
    """What the pipeline passes to its network, and gets, is recorded; `call` must say the same of the same latents."""
    model, row, seen = case.model, case.row, []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x = kwargs.get("hidden_states", kwargs.get("sample", args[0] if args else None))
        t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        seen.append((x, t, out[0] if isinstance(out, tuple) else out.sample))

    hook = model.net.register_forward_hook(record, with_kwargs=True)
    drawn = draw(model, row.prompts, latents=True)
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
    stock = model.pipe(
        list(case.row.prompts), generator=generators(2), num_inference_steps=2, guidance_scale=3.0, output_type="pil"
    ).images
    for mine, theirs in zip(draw(model, case.row.prompts), stock, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


def test_an_image_depends_on_its_own_generator_alone(case: Case) -> None:
    both = draw(case.model, case.row.prompts, latents=True)
    again = case.model.draw(case.row.prompts[::-1], generators(2)[::-1], steps=2, guidance=3.0, latents=True)
    torch.testing.assert_close(both, again.flip(0), rtol=1e-4, atol=1e-4)


def test_saved_after_no_step_it_is_the_same(case: Case, tmp_path: Path) -> None:
    """Every tensor, and every pixel."""
    saving.write(case.source, {}, tmp_path / "model", {})
    for path in sorted(case.source.folder.rglob("*.safetensors")):
        from safetensors.torch import load_file

        other = tmp_path / "model" / path.relative_to(case.source.folder)
        assert digest(load_file(path)) == digest(load_file(other))
    again = open_model(locate(tmp_path / "model"))
    for mine, theirs in zip(draw(case.model, case.row.prompts), draw(again, case.row.prompts), strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


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
