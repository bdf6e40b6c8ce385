"""How image files are read, everywhere: upright by their EXIF orientation, transparent pixels on white."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def decode(load: Callable[[], Image.Image], where: object) -> Image.Image:
    """A whole image in its own mode, upright.

    Args:
        load: opens it.
        where: the file, for the message.

    Raises:
        ValueError: for a file that is no image or is cut short.
    """
    try:
        with load() as image:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(f" {str(where)!r}", "")  # Pillow names the file again
        raise ValueError(f"{where} is not an image or is cut short ({reason})") from error


def as_rgb(image: Image.Image, where: object) -> Image.Image:
    """An image of any mode as RGB, transparent pixels on white.

    Raises:
        ValueError: for samples of more than 8 bits, which Pillow would clip.
    """
    if image.mode[0] in "IF":
        raise ValueError(f"{where} has mode {image.mode}, more than 8 bits a sample: convert it to RGB first")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether a pixel is not opaque."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def square(image: Image.Image, side: int) -> Image.Image:
    """The shorter side resized, centre cropped."""
    ratio = side / min(image.size)
    width, height = (max(side, round(length * ratio)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def count_files(total: int, used: int, skipped: Iterable[Path], more: str = "") -> str:
    """`8 files: 6 used (2 with own captions), 1 skipped (.gif)`."""
    kinds = Counter(path.suffix.lower() or path.name for path in skipped)
    named = ", ".join(f"{kind} {count}" if count > 1 else kind for kind, count in sorted(kinds.items()))
    return f"{total} files: {used} used{more}" + (f", {kinds.total()} skipped ({named})" if kinds else "")
