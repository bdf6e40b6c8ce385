"""PixArt-Σ and PixArt-α pipelines of the real classes with random weights."""

from pathlib import Path
from typing import Any

import micro
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 12


def tokenizer(folder: Path, **given: Any) -> T5Tokenizer:
    """Unigrams: each of `micro.WORDS` is one token, any other word one a letter; as read from a folder."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -1.0) for word in micro.WORDS]
    letters = [("▁", -3.0), *((letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0, **given).save_pretrained(folder)
    found: T5Tokenizer = T5Tokenizer.from_pretrained(folder)
    return found


def encoder(vocabulary: int, width: int = WIDTH) -> T5EncoderModel:
    """With new weights."""
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes))


def transformer(**changes: Any) -> PixArtTransformer2DModel:
    """Predicts a variance too."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_size": micro.LATENT,
        "patch_size": 2,
        "caption_channels": WIDTH,
    }
    return PixArtTransformer2DModel(**{**settings, **changes})


def pipeline(work: Path, kind: Any = PixArtSigmaPipeline, **changes: Any) -> Any:
    """Random weights of seed 0; `changes` to the transformer's configuration."""
    words = tokenizer(work / "tokenizer")
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        text, net = encoder(len(words)), transformer(**changes)
        for network in (text, net):  # so that text and time do something
            for p in network.parameters():
                if p.ndim > 1:
                    nn.init.normal_(p, std=0.2)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=micro.SIZE,
            mid_block_add_attention=False,  # of PixArt-α's 128 × 128 latents it takes seconds
            scaling_factor=0.6,
        )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return kind(tokenizer=words, text_encoder=text, vae=vae, transformer=net, scheduler=scheduler)


def alpha(work: Path) -> Any:
    """PixArt-α, which is told an image's size where latents are 128 wide."""
    return pipeline(work, PixArtAlphaPipeline, sample_size=128, patch_size=16, use_additional_conditions=True)
