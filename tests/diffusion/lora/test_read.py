"""LoRAs that come in: merged as diffusers fuses them, and refused in one line where they do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import micro
import micro_flux
import micro_pixart
import micro_sd3
import micro_sdxl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from erase.diffusion.checkpoints import convert, folders
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.lora.read import parse, with_loras
from erase.diffusion.model import open_model
from erase.store import files

MICRO: dict[str, Any] = {
    "sd": micro.pipeline,
    "sdxl": micro_sdxl.pipeline,
    "sd3": micro_sd3.pipeline,
    "flux": micro_flux.pipeline,
}
TARGETS = {"unet": ["to_q", "to_k", "proj_in", "conv1"], "transformer": ["add_k_proj", "to_q", "proj_out"]}


def merged(source: Source | SingleFile, *specs: str) -> Any:
    return with_loras(source, specs)


def write(folder: Path, tensors: dict[str, Tensor], **meta: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "lora.safetensors", metadata=meta)
    return str(folder / "lora.safetensors")


def kohya(shape_of: str = "attn2_to_k", up: int = 8, wide: int = 16, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA of one layer of `micro.unet`."""
    generator = torch.Generator().manual_seed(0)
    layer = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{shape_of}"
    return {
        f"{layer}.lora_up.weight": torch.randn(up, rank, generator=generator),
        f"{layer}.lora_down.weight": torch.randn(rank, wide, generator=generator),
        f"{layer}.alpha": torch.tensor(1.0),
    }


@pytest.mark.parametrize("name", MICRO)
def test_a_model_with_loras_is_what_diffusers_fuses(name: str, tmp_path: Path) -> None:
    """Two LoRAs of diffusers' own trainer form, in the network and in a text encoder, with ranks and alphas apart."""
    pipe = MICRO[name](tmp_path / "parts")
    pipe.save_pretrained(tmp_path / "model")
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    net, kind = getattr(pipe, part), type(pipe)
    for number, alpha in enumerate((2, 5)):
        torch.default_generator.manual_seed(number)
        own = LoraConfig(r=3, lora_alpha=alpha, target_modules=TARGETS[part], init_lora_weights=False)
        text = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        net.add_adapter(own, f"a{number}")
        pipe.text_encoder.add_adapter(text, f"a{number}")
        layers = {}
        for where, config, module in ((part, own, net), ("text_encoder", text, pipe.text_encoder)):
            state = {n: p for n, p in module.state_dict().items() if f".a{number}." in n}
            layers[f"{where}_lora_layers"] = {n.replace(f".a{number}.", "."): p for n, p in state.items()}
            layers[f"{where}_lora_adapter_metadata"] = config.to_dict()
        kind.save_lora_weights(tmp_path / str(number), **layers)
    wanted = kind.from_pretrained(tmp_path / "model")
    for number, scale in enumerate((1.0, -0.5)):
        wanted.load_lora_weights(str(tmp_path / str(number)))
        wanted.fuse_lora(components=[part, "text_encoder"], lora_scale=scale)
        wanted.unload_lora_weights()
    files_ = [str(tmp_path / f"{number}/pytorch_lora_weights.safetensors") for number in range(2)]
    source = merged(locate(tmp_path / "model"), files_[0], f"{files_[1]}:-0.5")
    found = open_model(source).pipe
    for where in (part, "text_encoder"):
        old = dict(getattr(pipe, where).named_parameters())
        moved = 0
        for key, p in getattr(wanted, where).named_parameters():
            mine = getattr(found, where).get_parameter(key)
            torch.testing.assert_close(mine, p, rtol=0, atol=2e-5, msg=key)
            before = old.get(key, old.get(".base_layer.".join(key.rsplit(".", 1))))
            moved += before is not None and not torch.equal(before, p)
        assert moved > 1
    hashes = folders.fingerprint(source)
    assert hashes["lora pytorch_lora_weights.safetensors:-0.5"] == files.sha256(Path(files_[1]))


def test_pixart_reads_pefts_form(tmp_path: Path) -> None:
    pipe = micro_pixart.pipeline(tmp_path / "parts")
    pipe.save_pretrained(tmp_path / "model")
    layer, up, down = "transformer_blocks.0.attn2.to_k", torch.randn(24, 2), torch.randn(2, 24)
    for number, prefix in enumerate(("transformer.", "base_model.model.")):
        tensors = {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
        file = write(tmp_path / str(number), tensors)
        (tmp_path / str(number) / "adapter_config.json").write_text('{"lora_alpha": 2}')
        source = merged(locate(tmp_path / "model"), file)
        old = pipe.transformer.state_dict()[f"{layer}.weight"]
        torch.testing.assert_close(folders.tensors(source)[f"{layer}.weight"], old + up @ down)


PEFTS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {"alpha_pattern": {"^conv_in": 9, "attn1.to_q": 1}, "rank_pattern": {"attn1.to_q": 2}},
}


@pytest.mark.parametrize("what", PEFTS)
def test_an_adapter_of_peft_has_the_strength_that_peft_merges_it_with(what: str, tmp_path: Path) -> None:
    pipe = micro.pipeline(tmp_path / "parts")
    pipe.save_pretrained(tmp_path / "model")
    torch.default_generator.manual_seed(0)
    own = LoraConfig(r=4, target_modules=["to_q", "conv_in"], init_lora_weights=False, **PEFTS[what])
    net: Any = get_peft_model(pipe.unet, own)
    net.save_pretrained(tmp_path / "adapter")
    source = merged(locate(tmp_path / "model"), str(tmp_path / "adapter/adapter_model.safetensors"))
    found, old = folders.tensors(source), folders.tensors(locate(tmp_path / "model"))
    wanted = net.merge_and_unload().state_dict()
    assert {name for name in old if not torch.equal(found[name], old[name])} == {
        name for name in old if name.endswith(("to_q.weight", "conv_in.weight"))
    }
    for name, t in found.items():
        torch.testing.assert_close(t, wanted[name], rtol=0, atol=2e-5, msg=name)
    settings = tmp_path / "adapter/adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora_alpha": 1}))
    again = merged(locate(tmp_path / "model"), str(tmp_path / "adapter/adapter_model.safetensors"))
    assert folders.fingerprint(again) != folders.fingerprint(source)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"lora_alpha": null}', '{"lora_alpha": 1, "alpha_pattern": 3}']
)
def test_an_adapter_of_peft_without_its_scale_is_refused(text: str | None, micro_sd: Path, tmp_path: Path) -> None:
    layer = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{layer}.lora_B.weight": torch.ones(8, 2), f"{layer}.lora_A.weight": torch.ones(2, 16)}
    file = write(tmp_path, tensors)
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json") as caught:
        merged(locate(micro_sd), file)
    assert "\n" not in str(caught.value)
    merged(locate(micro_sd), write(tmp_path / "own", {**tensors, f"{layer}.alpha": torch.tensor(1.0)}))


def test_alpha_and_scale(micro_sd: Path, tmp_path: Path) -> None:
    source, tensors = locate(micro_sd), kohya()
    file = write(tmp_path, tensors)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    up, down, _ = tensors.values()
    old = folders.tensors(source)
    for spec, scale in ((file, 1.0), (f"{file}:0.5", 0.5)):
        new = folders.tensors(merged(source, spec))
        assert {key for key in new if not torch.equal(new[key], old[key])} == {name}
        torch.testing.assert_close(new[name], (old[name].float() + scale / 2 * up @ down).half(), rtol=0, atol=0)
    assert parse("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert parse("C:/b.safetensors:0.8") == (Path("C:/b.safetensors"), 0.8)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_saved_model_has_the_loras_in_it(form: str, micro_sd: Path, tmp_path: Path) -> None:
    """Whether their layers learned or not; in a text encoder, too. A delta is to the model without."""
    base = micro_sd
    if form == "file":
        base = tmp_path / "base.safetensors"
        convert.to_file(locate(micro_sd), base)  # type: ignore[arg-type]
    tensors = kohya()
    text = "lora_te_text_model_encoder_layers_0_self_attn_k_proj"
    if form == "folder":
        tensors |= {f"{text}.lora_up.weight": torch.ones(16, 1), f"{text}.lora_down.weight": torch.ones(1, 16)}
    source = merged(locate(base), write(tmp_path, tensors))
    learned = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    new = {learned: folders.tensors(source)[learned] + 1}
    folders.save(source, new, tmp_path / "out", {})
    saved = locate(tmp_path / "out")
    wanted = {**folders.tensors(source), **new}
    found = folders.tensors(saved)
    assert all(torch.equal(found[key], t) for key, t in wanted.items())
    if form == "folder":
        for part in ("text_encoder", "vae"):
            before, after = folders.part_tensors(locate(micro_sd), part), folders.part_tensors(saved, part)
            moved = [key for key in before if not torch.equal(before[key], after[key])]
            assert [key.split(".")[-2] for key in moved] == (["k_proj"] if part == "text_encoder" else [])


def test_a_single_file_takes_no_text_encoder(micro_sd: Path, tmp_path: Path) -> None:
    convert.to_file(locate(micro_sd), tmp_path / "base.safetensors")  # type: ignore[arg-type]
    text = "lora_te_text_model_encoder_layers_0_self_attn_k_proj"
    tensors = {f"{text}.lora_up.weight": torch.ones(16, 1), f"{text}.lora_down.weight": torch.ones(1, 16)}
    with pytest.raises(ValueError, match="erase convert"):
        merged(locate(tmp_path / "base.safetensors"), write(tmp_path / "lora", tensors))


def without(end: str) -> dict[str, Tensor]:
    return {name: t for name, t in kohya().items() if not name.endswith(end)}


def nan() -> dict[str, Tensor]:
    tensors = kohya()
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


BROKEN: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "nan": (nan, "NaN"),
    "no down": (lambda: without("lora_down.weight"), "incomplete"),
    "no up": (lambda: without("lora_up.weight"), "incomplete"),
    "alpha alone": (lambda: kohya() | {"lora_unet_x.alpha": torch.tensor(1.0)}, "lora_unet_x.alpha"),
    "ranks": (lambda: {n: t[:1] if "lora_down" in n else t for n, t in kohya().items()}, "ranks differ"),
    "shape": (lambda: kohya(wide=5), "another model"),
    "name": (lambda: kohya("attn7_to_k"), "another model"),
    "integers": (lambda: {n: t.int() if "up" in n else t for n, t in kohya().items()}, "I32"),
    "lokr": (lambda: {"lora_unet_x.lokr_w1": torch.ones(2, 2)}, "LoKr"),
    "dora": (lambda: kohya() | {"lora_unet_x.dora_scale": torch.ones(2)}, "DoRA"),
    "difference": (lambda: {"lora_unet_conv_in.diff": torch.ones(2)}, "differences"),
    "other": (lambda: {"weight": torch.ones(2)}, "not a LoRA"),
    "unknown": (lambda: kohya() | {"lora_te9_x.lora_down.weight": torch.ones(2, 2)}, "lora"),
    "alpha": (lambda: kohya() | {next(n for n in kohya() if "alpha" in n): torch.ones(2)}, "one number"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_in_one_line(what: str, micro_sd: Path, tmp_path: Path) -> None:
    make, said = BROKEN[what]
    file = write(tmp_path, make())
    with pytest.raises(ValueError, match=said) as caught:
        merged(locate(micro_sd), file)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_lora_are_refused(micro_sd: Path, tmp_path: Path) -> None:
    file = Path(write(tmp_path, kohya()))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-8])
    shutil.copy(file, tmp_path / "lora.bin")
    meta = write(tmp_path / "meta", kohya(), lora_adapter_metadata="{")
    for spec, said in (
        (tmp_path / "cut.safetensors", "cut short"),
        (tmp_path / "lora.bin", "pickles"),
        (tmp_path / "none.safetensors", "no such file"),
        (f"{file}:much", "'much'"),
        (f"{file}:inf", "'inf'"),
        (meta, "lora_adapter_metadata"),
    ):
        with pytest.raises(ValueError, match=said):
            merged(locate(micro_sd), str(spec))
    with pytest.raises(ValueError, match="text-to-image"):
        merged(locate("fashion-ddpm"), str(file))


def test_another_familys_lora_is_refused(micro_sd: Path, tmp_path: Path) -> None:
    tensors = {f"transformer.transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    with pytest.raises(ValueError, match="another model"):
        merged(locate(micro_sd), write(tmp_path, tensors, **{"modelspec.architecture": "flux-1-dev/lora"}))
