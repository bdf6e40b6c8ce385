"""The seam between the engine and a family of diffusion models: a family is one module of this package.

Everything that differs between Stable Diffusion, SDXL, SD3, Flux, PixArt, DiT and a class-conditional DDPM is behind
`Family`. Whatever stands above it (losses, data, programs, attacks, evaluation) is written once. A new family is a
file here and a row of `FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from erase.diffusion.checkpoints.layout import Layout
from erase.diffusion.condition import Condition
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.process import Process

FAMILIES: dict[str, tuple[str, ...]] = {
    "sd": ("StableDiffusionPipeline",),
    "sdxl": ("StableDiffusionXLPipeline",),
    "sd3": ("StableDiffusion3Pipeline",),
    "flux": ("FluxPipeline",),
    "pixart": ("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
    "lumina2": ("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
    "ddpm": ("ClassConditionalPipeline",),
    "dit": ("DiTPipeline",),
}
"""Modules of this package, and the `_class_name` of the pipelines that each opens (in `model_index.json`)."""


class Family(Protocol):
    """A family of diffusion models; a module satisfies it.

    One whose models come in single files has the row `SINGLE_FILE`, too: a layout of `erase.diffusion.checkpoints`.

    B is the batch size, P a number of prompts. Latents `[B, C, H, W]` are as the network sees them: scaled and shifted.
    """

    NAME: str
    """As people call it."""
    CONDITION: Literal["text", "label"]
    """What a prompt is: text, or the name of a class."""
    TRAINED: str
    """The component that learns: `unet` or `transformer`."""
    PARTS: tuple[str, ...]
    """The components that a checkpoint must have, as subfolders; those with weights are hashed."""
    ENCODERS: tuple[str, ...]
    """The components that turn prompts into conditions: needed no more once all prompts are embedded."""
    PARAMETERS: Mapping[str, str]
    """Names for sets of parameters (`full`, `xattn`, `kv`, `noxattn`, `esd_u`): expressions searched in their names."""
    TEXT_KV: str | None
    """Linear weights that read the text embeddings themselves, as an expression over names: what closed forms edit."""
    LORA: LoraLayout | None
    """How LoRA files name its layers; `None` where no reader of such files knows the family."""
    CFG: bool
    """Whether images are guided by the difference from the empty prompt (classifier-free guidance); if not, the network
    is told the scale, as a leaf `guidance` of its condition, or needs none."""
    STRIDE: int
    """Pixels; width and height of an image are multiples of it."""

    def open(
        self,
        source: Any,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        hollow: Collection[str] = (),
    ) -> Any:
        """The pipeline, all networks frozen and in eval mode, without a safety checker.

        Args:
            source: the checkpoint.
            device: where its networks go.
            dtype: of the weights.
            hollow: networks to leave without weights (`erase.diffusion.loading`).

        Raises:
            ValueError: for weights that are missing, do not fit their configuration, or are not finite; and for a
                network that takes something else than this family's.
        """

    def check(self, pipe: Any, where: object) -> None:
        """Refuse a pipeline whose networks take something else than this family's, and say `where` it is.

        Raises:
            ValueError: for these.
        """

    def process(self, pipe: Any) -> Process:
        """The noising process that the network was trained on."""

    def embed(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the network is told of prompts, by every encoder: leaves `[P, …]`, on the pipeline's device.

        Of the empty prompt it is what the family's own pipeline uses as the negative condition.
        """

    def has_null(self, pipe: Any) -> bool:
        """Whether the model was trained with an empty condition, which `embed` then gives for the empty prompt."""

    def encode(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latent mean and standard deviation of images `[B, 3, H, W]` in [-1, 1]; `None` where nothing is random."""

    def call(self, net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One forward pass: the prediction, shaped as `x` `[B, C, H, W]`. `t` `[B]` is what `Process.clock` gives.

        Packing, position ids, guidance embedding and learned variances are the family's own affair, and stay in here.
        """

    def generate(
        self,
        pipe: Any,
        condition: Condition,
        null: Condition | None,
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float | None,
        size: tuple[int, int] | None = None,
        latents: bool = False,
    ) -> Any:
        """Generate one sample for each of B conditions, from B generators on the CPU.

        Args:
            pipe: the pipeline.
            condition: of `embed`, leaves `[B, …]`.
            null: of `embed` for empty prompts, leaves `[B, …]`.
            generators: of the first noise and of the sampler's.
            steps: of the sampler.
            guidance: scale as the family's pipeline counts it; None is the model's own.
            size: height and width in pixels; by default the model's own.
            latents: give latents `[B, C, H, W]`, not PIL images.
        """

    def resolution(self, pipe: Any) -> int:
        """The side of an image that the model was trained at, in pixels."""

    def example(self, configs: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Zeros shaped as one sample and its condition, `[1, C, H, W]` and leaves `[1, …]`, from configurations alone.

        Args:
            configs: of the components, by name, and of the pipeline as `model_index`.
        """

    def tokenizer(self, pipe: Any) -> tuple[Any, int]:
        """The tokenizer that reads the most of a prompt, and how many tokens it reads; of text families alone."""


class LabelFamily(Family, Protocol):
    """A family whose prompts are names of classes; it has these, too."""

    def labels(self, pipe: Any) -> list[str]:
        """Names of the classes, by number: distinct, and each a prompt."""

    def shape(self, pipe: Any) -> tuple[int, int, int]:
        """Channels, height and width of an image, in pixels."""

    def guidance(self, pipe: Any) -> float:
        """The guidance scale that `generate` uses if it is given None."""


def family(name: str) -> Family:
    """A family by its module's name."""
    found: Any = importlib.import_module(f"{__name__}.{name}")
    checked: Family = found
    return checked


def layout_of(name: str) -> Layout:
    """How the single files of a family are laid out; the optional row `SINGLE_FILE` of its module.

    Raises:
        ValueError: for a family that has no single files here.
    """
    found: Layout | None = getattr(family(name), "SINGLE_FILE", None)
    if found is None:
        raise ValueError(f"{family(name).NAME} has no single files here: name a folder")
    return found


def family_of(pipeline: str | None, where: object) -> str:
    """The name of the family that opens pipelines of a class.

    Args:
        pipeline: `_class_name` of `model_index.json`.
        where: the checkpoint, for the message.

    Raises:
        ValueError: for a class that no family opens.
    """
    for name, classes in FAMILIES.items():
        if pipeline in classes:
            return name
    raise ValueError(f"{where} holds a {pipeline}; supported pipelines: {', '.join(supported())}")


def class_name(pipe: Any) -> str:
    """The class of a pipeline as `model_index.json` names it, or the one of ours that it inherits from."""
    names = [kind.__name__ for kind in type(pipe).__mro__]
    return next((name for name in names if name in supported()), names[0])


def supported() -> list[str]:
    """The classes of the pipelines that families open."""
    return [kind for classes in FAMILIES.values() for kind in classes]
