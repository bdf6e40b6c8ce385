"""A Stable Diffusion 3 pipeline of the real classes, with and without T5, small enough that a run takes seconds."""

from pathlib import Path
from typing import Any

import micro
import micro_t5
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

SIZE, LATENT = 16, 8
POOLED = (12, 20)
"""Widths of the two CLIP encoders, together less than T5's."""


def enlarge(net: nn.Module) -> Any:
    """So that text, time and every encoder do something."""
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return net


def vae(**given: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.6,
        shift_factor=0.3,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **{"sample_size": SIZE, **given},
    )


def clip_config(tokenizer: Any, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=micro.MAX_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def transformer(in_channels: int = 4) -> SD3Transformer2DModel:
    """As that of SD 3.5 medium: normed queries and keys, and a second attention of image tokens in the first block."""
    net: SD3Transformer2DModel = enlarge(
        SD3Transformer2DModel(
            sample_size=LATENT,
            in_channels=in_channels,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=micro_t5.WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=sum(POOLED),
            pos_embed_max_size=32,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )
    return net


def pipeline(work: Path, *, t5: bool = True, **scheduler: Any) -> StableDiffusion3Pipeline:
    """Random weights of seed 0."""
    for name in ("tokenizer", "tokenizer_2"):
        micro.write_tokenizer(work / name)
    tokenizers = [CLIPTokenizer.from_pretrained(work / name) for name in ("tokenizer", "tokenizer_2")]
    tokenizer_3 = micro_t5.tokenizer(work / "tokenizer_3") if t5 else None
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        texts = [
            enlarge(CLIPTextModelWithProjection(clip_config(tokenizer, width)))
            for tokenizer, width in zip(tokenizers, POOLED, strict=True)
        ]
        return StableDiffusion3Pipeline(
            transformer=transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            vae=vae(),
            text_encoder=texts[0],
            tokenizer=tokenizers[0],
            text_encoder_2=texts[1],
            tokenizer_2=tokenizers[1],
            text_encoder_3=None if tokenizer_3 is None else enlarge(micro_t5.encoder(len(tokenizer_3))),
            tokenizer_3=tokenizer_3,
        )
