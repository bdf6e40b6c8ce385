"""A Lumina Image 2.0 pipeline of the real classes, small enough that a run takes seconds."""

from pathlib import Path
from typing import Any

import micro
import micro_sd3
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_lumina2 import Lumina2Transformer2DModel
from diffusers.pipelines.lumina2.pipeline_lumina2 import Lumina2Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

WIDTH = 16


def tokenizer(folder: Path) -> GemmaTokenizer:
    """BPE: each of `micro.WORDS` after a space is one token, any other word one a letter."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocab = {token: k for k, token in enumerate((*special, "▁", *map(chr, range(33, 127))))}
    merges = []
    for word in micro.WORDS:
        token = "▁"
        for letter in word:
            if (token, letter) not in merges:
                merges.append((token, letter))
            token += letter
            vocab.setdefault(token, len(vocab))
    GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True).save_pretrained(folder)
    found: GemmaTokenizer = GemmaTokenizer.from_pretrained(folder)
    return found


def encoder(vocabulary: int) -> Gemma2Model:
    """Of two layers; the pipeline reads what goes into the last."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Gemma2Model(Gemma2Config(vocab_size=vocabulary, **sizes, **heads))


def transformer(**changes: Any) -> Lumina2Transformer2DModel:
    settings: dict[str, Any] = {
        "sample_size": micro.LATENT,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (300, 32, 32),
        "cap_feat_dim": WIDTH,
    }
    net: Lumina2Transformer2DModel = micro_sd3.enlarge(Lumina2Transformer2DModel(**{**settings, **changes}))
    return net


def pipeline(work: Path, **changes: Any) -> Lumina2Pipeline:
    """Random weights of seed 0; `changes` to the transformer's configuration. The VAE's scale is 8 by the pipeline."""
    words = tokenizer(work / "tokenizer")
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return Lumina2Pipeline(
            transformer=transformer(**changes),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8,) * 4,
                layers_per_block=1,
                norm_num_groups=4,
                sample_size=8 * micro.LATENT,
                scaling_factor=0.6,
                shift_factor=0.3,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=micro_sd3.enlarge(encoder(len(words))),
            tokenizer=words,
        )
