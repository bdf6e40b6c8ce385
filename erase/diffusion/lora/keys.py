"""Names of layers in LoRA files, by family: those that diffusers, ComfyUI and the WebUIs all read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from erase.diffusion.checkpoints import ldm

WEIGHT, BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class LoraLayout:
    """How a family's LoRA files name the layers of the network that learns.

    `kohya` is the layout of kohya's sd-scripts, which the WebUIs and ComfyUI read: `lora_unet_`, the layer's name with
    underscores, `.lora_up.weight`, `.lora_down.weight` and `.alpha`; alpha over the rank scales their product.
    `peft` is diffusers' own: `transformer.`, the layer's name, `.lora_B.weight` and `.lora_A.weight`.
    """

    base: str
    """The family's models, as headers name them (`modelspec.architecture`)."""
    style: Literal["kohya", "peft"]
    sgm: bool = False
    """Whether layers have the names of LDM's UNet, as in sd-scripts' files of SDXL, and not those of diffusers."""
    carries: str = r"\.weight$"
    """The weights of linear layers and convolutions that all readers find: an expression over their names."""
    comfy: str | None = r""
    """Biases that ComfyUI finds, as an expression; `None` where it does not know diffusers' names of this family."""

    @property
    def suffixes(self) -> tuple[str, str, str | None]:
        """Of up, down and alpha; PEFT's files have no alpha: it is the rank."""
        if self.style == "kohya":
            return ".lora_up.weight", ".lora_down.weight", ".alpha"
        return ".lora_B.weight", ".lora_A.weight", None

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
        """What the file calls each layer, without a suffix, by the layer's own name.

        Args:
            names: of all tensors of the network.
            config: its `config.json`.
        """
        known = list(names)
        modules = {name: re.sub(r"\.(weight|bias)$", "", name) for name in known}
        if self.sgm:
            spelled = {place.names[0]: key for key, place in ldm.unet(known, config, "unet").items()}
            found = {modules[n]: spelled[n].removesuffix(n[len(modules[n]) :]) for n in known}
        else:
            found = {module: module for module in modules.values()}
        if self.style == "kohya":
            return {module: f"lora_unet_{name.replace('.', '_')}" for module, name in found.items()}
        return {module: f"transformer.{name}" for module, name in found.items()}

    def carried(self, name: str, ndim: int) -> bool:
        """Whether a LoRA carries the tensor: a matrix or a convolution that all readers find."""
        return ndim in (2, 4) and name.endswith(WEIGHT) and re.search(self.carries, name) is not None

    def as_difference(self, name: str) -> bool:
        """Whether ComfyUI's `.diff` form carries the tensor: weights, and biases that it does not stack."""
        if self.comfy is None:
            return False
        return name.endswith(WEIGHT) or (name.endswith(BIAS) and re.search(self.comfy, name) is not None)


BLOCKS = r"^(down_blocks|mid_block|up_blocks)\..+\.weight$"
"""Layers outside the UNet's blocks are unknown to sd-scripts, which leaves them out without a word."""
UNSTACKED = r"^(?!.*(\.(to_[qkv]|add_[qkv]_proj|proj_mlp)|norm_out\.linear|norm1_context\.linear)\.bias$)"
"""Biases of a transformer that are whole in ComfyUI: it stacks q, k and v, and swaps the halves of the last norm's."""

SD = LoraLayout("stable-diffusion-v1", "kohya", carries=BLOCKS)
SDXL = LoraLayout("stable-diffusion-xl-v1-base", "kohya", sgm=True, carries=BLOCKS)
SD3 = LoraLayout("stable-diffusion-3", "peft", comfy=UNSTACKED)
FLUX = LoraLayout("flux-1-dev", "peft", comfy=UNSTACKED)
PIXART = LoraLayout("pixart-sigma", "peft", comfy=UNSTACKED)
LUMINA2 = LoraLayout("lumina-2", "peft", comfy=None)
