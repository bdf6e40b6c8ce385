"""Forget and remain data: image folders with their prompts, and cached latents served in batches."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from erase.diffusion.condition import Condition, take

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageItem:
    """An image file and its prompt."""

    path: Path
    prompt: str


def read_folder(folder: Path, prompt: str | None = None) -> list[ImageItem]:
    """The images of a folder with their prompts, sorted by name.

    Prompts come from `metadata.jsonl` or `metadata.csv` (columns `file_name` and `text` or `prompt`), from our
    `manifest.jsonl` (`file`, `prompt`), or from `prompt` for all.

    Raises:
        ValueError: for a folder that is missing or without images, a broken metadata file, or an image
            without a prompt.
    """
    if not folder.is_dir():
        raise ValueError(f"no such image folder: {folder}")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    prompts = _metadata(folder)
    items = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        text = prompts.get(name, prompt)
        if text is None:
            raise ValueError(
                f"{path} has no prompt: give one prompt for the folder, or a metadata.jsonl with file_name and text"
            )
        items.append(ImageItem(path, text))
    return items


def _metadata(folder: Path) -> dict[str, str]:
    rows: list[Any] = []
    source = folder
    for name in ("metadata.jsonl", "manifest.jsonl", "metadata.csv"):
        source = folder / name
        if not source.exists():
            continue
        text = source.read_text(encoding="utf-8-sig")
        if source.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            for number, line in enumerate(text.splitlines(), 1):
                if not line.strip():
                    continue
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{source}, line {number}: broken JSON ({error.msg})") from error
        break
    found = {}
    for number, row in enumerate(rows, 1):
        cells = row if isinstance(row, dict) else {}
        file = cells.get("file_name") or cells.get("file")
        prompt = cells.get("text") or cells.get("prompt")
        if not (file and prompt and isinstance(file, str) and isinstance(prompt, str)):
            raise ValueError(f"{source}, row {number}: needs file_name and text (or file and prompt); got {row}")
        found[file] = prompt
    return found


def read_image(path: Path, resolution: int) -> Tensor:
    """An image in `[-1, 1]`, `[3, R, R]`: shorter side resized to R, centre cropped.

    Raises:
        ValueError: for a file that is no image or is cut short.
    """
    image = _decode(path)
    ratio = resolution / min(image.size)
    width, height = (max(resolution, round(side * ratio)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    array = np.asarray(image.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()


def check_images(items: Sequence[ImageItem]) -> None:
    """Decode every image once, so that a broken one is found before hours of work.

    Raises:
        ValueError: for a file that is no image or is cut short.
    """
    for item in items:
        _decode(item.path)


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no image or is cut short ({error})") from error


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
