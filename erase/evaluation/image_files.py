"""Image files: listing a folder of them, and decoding one."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

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
    """Decode an image as RGB, upright by its EXIF orientation.

    Raises:
        ValueError: the file is missing, or is not a whole image.
    """
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such image") from error
    # Pillow's decoders raise all of these on damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image that can be decoded ({error})") from error
