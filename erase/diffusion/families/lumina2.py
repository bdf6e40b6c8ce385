"""Lumina Image 2.0: one stream of text and image tokens, and Gemma 2 as the text encoder.

A prompt follows a system prompt, and the empty prompt stands alone. The network's time runs from 0 at noise to 1 at
data, and its velocity points to the data: both are turned round in `call` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.pipelines.lumina2.pipeline_lumina2 import Lumina2Pipeline
from torch import Tensor, nn

from erase.diffusion import loading
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.condition import Condition
from erase.diffusion.lora import keys
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.process import Flow, flow

NAME = "Lumina Image 2.0"
CONDITION: Literal["text", "label"] = "text"
TRAINED = "transformer"
PARTS: tuple[str, ...] = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
ENCODERS: tuple[str, ...] = ("text_encoder",)
# There is no cross-attention, and the joint blocks (`layers`) hold text and image tokens in one stream with the same
# weights, which cannot be told apart: they are in `noxattn`. `xattn` is what text alone passes before it joins the
# image, and `kv` the keys and values in there.
PARAMETERS: Mapping[str, str] = {
    "full": r".*",
    "xattn": r"^(time_caption_embed\.caption_embedder|context_refiner)\.",
    "kv": r"^context_refiner\.\d+\.attn\.to_[kv]\.",
    "noxattn": r"^(?!time_caption_embed\.caption_embedder\.|context_refiner\.)",
}
# No linear weight reads the embeddings themselves: the first, of `caption_embedder`, reads them normed.
TEXT_KV: str | None = None
LORA: LoraLayout | None = keys.LUMINA2
CFG = True
STRIDE = 16
TOKENS = 256
"""Tokens that the stock pipeline reads, the system prompt's included; no configuration names another number."""


def open(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    hollow: Collection[str] = (),
) -> Any:
    """The whole pipeline."""
    pipe = loading.open_pipeline(source, Lumina2Pipeline, TRAINED, device, dtype, hollow)
    check(pipe, source.place)
    return pipe


def check(pipe: Any, where: object) -> None:
    """Refuse networks that take something else than this family's, and say `where` they are.

    Raises:
        ValueError: for these.
    """
    taken, given, latent = pipe.transformer.config.in_channels, pipe.transformer.out_channels, pipe.vae.config
    if (taken, given) != (latent.latent_channels,) * 2:
        raise ValueError(
            f"{where} has a transformer of {taken} input and {given} output channels for "
            f"{latent.latent_channels} latent channels: editing and control models are not supported"
        )


def process(pipe: Any) -> Flow:
    """The flow that the transformer was trained on, shifted as the scheduler says."""
    config = pipe.transformer.config
    return flow(pipe.scheduler.config, (config.sample_size // config.patch_size) ** 2)


def embed(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`text` `[P, T, D]` and `mask` `[P, T]`, 1 for tokens and 0 for padding."""
    text, mask, no_text, no_mask = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance="" in prompts, device=pipe.device, max_sequence_length=TOKENS
    )
    if "" in prompts:
        empty = torch.tensor([not prompt for prompt in prompts], device=text.device)[:, None]
        text, mask = torch.where(empty[..., None], no_text, text), torch.where(empty, no_mask, mask)
    return {"text": text, "mask": mask}


def has_null(pipe: Any) -> bool:
    """Always."""
    return True


def encode(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the VAE's posterior, shifted and scaled."""
    return loading.latents(pipe.vae, pixels)


def call(net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The velocity `[B, C, H, W]` from data to noise."""
    out: Tensor = net(
        hidden_states=x,
        timestep=1 - t / 1000,
        encoder_hidden_states=condition["text"],
        encoder_attention_mask=condition["mask"],
        return_dict=False,
    )[0]
    return -out


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
    """By the stock pipeline, which scales each row of a guided velocity to the length of the conditional one's."""
    height, width = size or (resolution(pipe),) * 2
    return pipe(
        prompt_embeds=condition["text"],
        prompt_attention_mask=condition["mask"],
        negative_prompt_embeds=None if null is None else null["text"],
        negative_prompt_attention_mask=None if null is None else null["mask"],
        generator=list(generators),
        num_inference_steps=steps,
        height=height,
        width=width,
        output_type="latent" if latents else "pil",
        **({} if guidance is None else {"guidance_scale": guidance}),
    ).images


def resolution(pipe: Any) -> int:
    """The side that the transformer was trained at, pixels."""
    return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)


def example(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros, as long as a prompt can be."""
    net = configs["transformer"]
    return torch.zeros(1, net["in_channels"], net["sample_size"], net["sample_size"]), {
        "text": torch.zeros(1, TOKENS, net["cap_feat_dim"]),
        "mask": torch.ones(1, TOKENS, dtype=torch.long),
    }


def tokenizer(pipe: Any) -> tuple[Any, int]:
    """Gemma's, after the system prompt as `embed` reads prompts, and the tokens that it reads, both included."""

    def read(prompt: str, **given: Any) -> Any:
        return pipe.tokenizer(f"{pipe.system_prompt} <Prompt Start> {prompt}" if prompt else "", **given)

    return read, TOKENS
