"""A Flux.1 pipeline of the real classes, dev or schnell, small enough that a run takes seconds."""

from pathlib import Path
from typing import Any

import micro
import micro_sd3
import micro_t5
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModel, CLIPTokenizer

POOLED = 12


def transformer(*, guidance: bool = True, in_channels: int = 16) -> FluxTransformer2DModel:
    net: FluxTransformer2DModel = micro_sd3.enlarge(
        FluxTransformer2DModel(
            in_channels=in_channels,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=micro_t5.WIDTH,
            pooled_projection_dim=POOLED,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
    )
    return net


def pipeline(work: Path, *, schnell: bool = False) -> FluxPipeline:
    """Random weights of seed 0."""
    micro.write_tokenizer(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    tokenizer_2 = micro_t5.tokenizer(work / "tokenizer_2")
    shift = {"shift": 1.0} if schnell else {"shift": 3.0, "use_dynamic_shifting": True}
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**shift),
            vae=micro_sd3.vae(),
            text_encoder=micro_sd3.enlarge(CLIPTextModel(micro_sd3.clip_config(tokenizer, POOLED))),
            tokenizer=tokenizer,
            text_encoder_2=micro_sd3.enlarge(micro_t5.encoder(len(tokenizer_2))),
            tokenizer_2=tokenizer_2,
            transformer=transformer(guidance=not schnell),
        )


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """`[B, N, 4 C]` of a square image as `[B, C, H, W]`, by the pipeline's own function."""
    side = 2 * int(packed.shape[1] ** 0.5)
    found: torch.Tensor = FluxPipeline._unpack_latents(packed, side, side, vae_scale_factor=1)
    return found


def clock(told: Any) -> torch.Tensor:
    """1000 σ, from the σ that the network is given."""
    return 1000 * torch.as_tensor(told).double()
