"""Stable Diffusion 1.x and 2.x: a UNet that reads one CLIP text encoder through cross-attention."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn

from erase.diffusion import loading
from erase.diffusion.checkpoints import ldm
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.condition import Condition
from erase.diffusion.lora import keys
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.process import Discrete, discrete

NAME = "Stable Diffusion"
CONDITION: Literal["text", "label"] = "text"
TRAINED = "unet"
PARTS: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
ENCODERS: tuple[str, ...] = ("text_encoder",)
PARAMETERS: Mapping[str, str] = {
    "full": r".*",
    "xattn": r"\.attn2\.",
    "kv": r"\.attn2\.to_[kv]\.",
    "noxattn": r"^(?!.*\.attn2\.)",
    "esd_u": r"^(?!.*(\.attn2\.|norm))",  # all Linear and Conv2d outside cross-attention, as ESD's current script
}
TEXT_KV: str | None = r"\.attn2\.to_[kv]\.weight$"
LORA: LoraLayout | None = keys.SD
CFG = True
STRIDE = 8
SINGLE_FILE = ldm.SD


def open(
    source: Source | SingleFile,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    hollow: Collection[str] = (),
) -> Any:
    """The whole pipeline."""
    pipe = loading.open_pipeline(source, StableDiffusionPipeline, TRAINED, device, dtype, hollow)
    check(pipe, source.place)
    return pipe


def check(pipe: Any, where: object) -> None:
    """Refuse networks that take something else than this family's, and say `where` they are.

    Raises:
        ValueError: for these.
    """
    channels = pipe.unet.config.in_channels
    if channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"{where} has a UNet of {channels} input channels for {pipe.vae.config.latent_channels} latent "
            "channels: inpainting and depth models are not supported"
        )
    loading.check_cfg(pipe.unet, where)
    loading.check_betas(pipe, where)


def process(pipe: Any) -> Discrete:
    """The schedule that the UNet was trained on."""
    return discrete(pipe.scheduler.config)


def embed(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`text` `[P, T, D]`."""
    return {"text": pipe.encode_prompt(list(prompts), pipe.device, 1, False)[0]}


def has_null(pipe: Any) -> bool:
    """Always."""
    return True


def encode(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the VAE's posterior, scaled."""
    return loading.latents(pipe.vae, pixels)


def call(net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The UNet's prediction, `[B, C, H, W]`."""
    out: Tensor = net(x, t, encoder_hidden_states=condition["text"], return_dict=False)[0]
    return out


def generate(
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
    """By the stock pipeline."""
    height, width = size or (resolution(pipe),) * 2
    return pipe(
        prompt_embeds=condition["text"],
        negative_prompt_embeds=None if null is None else null["text"],
        generator=list(generators),
        num_inference_steps=steps,
        height=height,
        width=width,
        output_type="latent" if latents else "pil",
        **({} if guidance is None else {"guidance_scale": guidance}),
    ).images


def resolution(pipe: Any) -> int:
    """The side that the UNet was trained at, pixels."""
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def example(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros."""
    unet, text = configs["unet"], configs["text_encoder"]
    side = unet["sample_size"]
    tokens = text.get("max_position_embeddings", 77)
    return torch.zeros(1, unet["in_channels"], side, side), {
        "text": torch.zeros(1, tokens, unet["cross_attention_dim"])
    }


def tokenizer(pipe: Any) -> tuple[Any, int]:
    """CLIP's, and the tokens that it reads, begin and end included."""
    return pipe.tokenizer, int(pipe.tokenizer.model_max_length)
