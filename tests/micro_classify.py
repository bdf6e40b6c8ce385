"""Classifiers of the real classes, small enough that a whole run takes a second."""

from typing import Any

import torch
from torch import Tensor

from erase.classification import models
from erase.classification.models import Model

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
