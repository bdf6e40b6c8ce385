"""Which images of a run the page shows, and those images as data within the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erase.evaluation.columns import Column, blocks, headings, match
from erase.evaluation.grid import Blur, fit, read_for_people
from erase.evaluation.manifest import check_bytes, read_manifest
from erase.evaluation.page.folder import image_folders

MAX_BLOCKS = 12
MAX_COLUMNS = 6
SIDES = (512, 384, 256, 192, 128)
"""Longest side in pixels of images on the page: the largest with which they stay within `BUDGET`."""
BUDGET = 4_500_000
"""Bytes of all images, before base64 adds a third."""


LONGEST = 14
"""Letters of a word that is not broken."""


@dataclass(frozen=True)
class PageImage:
    """An image of the page."""

    source: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class Block:
    """A table of images: models in rows, a seed a column."""

    title: str
    side: str
    columns: tuple[tuple[str, str], ...]
    """Heading and, in a block of several prompts, side of each."""
    rows: tuple[tuple[str, tuple[PageImage, ...]], ...]

    @property
    def word(self) -> int:
        """Letters of the longest word above a column, for which there must be room; longer ones may be broken."""
        return min(
            LONGEST, max((len(word) for texts in self.columns for text in texts for word in text.split()), default=1)
        )


def chosen_columns(columns: Sequence[Column]) -> list[tuple[str, list[int]]]:
    """What the page shows: (prompt, columns) of each block."""
    parts = blocks(columns)
    if len(parts) == 1 and not parts[0][0]:  # an image a prompt: as many as fit in a block
        numbers = parts[0][1]
        parts = [("", numbers[start : start + MAX_COLUMNS]) for start in range(0, len(numbers), MAX_COLUMNS)]
    return [(prompt, numbers[:MAX_COLUMNS]) for prompt, numbers in parts[:MAX_BLOCKS]]


def image_blocks(run_dir: Path, report: Mapping[str, Any], blur: Blur | None) -> tuple[list[Block], str]:
    """The images that the page shows, and a word on those that it does not."""
    folders = image_folders(run_dir)
    if not folders:
        return [], ""
    columns, images = match(list(folders.values()))
    chosen = chosen_columns(columns)
    numbers = [i for _, part in chosen for i in part]
    encoded = encode(list(folders.values()), [row[i] for i in numbers for row in images], blur)
    shown = []
    for prompt, part in chosen:
        title, heads = headings(prompt, [columns[i] for i in part])
        if prompt:
            marked = [(head, "") for head in heads]
        else:  # an image a prompt: its seed is in the enlarged image's caption
            marked = [
                (columns[i].prompt.strip() or head, side(columns[i].prompt, report))
                for i, head in zip(part, heads, strict=True)
            ]
        models = tuple(
            (name, tuple(replace(encoded[row[i]], alt=f"{name}: {columns[i]}") for i in part))
            for name, row in zip(folders, images, strict=True)
        )
        shown.append(Block(title, side(prompt, report), tuple(marked), models))
    if len(numbers) == len(columns):
        return shown, ""
    return shown, f"Shown are {len(numbers)} of {len(columns)} images of each model; all are in images/."


def came_through(
    run_dir: Path, found: Sequence[tuple[str, Sequence[str]]], blur: Blur | None
) -> list[tuple[str, list[PageImage]]]:
    """Images that attacks brought back, a row for each attack; of a run whose images are gone, none."""
    rows = [(name, [run_dir / path for path in paths if (run_dir / path).is_file()]) for name, paths in found]
    every = [path for _, paths in rows for path in paths]
    encoded = encode(list(dict.fromkeys(path.parent for path in every)), every, blur)
    return [
        (name, [replace(encoded[path], alt=f"{name}, {path.name}") for path in paths]) for name, paths in rows if paths
    ]


def side(prompt: str, report: Mapping[str, Any]) -> str:
    """Whether a prompt is what was forgotten, another form of it, or neither."""
    target = report.get("target")
    forget = target.get("forget") if isinstance(target, dict) else target
    if prompt and prompt in (forget if isinstance(forget, list) else [forget]):
        return "forgotten"
    counted = report["after"].get("classes") or report["after"].get("clip")
    rows = counted.get("per_prompt") if isinstance(counted, dict) else None
    row = rows.get(prompt) if isinstance(rows, dict) else None
    counted_as = row.get("side") if isinstance(row, dict) else None
    return {"forget": "forgotten", "form": "another form", "earlier": "forgotten earlier"}.get(str(counted_as), "")


def encode(folders: Sequence[Path], paths: Sequence[Path], blur: Blur | None) -> dict[Path, PageImage]:
    """Images of some folders as data within a page, as large as the budget allows, still without their `alt`.

    Raises:
        ValueError: for an image that is not the one of its folder's manifest, or not in `blur`.
    """
    shown = {str(path) for path in paths}
    whole = ((folder, row) for folder in folders for row in read_manifest(folder))
    rows = {folder / row.file: (folder, row) for folder, row in whole if str(folder / row.file) in shown}
    for path in paths:
        check_bytes(*rows[path])
    found: dict[Path, tuple[str, bytes, tuple[int, int]]] = {}
    for side in SIDES:
        found, total = {}, 0
        for path in paths:
            found[path] = _encode(read_for_people(path, blur), side)
            total += len(found[path][1])
            if total > BUDGET and side != SIDES[-1]:
                break
        else:
            break
    return {
        path: PageImage(f"data:image/{form};base64,{base64.b64encode(data).decode('ascii')}", "", *size)
        for path, (form, data, size) in found.items()
    }


def _encode(image: Any, side: int) -> tuple[str, bytes, tuple[int, int]]:
    """Form, bytes and size: small images pixel for pixel, large ones as JPEG."""
    if max(image.size) > side:
        image = fit(image, side)
    buffer = io.BytesIO()
    if max(image.size) <= SIDES[-1]:
        image.save(buffer, "PNG", optimize=True)
        return "png", buffer.getvalue(), image.size
    image.save(buffer, "JPEG", quality=88, optimize=True)
    return "jpeg", buffer.getvalue(), image.size
