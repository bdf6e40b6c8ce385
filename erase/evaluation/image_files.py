"""Image files: listing a folder of them, and decoding one."""

from __future__ import annotations

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
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not found:
        raise ValueError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return found


def read_image(path: Path) -> Image.Image:
    """Decode an image as RGB, as `erase.store.images` does.

    Raises:
        ValueError: the file is missing, or is no whole image of 8 bits.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such image")
    return as_rgb(decode(lambda: Image.open(path), path), path)
