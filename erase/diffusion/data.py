"""Forget and remain data: image folders with their prompts, and cached latents served in batches."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erase.diffusion.condition import Condition, take
from erase.store.images import SUFFIXES, as_rgb, count_files, decode, is_transparent, square

CAPTIONS = ("metadata.jsonl", "manifest.jsonl", "metadata.csv")
"""Files that hold the prompts of a folder's images; the first that is there counts."""


@dataclass(frozen=True)
class ImageItem:
    """An image file and its prompt."""

    path: Path
    prompt: str
    captioned: bool = True
    """Whether the prompt is its own, not the folder's."""


def read_folder(
    folder: Path, prompt: str | None = None, say: Callable[[str], None] = lambda line: None
) -> list[ImageItem]:
    """The images of a folder with their prompts, sorted by name; a line says how many, and which files are skipped.

    Prompts come from `metadata.jsonl` or `metadata.csv` (columns `file_name` and `text` or `prompt`), from our
    `manifest.jsonl` (`file`, `prompt`), or from `prompt` for all.

    Raises:
        ValueError: for a folder that is missing or without images, a metadata file that is broken or names a file
            that is missing, or an image without a prompt.
    """
    if not folder.is_dir():
        raise ValueError(f"no such image folder: {folder}")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    captions = next((folder / name for name in CAPTIONS if (folder / name).exists()), None)
    skipped = [path for path in files if path not in paths and path != captions]
    if not paths:
        more = f": {count_files(len(files), 0, skipped)}" if skipped else ""
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}){more}")
    prompts = {} if captions is None else _metadata(captions)
    lost = [name for name in prompts if not (folder / name).is_file()]
    if lost:
        raise ValueError(f"{captions} names {lost[0]}, which is missing: add the file, or remove its line")
    items = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        text = prompts.get(name, prompt)
        if text is None:
            raise ValueError(
                f"{path} has no prompt: give one prompt for the folder, or a metadata.jsonl with file_name and text"
            )
        items.append(ImageItem(path, text, name in prompts))
    own = sum(item.captioned for item in items)
    more = f" ({own} with own captions)" if own else ""
    say(f"{folder}: {count_files(len(files), len(items), skipped, more)}")
    return items


def _metadata(source: Path) -> dict[str, str]:
    rows: list[Any] = []
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if source.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}, line {number}: broken JSON ({error.msg})") from error
    found = {}
    for number, row in enumerate(rows, 1):
        cells = row if isinstance(row, dict) else {}
        file = cells.get("file_name") or cells.get("file")
        prompt = cells.get("text") or cells.get("prompt")
        if not (file and prompt and isinstance(file, str) and isinstance(prompt, str)):
            raise ValueError(f"{source}, row {number}: needs file_name and text (or file and prompt); got {row}")
        found[Path(file).as_posix()] = prompt
    return found


def read_image(path: Path, resolution: int) -> Tensor:
    """An image in `[-1, 1]`, `[3, R, R]`: upright, on white, shorter side resized to R, centre cropped.

    Raises:
        ValueError: for a file that is no image or is cut short.
    """
    image = as_rgb(decode(lambda: Image.open(path), path), path)
    array = np.asarray(square(image, resolution), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()


def check_images(items: Sequence[ImageItem], refuse: str | None = None) -> None:
    """Decode every image once, so that a broken one is found before hours of work.

    Args:
        items: the images.
        refuse: the setting by which transparent pixels are refused, if they are.

    Raises:
        ValueError: for a file that is no image or is cut short, and for transparent pixels.
    """
    for item in items:
        image = decode(partial(Image.open, item.path), item.path)
        if refuse is not None and is_transparent(image):
            raise ValueError(f"{item.path} has transparent pixels: set {refuse}=white, or give an opaque file")
        as_rgb(image, item.path)


@dataclass(frozen=True)
class LatentSet:
    """Cached data of one side, computed once: nothing is encoded in a step."""

    mean: Tensor
    """`[N, C, H, W]`, scaled as the denoiser sees it."""
    cond: Tensor
    """`[N]`, rows of `table`."""
    table: Condition
    """Distinct conditions, leaves `[P, …]`."""
    std: Tensor | None = None
    """`[N, C, H, W]`, or None for exact latents."""
    anchor: Tensor | None = None
    """`[N]`, rows of `table`."""
    stands_for: LatentSet | None = None
    """What these are surrogates of, where it is asked for."""
    attribute: Tensor | None = None
    """`[N]`, rows of `table`: what samples should lose (`Negate`)."""
    weight: Tensor | None = None
    """`[N]`, float32, mean 1: shares of the loss."""

    def __len__(self) -> int:
        """N."""
        return len(self.mean)

    def gather(self, index: Tensor) -> dict[str, Any]:
        """The batch of samples `index`, `[B]`."""
        batch: dict[str, Any] = {"mean": self.mean[index], "cond": take(self.table, self.cond[index])}
        if self.std is not None:
            batch["std"] = self.std[index]
        if self.anchor is not None:
            batch["anchor"] = take(self.table, self.anchor[index])
        if self.attribute is not None:
            batch["attribute"] = take(self.table, self.attribute[index])
        if self.weight is not None:
            batch["weight"] = self.weight[index]
        return batch


def encode_in_batches(
    items: Sequence[ImageItem],
    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    resolution: int,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor | None]:
    """Latent mean and std of images, `[N, C, H, W]` each; no std where nothing is random."""
    means, stds = [], []
    for start in range(0, len(items), batch_size):
        pixels = torch.stack([read_image(item.path, resolution) for item in items[start : start + batch_size]])
        mean, std = encode(pixels)
        means.append(mean)
        if std is not None:
            stds.append(std)
    return torch.cat(means), torch.cat(stds) if stds else None
