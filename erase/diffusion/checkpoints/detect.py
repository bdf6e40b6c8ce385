"""What a file of tensors is, by their names alone: a family's single file, or what else."""

from __future__ import annotations

import re
from collections.abc import Iterable

LORA = "a LoRA"
FUSE = "name its model, and the LoRA by loras=[FILE] (erase generate: --lora FILE)"

ALIENS = (
    (r"(lora_unet_|lora_te|.*[._]lora[._](up|down|A|B)\.|.*\.lora_linear_layer\.)", LORA),
    (r"control_model\.|controlnet_", "a ControlNet"),
    (r"conditioner\.embedders\.0\.model\.", "the refiner of Stable Diffusion XL"),
    (r"embedder\.model\.", "a model that is conditioned on images (unCLIP)"),
    (r"(model\.diffusion_model\.)?distilled_guidance_layer\.", "Chroma"),
    (r"(model\.diffusion_model\.)?double_stream_modulation_img\.", "Flux.2"),
    (r"edm_mean", "Playground 2.5, whose noise schedule is another"),
    (r"edm_vpred\.", "CosXL, whose noise schedule is another"),
)
"""Names that no family's file has, and what has them: some are like a family's otherwise."""
FAMILIES = (
    ("flux", r"(model\.diffusion_model\.)?double_blocks\.\d+\.img_attn\.qkv\.weight"),
    ("sd3", r"(model\.diffusion_model\.)?joint_blocks\.\d+\.x_block\.attn\.qkv\.weight"),
    ("sdxl", r"conditioner\.embedders\.[01]\."),
    ("sdxl", r"model\.diffusion_model\.label_emb\.0\.0\.weight"),
    ("sd", r"model\.diffusion_model\.(time_embed|input_blocks|out)\."),
)
"""Families that have single files, and a name in them; the first that fits."""
OTHERS = (
    (r"(double_blocks|joint_blocks|transformer_blocks)\.", "a diffusion transformer"),
    (r"down_blocks\.\d+\.(attentions|resnets)\.", "a diffusers UNet's weights"),
    (r"(first_stage_model\.)?(encoder|decoder)\.(mid|mid_block)\b", "an autoencoder's weights"),
    (r"(text_model\.)?encoder\.layers\.", "a text encoder's weights"),
    (r"emb_params|string_to_param|<.+>", "a textual inversion"),
)


def family_of_file(names: Iterable[str]) -> str | None:
    """The family whose single file has such tensors: a module of `erase.diffusion.families`."""
    found = list(names)
    if _first(ALIENS, found) is not None:
        return None
    return _first(((sign, name) for name, sign in FAMILIES), found)


def kind_of(names: Iterable[str]) -> str:
    """What a file that is no family's is, as far as its tensors' names tell."""
    return _first((*ALIENS, *OTHERS), list(names)) or "something else"


def explain(names: Iterable[str]) -> str:
    """The same in words, with what can be done about it."""
    kind = kind_of(names)
    return f"it is {kind}" + (f", which changes a model: {FUSE}" if kind == LORA else "")


def _first(signs: Iterable[tuple[str, str]], names: list[str]) -> str | None:
    return next((kind for sign, kind in signs if any(re.match(sign, name) for name in names)), None)
