"""The networks of Stable Diffusion 1.x and 2.x from their configurations alone: what tensors they need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from erase.diffusion.checkpoints.single_file import Shapes


def shapes(texts: Mapping[str, str]) -> Shapes:
    """Of the tensors that the networks of a folder's configuration have, by part and name.

    Raises:
        ValueError: for a configuration that makes no network.
    """
    try:
        with torch.device("meta"):
            nets = {part: network(part, json.loads(texts[f"{part}/config.json"])) for part in ("unet", "vae")}
            nets["text_encoder"] = CLIPTextModel(text_config(texts))
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"the configuration makes no network: {str(error).strip().splitlines()[0]}") from error
    return {part: {name: t.shape for name, t in net.state_dict().items()} for part, net in nets.items()}


def network(part: str, config: dict[str, Any]) -> nn.Module:
    """The UNet or the VAE of a configuration, with new weights."""
    kind: Any = UNet2DConditionModel if part == "unet" else AutoencoderKL
    net: nn.Module = kind.from_config(config)
    return net


def text_config(texts: Mapping[str, str]) -> CLIPTextConfig:
    """Of the text encoder of a folder's configuration."""
    found: CLIPTextConfig = CLIPTextConfig.from_dict(json.loads(texts["text_encoder/config.json"]))
    return found
