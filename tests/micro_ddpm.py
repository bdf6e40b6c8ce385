"""A class-conditional DDPM, its labelled images and a judge of them, of the real classes and small enough for a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from erase.diffusion import ddpm

SIZE = 8
LABELS = ("ant", "bee", "cow")
ARCHITECTURE = {"channels": [8, 16], "layers": 1, "groups": 4}


def model(labels: tuple[str, ...] = LABELS, shape: tuple[int, int, int] = (1, SIZE, SIZE), **changes: Any) -> Any:
    """A pipeline with new weights of seed 0."""
    settings: dict[str, Any] = {
        **ARCHITECTURE,
        "attention": [],
        "patch": 1,
        "head": 8,
        "prediction": "epsilon",
        "schedule": "squaredcos_cap_v2",
        "guidance": 2.0,
        "seed": 0,
    }
    return ddpm.new(labels, shape, **{**settings, **changes})


def write_images(
    folder: Path, count: int = 8, labels: tuple[str, ...] = LABELS, size: int = SIZE, mode: str = "L", seed: int = 0
) -> Path:
    """A subfolder for each class with grey or coloured noise, as bright as the class's number says."""
    rng = np.random.default_rng(seed)
    shape = (size, size) if mode == "L" else (size, size, 3)
    for number, label in enumerate(labels):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 64, shape, np.uint8) + np.uint8(60 * number)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


def write_classifier(folder: Path, labels: tuple[str, ...] = LABELS) -> Path:
    """A judge of random weights, large enough that the classes differ."""
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
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    net.save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return folder
