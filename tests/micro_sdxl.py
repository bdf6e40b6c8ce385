"""A Stable Diffusion XL pipeline of the real classes with random weights."""

import json
from pathlib import Path
from typing import Any

import micro
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTHS, POOLED, SIZE_WIDTH = (8, 16), 12, 4


def unet(**changes: Any) -> UNet2DConditionModel:
    """Told a pooled prompt of `POOLED` numbers and six sizes of `SIZE_WIDTH` each."""
    settings: dict[str, Any] = {
        "sample_size": micro.LATENT,
        "in_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": sum(WIDTHS),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": POOLED + 6 * SIZE_WIDTH,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def pipeline(
    work: Path, *, net: dict[str, Any] | None = None, vae: dict[str, Any] | None = None, **given: Any
) -> StableDiffusionXLPipeline:
    """Random weights of seed 0; `net` and `vae` change those networks' configurations, `given` the pipeline's."""
    tokenizers = []
    for name in ("tokenizer", "tokenizer_2"):
        micro.write_tokenizer(work / name)
        if name == "tokenizer_2":  # the second encoder pads with another token
            file = work / name / "tokenizer_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "!"}))
        tokenizers.append(CLIPTokenizer.from_pretrained(work / name))
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        encoders = []
        for kind, width, tokenizer in zip(
            (CLIPTextModel, CLIPTextModelWithProjection), WIDTHS, tokenizers, strict=True
        ):
            config = CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=micro.MAX_TOKENS,
                projection_dim=POOLED,
                hidden_act="gelu" if kind is CLIPTextModelWithProjection else "quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            encoders.append(kind(config))
        networks = [*encoders, unet(**(net or {}))]
        for network in networks:  # so that text, sizes and time do something
            for p in network.parameters():
                if p.ndim > 1:
                    nn.init.normal_(p, std=0.2)
        settings: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": micro.SIZE,
            "scaling_factor": 0.6,
            "force_upcast": True,
            "latents_mean": (0.1, -0.2, 0.3, 0.0),
            "latents_std": (1.0, 2.0, 0.5, 1.5),
        }
        decoder = AutoencoderKL(**{**settings, **(vae or {})})
    return StableDiffusionXLPipeline(
        vae=decoder,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=networks[-1],
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
        **given,
    )
