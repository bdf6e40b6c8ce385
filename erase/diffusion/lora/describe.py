"""What a LoRA file is, from the names and shapes of its tensors and from its header: for `erase inspect`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from erase.diffusion.lora.write import HEADER
from erase.store.safetensors import KINDS, Lazy

FORMS = (
    (r"lora_(unet_|[t]e\d?_)", "kohya"),
    (r"(transformer|unet|base_model\.model|text_encoder\w*)\..+\.lora_[AB]\.", "PEFT"),
    (r".+lora.*\.(up|down)\.", "diffusers before PEFT"),
)
"""Layouts by the names of tensors."""
BASES = (
    (r"lora_unet_(input|output)_blocks_|lora_te2_", "Stable Diffusion XL"),
    (r"(transformer\.)?single_transformer_blocks\.|lora_unet_(double|single)_blocks", "Flux.1"),
    (r"transformer\.transformer_blocks\.\d+\.attn\.add_", "Stable Diffusion 3 or Flux.1"),
    (r"transformer\.(context_refiner|layers)\.", "Lumina Image 2.0"),
    (r"transformer\.transformer_blocks\.\d+\.attn2\.", "PixArt"),
    (r"lora_unet_(down|up|mid)_block|unet\.", "Stable Diffusion 1, 2 or XL"),
)
"""Families by the names of tensors, where no header tells."""


def describe_lora(tensors: Lazy, header: Mapping[str, str]) -> dict[str, Any]:
    """Whose it is, for which base, in which layout, at which ranks, and what it changes.

    Raises:
        ValueError: for a header of ours that cannot be read.
    """
    shapes: dict[str, Tensor] = dict(tensors.sketches())
    ranks = {name: t.shape[0] for name, t in shapes.items() if re.search(r"lora_?(linear_layer)?[._](down|A)\.", name)}
    parts = Counter("text encoder" if re.search(r"lora_te|text_encoder", name) else "network" for name in ranks)
    found: dict[str, Any] = {
        "kind": "LoRA of erase" if HEADER in header else "LoRA",
        "use": "loras=[FILE] of erase run sd, --lora FILE of erase generate, or load_lora_weights of diffusers",
        "layout": next((form for sign, form in FORMS if any(re.match(sign, name) for name in shapes)), "unknown"),
        "base": base_of(shapes, header),
        "layers": dict(parts),
        "rank": sorted({*ranks.values()}),
        "dtype": "/".join(sorted({KINDS[t.dtype] for name, t in shapes.items() if not name.endswith("alpha")})),
        "weights": sum(t.numel() for t in shapes.values()),
    }
    if HEADER in header:
        try:
            found["change"] = json.loads(header[HEADER])
        except json.JSONDecodeError as error:
            raise ValueError(f"{HEADER} in the LoRA's header is not JSON ({error.msg}): get it again") from error
    return found


def base_of(names: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """The base that a header names, else the family by the names of tensors."""
    for key in ("erase_base", "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name"):
        if header.get(key):
            return header[key].removesuffix("/lora")
    return next((base for sign, base in BASES if any(re.match(sign, name) for name in names)), "unknown")
