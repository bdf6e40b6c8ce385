"""A folder of images and what it says of them: which prompt and seed each is of, and what they were made by.

``manifest.jsonl`` has a row for each image, with its SHA-256; ``settings.json`` says what the pixels depend on. With
them a folder can be checked before it is counted, and two folders can be paired. `erase.evaluation.generate` writes
both.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from erase.evaluation.prompt_files import PromptRow
from erase.store.files import differences, read_json, replacing, sha256

MANIFEST = "manifest.jsonl"
SETTINGS = "settings.json"
OF_ROWS = ("prompt_file", "truncated_prompts")
"""What ``settings.json`` says of a folder's rows, beside what made their images."""


@dataclass(frozen=True, slots=True)
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


def _line(row: ManifestRow) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def write_rows(path: Path, rows: Iterable[ManifestRow]) -> None:
    """Write a manifest, atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, rows))


def append_rows(path: Path, rows: Sequence[ManifestRow]) -> None:
    """Add rows to a manifest; they are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, *, cut_short: bool = False) -> list[ManifestRow]:
    """The rows of a manifest file, which may have none.

    Args:
        path: the file.
        cut_short: leave out a last line that is not whole, as a killed run may leave one.

    Raises:
        ValueError: a line is not a row, or (as a UnicodeDecodeError) the file is not UTF-8.
    """
    rows = []
    with path.open(encoding="utf-8", errors="replace" if cut_short else "strict") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_row(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                if cut_short and not line.endswith("\n"):
                    break  # the line being written when the run was killed
                raise ValueError(
                    f"{path}: line {number} is not a row with file, prompt or label, seed and sha256 ({error!r})"
                ) from error
    return rows


def _row(value: Any) -> ManifestRow:
    label = str(value["prompt"] if "prompt" in value else value["label"])
    return ManifestRow(
        str(value["file"]),
        sys.intern(label),  # of many images, held once
        int(value["seed"]),
        int(value.get("index", 0)),
        str(value["sha256"]),
        sys.intern(str(value.get("settings", ""))),
    )


def read_manifest(folder: Path) -> list[ManifestRow]:
    """The rows of ``folder``'s ``manifest.jsonl``; ``label`` is taken where there is no ``prompt``.

    Raises:
        ValueError: the manifest is missing, empty, names a file twice, or has a line that is not a row.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest")
    try:
        rows = read_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    if not rows:
        raise ValueError(f"{path}: holds no images")
    twice = [file for file, times in Counter(row.file for row in rows).items() if times > 1]
    if twice:
        raise ValueError(f"{path}: {twice[0]} stands there twice, and would count twice: remove a line")
    return rows


def images_of(folder: Path) -> list[Path]:
    """The images of ``folder``, in the order of its manifest.

    Raises:
        ValueError: as `read_manifest`.
    """
    return [folder / row.file for row in read_manifest(folder)]


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
            f"{path}: not the image that {MANIFEST} names for {row.prompt[:60]!r}, its SHA-256 differs: generate it "
            "again"
        )


def check_images(
    folder: Path, rows: Sequence[PromptRow], per_prompt: int, weights: Mapping[str, str] | None = None
) -> list[Path]:
    """The images of a folder, in row order, if they are those that were asked for: see `generate`.

    Raises:
        ValueError: as `read_whole`; or the manifest has other rows than were asked for, or other weights than
            ``weights`` drew them.
    """
    found = read_whole(folder)
    if len(found) != (number := len(rows) * per_prompt):
        raise ValueError(f"{folder / MANIFEST}: {len(found)} images, expected {number}: they cannot be counted")
    asked = ((row.prompt, row.seed, index) for row in rows for index in range(per_prompt))
    for row, wanted in zip(found, asked, strict=True):
        if (row.prompt, row.seed, row.index) != wanted:
            raise ValueError(
                f"{folder / MANIFEST}: {row.file} is of {_said(row.prompt, row.seed, row.index)}, where "
                f"{_said(*wanted)} was asked for: prompts or seeds were shuffled, so it cannot be counted"
            )
    theirs = generated_by(folder)
    if weights is not None and theirs is not None and theirs != dict(weights):
        raise ValueError(
            f"{folder}: generated with other weights than this run's, so it cannot be counted: were base and erased "
            "swapped?"
        )
    return [folder / row.file for row in found]


def _said(prompt: str, seed: int, index: int) -> str:
    return f"{prompt!r}, seed {seed}, sample {index}"


def pair_rows(before: Path, after: Path) -> list[tuple[ManifestRow, ManifestRow]]:
    """Images of two models, paired by prompt, seed and sample index, in the order of ``after``.

    The n-th image of a key that a folder has several times goes with the n-th of the other. Rows and one
    table of them are in memory.

    Raises:
        ValueError: as `read_whole`; or the folders hold other images each, or were made with other settings but for
            the model.
    """
    waiting: dict[tuple[str, int, int], list[ManifestRow]] = {}
    for row in read_whole(before):
        waiting.setdefault((row.prompt, row.seed, row.index), []).append(row)
    pairs, alone = [], []
    for rows in waiting.values():
        rows.reverse()  # the first is then the last, and cheap to take
    for row in read_whole(after):
        rows = waiting.get((row.prompt, row.seed, row.index), [])
        if rows:
            pairs.append((rows.pop(), row))
        else:
            alone.append((row, after))
    alone += [(row, before) for rows in waiting.values() for row in rows]
    if alone:
        row, folder = min(alone, key=lambda each: (each[0].prompt, each[0].seed, each[0].index))
        raise ValueError(
            f"{before} and {after} are not pairs: {len(alone)} images have no partner, such as {row.prompt[:60]!r}, "
            f"seed {row.seed}, in {folder} only; generate both from the same prompts and seeds"
        )
    told = [_comparable(folder / SETTINGS) for folder in (before, after) if (folder / SETTINGS).is_file()]
    if len(told) == 2 and (changed := differences(told[0], told[1])):
        raise ValueError(
            f"{before} and {after} were made with other settings, so they are not pairs: {'; '.join(changed)}"
        )
    return pairs


def _comparable(path: Path) -> dict[str, Any]:
    """What two folders of pairs must have in common: all but the model, where rows came from, and float rounding.

    Raises:
        ValueError: for a file that is not ours.
    """
    record = read_json(path)
    if not isinstance(record, dict) or "prompts_sha256" not in record:
        raise ValueError(f"{path} is not a record of generated images: get it again, or remove it")
    left_out = ("model", "weights", "configs", "threads", *OF_ROWS)
    settings = {k: v for k, v in record.get("settings", {}).items() if k not in left_out}
    # Rows with settings of their own, which the manifest does not tell, must be the same rows.
    return {"settings": settings, "prompts_sha256": record["prompts_sha256"] if record.get("own") else None}


def generated_by(folder: Path) -> dict[str, str] | None:
    """The weights that drew a folder's images, as its ``settings.json`` names them: hashes by file.

    Raises:
        ValueError: the file is not JSON.
    """
    stored = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else None
    settings = stored.get("settings") if isinstance(stored, dict) else None
    weights = settings.get("weights") if isinstance(settings, dict) else None
    return weights if isinstance(weights, dict) else None


def origin(folder: Path) -> dict[str, Any]:
    """What a folder's counts are of, to be kept beside them: the weights that drew the images, and the manifest."""
    return {"weights": generated_by(folder), "manifest_sha256": sha256(folder / MANIFEST)}
