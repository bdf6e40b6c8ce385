"""Image classifiers of transformers forget images, or classes whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erase.api.history import past
from erase.api.learning import learn, no_launch_left
from erase.api.networks import ASKED
from erase.api.result import About, Result, base_name, finish
from erase.api.settings import Call, choose
from erase.classification.backend import RELABEL, Classifier
from erase.engine.backend import device_of
from erase.engine.borrow import borrow
from erase.engine.losses import ASCENT, DESCENT
from erase.evaluation.classifiers import load_processor
from erase.evaluation.image_files import list_images, read_image
from erase.programs.progress import listening
from erase.programs.run import Lesson
from erase.store.class_names import class_number

Labelled = str | Path | Sequence[Any]
"""A folder with a subfolder for each class, pairs of an image and its label, or rows with `image` and `label`."""


@dataclass(frozen=True)
class LabelledSet:
    """Images in memory or in files, as the network takes them when they are asked for."""

    images: list[Any]
    labels: Tensor
    """`[N]`, long."""
    prepare: Callable[[list[Any]], Tensor]
    """Images to `[B, C, H, W]`."""

    def __len__(self) -> int:
        """N."""
        return len(self.images)

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        """The batch of images `index`, `[B]`: `x` and labels `y`."""
        return {"x": self.prepare([self.images[i] for i in index.tolist()]), "y": self.labels[index]}


def forget_images(
    net: Any, images: Labelled | None, call: Call, *, remain: Labelled | None = None, processor: Any = None
) -> Result:
    """Arguments as those of `erase.forget`. The network is in eval mode: running statistics stay, dropout is off."""
    began = time.perf_counter()
    if images is None or remain is None:
        raise TypeError("a classifier needs images to forget, and remain=… to keep, both with labels")
    chosen = choose(call, "classifier", ASKED, (), device_of(net), net.dtype)
    config, before = chosen.config, past(net)
    found = own_processor(net) if processor is None else processor
    prepare = partial(prepared, found, int(getattr(net.config, "num_channels", 3)))
    names = [str(net.config.id2label[k]) for k in range(net.config.num_labels)]
    backend = Classifier(net, len(names), lambda x: x, relabel=config.forget.relabel)
    own = chosen.method.forget
    lesson = Lesson(
        backend=backend,
        forget=labelled(images, names, prepare, "what to forget"),
        remain=labelled(remain, names, prepare, "remain"),
        forget_objective=RELABEL if own is not None and own.sense > 0 else ASCENT,
        remain_objective=DESCENT,
    )
    with listening(call.progress), no_launch_left(), borrow(net) as loan:
        net.eval()
        loan.keep()
        for p in net.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        learned = learn(chosen, lesson, call.progress)
    about = About(chosen, base_name(net, before), {}, processor=found)
    return finish(Result(net, learned, time.perf_counter() - began, net, about, before, loan.base), call)


def own_processor(net: Any) -> Any:
    """The image processor that lies where a network was loaded from.

    Raises:
        ValueError: if there is none, or the network was made in memory.
    """
    where = str(net.name_or_path)
    try:
        return load_processor(where)
    except (OSError, ValueError) as error:
        raise ValueError(f"no image processor where the network comes from ({where!r}): give processor=…") from error


def labelled(given: Labelled, names: Sequence[str], prepare: Callable[[list[Any]], Tensor], what: str) -> LabelledSet:
    """Images and the numbers of their classes.

    Raises:
        TypeError: for rows that are no image with a label.
        ValueError: for no images, and labels that are no class.
    """
    if isinstance(given, str | Path):
        folders = sorted(path for path in Path(given).glob("*/") if not path.name.startswith("."))
        rows: list[Any] = [(path, folder.name) for folder in folders for path in list_images(folder)]
    else:
        rows = [(row["image"], row["label"]) if isinstance(row, dict) else row for row in given]
    if not rows:
        raise ValueError(
            f"{what} has no images: give pairs (image, label), or a folder with a subfolder for each class"
        )
    if not all(isinstance(row, tuple | list) and len(row) == 2 for row in rows):
        raise TypeError(f"{what} must be pairs (image, label), or rows with image and label")
    labels = [class_number(label if isinstance(label, str) else int(label), names) for _, label in rows]
    return LabelledSet([image for image, _ in rows], torch.tensor(labels), prepare)


def prepared(processor: Any, channels: int, images: list[Any]) -> Tensor:
    """What a network takes of images, `[B, C, H, W]`: as its processor has it."""
    opened = [image if isinstance(image, Image.Image) else read_image(Path(image)) for image in images]
    if channels == 1:  # processors take no grey images of Pillow
        grey = [np.asarray(image.convert("L"))[None] for image in opened]
        found = processor(images=grey, return_tensors="pt", input_data_format="channels_first")
    else:
        found = processor(images=[image.convert("RGB") for image in opened], return_tensors="pt")
    pixels: Tensor = found["pixel_values"]
    return pixels
