"""Names of the tensors of Stable Diffusion 3 and 3.5 and of Flux.1: in a diffusers folder, and in a single file.

The layouts are those of the original releases, which ComfyUI reads: `joint_blocks` (SD3) and `double_blocks` and
`single_blocks` (Flux), with q, k and v stacked; so is the first linear layer of a single block with its MLP. Where
diffusers has scale and shift of a last modulation, the file has shift and scale. Names are derived from those of the
diffusers folder, so they hold for any number of blocks and channels; configurations are derived from the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from erase.diffusion.checkpoints.layout import (
    Config,
    Layout,
    Part,
    Place,
    Prediction,
    Slot,
    gathered,
    homeless,
    sketch_of,
)
from erase.diffusion.checkpoints.ldm import CLIP_TOKENIZER, VAE_PART
from erase.diffusion.checkpoints.released import rest_of_sd3, written

NETWORK = "model.diffusion_model."
"""What the names of a network begin with in a file, where they are not bare."""
_T5 = "text_encoders.t5xxl."
QKV = (1, 1, 1)

_SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_SD3_QKV = {"attn.to_": "x_block.attn.qkv", "attn.add_": "context_block.attn.qkv", "attn2.to_": "x_block.attn2.qkv"}

_FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_QKV = {"attn.to_": "img_attn.qkv", "attn.add_": "txt_attn.qkv"}
_FLUX_SINGLE = {
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
}
_FIRST = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
"""What a single block stacks as `linear1`; the MLP is four times as wide as the others, in every Flux.1."""


def sd3(names: Sequence[str], config: Config, part: str) -> dict[str, Place]:
    """Of the transformer of Stable Diffusion 3 and 3.5.

    Raises:
        ValueError: for a tensor that has no place in a single file.
    """
    last = max((int(found[1]) for n in names if (found := re.match(r"transformer_blocks\.(\d+)\.", n))), default=0)
    out: dict[str, Slot] = {}
    for name in names:
        module, leaf = name.rpartition(".")[::2]
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        slot: Slot | None = None
        if name in _SD3:  # a buffer
            slot = Slot(_SD3[name])
        elif module in _SD3:
            slot = Slot(f"{_SD3[module]}.{leaf}")
        elif module == "norm_out.linear":
            slot = Slot(f"final_layer.adaLN_modulation.1.{leaf}", form="swapped")
        elif block is not None:
            where = f"joint_blocks.{block[1]}"
            turned = block[2] == "norm1_context.linear" and int(block[1]) == last  # of scale and shift alone
            if block[2] in _SD3_BLOCK:
                slot = Slot(f"{where}.{_SD3_BLOCK[block[2]]}.{leaf}", form="swapped" if turned else "same")
            else:
                slot = _stacked(where, block[2], leaf, _SD3_QKV)
        if slot is None:
            raise homeless(part, name)
        out[name] = slot
    return gathered(part, out)


def flux(names: Sequence[str], config: Config, part: str) -> dict[str, Place]:
    """Of the transformer of Flux.1.

    Raises:
        ValueError: for a tensor that has no place in a single file.
    """
    out: dict[str, Slot] = {}
    for name in names:
        module, leaf = name.rpartition(".")[::2]
        block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
        slot: Slot | None = None
        if module in _FLUX:
            slot = Slot(f"{_FLUX[module]}.{leaf}")
        elif module == "norm_out.linear":
            slot = Slot(f"final_layer.adaLN_modulation.1.{leaf}", form="swapped")
        elif block is not None:
            where, inner = f"{'single' if block[1] else 'double'}_blocks.{block[2]}", block[3]
            known = _FLUX_SINGLE if block[1] else _FLUX_DOUBLE
            if inner in known:
                slot = Slot(f"{where}.{known[inner]}.{'scale' if known[inner].endswith('_norm') else leaf}")
            elif block[1] and inner in _FIRST:
                slot = Slot(f"{where}.linear1.{leaf}", _FIRST.index(inner), (1, 1, 1, 4))
            elif not block[1]:
                slot = _stacked(where, inner, leaf, _FLUX_QKV)
        if slot is None:
            raise homeless(part, name)
        out[name] = slot
    return gathered(part, out)


def _stacked(where: str, inner: str, leaf: str, known: Mapping[str, str]) -> Slot | None:
    """Where a block stacks queries, keys and values."""
    found = re.fullmatch(r"(attn2?\.(?:to|add)_)([qkv])(_proj)?", inner)
    if found is None or found[1] not in known:
        return None
    return Slot(f"{where}.{known[found[1]]}.{leaf}", "qkv".index(found[2]), QKV)


def released_sd3(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], prediction: Prediction | None
) -> dict[str, str]:
    """The transformer's configuration, as far as shapes tell, and those of the rest; T5's is in no file.

    Raises:
        ValueError: for tensors of another architecture.
    """
    shape = _Shapes(path, tensors, "joint_blocks.0.x_block.attn.qkv.weight")
    width, joint = shape("context_embedder.weight", 2)
    _, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    # Without norms of queries and keys nothing says how wide a head is: 64 in every released model.
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head = shape(norm, 1)[0] if shape.has(norm) else 64
    config = {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("final_layer.linear.weight", 2)[0] // patch**2,
        "num_layers": len(shape.blocks(r"joint_blocks\.(\d+)\..+")),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": joint,
        "caption_projection_dim": width,
        "pooled_projection_dim": shape("y_embedder.mlp.0.weight", 2)[1],
        "pos_embed_max_size": math.isqrt(shape("pos_embed", 3)[1]),
        "dual_attention_layers": shape.blocks(r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight"),
        "qk_norm": "rms_norm" if shape.has(norm) else None,
    }
    t5 = any(name.startswith(_T5) for name in tensors)
    return written({**rest_of_sd3(t5), "transformer/config.json": config})


def released_flux(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], prediction: Prediction | None
) -> dict[str, str]:
    """The transformer's configuration, as far as shapes tell; all else of it is in the folder with the rest.

    Raises:
        ValueError: for tensors of another architecture.
    """
    shape = _Shapes(path, tensors, "double_blocks.0.img_attn.qkv.weight")
    width, channels = shape("img_in.weight", 2)
    (head,) = shape("double_blocks.0.img_attn.norm.key_norm.scale", 1)
    config = {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shape("final_layer.linear.weight", 2)[0],
        "num_layers": len(shape.blocks(r"double_blocks\.(\d+)\..+")),
        "num_single_layers": len(shape.blocks(r"single_blocks\.(\d+)\..+")),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("txt_in.weight", 2)[1],
        "pooled_projection_dim": shape("vector_in.in_layer.weight", 2)[1],
        "guidance_embeds": shape.has("guidance_in.in_layer.weight"),
    }
    return written({"transformer/config.json": config})


class _Shapes:
    """Shapes of a file's tensors, by their names without what all begin with.

    Args:
        path: the file.
        tensors: of it.
        known: the name of one of them, without its beginning.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], known: str) -> None:
        self.path, self.tensors = path, tensors
        self.begin = NETWORK if NETWORK + known in tensors else ""

    def has(self, name: str) -> bool:
        """Whether the file has a tensor."""
        return self.begin + name in self.tensors

    def __call__(self, name: str, dimensions: int) -> list[int]:
        """Of a tensor.

        Raises:
            ValueError: if the file lacks it, or it has another number of dimensions.
        """
        if not self.has(name):
            raise ValueError(f"{self.path} is incomplete: it lacks {self.begin}{name}: get it again")
        found = list(sketch_of(self.tensors, self.begin + name).shape)
        if len(found) != dimensions or 0 in found:
            raise ValueError(
                f"{self.path}: {self.begin}{name} must have {dimensions} dimensions; got the shape {found}: get it "
                "again"
            )
        return found

    def blocks(self, pattern: str) -> list[int]:
        """The numbers of the blocks that have a tensor."""
        return sorted({int(m[1]) for n in self.tensors if (m := re.fullmatch(re.escape(self.begin) + pattern, n))})


def plain(names: Sequence[str], config: Config, part: str) -> dict[str, Place]:
    """Of a text encoder under transformers' own names."""
    return gathered(part, {name: Slot(f"transformer.{name}") for name in names})


_T5_TOKENIZER = ("T5Tokenizer", "T5TokenizerFast")
_PROJECTION = ("text_projection.weight", "text_model.final_layer_norm.weight")
_CLIP = "CLIPTextModelWithProjection"
_FILES = (
    *("model_index.json", "scheduler/scheduler_config.json"),
    *(f"{part}/config.json" for part in ("transformer", "vae", "text_encoder", "text_encoder_2")),
    *(f"{tokenizer}/tokenizer_config.json" for tokenizer in ("tokenizer", "tokenizer_2")),
)
SD3 = Layout(
    "Stable Diffusion 3",
    "transformer",
    {
        "transformer": Part("diffusers", "SD3Transformer2DModel", NETWORK, sd3),
        "vae": VAE_PART,
        "text_encoder": Part("transformers", _CLIP, "text_encoders.clip_l.", plain, _PROJECTION),
        "text_encoder_2": Part("transformers", _CLIP, "text_encoders.clip_g.", plain),
        "text_encoder_3": Part("transformers", "T5EncoderModel", _T5, plain),
    },
    released_sd3,
    _FILES,
    ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"),
    {"tokenizer": CLIP_TOKENIZER, "tokenizer_2": CLIP_TOKENIZER, "tokenizer_3": _T5_TOKENIZER},
    aliases=((NETWORK, ""),),
)
FLUX = Layout(
    "Flux.1",
    "transformer",
    {"transformer": Part("diffusers", "FluxTransformer2DModel", "", flux)},
    released_flux,
    _FILES,
    alike=("guidance_embeds",),
    aliases=(("", NETWORK),),
)
