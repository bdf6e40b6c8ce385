"""Configurations of released models: what is known of a pipeline where a single file of others holds tensors alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from erase.diffusion.checkpoints.layout import Prediction

WIDTH = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
"""Tensors whose shapes tell the version: key weights of the first cross-attention, the first convolution."""

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_UNET_CONFIG = {  # diffusers' defaults among them: its own reader of single files looks for them here
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
}
UNET_XL = {
    **_UNET_CONFIG,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
_CLIP = {
    **_TEXT_CONFIG,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_BIGG = {
    **_TEXT_CONFIG,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "do_lower_case": True,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}


def released(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], prediction: Prediction | None
) -> dict[str, str]:
    """The configuration of the released model that has such tensors.

    Raises:
        ValueError: for tensors of no Stable Diffusion 1.x or 2.x, or a 2.x model of which it is not known what it
            predicts.
    """
    missing = [name for name in (WIDTH, FIRST) if name not in tensors]
    if missing:
        raise ValueError(f"{path} is not a complete Stable Diffusion checkpoint: it lacks {missing[0]}: get it again")
    width, channels = tensors[WIDTH].shape[-1], tensors[FIRST].shape[1]
    if width not in (768, 1024):
        raise ValueError(
            f"{path}: its cross-attention is {width} wide; 1.x has 768 and 2.x has 1024: name another file"
        )
    if channels != 4:
        raise ValueError(
            f"{path} has a UNet of {channels} input channels: inpainting and depth models are not supported; "
            "name the base model"
        )
    predicts = prediction or _told(header) or ("epsilon" if width == 768 else None)
    if predicts is None:
        raise ValueError(
            f"{path} is of Stable Diffusion 2.x and does not say what it predicts: make it a folder with erase convert "
            "--prediction epsilon (512 pixels, -base) or --prediction v_prediction (768 pixels)"
        )
    unet: dict[str, Any] = {**_UNET_CONFIG, "cross_attention_dim": width}
    unet |= {"sample_size": 96 if predicts == "v_prediction" and width == 1024 else 64, "attention_head_dim": 8}
    text: dict[str, Any] = _CLIP
    scheduler: dict[str, Any] = {**_SCHEDULE, "prediction_type": predicts}
    if width == 768:
        kind, pad = "PNDMScheduler", "<|endoftext|>"
        scheduler |= {"skip_prk_steps": True}
    else:
        unet |= {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True, "upcast_attention": True}
        text = {**_TEXT_CONFIG, "hidden_size": width, "intermediate_size": 4 * width}
        text |= {"num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512}
        kind, pad = "DDIMScheduler", "!"
        scheduler |= {"clip_sample": False}
    configs = {
        "model_index.json": {**_INDEX, "scheduler": ["diffusers", kind]},
        "unet/config.json": unet,
        "vae/config.json": {**_VAE_CONFIG, "sample_size": 8 * unet["sample_size"]},
        "text_encoder/config.json": text,
        "scheduler/scheduler_config.json": {"_class_name": kind, **scheduler},
        "tokenizer/tokenizer_config.json": {**_TOKENIZER, "pad_token": pad},
    }
    return written(configs)


def released_xl(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], prediction: Prediction | None
) -> dict[str, str]:
    """The configuration of Stable Diffusion XL's base.

    Some files of others say by empty tensors that they predict the velocity, and with a terminal SNR of zero.

    Raises:
        ValueError: for tensors of an inpainting model.
    """
    channels = tensors[FIRST].shape[1] if FIRST in tensors else 4
    if channels != 4:
        raise ValueError(
            f"{path} has a UNet of {channels} input channels: inpainting models are not supported; name the base model"
        )
    predicts = prediction or _told(header) or ("v_prediction" if "v_pred" in tensors else "epsilon")
    scheduler: dict[str, Any] = {"_class_name": "EulerDiscreteScheduler", **_SCHEDULE, "prediction_type": predicts}
    scheduler |= {"timestep_spacing": "leading", "interpolation_type": "linear", "use_karras_sigmas": False}
    if "ztsnr" in tensors:
        scheduler |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    second = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    index = {name: value for name, value in _INDEX.items() if "safety_checker" not in name}
    return written(
        {
            "model_index.json": {
                **index,
                **second,
                "_class_name": "StableDiffusionXLPipeline",
                "force_zeros_for_empty_prompt": True,
            },
            "unet/config.json": UNET_XL,
            "vae/config.json": {**_VAE_CONFIG, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            "text_encoder/config.json": _CLIP,
            "text_encoder_2/config.json": _BIGG,
            "scheduler/scheduler_config.json": scheduler,
            "tokenizer/tokenizer_config.json": {**_TOKENIZER, "pad_token": "<|endoftext|>"},
            "tokenizer_2/tokenizer_config.json": {**_TOKENIZER, "pad_token": "!"},
        }
    )


def rest_of_sd3(t5: bool) -> dict[str, Any]:
    """The configurations of Stable Diffusion 3 and 3.5 but for the transformer's, and T5's own.

    Args:
        t5: whether there is one.
    """
    clip, projected = ["transformers", "CLIPTokenizer"], ["transformers", "CLIPTextModelWithProjection"]
    return {
        "model_index.json": {
            "_class_name": "StableDiffusion3Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": projected,
            "text_encoder_2": projected,
            "text_encoder_3": ["transformers", "T5EncoderModel"] if t5 else [None, None],
            "tokenizer": clip,
            "tokenizer_2": clip,
            "tokenizer_3": ["transformers", "T5TokenizerFast"] if t5 else [None, None],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "vae/config.json": {
            **_VAE_CONFIG,
            "sample_size": 1024,
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "force_upcast": True,
        },
        "text_encoder/config.json": {**_CLIP, "architectures": ["CLIPTextModelWithProjection"]},
        "text_encoder_2/config.json": _BIGG,
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
        "tokenizer/tokenizer_config.json": {**_TOKENIZER, "pad_token": "<|endoftext|>"},
        "tokenizer_2/tokenizer_config.json": {**_TOKENIZER, "pad_token": "!"},
    }


def _told(header: Mapping[str, str]) -> Prediction | None:
    """What the header of a file of others says that the model predicts."""
    known: dict[str, Prediction] = {"epsilon": "epsilon", "v": "v_prediction"}
    return known.get(header.get("modelspec.prediction_type", ""))


def written(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Configurations as texts, by path in the folder."""
    return {name: json.dumps(config, indent=2) + "\n" for name, config in configs.items()}
