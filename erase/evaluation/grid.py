"""Grids of images: a block a prompt, models in rows, the same seed in each column."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from erase.evaluation.columns import blocks, headings, match, pick
from erase.evaluation.detections import Box
from erase.evaluation.image_files import list_images, read_image
from erase.store.files import write_bytes

Blur = Mapping[Path, Sequence[Box]]
"""The boxes to hide in each image; every image shown must have an entry."""

MIN_TILE = 96
MAX_TILE = 256
_GAP = 8
_FONT = 14
_LABEL_WIDTH = 132
_LABEL_LINES = 4
_INK, _FAINT, _PAPER = (24, 24, 24), (110, 110, 110), (255, 255, 255)


def blurred(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy with each box, and a tenth of its size around it, reduced to at most 4 by 4 flat colours.

    So few values are left that the content cannot be guessed back, unlike after a mild Gaussian.
    """
    result = image.copy()
    for left, top, width, height in boxes:
        dx, dy = max(1, width // 10), max(1, height // 10)
        area = (
            max(0, left - dx),
            max(0, top - dy),
            min(image.width, left + width + dx),
            min(image.height, top + height + dy),
        )
        size = (area[2] - area[0], area[3] - area[1])
        if width <= 0 or height <= 0 or min(size) <= 0:
            continue
        # From the source, so that overlapping boxes do not depend on their order of pixelation alone.
        small = image.crop(area).resize((min(4, size[0]), min(4, size[1])), Image.Resampling.BOX)
        result.paste(small.resize(size, Image.Resampling.NEAREST), area[:2])
    return result


def read_for_people(path: Path, blur: Blur | None) -> Image.Image:
    """Decode an image, with its boxes in ``blur`` hidden.

    Raises:
        ValueError: the image cannot be decoded, or ``blur`` has no entry for it: then nobody looked what to
            hide.
    """
    image = read_image(path)
    if blur is None:
        return image
    path = Path(path)
    boxes = blur.get(path)
    if boxes is None:
        resolved = path.resolve()
        boxes = next((value for key, value in blur.items() if Path(key).resolve() == resolved), None)
    if boxes is None:
        raise ValueError(
            f"{path}: not among the {len(blur)} images scanned for what to blur; scan it, or use --no-blur"
        )
    return blurred(image, boxes)


def grid(
    rows: Sequence[tuple[str, Sequence[Path]]],
    *,
    columns: Sequence[str] | None = None,
    max_columns: int = 12,
    tile: int | None = None,
    title: str | None = None,
    blur: Blur | None = None,
) -> Image.Image:
    """Draw labelled rows of images; a shorter row is left blank at its end.

    Args:
        rows: (label, images) from top to bottom; one column holds one prompt and seed.
        columns: a heading for each column.
        max_columns: columns drawn; if there are more, the grid says how many are left out.
        tile: side of a tile in pixels; default the images' longest side, within 96 to 256 (small images are
            enlarged by a whole factor, pixel for pixel).
        title: a line above.
        blur: the boxes to hide in each image; ``None`` hides nothing.

    Raises:
        ValueError: no rows, a row without images, too few headings, a size below 1, an image that cannot be
            decoded, or one that is not in ``blur``.
    """
    if not rows:
        raise ValueError("got no rows, expected at least 1")
    for label, paths in rows:
        if not paths:
            raise ValueError(f"row '{label}' has no images, expected at least 1")
    if max_columns < 1 or (tile is not None and tile < 1):
        raise ValueError(f"max_columns is {max_columns} and tile {tile}, expected at least 1")
    total = max(len(paths) for _, paths in rows)
    if columns is not None and len(columns) < total:
        raise ValueError(f"got {len(columns)} headings for {total} columns")
    shown = min(total, max_columns)
    note = f"first {shown} of {total} columns" if shown < total else ""

    images = [[read_for_people(path, blur) for path in paths[:shown]] for _, paths in rows]
    side = tile or _tile(max(max(p.size) for row in images for p in row))
    font = ImageFont.load_default(_FONT)
    line = _FONT + 4
    labels = [_wrap(label, _LABEL_WIDTH, font, max(1, side // line)) for label, _ in rows]
    headings = [_wrap(text, side, font, _LABEL_LINES) for text in (columns or [])[:shown]]
    label_width = max(int(font.getlength(text)) for lines in labels for text in lines) + _GAP
    left = _GAP + label_width
    width = left + shown * (side + _GAP)
    titles = _wrap(title, width - 2 * _GAP, font, 3) if title else []
    feet = _wrap(note, width - 2 * _GAP, font, 3) if note else []
    head = _GAP + len(titles) * line + max((len(lines) for lines in headings), default=0) * line
    foot = head + len(rows) * (side + _GAP)

    canvas = Image.new("RGB", (width, foot + len(feet) * line + (_GAP if feet else 0)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, font, titles, _GAP, _GAP // 2, _INK)
    for column, lines in enumerate(headings):  # bottom-aligned, next to the images
        _text(draw, font, lines, left + column * (side + _GAP), head - len(lines) * line - 2, _INK)
    for number, (row, lines) in enumerate(zip(images, labels, strict=True)):
        top = head + number * (side + _GAP)
        _text(draw, font, lines, _GAP, top + (side - len(lines) * line) // 2, _INK)
        for column, image in enumerate(row):
            fitted = fit(image, side)
            x = left + column * (side + _GAP) + (side - fitted.width) // 2
            canvas.paste(fitted, (x, top + (side - fitted.height) // 2))
    _text(draw, font, feet, _GAP, foot, _FAINT)
    return canvas


def _tile(longest: int) -> int:
    if longest >= MIN_TILE:
        return min(longest, MAX_TILE)
    return longest * -(-MIN_TILE // longest)


def fit(image: Image.Image, side: int) -> Image.Image:
    """Scale to fit a square: nearest neighbour for a whole factor up, else Lanczos."""
    longest = max(image.size)
    if longest == side:
        return image
    size = (max(1, round(image.width * side / longest)), max(1, round(image.height * side / longest)))
    whole = side % longest == 0
    return image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, lines: int) -> list[str]:
    """Break at spaces, or within a long word, into at most ``lines`` lines; the rest is cut, with dots.

    Letters lose their accents: Pillow's own font has none.
    """
    result = [""]
    for word in "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).split():
        joined = f"{result[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            result[-1] = joined
            continue
        if result[-1]:
            result.append("")
        for letter in word:
            if result[-1] and font.getlength(result[-1] + letter) > width:
                result.append("")
            result[-1] += letter
    if len(result) > lines:
        last = result[lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        result = [*result[: lines - 1], last + "..."]
    return result


def _text(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    lines: Sequence[str],
    x: int,
    y: int,
    ink: tuple[int, int, int],
) -> None:
    for number, text in enumerate(lines):
        draw.text((x, y + number * (_FONT + 4)), text, fill=ink, font=font)


def grid_from_folders(
    folders: Sequence[Path],
    *,
    names: Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
    max_columns: int = 12,
    max_prompts: int = 14,
    tile: int | None = None,
    title: str | None = None,
    blur: Blur | None = None,
) -> Image.Image:
    """A grid of models × prompts × seeds: a block a prompt, in it a row a folder and a seed a column.

    Only images that all folders share are in it; see `erase.evaluation.columns.match`. Where each prompt has one
    image, there is one block, and prompts are its columns.

    Args:
        folders: of images, one a model.
        names: labels of the rows; default as much of the folders' ends as tells them apart.
        prompts: only these; see `pick`.
        seeds: only these.
        max_columns: columns drawn; if there are more, the grid says how many are left out.
        max_prompts: blocks drawn, likewise.
        tile: see `grid`.
        title: a line above.
        blur: the boxes to hide in each image; ``None`` hides nothing.

    Raises:
        ValueError: as `match`, `pick` and `grid`; another number of names than folders; or ``max_prompts`` < 1.
    """
    columns, files = match(folders)
    if names is not None and len(names) != len(folders):
        raise ValueError(f"got {len(names)} names for {len(folders)} folders")
    if max_columns < 1 or max_prompts < 1:
        raise ValueError(f"max_columns is {max_columns} and max_prompts {max_prompts}, expected at least 1")
    left_out = max(len(list_images(folder)) for folder in folders) - len(columns)
    chosen = pick(columns, prompts, seeds)
    columns, rows = [columns[i] for i in chosen], [[row[i] for i in chosen] for row in files]
    parts = blocks(columns)
    shown = parts[:max_prompts]
    seen = [row[i] for row in rows for _, numbers in shown for i in numbers[:max_columns]]
    side = tile or _tile(max(max(read_image(path).size) for path in seen))
    notes = [f"first {len(shown)} of {len(parts)} prompts"] if len(shown) < len(parts) else []
    notes += [f"{left_out} images that are not in every folder are left out"] if left_out else []
    images = []
    for prompt, numbers in shown:
        above, heads = headings(prompt, [columns[i] for i in numbers])
        labelled = [(name, [row[i] for i in numbers]) for name, row in zip(names or _names(folders), rows, strict=True)]
        images.append(grid(labelled, columns=heads, max_columns=max_columns, tile=side, title=above or None, blur=blur))
    return _stacked(images, title, notes)


def _stacked(images: Sequence[Image.Image], title: str | None, notes: Sequence[str]) -> Image.Image:
    """Images one below the other, between a title and notes."""
    font = ImageFont.load_default(_FONT)
    line = _FONT + 4
    width = max(image.width for image in images)
    head = _wrap(title, width - 2 * _GAP, font, 3) if title else []
    feet = [text for note in notes for text in _wrap(note, width - 2 * _GAP, font, 3)]
    top = _GAP + len(head) * line if head else 0
    foot = top + sum(image.height for image in images)
    canvas = Image.new("RGB", (width, foot + len(feet) * line + (_GAP if feet else 0)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, font, head, _GAP, _GAP // 2, _INK)
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    _text(draw, font, feet, _GAP, foot, _FAINT)
    return canvas


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [Path(folder).resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image in the form its suffix names (.png, .jpg, .jpeg or .webp), atomically.

    Raises:
        ValueError: another suffix.
    """
    form = form_of(path)
    buffer = io.BytesIO()
    image.save(buffer, form)
    write_bytes(path, buffer.getvalue())


def form_of(path: Path) -> str:
    """Pillow's name of the form that the suffix of an image's path means.

    Raises:
        ValueError: a suffix that is not written.
    """
    forms = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    form = forms.get(Path(path).suffix.lower())
    if form is None:
        raise ValueError(f"{path}: suffix is '{Path(path).suffix}', expected one of {', '.join(forms)}")
    return form
