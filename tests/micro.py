"""A Stable Diffusion pipeline and a classifier of the real classes, small enough that a whole run takes seconds."""

import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
)

from erase.diffusion.families import family
from erase.diffusion.model import Model

SIZE, LATENT, MAX_TOKENS, WIDTH = 16, 8, 16, 16
WORDS = ("a", "photo", "of", "cat", "dog", "car", "boat", "sepia")
LABELS = ("cat/plain", "dog/plain", "car/plain", "boat/plain")


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE: each of `WORDS` is one token, any other word one a letter."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (pair := (parts[0], parts[1])) not in merges:
                merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
            parts = ["".join(pair), *parts[2:]]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    end = "<|endoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
    config |= {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def unet(in_channels: int = 4) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=in_channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


def pipeline(work: Path, **scheduler: object) -> StableDiffusionPipeline:
    """Random weights of seed 0."""
    write_tokenizer(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
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
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS,
                projection_dim=WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        net = unet()
        for p in net.parameters():  # so that text and time do something
            if p.ndim > 1:
                nn.init.normal_(p, std=0.2)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=net,
        scheduler=DDIMScheduler(**{**betas, "set_alpha_to_one": False, "steps_offset": 1, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_classifier(
    folder: Path, labels: tuple[str, ...] = LABELS, *, spread: float | None = None, side: int = SIZE
) -> Path:
    """A judge of random weights; with a spread they are large enough that the classes differ."""
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4],
        depths=[1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: k for k, label in enumerate(labels)},
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        net = ResNetForImageClassification(config)
        for weight in net.parameters() if spread is not None else ():
            nn.init.normal_(weight, std=spread)
    net.save_pretrained(folder)
    size = {"height": side, "width": side}
    settings = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return folder


def write_clip(folder: Path, *, siglip: bool = False) -> Path:
    """A CLIP or SigLIP model of random weights that reads `MAX_TOKENS` tokens and images of `SIZE` pixels."""
    write_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": SIZE, "patch_size": 8}
    towers = {"text_config": {**sizes, **text}, "vision_config": {**sizes, **vision}}
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        net = SiglipModel(SiglipConfig(**towers)) if siglip else CLIPModel(CLIPConfig(**towers, projection_dim=WIDTH))
        for p in net.parameters():  # so that words and pixels do something
            if p.ndim > 1:
                nn.init.normal_(p, std=0.3)
    net.save_pretrained(folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIZE}}
    settings |= {"do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return folder


def model(pipe: StableDiffusionPipeline) -> Model:
    """The pipeline in use."""
    return Model(family("sd"), pipe)
