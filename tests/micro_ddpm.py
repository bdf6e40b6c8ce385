"""A class-conditional DDPM, its labelled images and a judge of them, of the real classes and small enough for a run."""

import copy
from pathlib import Path
from typing import Any

import micro
import numpy as np
from PIL import Image

from erase.diffusion import class_conditional, samplers
from erase.diffusion.families import family
from erase.diffusion.model import Model

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
    return class_conditional.new(labels, shape, **{**settings, **changes})


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
    """A judge whose classes differ."""
    return micro.write_classifier(folder, labels, spread=0.5, side=16)


def pipeline(work: Path) -> Any:
    """For the suite of families, whose images are RGB."""
    return model(("cat", "dog", "car"), (3, SIZE, SIZE))


def wrap(pipe: Any) -> Model:
    """The pipeline in use."""
    return Model(family("ddpm"), pipe)


def with_sampler(pipe: Any, name: str | None) -> Any:
    """The same model with another sampler; `None` keeps its own."""
    other = copy.copy(pipe)
    if name is not None:
        other.scheduler = samplers.label_sampler(pipe.scheduler.config, name)
    return other
