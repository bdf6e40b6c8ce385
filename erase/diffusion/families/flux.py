"""Flux.1 dev and schnell: a transformer that attends jointly to packed latents and T5's text.

Latents `[B, C, H, W]` are packed into tokens of 2 × 2 pixels, `[B, H W / 4, 4 C]`, in `call` alone. CLIP's pooled
output is a second condition. Guidance is distilled: dev is told a scale, and the empty prompt, which has no part in
generation, is there for training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from erase.diffusion import loading
from erase.diffusion.checkpoints import mmdit
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.condition import Condition
from erase.diffusion.lora import keys
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.process import Flow, flow

NAME = "Flux.1"
CONDITION: Literal["text", "label"] = "text"
TRAINED = "transformer"
PARTS: tuple[str, ...] = (
    *("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
)
ENCODERS: tuple[str, ...] = ("text_encoder", "text_encoder_2")
# There is no cross-attention: `xattn` is what projects text tokens into the joint attention of the double blocks, and
# `kv` the part that image tokens read; why not `to_add_out` and norms, see `sd3`. The single blocks hold text and image
# tokens in one stream with the same weights, which cannot be told apart: they are in `noxattn`.
PARAMETERS: Mapping[str, str] = {
    "full": r".*",
    "xattn": r"\.attn\.add_[qkv]_proj\.",
    "kv": r"\.attn\.add_[kv]_proj\.",
    "noxattn": r"^(?!.*\.attn\.add_[qkv]_proj\.)",
}
# One matrix alone reads T5's embeddings themselves; CLIP's pooled one goes another way, through `time_text_embed`.
TEXT_KV: str | None = r"^context_embedder\.weight$"
LORA: LoraLayout | None = keys.FLUX
CFG = False
STRIDE = 16
SINGLE_FILE = mmdit.FLUX
GUIDANCE = 1.0
"""The scale that dev is told in training and when predictions are compared: the distilled model without guidance."""


def open(
    source: Source | SingleFile,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    hollow: Collection[str] = (),
) -> Any:
    """The whole pipeline."""
    pipe = loading.open_pipeline(source, FluxPipeline, TRAINED, device, dtype, hollow)
    check(pipe, source.place)
    return pipe


def check(pipe: Any, where: object) -> None:
    """Refuse networks that take something else than this family's, and say `where` they are.

    Raises:
        ValueError: for these.
    """
    channels, latent = pipe.transformer.config.in_channels, pipe.vae.config.latent_channels
    if channels != 4 * latent:
        raise ValueError(
            f"{where} has a transformer of {channels} input channels for {latent} latent channels, which are "
            f"{4 * latent} when packed: fill, depth, canny and control models are not supported"
        )
    _pipe_side(pipe)


def process(pipe: Any) -> Flow:
    """The flow, shifted as the scheduler says for images of the model's resolution."""
    return flow(pipe.scheduler.config, (_pipe_side(pipe) // 2) ** 2)


def embed(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`text` `[P, T, D]` of T5, `pooled` `[P, D']` of CLIP, and `guidance` `[P]` where the network is told it."""
    config = pipe.transformer.config
    text, pooled, _ = pipe.encode_prompt(list(prompts), None, pipe.device, max_sequence_length=_tokens(config))
    told = {"guidance": torch.full([len(text)], GUIDANCE, device=text.device)} if config.guidance_embeds else {}
    return {"text": text, "pooled": pooled, **told}


def has_null(pipe: Any) -> bool:
    """Always: the teacher was trained with the empty prompt."""
    return True


def encode(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the VAE's posterior, shifted and scaled."""
    return loading.latents(pipe.vae, pixels)


def call(net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The transformer's velocity, `[B, C, H, W]`."""
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    places = torch.zeros(rows, columns, 3, device=x.device)
    places[..., 1] = torch.arange(rows, device=x.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x.device)
    out: Tensor = net(
        hidden_states=F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
        timestep=t / 1000,
        guidance=condition.get("guidance"),
        pooled_projections=condition["pooled"],
        encoder_hidden_states=condition["text"],
        txt_ids=places.new_zeros(condition["text"].shape[1], 3),
        img_ids=places.flatten(0, 1),
        return_dict=False,
    )[0]
    return _unpack(out, rows, columns)


def _unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens `[B, rows columns, 4 C]` as latents `[B, C, 2 rows, 2 columns]`."""
    return F.pixel_shuffle(packed.transpose(1, 2).reshape(len(packed), -1, rows, columns), 2)


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
    """By the stock pipeline; `guidance` is told to the network, schnell ignores it, and `null` has no part."""
    height, width = size or (resolution(pipe),) * 2
    found = pipe(
        prompt_embeds=condition["text"],
        pooled_prompt_embeds=condition["pooled"],
        generator=list(generators),
        num_inference_steps=steps,
        height=height,
        width=width,
        output_type="latent" if latents else "pil",
        **({} if guidance is None else {"guidance_scale": guidance}),
    ).images
    stride = 2 * pipe.vae_scale_factor
    return _unpack(found, height // stride, width // stride) if latents else found


def resolution(pipe: Any) -> int:
    """The side that the VAE names, pixels: 1024 of published checkpoints; the transformer takes any."""
    return int(_pipe_side(pipe) * pipe.vae_scale_factor)


def _pipe_side(pipe: Any) -> int:
    """Side of a latent at the model's resolution; the pipeline remembers it when its VAE is freed."""
    if pipe.vae is not None:
        pipe.default_sample_size = _side(pipe.vae.config)
    return int(pipe.default_sample_size)


def _side(vae: Mapping[str, Any]) -> int:
    """Side of a latent at the model's resolution, by the VAE's configuration."""
    # diffusers fills in 32 pixels where the file names none
    named = "sample_size" in vae and "sample_size" not in vae.get("_use_default_values", ())
    side = int(vae["sample_size"]) if named else 1024
    return side // int(2 ** (len(vae["block_out_channels"]) - 1))


def _tokens(transformer: Mapping[str, Any]) -> int:
    """T5's tokens: 512 of dev, 256 of schnell, which is distilled in steps and is not told its guidance."""
    return 512 if transformer["guidance_embeds"] else 256


def example(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros."""
    net, side = configs["transformer"], _side(configs["vae"])
    condition = {
        "text": torch.zeros(1, _tokens(net), net["joint_attention_dim"]),
        "pooled": torch.zeros(1, net["pooled_projection_dim"]),
    }
    told = {"guidance": torch.full([1], GUIDANCE)} if net["guidance_embeds"] else {}
    return torch.zeros(1, net["in_channels"] // 4, side, side), condition | told


def tokenizer(pipe: Any) -> tuple[Any, int]:
    """T5's, and the tokens that it reads, the end included."""
    return pipe.tokenizer_2, _tokens(pipe.transformer.config)
