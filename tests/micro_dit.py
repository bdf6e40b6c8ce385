"""A DiT of the real classes, small enough that a whole run takes seconds."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import nn

SIZE, LATENT = 16, 8
LABELS = ("tench, Tinca tinca", "crane", "golden retriever", "crane", "corn, maize")
"""Two are called the same, as in ImageNet."""


def pipeline(work: Path, labels: tuple[str, ...] = LABELS, **transformer: object) -> DiTPipeline:
    """Random weights of seed 0; variances are learned."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=SIZE,
            scaling_factor=0.6,
        )
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": LATENT}
        channels = {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": len(labels)}
        net = DiTTransformer2DModel(**{**sizes, **channels, **transformer})
        for p in net.parameters():  # so that class and time do something
            if p.ndim > 1:
                nn.init.normal_(p, std=0.2)
    names = dict(enumerate(labels))
    pipe = DiTPipeline(net, vae, DDIMScheduler(clip_sample=False, set_alpha_to_one=True), names)
    pipe.register_to_config(id2label=names)  # which the pipeline itself does not save
    return pipe
