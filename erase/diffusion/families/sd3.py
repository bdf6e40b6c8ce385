"""Stable Diffusion 3 and 3.5: a transformer that attends jointly to image patches and the text of up to three encoders.

Two CLIP encoders give one row a token, their widths side by side, padded with zeros to the width of T5, whose rows
follow; their pooled outputs are a second condition. A checkpoint may come without T5 (`text_encoder_3` null in
`model_index.json`). The stock pipeline then gives `T5_TOKENS` rows of zeros. Here one row counts for all of them: equal
rows stay equal from block to block, and attention to N of them is attention to one whose logit is larger by ln N. The
embedded model attends to 41 rows, image and text, instead of 296.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor, nn

from erase.diffusion import loading
from erase.diffusion.checkpoints import mmdit
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.condition import Condition
from erase.diffusion.lora import keys
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.process import Flow, flow

NAME = "Stable Diffusion 3"
CONDITION: Literal["text", "label"] = "text"
TRAINED = "transformer"
PARTS: tuple[str, ...] = (
    *("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
)
ENCODERS: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
# There is no cross-attention: `xattn` is what projects text tokens into the joint attention, and `kv` the part that
# image tokens read. Left out are `to_add_out`, which writes what text tokens read (from the image too) back into the
# text stream, is absent from the last block, and has no counterpart among keys and values; and the norms of queries
# and keys. `attn2` of SD 3.5 medium is a second attention of image tokens among themselves, and reads no text.
PARAMETERS: Mapping[str, str] = {
    "full": r".*",
    "xattn": r"\.attn\.add_[qkv]_proj\.",
    "kv": r"\.attn\.add_[kv]_proj\.",
    "noxattn": r"^(?!.*\.attn\.add_[qkv]_proj\.)",
}
# The blocks read a text stream that changes from block to block; one matrix alone reads the embeddings themselves.
# The pooled embeddings go another way, through `time_text_embed`.
TEXT_KV: str | None = r"^context_embedder\.weight$"
LORA: LoraLayout | None = keys.SD3
CFG = True
STRIDE = 16
SINGLE_FILE = mmdit.SD3
T5_TOKENS = 256
"""The rows of T5 that the stock pipeline gives to the network; no configuration names another number."""


def open(
    source: Source | SingleFile,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    hollow: Collection[str] = (),
) -> Any:
    """The whole pipeline."""
    pipe = loading.open_pipeline(source, StableDiffusion3Pipeline, TRAINED, device, dtype, hollow)
    check(pipe, source.place)
    return pipe


def check(pipe: Any, where: object) -> None:
    """Refuse networks that take something else than this family's, and say `where` they are.

    Raises:
        ValueError: for these.
    """
    channels, latent = pipe.transformer.config.in_channels, pipe.vae.config.latent_channels
    if channels != latent:
        raise ValueError(
            f"{where} has a transformer of {channels} input channels for {latent} latent channels: inpainting, "
            "editing and control models are not supported"
        )


def process(pipe: Any) -> Flow:
    """The flow that the transformer was trained on, shifted as the scheduler says."""
    config = pipe.transformer.config
    return flow(pipe.scheduler.config, (config.sample_size // config.patch_size) ** 2)


def embed(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`text` `[P, T, D]` and `pooled` `[P, D']`; every encoder reads the whole prompt."""
    rows = 1 if pipe.text_encoder_3 is None else T5_TOKENS
    text, _, pooled, _ = pipe.encode_prompt(
        list(prompts), None, None, pipe.device, do_classifier_free_guidance=False, max_sequence_length=rows
    )
    return {"text": text, "pooled": pooled}


def has_null(pipe: Any) -> bool:
    """Always."""
    return True


def encode(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the VAE's posterior, shifted and scaled."""
    return loading.latents(pipe.vae, pixels)


def call(net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The transformer's velocity, `[B, C, H, W]`."""
    text, told = _rows(net, condition["text"])
    out: Tensor = net(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=text,
        pooled_projections=condition["pooled"],
        joint_attention_kwargs=told,
        return_dict=False,
    )[0]
    return out


class CountedAttention(JointAttnProcessor2_0):
    """Joint attention in which the last row of the text counts for `count` equal ones; for one, diffusers' own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        count: int = 1,
    ) -> Any:
        """Of image tokens `[B, N, D]` and text tokens `[B, T, D]`; both again, attended to and projected."""
        if count == 1 or encoder_hidden_states is None:
            stock: Any = super().__call__
            return stock(attn, hidden_states, encoder_hidden_states, attention_mask)

        def heads(x: Tensor, text: Tensor, norm: nn.Module | None, text_norm: nn.Module | None) -> Tensor:
            """`[B, heads, N + T, D / heads]`."""
            each = ((x, norm), (text, text_norm))
            split = [(y.view(*y.shape[:2], attn.heads, -1).transpose(1, 2), normed) for y, normed in each]
            return torch.cat([y if normed is None else normed(y) for y, normed in split], 2)

        images, text = hidden_states, encoder_hidden_states
        query = heads(attn.to_q(images), attn.add_q_proj(text), attn.norm_q, attn.norm_added_q)
        key = heads(attn.to_k(images), attn.add_k_proj(text), attn.norm_k, attn.norm_added_k)
        value = heads(attn.to_v(images), attn.add_v_proj(text), None, None)
        bias = F.pad(query.new_full((1, 1, 1, 1), math.log(count)), (key.shape[2] - 1, 0))
        found = F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2).to(query.dtype)
        images, text = found[:, : images.shape[1]], found[:, images.shape[1] :]
        out = attn.to_out[1](attn.to_out[0](images))
        return out, text if attn.context_pre_only else attn.to_add_out(text)


def _rows(net: nn.Module, text: Tensor) -> tuple[Tensor, dict[str, Any] | None]:
    """What the network is given for `text` `[B, T, D]`, and what its attention is told.

    If there are fewer rows than T5 alone would give, the last one counts for T5's: `CountedAttention` takes the place
    of diffusers' own and is told so. If any attention is of another kind, the row is repeated.
    """
    if text.shape[1] >= T5_TOKENS:
        return text, None
    found: list[Any] = [module for module in net.modules() if isinstance(module, Attention)]  # it may be wrapped
    if any(type(attn.processor) not in (JointAttnProcessor2_0, CountedAttention) for attn in found):
        return torch.cat([text[:, :-1], text[:, -1:].expand(-1, T5_TOKENS, -1)], 1), None
    new: Any = CountedAttention  # whose base has no annotations
    for attn in found:
        if type(attn.processor) is not CountedAttention:
            attn.set_processor(new())
    return text, {"count": T5_TOKENS}


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
    text, told = _rows(pipe.transformer, condition["text"])
    return pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=condition["pooled"],
        negative_prompt_embeds=None if null is None else _rows(pipe.transformer, null["text"])[0],
        negative_pooled_prompt_embeds=None if null is None else null["pooled"],
        generator=list(generators),
        num_inference_steps=steps,
        height=height,
        width=width,
        joint_attention_kwargs=told,
        output_type="latent" if latents else "pil",
        **({} if guidance is None else {"guidance_scale": guidance}),
    ).images


def resolution(pipe: Any) -> int:
    """The side that the transformer was trained at, pixels."""
    return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)


def example(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros."""
    net = configs["transformer"]
    side, rows = net["sample_size"], T5_TOKENS if "text_encoder_3" in configs else 1
    tokens = configs["text_encoder"].get("max_position_embeddings", 77) + rows
    return torch.zeros(1, net["in_channels"], side, side), {
        "text": torch.zeros(1, tokens, net["joint_attention_dim"]),
        "pooled": torch.zeros(1, net["pooled_projection_dim"]),
    }


def tokenizer(pipe: Any) -> tuple[Any, int]:
    """T5's where the pipeline has it, or CLIP's; and the tokens that it reads, special ones included."""
    return readers(pipe)[-1]


def readers(pipe: Any) -> list[tuple[Any, int]]:
    """The tokenizers whose tokens are the rows of `text`, in order, and the rows of each; not T5's rows of zeros."""
    clip = (pipe.tokenizer, int(pipe.tokenizer.model_max_length))
    return [clip] if pipe.text_encoder_3 is None else [clip, (pipe.tokenizer_3, T5_TOKENS)]
