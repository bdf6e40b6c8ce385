"""DiT: what is not a question for all families."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import micro_dit
import micro_pixart
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.describe import describe
from erase.diffusion.model import Model, open_model

IMAGENET = tuple(f"class {i}" for i in range(1000))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("dit")
    micro_dit.pipeline(folder).save_pretrained(folder / "dit")
    return folder / "dit"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="module")
def model(saved: Path) -> Model:
    return open_model(locate(saved))


def gens(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def exchange(folder: Path, net: Any) -> None:
    """Another network in the place of the transformer."""
    edit(folder / "model_index.json", transformer=["diffusers", type(net).__name__])
    net.save_pretrained(folder / "transformer")


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [4.0, 1.0, None])
@pytest.mark.parametrize("channels", [8, 4])
def test_images_are_the_stock_pipelines(tmp_path: Path, guidance: float | None, channels: int) -> None:
    """Which has ImageNet's null class, and guides at its own scale of 4 where none is given."""
    micro_dit.pipeline(tmp_path, IMAGENET, out_channels=channels).save_pretrained(tmp_path / "dit")
    model = open_model(locate(tmp_path / "dit"))
    given = {} if guidance is None else {"guidance_scale": guidance}
    stock = model.pipe([7, 999], generator=gens(0, 1), num_inference_steps=3, **given).images
    mine = model.generate(["class 7", "class 999"], gens(0, 1), steps=3, guidance=guidance)
    for a, b in zip(mine, stock, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_any_samplers_noise_is_of_the_images_own_generator(saved: Path, kind: Any) -> None:
    model = open_model(locate(saved))
    model.pipe.scheduler = kind.from_config(model.pipe.scheduler.config)
    draw = model.generate(["tench", "corn", "maize"], gens(0, 1, 2), steps=4, guidance=4.0, latents=True)
    alone = model.generate(["corn"], gens(1), steps=4, guidance=4.0, latents=True)
    assert draw.isfinite().all()
    torch.testing.assert_close(draw[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw[1], draw[2], rtol=1e-2)


def test_latents_are_not_clipped_as_pixels_are(model: Model) -> None:
    """By a scheduler whose class would, where the model's own does not say so."""
    own = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    pipe = SimpleNamespace(scheduler=own)
    assert not replace(model, pipe=pipe).scheduler("ddim").config.clip_sample


def test_another_size_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="16×16; got 32×16"):
        model.generate(["tench"], gens(0), steps=1, guidance=1.0, size=(16, 32))


def test_learned_variances_enter_no_loss(model: Model) -> None:
    """The last layer's rows of the variance, every second half of 8 channels, get no gradient."""
    model.net.requires_grad_(True)
    batch = {"mean": torch.randn(4, 4, 8, 8, generator=gens(0)[0]), "cond": model.embed(["tench", "corn", "1", "3"])}
    model.denoiser().losses(batch, gens(0)[0]).sum().backward()
    rows = model.net.get_parameter("proj_out_2.weight").grad
    assert isinstance(rows, Tensor)
    used = rows.abs().sum(1).view(-1, 8) > 0
    assert used.all(0).tolist() == [True] * 4 + [False] * 4
    assert not used.any(0)[4:].any()
    model.net.zero_grad(set_to_none=True)
    model.net.requires_grad_(False)


# --- classes --------------------------------------------------------------------------------------


def test_classes_are_called_by_any_of_their_names(model: Model) -> None:
    names = ["tench, Tinca tinca", "crane (1)", "golden retriever", "crane (3)", "corn, maize"]
    assert model.labels == names
    for prompt, number in [*((name, i) for i, name in enumerate(names)), ("Tinca tinca", 0), ("3", 3), ("", 5)]:
        assert model.embed([prompt])["label"].tolist() == [number]
    with pytest.raises(ValueError, match=r"several classes are called 'crane': 1 crane \(1\), 3 crane \(3\)"):
        model.embed(["crane"])


def test_without_names_they_are_numbers(copy: Path) -> None:
    """As the stock pipeline saves one that it has opened."""
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "id2label"}))
    assert open_model(locate(copy)).labels == ["0", "1", "2", "3", "4"]
    assert open_model(locate(copy, labels=list("abcde"))).labels == list("abcde")


def test_it_is_described(saved: Path) -> None:
    found = describe(locate(saved))
    assert found["image"] == {"channels": 3, "height": 16, "width": 16}
    assert (found["kind"], found["null_class"], found["guidance"]) == ("DiT pipeline", 5, 4.0)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hollow", [False, True])
def test_a_published_folder_opens(model: Model, copy: Path, hollow: bool) -> None:
    """It names the class that diffusers had then, and its weights are pickles."""
    edit(copy / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(copy / "transformer/config.json", _class_name="Transformer2DModel")
    for part in ("transformer", "vae"):
        weights = copy / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    found = open_model(locate(copy), hollow=hollow)
    assert type(found.net) is type(model.net)
    for name, p in model.net.named_parameters():
        assert hollow or torch.equal(found.net.get_parameter(name), p)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: edit(f / "model_index.json", id2label={"0": "a"}), "has 5 classes; got 1 names"),
        (lambda f: edit(f / "model_index.json", id2label={str(i): "a" for i in range(1, 6)}), "has 5 classes"),
        (lambda f: micro_dit.pipeline(f, in_channels=3).transformer.save_pretrained(f / "transformer"), "of 3 input"),
        (lambda f: micro_dit.pipeline(f, out_channels=12).transformer.save_pretrained(f / "transformer"), "12 output"),
        (lambda f: exchange(f, micro_pixart.pipeline(f).transformer), "expected a DiTTransformer2DModel"),
        (lambda f: shutil.rmtree(f / "vae"), "vae is missing"),
    ],
)
def test_what_does_not_fit_is_refused(copy: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=said) as caught:
        open_model(locate(copy))
    assert "\n" not in str(caught.value)


def test_names_of_ones_own_are_refused_where_it_has_names(saved: Path) -> None:
    with pytest.raises(ValueError, match="names its classes itself: leave out labels"):
        open_model(locate(saved, labels=list("abcde")))
