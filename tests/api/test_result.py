"""What a call gives back: images, counts, files."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import micro
import micro_ddpm
import micro_dit
import micro_flux
import micro_lumina2
import micro_own as models
import micro_pixart
import micro_sd3
import micro_sdxl
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

import erase
from erase.api.writing import save_lora
from erase.cli import app
from erase.diffusion.checkpoints import convert
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.lora.svd import Ranks
from erase.programs import saving
from erase.store.delta import open_delta

REMAIN = ["a car", "a boat"]


@pytest.fixture
def forgot(pipe: Any) -> Any:
    return erase.forget(pipe, "a photo of a cat", remain=REMAIN, settings={"method.fast_rate": 0.1})


def test_a_full_save_is_the_pipeline_with_a_card(forgot: Any, pipe: Any, tmp_path: Path) -> None:
    out = forgot.save(tmp_path / "out")
    again = type(pipe).from_pretrained(out, safety_checker=None)
    assert not models.changed(again.unet, models.state(pipe.unet))
    assert "sfron" in (out / "README.md").read_text()
    with safe_open(out / "unet/diffusion_pytorch_model.safetensors", "pt") as file:
        header = file.metadata()
    assert header["erase_method"] == "sfron"
    assert header["erase_mask_density"] == f"{forgot.mask.density:.6f}"
    assert "cat" not in str(header)
    with pytest.raises(ValueError, match="exists"):
        forgot.save(out)
    with pytest.raises(ValueError, match="form"):
        forgot.save(tmp_path / "other", form="half")


def test_a_loaded_model_knows_what_its_file_forgot(forgot: Any, tmp_path: Path) -> None:
    again = erase.load(forgot.save(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"forget\.anchors"):
        erase.forget(again, "a photo of a dog", anchor="a photo of a cat", remain=REMAIN)


def test_the_card_names_what_was_loaded(micro_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is unpacked and a hub id is a folder named by a commit: neither is the base's name; of later calls too."""
    file = tmp_path / "my model.safetensors"
    convert.to_file(locate(micro_sd), file)  # type: ignore[arg-type]
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **_: micro_sd)
    for given, name in ((micro_sd, micro_sd.name), ("some/model", "some/model"), (file, file.name)):
        pipe = erase.load(given, device="cpu")
        assert erase.forget(pipe, "a photo of a cat", remain=REMAIN).meta["erase_base"] == name
    assert erase.forget(pipe, "a dog", remain=REMAIN).meta["erase_base"] == name


def test_a_lora_is_loaded_onto_the_base(forgot: Any, pipe: Any, tmp_path: Path) -> None:
    file = forgot.save(tmp_path / "out", form="lora", energy=1.0)
    assert file == tmp_path / "out/lora.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["erase_method"] == "sfron"
    erased = models.state(pipe.unet)
    forgot.undo()
    base = models.state(pipe.unet)
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    weights = [name for name, t in erased.items() if not torch.equal(t, base[name]) and t.ndim > 1]
    assert weights
    for name in weights:
        torch.testing.assert_close(pipe.unet.state_dict()[name], erased[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_trained_in_lora_form_is_merged_and_kept(pipe: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """The network is its own again, with what A and B learned in its weights; the LoRA of their rank is exact."""
    pipe.to(dtype)
    base, modules = models.state(pipe.unet), {name: type(m) for name, m in pipe.unet.named_modules()}
    settings = {"train.form": "lora", "lora.rank": 2, "method.fast_rate": 0.1}
    forgot = erase.forget(pipe, "a photo of a cat", remain=REMAIN, settings=settings)
    assert {name: type(m) for name, m in pipe.unet.named_modules()} == modules
    assert not hasattr(pipe.unet, "peft_config")
    erased = models.state(pipe.unet)
    moved = [name for name, t in erased.items() if not torch.equal(t, base[name])]
    assert moved
    assert all("attn2" in name and name.endswith(".weight") for name in moved)
    tensors = load_file(forgot.save(tmp_path / "out", form="lora"))
    for name in moved:
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        up, down = (tensors[layer + end] for end in (".lora_up.weight", ".lora_down.weight"))
        assert (up.dtype, down.shape[0]) == (torch.float32, 2)
        rounding = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(base[name].float() + up @ down, erased[name].float(), rtol=rounding, atol=1e-6)
    forgot.undo()
    assert not models.changed(pipe.unet, base)


def test_the_lora_of_a_closed_form_is_lossless(pipe: Any, tmp_path: Path) -> None:
    """To 1e-5 in every layer, in float32, without asking; at the rank of the tokens, which is not full."""
    given: dict[str, Any] = {"method": {"name": "uce"}, "saliency.kind": "none", "train.parameters": "kv"}
    base = models.state(pipe.unet)
    words = ["a photo of a cat", "a photo of a car"]
    forgot = erase.forget(pipe, words, anchor="a photo of a dog", remain="a boat", steps=1, settings=given)
    file = forgot.save(tmp_path / "out", form="lora")
    erased, tensors = models.state(pipe.unet), load_file(file)
    moved = [name for name, t in erased.items() if not torch.equal(t, base[name])]
    assert moved
    for name in moved:
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        up, down, alpha = (tensors[layer + end] for end in (".lora_up.weight", ".lora_down.weight", ".alpha"))
        change = erased[name].double() - base[name].double()
        kept = float(alpha) / len(down) * up.double() @ down.double()
        assert float((kept - change).norm() / change.norm()) <= 1e-5


def test_a_network_of_no_family_has_no_lora(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="form='lora'"):
        save_lora(net, net, net.state_dict(), tmp_path / "out", {}, Ranks())
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_delta_is_for_apply(micro_sd: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Of a base that is stored in 16 bits, whatever it is loaded in; float16 learns on accelerators alone."""
    if dtype == torch.float16 and not torch.accelerator.is_available():
        pytest.skip("float16 on a CPU is refused")
    pipe = erase.load(micro_sd, dtype=dtype)
    result = erase.forget(pipe, "a photo of a cat", remain=REMAIN, settings={"method.fast_rate": 0.1})
    delta = result.save(tmp_path / "delta.safetensors", form="delta")
    app(["apply", str(micro_sd), str(delta), "--out", str(tmp_path / "erased")], standalone_mode=False)
    stored = saving.tensors(locate(tmp_path / "erased"))
    after = models.state(pipe.unet)
    assert all(torch.equal(x, after[name].to(torch.float16)) for name, x in stored.items())
    app(
        ["apply", str(tmp_path / "erased"), str(delta), "--undo", "--out", str(tmp_path / "undone")],
        standalone_mode=False,
    )
    base = saving.tensors(locate(micro_sd))
    assert all(torch.equal(x, base[name]) for name, x in saving.tensors(locate(tmp_path / "undone")).items())


@pytest.mark.slow
def test_a_delta_of_a_pipeline_in_memory_is_to_its_own_weights(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "base")
    first = erase.forget(pipe, "a photo of a cat", remain=REMAIN)
    first.save(tmp_path / "first")
    assert first.save(tmp_path / "delta", form="delta") == tmp_path / "delta/delta.safetensors"
    app(
        ["apply", str(tmp_path / "base"), str(tmp_path / "delta/delta.safetensors"), "--out", str(tmp_path / "made")],
        standalone_mode=False,
    )
    path = "unet/diffusion_pytorch_model.safetensors"
    made, saved = load_file(tmp_path / "made" / path), load_file(tmp_path / "first" / path)
    assert all(torch.equal(x, saved[name]) for name, x in made.items())
    second = erase.forget(pipe, "a dog", remain=REMAIN).save(tmp_path / "second.safetensors", form="delta")
    assert open_delta(second).base_meta["erase_method"] == "sfron"


def test_images_before_and_after_are_of_the_same_seeds(forgot: Any, pipe: Any) -> None:
    after = models.state(pipe.unet)
    assert (
        forgot.show("a photo of a cat", seeds=[0, 1], blur=False).tobytes()
        == forgot.show(["a photo of a cat"], seeds=[0, 1], blur=False).tobytes()
    )
    assert not models.changed(pipe.unet, after)
    with forgot._images(["a photo of a cat"], [3]) as folders:
        drawn = [sorted(folder.glob("*.png"))[0].read_bytes() for folder in folders]
    assert drawn[0] != drawn[1]
    forgot.undo()
    again = erase.forget(pipe, "a photo of a cat", remain=REMAIN, settings={"method.fast_rate": 0.1})
    with again._images(["a photo of a cat"], [3]) as folders:
        assert [sorted(folder.glob("*.png"))[0].read_bytes() for folder in folders] == drawn


def test_a_pipelines_safety_checker_stays_and_has_no_say(pipe: Any) -> None:
    class Checker(torch.nn.Module):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("asked")

    pipe.register_modules(safety_checker=Checker())
    checker = pipe.safety_checker
    result = erase.forget(pipe, "a photo of a cat", remain=REMAIN)
    result.show(seeds=[0], blur=False)
    assert pipe.safety_checker is checker


def test_counts_before_and_after(forgot: Any) -> None:
    found = forgot.count(seeds=[0, 1], nudity="i2p")
    assert {name: counted["images"] for name, counted in found.items()} == {"base": 2, "erased": 2}


def test_a_threshold_is_for_body_parts(forgot: Any) -> None:
    found = forgot.count(seeds=[0], body_parts=["FACE_FEMALE"], threshold=0.4)
    assert found["base"]["images"] == 1
    with pytest.raises(ValueError, match=r"threshold=0\.4 is for body_parts; nudity has no threshold to set"):
        forgot.count(seeds=[0], nudity="i2p", threshold=0.4)


def test_all_that_was_forgotten_is_counted(pipe: Any) -> None:
    words = ["a photo of a cat", "a dog"]
    asked = [prompt for prompt, _ in counted(erase.forget(pipe, words, anchor="a boat", remain=REMAIN))]
    assert asked == words
    ddpm = micro_ddpm.model()
    assert [label for label, _ in counted(erase.forget(ddpm, label=["cow", "ant"]))] == ["cow", "ant"]


def counted(result: Any) -> list[tuple[str, int]]:
    """Prompts and seeds of images that `count` makes."""
    asked: list[tuple[str, int]] = []

    def sample(prompts: list[str], generators: list[torch.Generator], **_: Any) -> list[Any]:
        asked.extend(zip(prompts, (g.initial_seed() for g in generators), strict=True))
        return models.images(len(prompts))

    result.sampling = replace(result.sampling, sample=sample)
    result.count(seeds=[3], nudity="i2p")
    return asked[: len(asked) // 2]


def test_without_the_base_nothing_is_undone(pipe: Any, tmp_path: Path) -> None:
    result = erase.forget(pipe, "a photo of a cat", remain=REMAIN, keep_base=False)
    for call in (result.undo, result.show, lambda: result.save(tmp_path / "out", form="delta")):
        with pytest.raises(ValueError, match="keep_base"):
            call()
    result.save(tmp_path / "out")


def test_a_model_that_was_converted_since_has_no_base(forgot: Any, pipe: Any, tmp_path: Path) -> None:
    """Its first weights would be lost in the other dtype; the model itself can be saved in any."""
    erased, held = models.state(pipe.unet), {name: x.clone() for name, x in forgot.base.held.items()}
    pipe.to(torch.bfloat16)
    calls: list[Callable[[], Any]] = [forgot.undo, lambda: forgot.show(seeds=[0], blur=False)]
    calls += [partial(forgot.save, tmp_path / "out", form=form) for form in ("delta", "lora")]
    for call in calls:
        with pytest.raises(ValueError, match=r"converted to torch\.bfloat16 since.*was torch\.float32.*load it again"):
            call()
    assert not list(tmp_path.glob("out*"))
    saved = load_file(forgot.save(tmp_path / "half") / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(x, erased[name].bfloat16()) for name, x in saved.items())
    assert forgot.meta["erase_base_sha256"] == "not kept"
    assert {name: x.dtype for name, x in forgot.base.held.items()} == {name: x.dtype for name, x in held.items()}
    assert all(torch.equal(x, held[name]) for name, x in forgot.base.held.items())
    pipe.to(torch.float32)  # does not bring back what was rounded
    for call in calls:
        with pytest.raises(ValueError, match=r"did not learn, has changed since.*load the model again"):
            call()
    assert forgot.meta["erase_base_sha256"] == "not kept"
    pipe.unet.load_state_dict(erased)
    forgot.save(tmp_path / "delta.safetensors", form="delta")
    forgot.undo()


def test_what_was_put_into_a_model_since_is_removed_first(forgot: Any, pipe: Any) -> None:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(ValueError, match="adapters"):
        forgot.undo()


def test_count_and_grid_take_images_files_and_folders(tmp_path: Path, micro_classifier: Path) -> None:
    pictures = models.images(3)
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    given: list[Any] = [tmp_path, pictures, sorted(tmp_path.glob("*.png"))]
    found = [erase.count(images, nudity="i2p") for images in given]
    assert [counted["images"] for counted in found] == [3, 3, 3]
    assert sum(erase.count(pictures, classifier=micro_classifier)["counts"].values()) == 3
    grids = [erase.grid({"a": images, "b": images[:2] if isinstance(images, list) else images}) for images in given]
    assert grids[1].tobytes() == grids[2].tobytes()
    for how in ({}, {"nudity": "i2p", "classifier": micro_classifier}):
        with pytest.raises(ValueError, match="classifier"):
            erase.count(pictures, **how)
    with pytest.raises(TypeError):
        erase.count([3], nudity="i2p")


@pytest.mark.parametrize("module", [micro, micro_sdxl, micro_sd3, micro_flux, micro_pixart, micro_lumina2, micro_dit])
def test_what_is_loaded_in_16_bits_generates(module: Any, tmp_path: Path) -> None:
    """By the stock pipeline, whose latents have another dtype than the VAE; a copy has a VAE of its own."""
    module.pipeline(tmp_path / "parts").save_pretrained(tmp_path / "model")
    pipe = copy.deepcopy(erase.load(tmp_path / "model", device="cpu", dtype=torch.bfloat16))
    given = {micro_pixart: {"use_resolution_binning": False}, micro_dit: {"guidance_scale": 1.0}}.get(module, {})
    asked: Any = [1] if module is micro_dit else "a cat"
    assert pipe(asked, num_inference_steps=1, **given).images
    assert pipe.vae.dtype == torch.float32
    image = torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)
    pipe.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    assert bool(pipe.vae.encode(image).latent_dist.mean.isnan().all())


def test_a_ddpm_in_16_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.float16.*leave out dtype"):
        erase.load("fashion-ddpm", device="cpu", dtype=torch.float16)


def test_without_a_gpu_a_torch_built_for_cuda_loads_onto_the_cpu(
    micro_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = torch.device("cuda")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else built
    )
    assert erase.load(micro_sd).unet.device.type == "cpu"
