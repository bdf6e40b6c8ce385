"""The emoji world's networks, of the real classes: VAE, text encoders, UNet, transformer, judge and zero-shot judge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from emoji_world import BACKGROUNDS, SIZE, STYLES, World, all_captions
from torch import Tensor, nn

MAX_TOKENS = 24
LATENT, CHANNELS = SIZE // 4, 8
WIDTHS = (96, 64)
"""Of the text encoders: of `emoji-sd` and the first of `emoji-sd3`, and of the second of the latter; fewer than there
are concepts, so that no linear edit of the text side is exact."""
VISION = 128
SHOWN = 96
"""Pixels that the judge sees, of `SIZE`: the stem of a `transformers` ResNet shrinks by four, and one of two objects is
14 pixels wide."""


def write_tokenizer(folder: Path, captions: Sequence[str]) -> Any:
    """A CLIP tokenizer (byte-level BPE, lower case) whose merges make one token of each word of the captions."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import CLIPTokenizer

    # As CLIP's own: words of letters, and digits one at a time.
    words_of = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    merges: dict[tuple[str, str], int] = {}
    for word in sorted({word for text in captions for word, _ in words_of.pre_tokenize_str(text)}):
        while len(parts := pieces(word, merges)) > 1:  # a later merge leaves words as they are that are whole
            merges[parts[0], parts[1]] = len(merges)
            vocab.setdefault(parts[0] + parts[1], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8"
    )
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def pieces(word: str, merges: Mapping[tuple[str, str], int]) -> list[str]:
    """What byte-level BPE makes of a word: of the pairs side by side, the merge of the lowest rank is next."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        ranks = [merges.get(pair, len(merges)) for pair in pairwise(parts)]
        at = ranks.index(min(ranks))
        if ranks[at] == len(merges):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def tokenizer_of(work: Path, world: World) -> Any:
    """The world's tokenizer, written on first use."""
    from transformers import CLIPTokenizer

    folder = work / "tokenizer"
    if (folder / "tokenizer_config.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    return write_tokenizer(folder, all_captions(world))


def new_vae() -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def text_config(tokenizer: Any, width: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32 if width % 32 == 0 else 4,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": width,
        "hidden_act": "quick_gelu",
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }


def new_texts(tokenizer: Any) -> tuple[nn.Module, nn.Module]:
    """The generators' text encoders, causal and pooled at the first end of text as CLIP's are."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    first, second = (
        CLIPTextModelWithProjection(CLIPTextConfig(**text_config(tokenizer, width, layers)))
        for width, layers in zip(WIDTHS, (3, 2), strict=True)
    )
    return first, second


def without_projection(text: Any) -> nn.Module:
    """The first text encoder as Stable Diffusion has it."""
    from transformers import CLIPTextModel

    plain = CLIPTextModel(text.config)
    weights = {name: value for name, value in text.state_dict().items() if name != "text_projection.weight"}
    missing, odd = plain.load_state_dict(weights, strict=False)
    if missing:  # the two classes may name the same weights with and without a prefix
        weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
        missing, odd = plain.load_state_dict(weights, strict=False)
    assert not missing, missing
    assert not odd, odd
    return plain.eval()


def new_clip(tokenizer: Any) -> nn.Module:
    """The zero-shot judge, with a text encoder of its own."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "image_size": SIZE,
        "patch_size": 4,
        "hidden_size": VISION,
        "intermediate_size": 4 * VISION,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    text = text_config(tokenizer, WIDTHS[0], 2)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTHS[0]))


def labels_of(world: World) -> list[str]:
    """The judge's: objects, of which an image may show any number, styles and backgrounds."""
    axes = (("object", world.names), ("style", STYLES), ("background", BACKGROUNDS))
    return [f"{axis}={value}" for axis, values in axes for value in values]


def new_judge(world: World) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    names = labels_of(world)
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[2, 2, 2, 1],
        layer_type="basic",
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    config.several_axes = ["object"]
    return ResNetForImageClassification(config)


def new_unet() -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 160),
        layers_per_block=1,
        cross_attention_dim=WIDTHS[0],
        attention_head_dim=4,
        norm_num_groups=32,
    )


def new_transformer() -> nn.Module:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=sum(WIDTHS),
        caption_projection_dim=192,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=LATENT // 2,
        qk_norm="rms_norm",
    )


def scheduler_config() -> dict[str, Any]:
    """Of the UNet."""
    return {
        "prediction_type": "v_prediction",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def tokens(tokenizer: Any, captions: Sequence[str]) -> Any:
    """Ids and mask `[B, MAX_TOKENS]`, padded with ends of text."""
    return tokenizer(list(captions), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")


def two_rows(first: Any, second: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Text `[B, T + 1, D]` and pooled `[B, D]` as `erase.diffusion.families.sd3` makes them without T5.

    It takes the last but one layer's rows of both encoders, side by side, then a row of zeros for those of T5.
    """
    outs = [encoder(ids, output_hidden_states=True) for encoder in (first, second)]
    rows = torch.cat([out.hidden_states[-2] for out in outs], -1)
    return F.pad(rows, (0, 0, 0, 1)), torch.cat([out.text_embeds for out in outs], -1)


def processor(kind: str, side: int) -> dict[str, Any]:
    """`preprocessor_config.json` of the judge (`ConvNext`) or the zero-shot judge (`CLIP`): bilinear, to [-1, 1]."""
    shared = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return {**shared, "do_center_crop": False, "do_convert_rgb": True} if kind == "CLIP" else shared
