"""Names of the tensors of Stable Diffusion 1.x, 2.x and XL: in a diffusers folder, and in a single file (LDM).

LDM is the layout of the original releases, which WebUI and ComfyUI read. The names are derived from those of the
diffusers folder and from its configuration, so they hold for any number of blocks, layers and channels:

- UNet: `input_blocks` count convolution, residual blocks and downsamplers in one row, `output_blocks` likewise.
- VAE: `up` is numbered from the finest resolution; its attention is of 1×1 convolutions.
- text encoders: CLIP (1.x, the first of XL) has the names of transformers; OpenCLIP (2.x, the second of XL) has q, k
  and v stacked, and its projection transposed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from erase.diffusion.checkpoints.layout import Config, Layout, Part, Place, Slot, gathered, homeless
from erase.diffusion.checkpoints.released import released, released_xl

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
FIRST, SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."
"""The text encoders of Stable Diffusion XL."""

_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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
PROJECTION = "text_projection.weight"
POSITIONS = "embeddings.position_ids"
"""A buffer of old text encoders."""


def unet(names: Sequence[str], config: Config, part: str) -> dict[str, Place]:
    """Of any UNet of Stable Diffusion.

    Raises:
        ValueError: for a tensor or a configuration that has no place in a single file.
    """
    row = config.get("layers_per_block", 2)
    if not isinstance(row, int):
        raise ValueError(
            f"the unet's layers_per_block is {row}, but a single file has one number for all blocks: keep the folder"
        )
    attending = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    out: dict[str, Slot] = {}
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
            raise homeless(part, name)
        out[name] = Slot(f"{ldm}.{leaf}")
    return gathered(part, out)


def vae(names: Sequence[str], config: Config, part: str) -> dict[str, Place]:
    """Of a KL autoencoder, of whatever family.

    Raises:
        ValueError: for a tensor that has no place in a single file.
    """
    depth = len(config.get("block_out_channels", (0,)))
    out: dict[str, Slot] = {}
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
            raise homeless(part, name)
        conv = ".attn_1." in ldm and ".norm" not in ldm and leaf == "weight"
        out[name] = Slot(f"{ldm}.{leaf}", form="conv" if conv else "same")
    return gathered(part, out)


Act = Literal["quick_gelu", "gelu"]
"""Of CLIP, and of OpenCLIP."""


def text(
    names: Sequence[str],
    config: Config,
    part: str,
    act: Act | None = None,
) -> dict[str, Place]:
    """Of a text encoder: CLIP's own names or OpenCLIP's, by what its activation is.

    Args:
        names: of its tensors.
        config: of it.
        part: its name.
        act: the activation that a file has in this place; by default either, without a projection.

    Raises:
        ValueError: for a tensor or an activation that has no place in a single file.
    """
    found, allowed = config.get("hidden_act", "quick_gelu"), [act] if act else ["quick_gelu", "gelu"]
    if found not in allowed:
        kinds = {"quick_gelu": "CLIP (quick_gelu)", "gelu": "OpenCLIP (gelu)"}
        raise ValueError(
            f"the {part}'s hidden_act is {found!r}, but a single file can only hold "
            f"{' or '.join(kinds[a] for a in allowed)}: keep the folder"
        )
    out: dict[str, Slot] = {}
    for name in names:
        plain = name.removeprefix("text_model.")
        if found == "gelu" and plain != POSITIONS:
            slot = None if plain == PROJECTION and act is None else _openclip(plain)
            if slot is None:
                raise homeless(part, name)
            out[name] = replace(slot, key=f"model.{slot.key}")
        else:
            out[name] = Slot(f"transformer.text_model.{plain}")
    return gathered(part, out)


def _openclip(name: str) -> Slot | None:
    """Where OpenCLIP has a tensor of transformers; None if it has none such."""
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if name == PROJECTION:
        return Slot("text_projection", form="transposed")
    if name in _OPENCLIP_TOP:
        return Slot(_OPENCLIP_TOP[name])
    if layer is None:
        return None
    block = f"transformer.resblocks.{layer[1]}"
    if layer[2] in _OPENCLIP:
        return Slot(f"{block}.{_OPENCLIP[layer[2]]}.{layer[3]}")
    head = re.fullmatch(r"self_attn\.([qkv])_proj", layer[2])
    return Slot(f"{block}.attn.in_proj_{layer[3]}", "qkv".index(head[1]), (1, 1, 1)) if head else None


CLIP_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
_UNET_PART = Part("diffusers", "UNet2DConditionModel", UNET, unet)
VAE_PART = Part("diffusers", "AutoencoderKL", VAE, vae)
_FILES = (
    *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"),
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
)
SD = Layout(
    "Stable Diffusion 1.x or 2.x",
    "unet",
    {"unet": _UNET_PART, "vae": VAE_PART, "text_encoder": Part("transformers", "CLIPTextModel", TEXT, text)},
    released,
    _FILES,
    ("tokenizer", "scheduler"),
    {"tokenizer": CLIP_TOKENIZER},
    aliases=((f"{TEXT}transformer.text_model.", f"{TEXT}transformer."),),
)
SDXL = Layout(
    "Stable Diffusion XL",
    "unet",
    {
        "unet": _UNET_PART,
        "vae": VAE_PART,
        "text_encoder": Part("transformers", "CLIPTextModel", FIRST, partial(text, act="quick_gelu")),
        "text_encoder_2": Part("transformers", "CLIPTextModelWithProjection", SECOND, partial(text, act="gelu")),
    },
    released_xl,
    (*_FILES, "text_encoder_2/config.json", "tokenizer_2/tokenizer_config.json"),
    ("tokenizer", "tokenizer_2", "scheduler"),
    {"tokenizer": CLIP_TOKENIZER, "tokenizer_2": CLIP_TOKENIZER},
)
