"""Classifiers of the real classes, small enough that a whole run takes a second."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from erase.classification import models
from erase.classification.models import Model
from erase.engine.backend import drawn_from

LABELS = ("ant", "bee", "cow")
SIZE = 8
RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "stem": {"kernel": 3, "stride": 1},
}
VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
}
SWIN = {"model_type": "swin", "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2}
CONVNEXT = {"model_type": "convnext", "depths": [1, 1], "hidden_sizes": [4, 8], "num_stages": 2, "patch_size": 2}


def model(architecture: dict[str, Any] = RESNET, labels: tuple[str, ...] = LABELS, seed: int = 0) -> Model:
    return models.new(architecture, labels, (1, SIZE, SIZE), seed)


def batch(size: int = 6, seed: int = 0, side: int = SIZE) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size, 1, side, side), generator=g, dtype=torch.uint8)
    return {"x": pixels, "y": torch.arange(size) % len(LABELS)}


FOREIGN: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "resnet": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3),
        ConvNextImageProcessorPil,
        {"size": {"shortest_edge": 16}},
    ),
    "vit": (
        ViTConfig(**{k: v for k, v in VIT.items() if k != "model_type"}, image_size=16, num_labels=3),
        ViTImageProcessorPil,
        {"size": {"height": 16, "width": 16}},
    ),
    "swin": (
        SwinConfig(**{k: v for k, v in SWIN.items() if k != "model_type"}, image_size=16, num_labels=3),
        ViTImageProcessorPil,
        {"size": {"height": 16, "width": 16}},
    ),
    "convnext": (
        ConvNextConfig(**{k: v for k, v in CONVNEXT.items() if k != "model_type"}, num_labels=3),
        ConvNextImageProcessorPil,
        {"size": {"shortest_edge": 16}, "crop_pct": 0.8},
    ),
}
"""Configurations and processors of `transformers`, for networks of three channels."""


def write_foreign(kind: str, folder: Path) -> Path:
    """A folder that `transformers` alone writes."""
    config, processor, settings = FOREIGN[kind]
    with drawn_from(0):
        AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    processor(**settings).save_pretrained(folder)
    return folder
