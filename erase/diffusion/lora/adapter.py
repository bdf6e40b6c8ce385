"""A LoRA that goes into a model before anything else: its weights, and the model's with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from erase.diffusion.lora.svd import product
from erase.store.safetensors import Lazy

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""Up and down by the name of the weight that they change, as files of the model name it; alpha is in them."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file that fits a model."""

    path: Path
    scale: float
    sha256: str
    """Of the file; of an adapter of PEFT, of it and of the file with its scale."""
    parts: Mapping[str, Pairs] = field(repr=False)
    """By component: `unet`, `transformer`, `text_encoder`, …"""

    @property
    def title(self) -> str:
        """File and scale, as a record names it."""
        return f"{self.path.name}:{self.scale:g}"


def merged(tensors: Lazy, part: str, loras: Sequence[Lora]) -> Lazy:
    """Tensors of a component with LoRAs in them, in their own dtypes; summed in float32 as `fuse_lora` of diffusers."""
    changing = [(lora.scale, lora.parts[part]) for lora in loras if part in lora.parts]
    if not changing:
        return tensors

    def get(name: str) -> Tensor:
        old = tensors[name]
        found = [(scale, pairs[name]) for scale, pairs in changing if name in pairs]
        if not found:
            return old
        new = old.float()
        for scale, (up, down) in found:
            new = new + scale * product(up, down).reshape(old.shape)
        return new.to(old.dtype)

    return Lazy(tensors, get, tensors.sketch)


def changed_by(part: str, loras: Sequence[Lora]) -> list[str]:
    """The weights of a component that LoRAs change."""
    return list(dict.fromkeys(name for lora in loras for name in lora.parts.get(part, {})))
