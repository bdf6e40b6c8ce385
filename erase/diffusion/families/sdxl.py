"""Stable Diffusion XL: a UNet that reads two CLIP text encoders, a pooled embedding and the image's size.

Refiners and inpainting networks are refused: their UNets are told other things than a prompt and a size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor, nn

from erase.diffusion import loading
from erase.diffusion.checkpoints import ldm
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.condition import Condition
from erase.diffusion.lora import keys
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.process import Discrete, discrete

NAME = "Stable Diffusion XL"
CONDITION: Literal["text", "label"] = "text"
TRAINED = "unet"
PARTS: tuple[str, ...] = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
ENCODERS: tuple[str, ...] = ("text_encoder", "text_encoder_2")
# Published SDXL erasers train or edit cross-attention (`attn2`). The pooled embedding enters through `add_embedding`,
# which these sets leave to `full` and `noxattn`.
PARAMETERS: Mapping[str, str] = {
    "full": r".*",
    "xattn": r"\.attn2\.",
    "kv": r"\.attn2\.to_[kv]\.",
    "noxattn": r"^(?!.*\.attn2\.)",
    "esd_u": r"^(?!.*(\.attn2\.|norm|emb)).*block",  # Linear and Conv2d of blocks, as ESD's script for SDXL
}
TEXT_KV: str | None = r"\.attn2\.to_[kv]\.weight$"
LORA: LoraLayout | None = keys.SDXL
CFG = True
STRIDE = 8
SINGLE_FILE = ldm.SDXL


def open(
    source: Source | SingleFile,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    hollow: Collection[str] = (),
) -> Any:
    """The whole pipeline in float32, without a watermark.

    Raises:
        ValueError: for weights that do not fit their configuration, or a network that needs other conditions.
    """
    pipe = loading.open_pipeline(source, StableDiffusionXLPipeline, TRAINED, device, dtype, hollow)
    check(pipe, source.place)
    loading.keep_vae_exact(pipe.vae)
    pipe.watermark = None  # made wherever the package invisible_watermark is installed
    return pipe


def check(pipe: Any, where: object) -> None:
    """Refuse networks that take something else than this family's, and say `where` they are.

    Raises:
        ValueError: for these.
    """
    unet, latent = pipe.unet.config, pipe.vae.config.latent_channels
    told = pipe.text_encoder_2.config.projection_dim + 6 * (unet.addition_time_embed_dim or 0)
    if unet.in_channels != latent:
        raise ValueError(
            f"{where} has a UNet of {unet.in_channels} input channels for {latent} latent channels: inpainting "
            "and image-to-image models are not supported"
        )
    if unet.addition_embed_type != "text_time" or unet.projection_class_embeddings_input_dim != told:
        raise ValueError(
            f"{where} has a UNet that is conditioned on other things than a pooled prompt and six sizes: "
            "refiners and adapters are not supported"
        )
    loading.check_cfg(pipe.unet, where)
    loading.check_betas(pipe, where)


def process(pipe: Any) -> Discrete:
    """The schedule that the UNet was trained on."""
    return discrete(pipe.scheduler.config)


def embed(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`text` `[P, T, D]` of both encoders side by side, `pooled` `[P, E]` of the second, and `time_ids` `[P, 6]`.

    The empty prompt is all zeros where the checkpoint says so (`force_zeros_for_empty_prompt`), as it is when no
    negative prompt is given. The sizes are the model's own resolution without a crop: height and width of the original
    image, the crop's top and left, height and width of the result.
    """
    text, _, pooled, _ = pipe.encode_prompt(list(prompts), device=pipe.device, do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:
        empty = torch.tensor([[prompt == ""] for prompt in prompts], device=text.device)
        text, pooled = text.masked_fill(empty[..., None], 0), pooled.masked_fill(empty, 0)
    side = float(resolution(pipe))
    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=text.device)
    return {"text": text, "pooled": pooled, "time_ids": sizes.repeat(len(prompts), 1)}


def has_null(pipe: Any) -> bool:
    """Always."""
    return True


def encode(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the VAE's posterior, shifted and scaled."""
    posterior, config = loading.posterior(pipe.vae, pixels), pipe.vae.config
    mean, scale = posterior.mean, config.scaling_factor
    if config.latents_mean is not None and config.latents_std is not None:  # as the pipeline's own decoding has it
        shift, spread = (
            torch.tensor(values, device=mean.device, dtype=mean.dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        mean, scale = mean - shift, scale / spread
    return mean * scale, posterior.std * scale


def call(net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The UNet's prediction, `[B, C, H, W]`."""
    out: Tensor = net(
        x,
        t,
        encoder_hidden_states=condition["text"],
        added_cond_kwargs={"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]},
        return_dict=False,
    )[0]
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
    """By the stock pipeline, which makes `time_ids` for the size asked for."""
    height, width = size or (resolution(pipe),) * 2
    return pipe(
        prompt_embeds=condition["text"],
        pooled_prompt_embeds=condition["pooled"],
        negative_prompt_embeds=None if null is None else null["text"],
        negative_pooled_prompt_embeds=None if null is None else null["pooled"],
        generator=list(generators),
        num_inference_steps=steps,
        **({} if guidance is None else {"guidance_scale": guidance}),
        height=height,
        width=width,
        output_type="latent" if latents else "pil",
    ).images


def resolution(pipe: Any) -> int:
    """The side that the UNet was trained at, pixels."""
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def example(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros."""
    unet, text = configs["unet"], configs["text_encoder"]
    side = unet["sample_size"]
    return torch.zeros(1, unet["in_channels"], side, side), {
        "text": torch.zeros(1, text.get("max_position_embeddings", 77), unet["cross_attention_dim"]),
        "pooled": torch.zeros(1, configs["text_encoder_2"]["projection_dim"]),
        "time_ids": torch.zeros(1, 6),
    }


def tokenizer(pipe: Any) -> tuple[Any, int]:
    """CLIP's, which both encoders read with, and the tokens that it reads, begin and end included."""
    return pipe.tokenizer, int(pipe.tokenizer.model_max_length)
