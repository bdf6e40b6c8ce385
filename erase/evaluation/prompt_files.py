"""Prompt files: a CSV of prompts with their seeds and sizes, or a text file with one prompt a line."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from erase import resources
from erase.nearest import either

MAX_SEED = 2**32 - 1
# Column names, in order of preference: ours, I2P as published, I2P as on the hub, captions of COCO; adversarial prompts
# of Ring-A-Bell, of MMA-Diffusion, and of collections of attacks.
_PROMPT = ("prompt", "caption", "sensitive prompt", "adv_prompt", "adversarial_prompt")
_SEED = ("seed", "evaluation_seed", "sd_seed")
_GUIDANCE = ("guidance", "evaluation_guidance", "sd_guidance_scale")
_WIDTH = ("width", "sd_image_width")
_HEIGHT = ("height", "sd_image_height")
_CASE = ("case", "case_number", "coco_id", "image_id")


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt file; ``None`` leaves the choice to the sampler."""

    prompt: str
    seed: int
    """0 to 2**32 - 1."""
    guidance: float | None = None
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    case: str | None = None
    """The file's own name for the row (I2P's ``case_number``, COCO's ``image_id``)."""
    object: str | None = None
    """What the prompt shows, in labelled sets: the first part of a classifier's "object/style"."""
    style: str | None = None
    """How it shows it: the second part."""
    group: str | None = None
    """What kind of thing the object is: those of the erased concept's group are near it."""


def is_file_name(text: str) -> bool:
    """Whether a text ends as a file of prompts does."""
    return text.lower().endswith((".csv", ".txt"))


def find_set(text: str) -> Path | None:
    """The file of a prompt set, where a text is its name or path; ``None`` where it is a prompt.

    Raises:
        ValueError: the file is missing, or the text is likely a set's name with a slip, such as ``photo-plain``.
    """
    known = resources.list_prompts()
    if text in known or is_file_name(text):
        return resources.prompt_path(text)
    refuse_path(text)
    if "-" in text and " " not in text and (near := get_close_matches(text, known, 3, 0.8)):
        raise ValueError(f"no prompt set {text!r}; did you mean {either(near)}?")
    return None


def refuse_path(text: str) -> None:
    """Refuse a prompt that is likely the path of a file of another kind.

    Raises:
        ValueError: if it is.
    """
    if text.startswith(("/", "./", "../", "~/")):
        raise ValueError(f"{text!r} looks like a path, but prompt files end in .csv or .txt")


@dataclass(frozen=True)
class ConceptRow:
    """One row of a file of concepts."""

    prompt: str
    anchor: str | None = None
    """What it should become."""
    weight: float | None = None
    """How much it counts, > 0."""
    labels: tuple[str, ...] = ()
    """Object and style, in labelled sets."""


def read_concepts(path: Path) -> list[ConceptRow]:
    """Read a prompt file whose CSV may have the columns `anchor` and `weight`.

    Raises:
        ValueError: as `read_prompts`, and for a weight that is not a positive number.
    """
    path = Path(path)
    read_prompts(path)
    found = []
    for number, values in enumerate(_cells(path), 1):
        anchor, weight = (values.get(name, "").strip() or None for name in ("anchor", "weight"))
        try:
            share = None if weight is None else float(weight)
        except ValueError:
            share = math.nan
        if share is not None and not 0 < share < math.inf:
            raise ValueError(f"{path}: row {number}: weight is '{weight}', expected a positive number")
        labels = tuple(filter(None, (values.get(name, "").strip() for name in ("object", "style"))))
        found.append(ConceptRow(values["prompt"], anchor, share, labels))
    return found


def read_prompts(path: Path, *, default_seed: int = 0) -> list[PromptRow]:
    """Read a prompt file: ``.csv`` with a ``prompt`` column, or ``.txt`` with one prompt a line.

    Files of the field are read as they are published: ``caption`` (COCO), ``sensitive prompt`` (Ring-A-Bell),
    ``adv_prompt`` (MMA-Diffusion) and ``adversarial_prompt`` are columns of prompts, too.

    Of a CSV's other columns, seed, guidance, width, height, case, object, style and group are used, by these names or
    by either of I2P's (``evaluation_seed``/``sd_seed``, ...) or COCO's (``coco_id``/``image_id``); the rest are
    not. A row without a seed gets ``default_seed`` + its row number from 0. Prompts are kept to the letter; an
    empty one is refused, but in a file with I2P's seed column: I2P has one (row 2261), and it counts among the
    published 4,703.

    Raises:
        ValueError: the file is missing, empty, not UTF-8, of another kind, or has no prompt column; or a row
            has an empty prompt, more values than there are columns, or a number out of range.
    """
    path = Path(path)
    rows = [_row(path, number, values, default_seed) for number, values in enumerate(_cells(path))]
    if not rows:
        raise ValueError(f"{path}: holds no prompts, expected at least one row")
    return rows


def _cells(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a prompt file, by column.

    Raises:
        ValueError: see `read_prompts`.
    """
    if not is_file_name(path.name):
        raise ValueError(f"{path}: got a '{path.suffix}' file, expected .csv (with a prompt column) or .txt")
    if not path.is_file():
        raise ValueError(f"{path}: no such prompt file; erase ls prompts lists the sets that come with erase")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path}: holds NUL characters, so it is not text: save it as UTF-8")
    return _table(path, text) if path.suffix.lower() == ".csv" else _lines(text)


def _lines(text: str) -> Iterator[dict[str, str]]:
    for line in io.StringIO(text.rstrip(), newline=None):
        yield {"prompt": line.removesuffix("\n")}


def _table(path: Path, text: str) -> Iterator[dict[str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begun = 1
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        column = next((name for name in _PROMPT if name in header), None)
        if column is None:
            raise ValueError(
                f"{path}: columns are {', '.join(filter(None, header)) or 'none'}; expected a 'prompt' column"
            )
        if header.count(column) > 1:
            raise ValueError(f"{path}: {header.count(column)} columns are named {column}: keep one")
        header[header.index(column)] = "prompt"
        number = 0
        begun = reader.line_num + 1
        for cells in reader:
            begun = reader.line_num + 1
            if not cells:  # a blank line, as many editors leave at the end
                continue
            number += 1
            if any(cell.strip() for cell in cells[len(header) :]):
                raise ValueError(
                    f"{path}: row {number} has {len(cells)} values for {len(header)} columns; "
                    "quote a prompt that has commas"
                )
            if len(cells) <= header.index("prompt"):
                raise ValueError(f"{path}: row {number} ends before its prompt: add it, or remove the row")
            yield dict(zip(header, cells, strict=False))
    except csv.Error as error:
        if "end of data" in str(error):
            raise ValueError(
                f"{path}: the quote that line {begun} opens is never closed: close it, or remove it"
            ) from error
        raise ValueError(
            f"{path}: line {begun} is not CSV ({error}): close each quote, and double one that is part of a prompt"
        ) from error


def _row(path: Path, number: int, values: Mapping[str, str], default_seed: int) -> PromptRow:
    def column(names: Sequence[str]) -> str:
        return next((name for name in names if values.get(name, "").strip()), names[0])

    def cell(names: Sequence[str]) -> str | None:
        return values.get(column(names), "").strip() or None

    def whole(names: Sequence[str], low: int, high: int) -> int | None:
        value = cell(names)
        if value is None:
            return None
        try:
            result = int(value.removesuffix(".0"))  # spreadsheets write 42 as 42.0
        except ValueError:
            result = low - 1
        if not low <= result <= high:
            raise ValueError(f"{where}: {column(names)} is '{value}', expected a whole number from {low} to {high}")
        return result

    where = f"{path}: row {number + 1}"
    prompt = values.get("prompt", "")
    if not prompt.strip() and not any(name in values for name in _SEED if name != "seed"):
        raise ValueError(f"{where}: the prompt is empty; write one or remove the row")
    guidance = cell(_GUIDANCE)
    try:
        scale = None if guidance is None else float(guidance)
    except ValueError:
        scale = math.nan
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"{where}: {column(_GUIDANCE)} is '{guidance}', expected a number from 0")
    seed = whole(_SEED, 0, MAX_SEED)
    if seed is None:
        seed = default_seed + number
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"{where}: default seed {default_seed} + {number} is outside 0 to {MAX_SEED}")
    return PromptRow(
        prompt,
        seed,
        scale,
        whole(_WIDTH, 1, 65535),
        whole(_HEIGHT, 1, 65535),
        cell(_CASE),
        cell(("object",)),
        cell(("style",)),
        cell(("group",)),
    )
