"""Prompts in, a folder of images and their manifest out.

Seeding: one CPU generator an image, from (row seed, sample index) and nothing else. With the last batch
padded to full size, an image does not depend on the order of the rows, on how many there are, or on a resume.

The folder: ``settings.json`` (written first: what the pixels depend on), ``00003-01.png`` (row 3, sample 1), and
``manifest.jsonl``, which grows by a batch at a time, so a killed run can be resumed, and is put in row order at the
end; each of its rows names the settings by their hash.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageOps

from erase.store.files import differences, in_use, json_text, read_json, sha256, write_bytes, write_json, write_text

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.jsonl"
SETTINGS = "settings.json"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_SEED = 2**32 - 1

# Column names, in order of preference: ours, I2P as published, I2P as on the hub, captions of COCO.
_PROMPT = ("prompt", "caption")
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


@dataclass(frozen=True)
class ManifestRow:
    """One image of a folder."""

    file: str
    """Relative to the manifest."""
    prompt: str
    """The prompt, or the class label."""
    seed: int
    """The row's seed, not the generator's."""
    index: int
    """Sample index within the row."""
    sha256: str
    """Of the image file."""
    settings: str = ""
    """SHA-256 of ``settings.json``, which says what the image was made by; empty in folders that others made."""


class Sampler(Protocol):
    """Draws one image a prompt; image i depends on prompt i, generator i and the settings alone."""

    def __call__(
        self,
        prompts: list[str],
        generators: list[torch.Generator],
        *,
        guidance: float | None,
        width: int | None,
        height: int | None,
    ) -> list[Image.Image]:
        """Draw; ``None`` is the sampler's own choice. Guidance is the scale, width and height are pixels."""
        ...


# --- prompts --------------------------------------------------------------------------------------


def read_prompts(path: Path, *, default_seed: int = 0) -> list[PromptRow]:
    """Read a prompt file: ``.csv`` with a ``prompt`` (or ``caption``) column, or ``.txt`` with one prompt a line.

    Of a CSV's other columns, seed, guidance, width, height, case, object and style are used, by these names or
    by either of I2P's (``evaluation_seed``/``sd_seed``, ...) or COCO's (``coco_id``/``image_id``); the rest are
    not. A row without a seed gets ``default_seed`` + its row number from 0. Prompts are kept to the letter; an
    empty one is refused, but in a file with I2P's seed column: I2P has one (row 2261), and it counts among the
    published 4,703.

    Raises:
        ValueError: the file is missing, empty, not UTF-8, of another kind, or has no prompt column; or a row
            has an empty prompt, more values than there are columns, or a number out of range.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".txt"):
        raise ValueError(f"{path}: got a '{path.suffix}' file, expected .csv (with a prompt column) or .txt")
    if not path.is_file():
        raise ValueError(f"{path}: no such prompt file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    table = _table(path, text) if path.suffix.lower() == ".csv" else _lines(text)
    rows = [_row(path, number, values, default_seed) for number, values in enumerate(table)]
    if not rows:
        raise ValueError(f"{path}: holds no prompts, expected at least one row")
    return rows


def _lines(text: str) -> Iterator[dict[str, str]]:
    for line in text.rstrip().splitlines():
        yield {"prompt": line}


def _table(path: Path, text: str) -> Iterator[dict[str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        column = next((name for name in _PROMPT if name in header), None)
        if column is None:
            raise ValueError(
                f"{path}: columns are {', '.join(filter(None, header)) or 'none'}; expected a 'prompt' column"
            )
        header[header.index(column)] = "prompt"
        number = 0
        for cells in reader:
            if not cells:  # a blank line, as many editors leave at the end
                continue
            number += 1
            if any(cell.strip() for cell in cells[len(header) :]):
                raise ValueError(
                    f"{path}: row {number} has {len(cells)} values for {len(header)} columns; "
                    "quote a prompt that has commas"
                )
            yield dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num} is not CSV ({error})") from error


def _row(path: Path, number: int, values: Mapping[str, str], default_seed: int) -> PromptRow:
    def cell(names: Sequence[str]) -> str | None:
        return next((values[name].strip() for name in names if values.get(name, "").strip()), None)

    def whole(names: Sequence[str], low: int, high: int) -> int | None:
        value = cell(names)
        if value is None:
            return None
        try:
            result = int(value.removesuffix(".0"))  # spreadsheets write 42 as 42.0
        except ValueError:
            result = low - 1
        if not low <= result <= high:
            raise ValueError(f"{where}: {names[0]} is '{value}', expected a whole number from {low} to {high}")
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
        raise ValueError(f"{where}: guidance is '{guidance}', expected a number from 0")
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
    )


# --- images ---------------------------------------------------------------------------------------


def image_generator(seed: int, index: int) -> torch.Generator:
    """A CPU generator for sample ``index`` of a row with ``seed``.

    Its seed is the first 8 bytes, big-endian, of SHA-256 of the ASCII text ``erase:{seed}:{index}``; torch's
    CPU engine uses the lower 32 bits of it.

    Raises:
        ValueError: ``seed`` outside 0..2**32 - 1, or a negative ``index``.
    """
    import torch

    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}, expected 0 to {MAX_SEED}")
    if index < 0:
        raise ValueError(f"index is {index}, expected 0 or more")
    digest = hashlib.sha256(f"erase:{seed}:{index}".encode("ascii")).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True)
class _Job:
    file: str
    row: PromptRow
    index: int


def generate(
    sampler: Sampler,
    rows: Sequence[PromptRow],
    out: Path,
    *,
    per_prompt: int = 1,
    batch_size: int = 8,
    resume: bool = False,
    reuse: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    settings: Mapping[str, Any] = {},
) -> list[ManifestRow]:
    """Draw ``per_prompt`` images of each row into ``out``.

    A batch holds rows of one (guidance, width, height), and the last of each is padded to ``batch_size`` with
    repeats that are thrown away, so that the same kernels run whatever is left to draw. ``batch_size`` may
    change on resume (it changes pixels by float rounding only); all else must be as it was.

    Args:
        sampler: see `Sampler`.
        rows: the prompts.
        out: a folder; it must be empty or absent, but for ``resume``.
        per_prompt: images a row; sample i of a row is seeded by (row seed, i).
        batch_size: images a call of ``sampler``.
        resume: keep the images that are in the manifest and whose bytes are as they were written; draw the
            rest.
        reuse: another folder made with the same ``settings``: images that it has are copied, not drawn.
        progress: called with (images there, images in all) at the start and after each batch.
        settings: what else the pixels depend on (model hash, steps, scheduler, ...), as JSON; kept in
            ``settings.json`` and compared on resume.

    Returns:
        The manifest, in row order.

    Raises:
        ValueError: no rows, a count below 1, an ``out`` in use, settings that are not JSON or differ on
            resume or from ``reuse``, or a sampler that returns another number of images than prompts.
    """
    out = Path(out)
    if not rows:
        raise ValueError("got no prompts, expected at least 1")
    for name, value in (("per_prompt", per_prompt), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    jobs = [
        _Job(f"{number:05d}-{index:02d}.png", row, index)
        for number, row in enumerate(rows)
        for index in range(per_prompt)
    ]
    record = _record(rows, per_prompt, settings)
    digest = hashlib.sha256(json_text(record).encode("utf-8")).hexdigest()
    spare = {} if reuse is None else _spare(Path(reuse), record)
    done = {name: replace(row, settings=digest) for name, row in _prepare(out, record, jobs, resume).items()}
    taken = [_copy(out, job, path, digest) for job in jobs if job.file not in done and (path := spare.get(_key(job)))]
    if taken:
        _append(out / MANIFEST, taken)
    done.update((row.file, row) for row in taken)
    if progress:
        progress(len(done), len(jobs))
    for batch in _batches([job for job in jobs if job.file not in done], batch_size):
        padded = batch + [batch[-1]] * (batch_size - len(batch))
        images = sampler(
            [job.row.prompt for job in padded],
            [image_generator(job.row.seed, job.index) for job in padded],
            guidance=batch[0].row.guidance,
            width=batch[0].row.width,
            height=batch[0].row.height,
        )
        if len(images) != len(padded):
            raise ValueError(f"the sampler returned {len(images)} images for {len(padded)} prompts")
        new = [_save(out, job, image, digest) for job, image in zip(batch, images, strict=False)]
        _append(out / MANIFEST, new)
        done.update((row.file, row) for row in new)
        if progress:
            progress(len(done), len(jobs))
    manifest = [done[job.file] for job in jobs]
    write_text(out / MANIFEST, "".join(map(_line, manifest)))
    return manifest


def _key(job: _Job) -> tuple[Any, ...]:
    row = job.row
    return (row.prompt, row.seed, job.index, row.guidance, row.width, row.height)


def check_reuse(folder: Path) -> None:
    """Refuse a folder that tells nothing of how its images were made.

    Raises:
        ValueError: it has no ``settings.json``.
    """
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder}: has no {SETTINGS}, so its images cannot be used again")


def _spare(folder: Path, record: Mapping[str, Any]) -> dict[tuple[Any, ...], Path]:
    """The images of a folder that can serve again: those of rows that leave everything to the sampler."""
    check_reuse(folder)
    stored = read_json(folder / SETTINGS)
    theirs = stored.get("settings") if isinstance(stored, dict) else None
    if changed := differences({"settings": theirs}, {"settings": record["settings"]}):
        raise ValueError(
            f"{folder}: made with other settings, so its images cannot be used again: {'; '.join(changed)}"
        )
    own = {f"{number:05d}" for number in stored.get("own", [])}
    return {
        (row.prompt, row.seed, row.index, None, None, None): path
        for row in read_manifest(folder)
        if row.file.partition("-")[0] not in own
        and (path := folder / row.file).is_file()
        and sha256(path) == row.sha256
    }


def _copy(out: Path, job: _Job, path: Path, settings: str) -> ManifestRow:
    return _write(out, job, path.read_bytes(), settings)


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[list[_Job]]:
    groups: dict[tuple[float | None, int | None, int | None], list[_Job]] = {}
    for job in jobs:
        groups.setdefault((job.row.guidance, job.row.width, job.row.height), []).append(job)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _record(rows: Sequence[PromptRow], per_prompt: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    prompts = json.dumps([asdict(row) for row in rows], ensure_ascii=True, sort_keys=True)
    record = {
        "schema": 1,
        "rows": len(rows),
        "per_prompt": per_prompt,
        "prompts_sha256": hashlib.sha256(prompts.encode("ascii")).hexdigest(),
        "settings": dict(settings),
    }
    if own := [i for i, row in enumerate(rows) if (row.guidance, row.width, row.height) != (None, None, None)]:
        record["own"] = own  # rows with settings of their own, which the manifest does not tell
    try:
        return dict(json.loads(json.dumps(record, allow_nan=False)))  # as it will be read back: tuples are lists
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings are not JSON ({error}); give strings, numbers, lists and mappings") from error


def begun(out: Path, resume: bool) -> bool:
    """Whether a folder holds pictures to go on with.

    Raises:
        ValueError: for a file, or a folder that holds something else, or is not to be gone on with.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, expected a folder")
    if not in_use(out):
        return False
    if not resume:
        raise ValueError(f"{out}: not empty; resume, or give another folder")
    if not (out / SETTINGS).is_file():
        raise ValueError(f"{out}: has no {SETTINGS}, so it cannot be resumed; give another folder")
    return True


def _prepare(out: Path, record: Mapping[str, Any], jobs: Sequence[_Job], resume: bool) -> dict[str, ManifestRow]:
    """Check ``out`` against ``record``, write ``settings.json`` if it is new, and find the images to keep."""
    if not begun(out, resume):
        write_json(out / SETTINGS, record)
        return {}
    stored = read_json(out / SETTINGS)
    if changed := differences(stored, record):
        raise ValueError(f"{out}: made with other settings, so it cannot be resumed: {'; '.join(changed)}")
    expected = {job.file: (job.row.prompt, job.row.seed, job.index) for job in jobs}
    kept = {}
    for row in _read_rows(out / MANIFEST, cut_short=True) if (out / MANIFEST).is_file() else []:
        path = out / row.file
        same = expected.get(row.file) == (row.prompt, row.seed, row.index)
        if same and path.is_file() and sha256(path) == row.sha256:
            kept[row.file] = row
    # Drop what is not kept, and the half line a killed run may have left, before more is appended.
    write_text(out / MANIFEST, "".join(map(_line, kept.values())))
    return kept


def _save(out: Path, job: _Job, image: Image.Image, settings: str) -> ManifestRow:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _write(out, job, buffer.getvalue(), settings)


def _write(out: Path, job: _Job, data: bytes, settings: str) -> ManifestRow:
    write_bytes(out / job.file, data)
    return ManifestRow(job.file, job.row.prompt, job.row.seed, job.index, hashlib.sha256(data).hexdigest(), settings)


# --- folders --------------------------------------------------------------------------------------


def _line(row: ManifestRow) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def _append(path: Path, rows: Sequence[ManifestRow]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())


def _read_rows(path: Path, *, cut_short: bool = False) -> list[ManifestRow]:
    lines = path.read_text(encoding="utf-8", errors="replace" if cut_short else "strict").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            label = value["prompt"] if "prompt" in value else value["label"]
            rows.append(
                ManifestRow(
                    str(value["file"]),
                    str(label),
                    int(value["seed"]),
                    int(value.get("index", 0)),
                    str(value["sha256"]),
                    str(value.get("settings", "")),
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            if cut_short and number == len(lines):
                break  # the line being written when the run was killed
            raise ValueError(
                f"{path}: line {number} is not a row with file, prompt or label, seed and sha256 ({error!r})"
            ) from error
    return rows


def read_manifest(folder: Path) -> list[ManifestRow]:
    """The rows of ``folder``'s ``manifest.jsonl``; ``label`` is taken where there is no ``prompt``.

    Raises:
        ValueError: the manifest is missing, empty, or has a line that is not a row.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest")
    try:
        rows = _read_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    if not rows:
        raise ValueError(f"{path}: holds no images")
    return rows


def read_whole(folder: Path) -> list[ManifestRow]:
    """The rows of ``folder``'s manifest, once every image is found to be the one that was written for its prompt.

    Raises:
        ValueError: as `read_manifest`; or an image is missing or is another one than its row names.
    """
    rows = read_manifest(folder)
    for row in rows:
        check_bytes(folder, row)
    return rows


def check_bytes(folder: Path, row: ManifestRow) -> None:
    """Refuse an image that is not as it was written.

    Raises:
        ValueError: its SHA-256 is not the manifest's, or it is missing.
    """
    path = Path(folder) / row.file
    if sha256(path) != row.sha256:
        raise ValueError(
            f"{path}: not the image that {MANIFEST} names for {row.prompt[:60]!r}, its SHA-256 differs: draw it again"
        )


def pair_rows(before: Path, after: Path) -> list[tuple[ManifestRow, ManifestRow]]:
    """Images of two models, paired by prompt, seed and sample index, in the order of ``after``.

    The n-th image of a key that a folder has several times goes with the n-th of the other.

    Raises:
        ValueError: as `read_whole`; or the folders hold other images each, or were made with other settings but for
            the model.
    """
    tables = []
    for folder in (before, after):
        seen: Counter[tuple[str, int, int]] = Counter()
        table = {}
        for row in read_whole(folder):
            key = (row.prompt, row.seed, row.index)
            table[(*key, seen[key])] = row
            seen[key] += 1
        tables.append(table)
    if odd := tables[0].keys() ^ tables[1].keys():
        lone = min(odd)
        folder = before if lone in tables[0] else after
        raise ValueError(
            f"{before} and {after} are no pairs: {len(odd)} images have no partner, such as {lone[0][:60]!r}, seed "
            f"{lone[1]}, in {folder} alone; draw both from the same prompts and seeds"
        )
    told = [_comparable(read_json(folder / SETTINGS)) for folder in (before, after) if (folder / SETTINGS).is_file()]
    if len(told) == 2 and (changed := differences(told[0], told[1])):
        raise ValueError(
            f"{before} and {after} were made with other settings, so they are no pairs: {'; '.join(changed)}"
        )
    return [(tables[0][key], row) for key, row in tables[1].items()]


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two folders of pairs must have in common: all but the model, where rows came from, and float rounding."""
    left_out = ("model", "weights", "prompt_file", "truncated_prompts", "threads")
    settings = {k: v for k, v in record.get("settings", {}).items() if k not in left_out}
    # Rows with settings of their own, which the manifest does not tell, must be the same rows.
    return {"settings": settings, "prompts_sha256": record["prompts_sha256"] if record.get("own") else None}


def drawn_by(folder: Path) -> dict[str, str] | None:
    """The weights that drew a folder's images, as its ``settings.json`` names them: hashes by file.

    Raises:
        ValueError: the file is not JSON.
    """
    stored = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else None
    settings = stored.get("settings") if isinstance(stored, dict) else None
    weights = settings.get("weights") if isinstance(settings, dict) else None
    return weights if isinstance(weights, dict) else None


def check_images(
    folder: Path, rows: Sequence[PromptRow], per_prompt: int, weights: Mapping[str, str] | None = None
) -> list[Path]:
    """The images of a folder, in row order, if they are those that were asked for: see `generate`.

    Raises:
        ValueError: as `read_whole`; or the manifest has other rows than were asked for, or other weights than
            ``weights`` drew them.
    """
    found = read_whole(folder)
    asked = [(row.prompt, row.seed, index) for row in rows for index in range(per_prompt)]
    if len(found) != len(asked):
        raise ValueError(f"{folder / MANIFEST}: {len(found)} images, expected {len(asked)}: they cannot be counted")
    for row, wanted in zip(found, asked, strict=True):
        if (row.prompt, row.seed, row.index) != wanted:
            raise ValueError(
                f"{folder / MANIFEST}: {row.file} is of {_said(row.prompt, row.seed, row.index)}, where "
                f"{_said(*wanted)} was asked for: prompts or seeds were shuffled, so it cannot be counted"
            )
    theirs = drawn_by(folder)
    if weights is not None and theirs is not None and theirs != dict(weights):
        raise ValueError(
            f"{folder}: drawn by other weights than this run's, so it cannot be counted: base and erased swapped?"
        )
    return [folder / row.file for row in found]


def _said(prompt: str, seed: int, index: int) -> str:
    return f"{prompt!r}, seed {seed}, sample {index}"


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
