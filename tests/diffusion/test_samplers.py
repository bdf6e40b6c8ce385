"""Samplers by name: the model's own noise schedule, one generator an image, and refusals."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any, get_args

import micro
import micro_ddpm
import micro_flux
import micro_pixart
import micro_sd3
import micro_sdxl
import pytest
import torch
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from torch import Tensor

from erase.config import Draw
from erase.diffusion import samplers
from erase.diffusion.families import family
from erase.diffusion.loading import networks
from erase.diffusion.model import Model
from erase.diffusion.process import discrete

NAMES = tuple(name for name in samplers.SCHEDULERS if name not in ("ddpm", "flow_euler"))
PROMPTS = ("a photo of a cat", "a dog", "a car")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return micro.model(micro.pipeline(tmp_path_factory.mktemp("sd")))


def draw(model: Model, sampler: str | None, picks: tuple[int, ...] = (0, 1, 2), steps: int = 5) -> Tensor:
    generators = [torch.Generator().manual_seed(10 + k) for k in picks]
    asked = [PROMPTS[k] for k in picks]
    found: Tensor = model.generate(asked, generators, steps=steps, guidance=2.0, sampler=sampler, latents=True)
    return found


def test_the_settings_name_the_samplers() -> None:
    options = get_args(inspect.get_annotations(Draw, eval_str=True)["sampler"])
    assert {*NAMES, "flow_euler"} == set(next(get_args(option) for option in options if get_args(option)))


@pytest.mark.parametrize("name", [None, *NAMES])
def test_an_image_depends_on_its_generator_alone(sd: Model, name: str | None) -> None:
    """Whatever was generated before and beside it; the pipeline keeps its own sampler."""
    own = sd.pipe.scheduler
    whole = draw(sd, name)
    assert whole.isfinite().all()
    shuffled = draw(sd, name, (2, 0, 1))
    alone = torch.cat([draw(sd, name, (k,)) for k in range(3)])
    scale = float(whole.abs().max())
    # float32 through five passes in batches of another size
    torch.testing.assert_close(shuffled[[1, 2, 0]], whole, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-4 * scale)
    assert torch.equal(draw(sd, name), whole)
    assert sd.pipe.scheduler is own


def test_every_sampler_is_another_one_and_none_is_the_models_own(sd: Model) -> None:
    found = {name: draw(sd, name) for name in (None, *NAMES)}
    assert torch.equal(found[None], found["ddim"])  # the micro model's own is DDIM
    different = [found[name] for name in NAMES]
    for k, one in enumerate(different):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in different[k + 1 :])
    assert sd.scheduler() is sd.pipe.scheduler


@pytest.mark.parametrize("name", [name for name in NAMES if name != "euler_a"])
def test_the_deterministic_ones_solve_the_models_equation(name: str) -> None:
    """Of data N(0, s²) the probability flow is known: x_0 = x_T s / √(ᾱ_T s² + 1 - ᾱ_T)."""
    own, spread = samplers.SCHEDULERS["ddim"](beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), 0.5
    found = samplers.scheduler(own.config, name, latent=True)
    found.set_timesteps(100)
    start = torch.tensor([[[[-1.0, 0.5, 2.0]]]])
    x = start * found.init_noise_sigma
    for t in found.timesteps:
        level = own.alphas_cumprod[int(t)]
        z = found.scale_model_input(x, t)
        noise = (1 - level).sqrt() * z / (level * spread**2 + 1 - level)
        x = found.step(noise, t, x).prev_sample
    last = own.alphas_cumprod[-1]
    exact = start * spread / (last * spread**2 + 1 - last).sqrt()
    # with 100 steps the methods of first order are a few percent off
    torch.testing.assert_close(x, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_schedule_is_the_models(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    model = micro.model(micro.pipeline(tmp_path, beta_end=0.02, num_train_timesteps=500, **settings))
    own, found = model.scheduler(), model.scheduler(name)
    assert type(found) is samplers.SCHEDULERS[name]
    torch.testing.assert_close(found.alphas_cumprod, own.alphas_cumprod)
    for key in ("prediction_type", "timestep_spacing", "num_train_timesteps", "beta_schedule"):
        assert found.config[key] == own.config[key], key
    found.set_timesteps(5)
    assert 490 <= int(found.timesteps.max()) < 500


@pytest.mark.parametrize("name", NAMES)
def test_defaults_of_the_models_own_class_are_its_schedule_too(name: str) -> None:
    """A latent consistency scheduler has other betas by default than all others."""
    own = LCMScheduler()
    found = samplers.scheduler(own.config, name, latent=True)
    torch.testing.assert_close(found.alphas_cumprod, own.alphas_cumprod)
    torch.testing.assert_close(discrete(own.config).alphas_cumprod, own.alphas_cumprod)
    assert not found.config.get("clip_sample", False)


def test_dpm_is_plus_plus_of_second_order_whatever_the_models_own_is() -> None:
    own = samplers.SCHEDULERS["dpm"](algorithm_type="sde-dpmsolver++", solver_order=3)
    found = samplers.scheduler(own.config, "dpm").config
    assert (found.algorithm_type, found.solver_order) == ("dpmsolver++", 2)


@pytest.mark.parametrize(("name", "make"), [("sdxl", micro_sdxl.pipeline), ("pixart", micro_pixart.pipeline)])
@pytest.mark.parametrize("sampler", NAMES)
def test_other_families_that_predict_noise(name: str, make: Any, sampler: str, tmp_path: Path) -> None:
    pipe = make(tmp_path)
    for net in networks(pipe).values():
        net.eval()  # T5 has dropout
    model = Model(family(name), pipe)
    assert draw(model, sampler, (0,), steps=2).isfinite().all()


@pytest.mark.parametrize(("name", "make"), [("sd3", micro_sd3.pipeline), ("flux", micro_flux.pipeline)])
def test_flows(name: str, make: Any, tmp_path: Path) -> None:
    pipe = make(tmp_path)
    for net in networks(pipe).values():
        net.eval()  # T5 has dropout
    model = Model(family(name), pipe)
    assert torch.equal(draw(model, "flow_euler"), draw(model, None))
    for other in NAMES:
        with pytest.raises(ValueError, match=rf"draw\.sampler.*{other}.*flow_euler") as refused:
            model.scheduler(other)
        assert "\n" not in str(refused.value)


def test_refusals(sd: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: Model, name: str) -> str:
        with pytest.raises(ValueError, match=rf"draw\.sampler.* {name}") as found:
            model.scheduler(name)
        return str(found.value).partition("choose")[2]

    assert "euler_a" in refused(sd, "flow_euler")
    assert "flow_euler" not in refused(sd, "heun")
    assert "pndm" not in refused(micro.model(micro.pipeline(tmp_path / "x", prediction_type="sample")), "pndm")
    rescaled = micro.model(micro.pipeline(tmp_path / "r", rescale_betas_zero_snr=True))
    assert "lms" not in refused(rescaled, "lms")
    rescaled.scheduler("euler")
    label = micro_ddpm.wrap(micro_ddpm.model())
    assert "ddpm" in refused(label, "euler")
    assert type(label.scheduler("ddpm")) is samplers.SCHEDULERS["ddpm"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lms needs scipy"):
        sd.scheduler("lms")
