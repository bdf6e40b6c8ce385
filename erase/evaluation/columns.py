"""Which images of several models go together: those of one prompt, seed and sample, a column of a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from erase.evaluation.image_files import list_images
from erase.evaluation.manifest import MANIFEST, read_manifest


@dataclass(frozen=True, slots=True)
class Column:
    """What is common to the images of a column."""

    prompt: str
    """The prompt or label; without manifests, the file's name."""
    seed: int | None = None
    index: int = 0

    @property
    def draw(self) -> str:
        """Which of the prompt's images: "seed 3", or "seed 3, sample 1"."""
        if self.seed is None:
            return ""
        return f"seed {self.seed}" + (f", sample {self.index}" if self.index else "")

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.prompt.strip(), self.draw)))


class Files(Sequence[Path]):
    """Paths of a folder's files, each made when it is asked for: of millions, names take less memory."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    @overload
    def __getitem__(self, number: int) -> Path: ...
    @overload
    def __getitem__(self, number: slice) -> Files: ...
    def __getitem__(self, number: int | slice) -> Path | Files:
        if isinstance(number, slice):
            return Files(self.folder, self.names[number])
        return self.folder / self.names[number]

    def __len__(self) -> int:
        return len(self.names)


def match(folders: Sequence[Path]) -> tuple[list[Column], list[Files]]:
    """Line up the images of several folders by (prompt, seed, sample index) of their manifests.

    The n-th image of a key that a folder has several times goes with the n-th of the others. Where *no*
    folder has a manifest, images go together by file name.

    Returns:
        What is common to all, in the first folder's order: the columns, and for each folder its images, one a
        column.

    Raises:
        ValueError: no folders, a folder without images, some with a manifest and some without, or nothing in
            common.
    """
    if not folders:
        raise ValueError("got no folders, expected at least 1")
    folders = [Path(folder) for folder in folders]
    for folder in folders:
        list_images(folder)
    without = [folder for folder in folders if not (folder / MANIFEST).is_file()]
    if without and len(without) < len(folders):
        raise ValueError(f"{without[0]}: has no {MANIFEST}, while another folder has; images cannot be matched")
    read = _by_name if without else _by_manifest
    first = read(folders[0])
    keys, names = list(first), [[name for _, name in first.values()]]
    for folder in folders[1:]:  # one table at a time, beside the first
        table = read(folder)
        common = [i for i, key in enumerate(keys) if key in table]
        if len(common) < len(keys):
            keys, names = [keys[i] for i in common], [[row[i] for i in common] for row in names]
        names.append([table[key][1] for key in keys])
    if not keys:
        what = "a file name" if without else "a prompt, seed and sample index"
        raise ValueError(f"no image is in each of {', '.join(map(str, folders))}: none shares {what}")
    return [first[key][0] for key in keys], [Files(*both) for both in zip(folders, names, strict=True)]


def _by_name(folder: Path) -> dict[object, tuple[Column, str]]:
    return {path.name: (Column(path.stem), str(path.relative_to(folder))) for path in list_images(folder)}


def _by_manifest(folder: Path) -> dict[object, tuple[Column, str]]:
    table: dict[object, tuple[Column, str]] = {}
    again: Counter[Column] = Counter()
    for row in read_manifest(folder):
        column = Column(row.prompt, row.seed, row.index)
        key: object = column
        if column in table:
            again[column] += 1
            key = (column, again[column])
        table[key] = (column, row.file)
    return table


def blocks(columns: Sequence[Column]) -> list[tuple[str, list[int]]]:
    """Columns put together by prompt: (prompt, the numbers of its columns), in order of appearance.

    Where no prompt has more than one image, all are in one block without a name.
    """
    found: dict[str, list[int]] = {}
    for number, column in enumerate(columns):
        found.setdefault(column.prompt, []).append(number)
    if all(len(numbers) == 1 for numbers in found.values()):
        return [("", list(range(len(columns))))]
    return list(found.items())


def headings(prompt: str, columns: Sequence[Column]) -> tuple[str, list[str]]:
    """The title of a block and the headings of its columns; a seed that all share goes into the title."""
    if not prompt:
        return "", [str(column) for column in columns]
    seed = columns[0].seed
    if len(columns) > 1 and seed is not None and all(column.seed == seed for column in columns):
        return f"{prompt.strip()}, seed {seed}", [f"sample {column.index}" for column in columns]
    return prompt.strip(), [column.draw for column in columns]


def pick(columns: Sequence[Column], prompts: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[int]:
    """The numbers of the columns whose prompt holds one of ``prompts`` and whose seed is one of ``seeds``.

    Upper and lower case are alike; without prompts or seeds, all are meant.

    Raises:
        ValueError: a prompt or seed that no column has, or none that has both.
    """
    for prompt in prompts:
        if not any(prompt.lower() in column.prompt.lower() for column in columns):
            there = list(dict.fromkeys(column.prompt for column in columns))
            raise ValueError(f"no prompt contains {prompt!r}; the {len(there)} prompts: {', '.join(there)[:300]}")
    for seed in seeds:
        if not any(column.seed == seed for column in columns):
            known = sorted({column.seed for column in columns if column.seed is not None})
            some = ", ".join(map(str, known[:20])) + (" …" if len(known) > 20 else "")
            raise ValueError(f"no image of seed {seed}; seeds: {some or 'none, as there is no manifest'}")
    found = [
        number
        for number, column in enumerate(columns)
        if (not seeds or column.seed in seeds)
        and (not prompts or any(prompt.lower() in column.prompt.lower() for prompt in prompts))
    ]
    if not found:
        raise ValueError(f"no image has both a prompt among {', '.join(prompts)} and a seed among {_listed(seeds)}")
    return found


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
