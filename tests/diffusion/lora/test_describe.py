"""What `erase inspect` says of LoRA files."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from erase.cli.inspect import _describe

describe = partial(_describe, components=None)
PAIR = ("lora_up", "lora_down")


def write(path: Path, tensors: dict[str, Tensor], **meta: str) -> Path:
    save_file(tensors, path, metadata=meta)
    return path


def test_ours_says_how_it_was_made(tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{layer}.lora_up.weight": torch.ones(8, 2), f"{layer}.lora_down.weight": torch.ones(2, 8)}
    told = {"layers": 1, "kept": 0.99, "left_out": 3, "rank": [2, 2]}
    meta = {"erase_lora": json.dumps(told), "erase_base": "photos-sd", "erase_forgotten": '["ab"]'}
    found = describe(write(tmp_path / "ours.safetensors", {**tensors, f"{layer}.alpha": torch.tensor(2.0)}, **meta))
    assert (found["kind"], found["layout"], found["base"]) == ("LoRA of erase", "kohya", "photos-sd")
    assert (found["rank"], found["layers"], found["dtype"], found["change"]) == ([2], {"network": 1}, "F32", told)
    assert found["metadata"]["erase_forgotten"] == ["ab"]


@pytest.mark.parametrize(
    ("layer", "form", "base"),
    [
        ("lora_unet_input_blocks_4_1_proj_in.lora_{down,up}", "kohya", "Stable Diffusion XL"),
        ("transformer.single_transformer_blocks.0.proj_out.lora_{A,B}", "PEFT", "Flux.1"),
        ("transformer.transformer_blocks.0.attn2.to_k.lora_{A,B}", "PEFT", "PixArt"),
        ("unet.mid_block.attentions.0.processor.to_k_lora.{down,up}", "diffusers before PEFT", "Stable Diffusion 1"),
    ],
)
def test_others_are_told_by_their_names(layer: str, form: str, base: str, tmp_path: Path) -> None:
    head, options = layer[:-1].split("{")
    down, up = options.split(",")
    tensors = {f"{head}{down}.weight": torch.ones(3, 8).half(), f"{head}{up}.weight": torch.ones(8, 3).half()}
    found = describe(write(tmp_path / "lora.safetensors", tensors))
    assert (found["kind"], found["layout"], found["rank"]) == ("LoRA", form, [3])
    assert found["base"].startswith(base)
    named = describe(write(tmp_path / "named.safetensors", tensors, ss_base_model_version="sd_v1"))
    assert named["base"] == "sd_v1"


def test_a_broken_header_of_ours_is_refused(tmp_path: Path) -> None:
    tensors = {f"lora_unet_x.{end}.weight": torch.ones(2, 2) for end in PAIR}
    with pytest.raises(ValueError, match="erase_lora"):
        describe(write(tmp_path / "lora.safetensors", tensors, erase_lora="{"))
