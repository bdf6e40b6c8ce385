"""Names of a Stable Diffusion 1.x / 2.x checkpoint's tensors: in a diffusers folder, and in a single file (LDM).

LDM is the layout of the original releases, which WebUI and ComfyUI read. The names are derived from those of the
diffusers folder and from its configuration, so they hold for any number of blocks, layers and channels:

- UNet: `input_blocks` count convolution, residual blocks and downsamplers in one row, `output_blocks` likewise.
- VAE: `up` is numbered from the finest resolution; its attention is of 1×1 convolutions.
- text encoder: 1.x is CLIP with the names of transformers; 2.x is OpenCLIP, with q, k and v stacked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARTS = ("unet", "vae", "text_encoder")
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
EMA = "model_ema."

_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {  # of the VAE; the last four are names of diffusers before 0.15
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_OPENCLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPENCLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
POSITIONS = "embeddings.position_ids"
"""A buffer of old text encoders."""


@dataclass(frozen=True)
class Place:
    """Where an LDM tensor lies in a diffusers folder."""

    part: str
    """`unet`, `vae` or `text_encoder`."""
    names: tuple[str, ...]
    """In that part; three are q, k and v, which LDM stacks."""
    conv: bool = False
    """LDM has a 1×1 convolution `[O, I, 1, 1]` where diffusers has a linear layer `[O, I]`."""

    def to_ldm(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of those in `names`."""
        whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        return whole[:, :, None, None] if self.conv else whole

    def to_diffusers(self, tensor: Tensor) -> list[Tensor]:
        """What `to_ldm` took."""
        whole = tensor[:, :, 0, 0] if self.conv else tensor
        return list(whole.chunk(len(self.names)))


def places(names: Mapping[str, Iterable[str]], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Place]:
    """Where each tensor of the single file comes from, by its LDM name.

    Args:
        names: of the tensors of each of `PARTS`, as diffusers has them.
        configs: `config.json` of each.

    Raises:
        ValueError: for an architecture or a tensor that has no place in a single file.
    """
    out: dict[str, Place] = {}
    stacked: dict[str, dict[str, str]] = {}
    for part, translate in (("unet", _unet), ("vae", _vae), ("text_encoder", _text)):
        for name, ldm in translate(list(names[part]), configs[part]).items():
            found = re.fullmatch(r"(.+self_attn\.)([qkv])(_proj\.\w+)", name) if ".in_proj_" in ldm else None
            if found is not None:
                stacked.setdefault(ldm, {})[found[2]] = name
            else:
                conv = part == "vae" and ".attn_1." in ldm and ".norm." not in ldm and ldm.endswith(".weight")
                out[ldm] = Place(part, (name,), conv)
    for ldm, qkv in stacked.items():
        if len(qkv) < 3:
            raise ValueError(f"the text encoder's {next(iter(qkv.values()))} lacks its two siblings of q, k and v")
        out[ldm] = Place("text_encoder", (qkv["q"], qkv["k"], qkv["v"]))
    return out


def _homeless(part: str, name: str) -> ValueError:
    return ValueError(f"the {part}'s tensor {name} has no place in a single file: not of Stable Diffusion 1.x or 2.x")


def _unet(names: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    row = config.get("layers_per_block", 2)
    if not isinstance(row, int):
        raise ValueError(f"the unet's layers_per_block is {row}: a single file has the same number in every block")
    attending = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    out = {}
    for name in names:
        module, leaf = name.rpartition(".")[::2]
        block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", module)
        middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module)
        if module in _TOP:
            ldm: str | None = _TOP[module]
        elif block is not None:
            side, number, kind, at, rest = block.groups()
            first = int(number) * (row + 1)
            if kind.endswith("samplers"):
                down, slot = side == "down", 2 if number in attending else 1
                where = f"input_blocks.{first + row + 1}.0.op" if down else f"output_blocks.{first + row}.{slot}.conv"
                ldm = where if rest == "conv" else None
            else:
                index = first + int(at) + (1 if side == "down" else 0)
                place = f"{'input' if side == 'down' else 'output'}_blocks.{index}.{int(kind == 'attentions')}"
                inner = rest if kind == "attentions" else _RESIDUAL.get(rest)
                ldm = inner and f"{place}.{inner}"
        elif middle is not None:
            kind, at, rest = middle.groups()
            inner = rest if kind == "attentions" else _RESIDUAL.get(rest)
            ldm = inner and f"middle_block.{2 * int(at) + int(kind == 'attentions')}.{inner}"
        else:
            ldm = None
        if ldm is None:
            raise _homeless("unet", name)
        out[name] = f"{UNET}{ldm}.{leaf}"
    return out


def _vae(names: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    depth = len(config.get("block_out_channels", (0,)))
    out = {}
    for name in names:
        module, leaf = name.rpartition(".")[::2]
        block = re.fullmatch(r"(en|de)coder\.(?:down|up)_blocks\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.+)", module)
        middle = re.fullmatch(r"(en|de)coder\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module)
        ldm: str | None = None
        if module in ("quant_conv", "post_quant_conv") or re.fullmatch(r"(en|de)coder\.conv_(in|out)", module):
            ldm = module
        elif re.fullmatch(r"(en|de)coder\.conv_norm_out", module):
            ldm = module.replace("conv_norm_out", "norm_out")
        elif block is not None:
            side, number, kind, at, rest = block.groups()
            level = f"down.{number}" if side == "en" else f"up.{depth - 1 - int(number)}"
            if kind == "resnets":
                inner = f"block.{at}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
            else:
                inner = f"{kind.removesuffix('rs')}.{rest}"
            ldm = f"{side}coder.{level}.{inner}"
        elif middle is not None:
            side, kind, at, rest = middle.groups()
            if kind == "resnets":
                ldm = f"{side}coder.mid.block_{int(at) + 1}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
            elif rest in _ATTENTION:
                ldm = f"{side}coder.mid.attn_1.{_ATTENTION[rest]}"
        if ldm is None:
            raise _homeless("vae", name)
        out[name] = f"{VAE}{ldm}.{leaf}"
    return out


def _text(names: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    act = config.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise ValueError(
            f"the text encoder's hidden_act is {act!r}: a single file holds CLIP (quick_gelu) or OpenCLIP (gelu)"
        )
    out = {}
    for name in names:
        plain = name.removeprefix("text_model.")
        ldm: str | None = f"{TEXT}transformer.text_model.{plain}"
        if act == "gelu" and plain != POSITIONS:
            layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", plain)
            if plain in _OPENCLIP_TOP:
                inner: str | None = _OPENCLIP_TOP[plain]
            elif layer is not None and layer[2] in _OPENCLIP:
                inner = f"transformer.resblocks.{layer[1]}.{_OPENCLIP[layer[2]]}.{layer[3]}"
            elif layer is not None and re.fullmatch(r"self_attn\.[qkv]_proj", layer[2]):
                inner = f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"
            else:
                inner = None
            ldm = inner and f"{TEXT}model.{inner}"
        if ldm is None:
            raise _homeless("text_encoder", name)
        out[name] = ldm
    return out
