"""LoRA files beside a model, by their tensors' names: they change it, so that they are not left out without a word."""

from __future__ import annotations

from pathlib import Path

from erase.diffusion.checkpoints.detect import FUSE, LORA, kind_of
from erase.store.safetensors import open_safetensors


def is_lora(path: Path) -> bool:
    """Whether a file holds a LoRA: of diffusers, PEFT or the WebUIs.

    Raises:
        ValueError: for a safetensors file that is broken.
    """
    if path.suffix == ".bin":
        return path.stem in ("pytorch_lora_weights", "adapter_model")
    return path.suffix == ".safetensors" and kind_of(open_safetensors(path)[0]) == LORA


def refuse_beside(folder: Path) -> None:
    """Refuse a model's folder with a LoRA in it, which would be left out without a word.

    Raises:
        ValueError: for one.
    """
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        try:
            found = is_lora(path)
        except ValueError:  # broken, and not read: other checkpoints beside a folder do not count
            continue
        if found:
            raise ValueError(
                f"{path} is a LoRA beside the model, and erase would not apply it: {FUSE}, or move it elsewhere"
            )
