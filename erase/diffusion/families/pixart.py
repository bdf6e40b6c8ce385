"""PixArt-Σ and PixArt-α: a transformer that reads a T5 text encoder through cross-attention.

Its last layer predicts the noise and a variance. The variance stays in here: it enters no loss, and the samplers that
these models are published with do not use it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from torch import Tensor, nn

from erase.diffusion import loading
from erase.diffusion.checkpoints.folders import Source, read_index
from erase.diffusion.condition import Condition
from erase.diffusion.families import class_name
from erase.diffusion.lora import keys
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.process import Discrete, discrete

NAME = "PixArt"
CONDITION: Literal["text", "label"] = "text"
TRAINED = "transformer"
PARTS: tuple[str, ...] = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
ENCODERS: tuple[str, ...] = ("text_encoder",)
# As for Stable Diffusion: `attn2` is each block's cross-attention.
PARAMETERS: Mapping[str, str] = {
    "full": r".*",
    "xattn": r"\.attn2\.",
    "kv": r"\.attn2\.to_[kv]\.",
    "noxattn": r"^(?!.*\.attn2\.)",
}
# T5's embeddings pass a small network before any cross-attention: its first layer alone is linear in them.
TEXT_KV: str | None = r"^caption_projection\.linear_1\.weight$"
LORA: LoraLayout | None = keys.PIXART
CFG = True
STRIDE = 16
TOKENS = {"PixArtSigmaPipeline": 300, "PixArtAlphaPipeline": 120}
"""Tokens of a prompt that a pipeline reads, by its class."""


def open(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    hollow: Collection[str] = (),
) -> Any:
    """The whole pipeline in float32.

    Raises:
        ValueError: for weights that do not fit their configuration, or a network that takes other things than latents.
    """
    alpha = read_index(source.folder)["_class_name"] == "PixArtAlphaPipeline"
    pipe = loading.open_pipeline(
        source, PixArtAlphaPipeline if alpha else PixArtSigmaPipeline, TRAINED, device, dtype, hollow
    )
    check(pipe, source.place)
    loading.keep_vae_exact(pipe.vae)
    return pipe


def check(pipe: Any, where: object) -> None:
    """Refuse networks that take something else than this family's, and say `where` they are.

    Raises:
        ValueError: for these.
    """
    taken, given, latent = pipe.transformer.config.in_channels, pipe.transformer.out_channels, pipe.vae.config
    if taken != latent.latent_channels or given not in (taken, 2 * taken):
        raise ValueError(
            f"{where} has a transformer of {taken} input and {given} output channels for "
            f"{latent.latent_channels} latent channels: inpainting and control models are not supported"
        )
    loading.check_betas(pipe, where)


def process(pipe: Any) -> Discrete:
    """The schedule that the transformer was trained on."""
    return discrete(pipe.scheduler.config)


def embed(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`text` `[P, T, D]` and `mask` `[P, T]`, 1 for tokens and 0 for padding.

    Networks that are told an image's size also get `size` `[P, 2]`, height and width in pixels, and `aspect` `[P, 1]`.
    Always in float32: T5's activations overflow in float16. Prompts are read as they are, without the stock pipeline's
    clean-up of web captions, and in lower case, as it has them.
    """
    with torch.autocast(pipe.device.type, enabled=False):
        text, mask, _, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=pipe.device,
            clean_caption=False,
            max_sequence_length=TOKENS[class_name(pipe)],
        )
    found = {"text": text, "mask": mask}
    if pipe.transformer.use_additional_conditions:
        found["size"] = torch.full((len(prompts), 2), float(resolution(pipe)), device=text.device)
        found["aspect"] = torch.ones(len(prompts), 1, device=text.device)
    return found


def has_null(pipe: Any) -> bool:
    """Always."""
    return True


def encode(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the VAE's posterior, scaled."""
    return loading.latents(pipe.vae, pixels)


def call(net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The predicted noise `[B, C, H, W]`, without the variance."""
    out: Tensor = net(
        x,
        encoder_hidden_states=condition["text"],
        encoder_attention_mask=condition["mask"],
        timestep=t,
        added_cond_kwargs={"resolution": condition.get("size"), "aspect_ratio": condition.get("aspect")},
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]


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
    """By the stock pipeline, at the size asked for and not at the nearest that it has a table entry for."""
    height, width = size or (resolution(pipe),) * 2
    given: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    if null is not None:
        given |= {"negative_prompt": None, "negative_prompt_embeds": null["text"]}
        given |= {"negative_prompt_attention_mask": null["mask"]}
    return pipe(
        prompt_embeds=condition["text"],
        prompt_attention_mask=condition["mask"],
        **given,
        generator=list(generators),
        num_inference_steps=steps,
        height=height,
        width=width,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="latent" if latents else "pil",
    ).images


def resolution(pipe: Any) -> int:
    """The side that the transformer was trained at, pixels."""
    return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)


def example(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros."""
    net, text = configs["transformer"], configs["text_encoder"]
    side, tokens = net["sample_size"], TOKENS[configs["model_index"]["_class_name"]]
    found = {"text": torch.zeros(1, tokens, text["d_model"]), "mask": torch.zeros(1, tokens, dtype=torch.long)}
    told = net.get("use_additional_conditions")
    if told or (told is None and side == 128):  # the network's own default
        found |= {"size": torch.zeros(1, 2), "aspect": torch.zeros(1, 1)}
    return torch.zeros(1, net["in_channels"], side, side), found


def tokenizer(pipe: Any) -> tuple[Any, int]:
    """T5's, in lower case as `embed` reads prompts, and the tokens that it reads, end included."""

    def read(prompt: str, **given: Any) -> Any:
        return pipe.tokenizer(prompt.lower().strip(), **given)

    return read, TOKENS[class_name(pipe)]
