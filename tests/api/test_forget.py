"""`erase.forget` on models of every kind: they learn in place, and nothing else of them changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import micro_classify
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
from accelerate import PartialState
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

import erase
from erase.api.settings import PRESETS
from erase.diffusion import families
from erase.engine import loop

REMAIN = ["a car", "a boat"]


class InterruptedHere(KeyboardInterrupt):
    pass


def interrupt(row: dict[str, Any]) -> None:
    if row["phase"] == "unlearning" and "step" in row:
        raise InterruptedHere


FAMILIES = {
    "sdxl": micro_sdxl,
    "sd3": micro_sd3,
    "flux": micro_flux,
    "pixart": micro_pixart,
    "lumina2": micro_lumina2,
}


def test_every_family_has_a_preset() -> None:
    assert families.FAMILIES.keys() <= PRESETS.keys()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in FAMILIES]
    + [pytest.param(name, torch.bfloat16, marks=[pytest.mark.slow] * (name != "flux")) for name in FAMILIES],
)
def test_every_text_family_learns_in_place(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = FAMILIES[name].pipeline(tmp_path / "parts").to(dtype)
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    before, kept = models.state(net), models.configuration(pipe)
    settings = {"train.checkpointing": True}
    result = erase.forget(pipe, "a photo of a cat", anchor="a dog", remain=REMAIN, settings=settings)
    assert models.changed(net, before)
    assert models.configuration(pipe) == kept
    assert len(result.metrics) == 2
    result.undo()
    assert not models.changed(net, before)


def test_a_pipeline_keeps_all_but_its_weights(pipe: Any) -> None:
    pipe.text_encoder.train()
    pipe.unet.conv_in.weight.requires_grad_(False)
    pipe.unet.conv_out.weight.grad = torch.ones_like(pipe.unet.conv_out.weight)
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    modes = [m.training for part in (pipe.unet, pipe.text_encoder, pipe.vae) for m in part.modules()]
    kept, drawn = models.configuration(pipe), torch.get_rng_state()
    encoder = models.state(pipe.text_encoder)
    erase.forget(pipe, "a photo of a cat", remain=REMAIN, settings={"train.checkpointing": True})
    assert models.configuration(pipe) == kept
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    assert [m.training for part in (pipe.unet, pipe.text_encoder, pipe.vae) for m in part.modules()] == modes
    assert pipe.unet.conv_out.weight.grad is not None
    assert pipe.unet.conv_in.weight.grad is None
    assert not models.changed(pipe.text_encoder, encoder)
    assert not PartialState._shared_state


def test_cross_attention_alone_learns_and_the_mask_is_obeyed(pipe: Any) -> None:
    before = models.state(pipe.unet)
    result = erase.forget(pipe, "a photo of a cat", remain=REMAIN, settings={"saliency.density": 0.25})
    assert all("attn2" in name for name in models.changed(pipe.unet, before))
    assert result.mask is not None
    assert result.mask.density == pytest.approx(0.25, abs=0.01)
    assert 0 < result.seconds < 60


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    import micro

    found = []
    for number, seed in enumerate((0, 0, 1)):
        pipe = micro.pipeline(tmp_path / str(number))
        torch.rand(number + 1)
        erase.forget(pipe, "a photo of a cat", remain=REMAIN, seed=seed)
        found.append(models.state(pipe.unet))
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    assert any(not torch.equal(x, found[2][name]) for name, x in found[0].items())


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.bfloat16, "dense"), (torch.float32, "dense"), (torch.bfloat16, "lora")]
)
def test_an_interrupted_call_changes_nothing(pipe: Any, dtype: torch.dtype, form: str) -> None:
    pipe.to(dtype)
    before, kept = models.state(pipe.unet), models.configuration(pipe)
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    with pytest.raises(InterruptedHere):
        erase.forget(pipe, "a photo of a cat", remain=REMAIN, settings={"train.form": form}, progress=interrupt)
    assert not models.changed(pipe.unet, before)
    assert models.configuration(pipe) == kept
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags


def test_weights_in_16_bits_stay_in_16_bits(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    before = models.state(pipe.unet)
    settings = "method.fast_rate=0.1"
    result = erase.forget(pipe, "a photo of a cat", images=models.images(2), remain=REMAIN, settings=settings)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.bfloat16}
    assert models.changed(pipe.unet, before)
    result.undo()
    assert not models.changed(pipe.unet, before)


def test_what_fails_before_the_first_step_changes_nothing(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    before = models.state(pipe.unet)
    settings = {"train.parameters": "conv_in", "forget.count": 1, "remain.count": 1, "draw.steps": 1}
    with pytest.raises(ValueError, match=r"train\.parameters"):
        erase.forget(pipe, "a photo of a cat", remain=REMAIN, preset="sd_nudity_uce", settings=settings)
    assert not models.changed(pipe.unet, before)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_pipeline_with_a_part_left_out_is_refused(pipe: Any, part: str) -> None:
    setattr(pipe, part, None)
    with pytest.raises(ValueError, match=rf"has no {part} \(it is None\): give the whole pipeline"):
        erase.forget(pipe, "a cat", steps=1)


def test_weights_that_do_not_fit_their_dtype_are_refused(pipe: Any) -> None:
    before = models.state(pipe.unet)
    with pytest.raises((ValueError, loop.NonFiniteError)):
        erase.forget(pipe, "a photo of a cat", remain=REMAIN, settings={"method.fast_rate": 1e38, "train.steps": 1})
    assert not models.changed(pipe.unet, before)


def test_progress_is_told_of_every_phase(pipe: Any, rows: Any, capfd: pytest.CaptureFixture[str]) -> None:
    found, progress = rows
    result = erase.forget(pipe, "a photo of a cat", remain=REMAIN, progress=progress)
    steps = [row for row in found if "step" in row]
    assert [row["done"] for row in steps] == [1, 2]
    assert [row["forget_loss"] for row in steps] == [row["forget_loss"] for row in result.metrics]
    assert len({row["phase"] for row in found}) == 5  # data and saliency of both sides, and the steps
    assert "unlearning" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_compiled_network_learns(pipe: Any) -> None:
    net = pipe.unet
    pipe.unet = torch.compile(net)
    before = models.state(net)
    result = erase.forget(pipe, "a photo of a cat", remain=REMAIN)
    assert models.changed(net, before)
    assert set(result.describe("")) > {"erase_method"}
    result.undo()
    assert not models.changed(net, before)


def test_what_cannot_learn_as_it_is_is_refused(pipe: Any) -> None:
    pipe.unet.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="adapters"):
        erase.forget(pipe, "a photo of a cat", remain=REMAIN)
    del pipe.unet.peft_config
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        erase.forget(pipe, "a photo of a cat", remain=REMAIN)
    pipe.unet.unfuse_qkv_projections()
    pipe.vae.enable_layerwise_casting(torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="layerwise casting"):
        erase.forget(pipe, "a photo of a cat", remain=REMAIN)
    for module in pipe.vae.modules():
        vars(module).pop("_diffusers_hook", None)
    add_hook_to_module(pipe.vae, ModelHook())
    with pytest.raises(ValueError, match="offloaded"):
        erase.forget(pipe, "a photo of a cat", remain=REMAIN)


@pytest.mark.slow
def test_a_second_call_knows_what_the_first_one_forgot(pipe: Any) -> None:
    first = erase.forget(pipe, "a cat", anchor="a boat", remain=[*REMAIN, "a dog"])
    with pytest.raises(ValueError, match=r"forget\.anchors"):
        erase.forget(pipe, "a dog", anchor="a cat", remain=REMAIN)
    with pytest.raises(ValueError, match=r"remain\.prompts"):
        erase.forget(pipe, "a dog", remain=["a cat"])
    second = erase.forget(pipe, "a dog", remain=[*REMAIN, "a cat"])
    with pytest.raises(ValueError, match="another"):
        first.undo()
    second.undo()
    with pytest.raises(ValueError, match="another"):
        second.undo()


@pytest.mark.slow
def test_images_of_ones_own_are_learned_from(pipe: Any, tmp_path: Path) -> None:
    pictures = models.images(3)
    (tmp_path / "cats").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "cats" / f"{number}.png")
    found = []
    for images in (pictures, tmp_path / "cats"):
        result = erase.forget(pipe, "a photo of a cat", images=images, remain=REMAIN)
        found.append(models.state(pipe.unet))
        result.undo()
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_esd_and_uce_are_methods_too(pipe: Any) -> None:
    small = {"forget.count": 2, "remain.count": 1, "train.steps": 1, "draw.steps": 2}
    for preset in ("sd_nudity_esd_u", "sd_nudity_uce"):
        before = models.state(pipe.unet)
        result = erase.forget(pipe, "a photo of a cat", anchor="a dog", remain=REMAIN, preset=preset, settings=small)
        assert models.changed(pipe.unet, before)
        assert result.mask is None
        result.undo()


CLASSES: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "ddpm": lambda work: (micro_ddpm.pipeline(work), "cat"),
    "dit": lambda work: (micro_dit.pipeline(work), "golden retriever"),
    "unet": lambda work: (models.unet(), 3),
    "stock": lambda work: (DDPMPipeline(models.unet(), DDPMScheduler()), 3),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_conditional_models_forget_a_class(name: str, tmp_path: Path) -> None:
    model, label = CLASSES[name](tmp_path)
    net = model if name == "unet" else model.transformer if name == "dit" else model.unet
    before = models.state(net)
    result = erase.forget(model, label=label)
    assert models.changed(net, before)
    assert result.show([label, 1], seeds=[0], blur=False).width > 0
    result.save(tmp_path / "out")
    again = erase.load(tmp_path / "out")  # which names its classes, or has kept how many there are
    saved = again.transformer if name == "dit" else again.unet
    assert not models.changed(saved, models.state(net))
    if name in ("ddpm", "dit"):
        with pytest.raises(ValueError, match="anchor"):
            erase.forget(again, label=1, anchor=label)


def test_a_class_is_named_once(tmp_path: Path) -> None:
    for given in ({}, {"what": 1, "label": 1}):
        with pytest.raises(ValueError, match="label"):
            erase.forget(models.unet(), **given)


@pytest.mark.slow
def test_a_class_conditional_unet_is_named(tmp_path: Path) -> None:
    erase.forget(models.unet(), label="bee", names=("ant", "bee", "cow"))  # the last embedding is the null class's
    erase.forget(models.unet(), label=3, names=4).save(tmp_path / "out")
    assert erase.load(tmp_path / "out").labels == ["0", "1", "2", "3"]
    for names in (("ant", "bee"), 5):
        with pytest.raises(ValueError, match="names"):
            erase.forget(models.unet(), label=1, names=names)
    with pytest.raises(ValueError, match="names"):
        erase.forget(micro_ddpm.pipeline(tmp_path), label=1, names=("a", "b", "c"))


def test_classifiers_forget_images(tmp_path: Path) -> None:
    vit = erase.load(micro_classify.write_foreign("vit", tmp_path / "vit"))
    vit.train()
    pairs = [(image, i % 3) for i, image in enumerate(models.images(8))]
    before = models.state(vit)
    result = erase.forget(vit, pairs[:4], remain=[{"image": i, "label": str(k)} for i, k in pairs[4:]])
    assert models.changed(vit, before)
    assert vit.training
    result.save(tmp_path / "out")
    assert not models.changed(erase.load(tmp_path / "out"), models.state(vit))
    with pytest.raises(ValueError, match="ViTForImageClassification"):
        result.show()
    vit.config._name_or_path = vit.name_or_path = ""
    with pytest.raises(ValueError, match="processor"):
        erase.forget(vit, pairs[:4], remain=pairs[4:])
    result.undo()
    assert not models.changed(vit, before)


def test_networks_forget_batches(tmp_path: Path) -> None:
    net = models.network().train()
    net[0].weight.requires_grad_(False)
    before = models.state(net)
    result = erase.forget(net, models.batches(0), remain=models.batches(1), losses=models.losses)
    assert result.mask is not None
    assert result.mask.density == pytest.approx(0.5, abs=0.1)
    assert "0.weight" not in models.changed(net, before)
    assert "1.running_mean" in models.changed(net, before)  # in training mode, as it was given
    result.undo()
    assert not models.changed(net, before)


def test_an_interrupted_network_is_as_it_was() -> None:
    net = models.network().train()
    before = models.state(net)
    with pytest.raises(InterruptedHere):
        erase.forget(net, models.batches(0), remain=models.batches(1), losses=models.losses, progress=interrupt)
    assert not models.changed(net, before)


def test_a_backend_is_a_network_with_its_losses() -> None:
    class Backend:
        net = models.network()

        def losses(self, batch: Any, generator: torch.Generator) -> torch.Tensor:
            return models.losses(self.net, batch)

    before = models.state(Backend.net)
    erase.forget(Backend(), models.batches(0), remain=models.batches(1))
    assert models.changed(Backend.net, before)


def refused(**given: Any) -> None:
    net = models.network()
    erase.forget(net, **{"what": models.batches(0), "remain": models.batches(1), "losses": models.losses, **given})


def test_batches_and_losses_are_checked() -> None:
    with pytest.raises(TypeError, match="remain"):
        refused(remain=iter(models.batches(1)))
    with pytest.raises(TypeError, match="losses"):
        refused(losses=None)
    with pytest.raises(ValueError, match="losses"):
        refused(losses=lambda net, batch: models.losses(net, batch).mean())


def test_negative_losses_have_no_adaptive_weights() -> None:
    def negative(net: torch.nn.Module, batch: Any) -> torch.Tensor:
        return models.losses(net, batch) - 5

    net = models.network()
    before = models.state(net)
    given = {"remain": models.batches(1), "losses": negative}
    with pytest.raises(ValueError, match=r"0 or more; got -.*method\.lambd=0"):
        erase.forget(net, models.batches(0), **given)
    assert not models.changed(net, before)
    erase.forget(net, models.batches(0), **given, settings={"method.lambd": 0})
    assert models.changed(net, before)


def test_what_is_not_supported_is_said(pipe: Any) -> None:
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    other = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(TypeError, match="StableDiffusionXLPipeline"):
        erase.forget(other, "a cat")
    with pytest.raises(TypeError, match="StableDiffusionXLPipeline"):
        erase.forget("photos-sd", "a cat")
    with pytest.raises(TypeError, match="label"):
        erase.forget(pipe, label=3)
    with pytest.raises(ValueError, match="float16"):
        erase.forget(pipe.to(torch.float16), "a cat")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"eval.images": 3}, r"eval\.images"),
        ({"method.name": "retrain"}, "retrain"),
        ({"train.stepz": 3}, r"train\.stepz"),
        ({"train.parameters": "nothing"}, r"train\.parameters"),
        (["train.steps"], r"train\.steps"),
    ],
)
def test_settings_are_checked(pipe: Any, settings: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        erase.forget(pipe, "a photo of a cat", remain=REMAIN, settings=settings)
    with pytest.raises(ValueError, match=r"erase\.forget\(pipe"):
        erase.forget(pipe)


def test_a_preset_may_name_what_to_forget(pipe: Any) -> None:
    words = ["remain.prompts=[a car]", "forget.count=1", "remain.count=1", "saliency.count=2", "draw.steps=2"]
    result = erase.forget(pipe, preset="sd_nudity_uce", settings=[*words, "forget.anchors=[a dog]"])
    assert len(result.metrics) == 1


def test_precision_fits_the_weights(pipe: Any) -> None:
    with pytest.raises(ValueError, match="precision"):
        erase.forget(pipe.to(torch.bfloat16), "a photo of a cat", remain=REMAIN, settings={"precision": "no"})
