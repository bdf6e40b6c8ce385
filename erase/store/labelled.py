"""Labelled images from disk, whole in memory: for class forgetting in DDPMs and for classifiers.

A source is a folder with one subfolder per class, a folder with the IDX files of MNIST's family, `fashion-mnist`
(Debian's package), or `datasets:NAME` (Hugging Face). Images are turned upright; nothing is resized or converted unless
a size is given.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erase.store.class_names import same_classes
from erase.store.images import SUFFIXES, as_rgb, count_files, decode, square

MODES = {"L": 1, "RGB": 3}
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

Split = Literal["train", "test"]
Shape = tuple[int, int, int]
Read = tuple[Tensor, Tensor, Sequence[str]]


class NoSplitError(ValueError):
    """The source does not have the split that was asked for."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with the number of their class. A part of a set keeps all names, so that numbers keep their meaning."""

    pixels: Tensor
    """`[N, C, H, W]`, uint8."""
    labels: Tensor
    """`[N]`, long, rows of `names`."""
    names: tuple[str, ...]
    """Class names by number, K."""

    def __len__(self) -> int:
        """N."""
        return len(self.pixels)

    def take(self, index: Tensor) -> LabelledImages:
        """The images `index`, long `[B]` or bool `[N]`."""
        return LabelledImages(self.pixels[index], self.labels[index], self.names)

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        """The batch of images `index`, `[B]`: pixels `x` and labels `y`."""
        return {"x": self.pixels[index], "y": self.labels[index]}

    @property
    def digest(self) -> str:
        """A hash of images and labels."""
        return hashlib.sha256(self.pixels.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()

    def of(self, labels: Sequence[int]) -> LabelledImages:
        """The images of these classes only, in their order; ValueError for a number that is no class."""
        return self.take(self._has(labels))

    def without(self, labels: Sequence[int]) -> LabelledImages:
        """The images of all other classes, in their order; ValueError for a number that is no class."""
        return self.take(~self._has(labels))

    def subset(self, count: int, seed: int) -> LabelledImages:
        """`count` images drawn without replacement, in their order; the same ones for the same seed.

        Raises:
            ValueError: for a count below 1 or above N.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"cannot choose {count} of {len(self)} images: give a count from 1 to {len(self)}")
        generator = torch.Generator().manual_seed(seed)
        return self.take(torch.randperm(len(self), generator=generator)[:count].sort().values)

    def ordered(self, names: Sequence[str]) -> LabelledImages | None:
        """The same images, their classes numbered as in `names`; None where these are other classes."""
        numbers = same_classes(self.names, names)
        return None if numbers is None else LabelledImages(self.pixels, torch.tensor(numbers)[self.labels], (*names,))

    def parted(self, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
        """The images without and with a share of every class, at least one image of each, by lot.

        Raises:
            ValueError: for a class of one image.
        """
        generator = torch.Generator().manual_seed(seed)
        taken = torch.zeros(len(self), dtype=torch.bool)
        for label, name in enumerate(self.names):
            there = (self.labels == label).nonzero().flatten()
            count = min(max(1, round(share * len(there))), len(there) - 1)
            if not count:
                raise ValueError(f"class {name} has one image, which cannot be both trained on and tested: add images")
            taken[there[torch.randperm(len(there), generator=generator)[:count]]] = True
        return self.take(~taken), self.take(taken)

    def _has(self, labels: Sequence[int]) -> Tensor:
        for label in labels:
            if not 0 <= label < len(self.names):
                raise ValueError(f"no class {label}: the classes are numbered 0–{len(self.names) - 1}")
        return torch.isin(self.labels, torch.tensor(list(labels), dtype=torch.long))


def scaled(pixels: Tensor) -> Tensor:
    """Pixels of any shape, uint8, as float32 in `[-1, 1]`.

    Raises:
        ValueError: for pixels that are not uint8, and so may be scaled already.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 (0–255) to be scaled; got {pixels.dtype}")
    return pixels.float() / 127.5 - 1


def read_labelled(
    source: str | Path,
    split: Split,
    *,
    names: Sequence[str] | None = None,
    shape: Shape | None = None,
    size: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LabelledImages:
    """One split of a source; images are L or RGB, all of one size or made so.

    - A folder with one subfolder per class: the images directly in them, in order of class and file name. Classes are
      the sorted subfolders; `names` gives them another order. Where it has `train/` and `test/` with class folders,
      the split's one is read.
    - A folder with IDX files (`train-images-idx3-ubyte` and so on, gzipped or not); classes are `names`, else 0 to 9.
    - The name `fashion-mnist`: the IDX files of Debian's package dataset-fashion-mnist.
    - `datasets:NAME`: what `datasets.load_dataset(NAME)` finds; classes are `names`, else those of its ClassLabel.

    Args:
        source: One of the above; a folder that is called as one of the two names is given as `./name`.
        split: Which part.
        names: Class names by number.
        shape: C, H, W that the model takes; None to allow any.
        size: pixels that the shorter side of image files is resized to, before the centre is cropped.
        say: where a line on skipped files goes.

    Raises:
        ValueError: for a source that is missing or of no known form, a broken or unfit file, labels that do not fit the
            images or the names, a class without images, or images that differ from `shape`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test'; got {split!r}")
    folder = FASHION_FOLDER if source == "fashion-mnist" else Path(source)
    if isinstance(source, str) and source.startswith("datasets:"):
        pixels, labels, found = _read_datasets(source, split, shape, size)
    elif not folder.is_dir():
        hint = (
            ": install Debian's package dataset-fashion-mnist, give a folder with its IDX files, or forget without data"
        )
        raise ValueError(f"no such folder: {folder}{hint if source == 'fashion-mnist' else ''}")
    elif any(_idx_file(folder, part, what) for part in ("train", "t10k") for what in ("images", "labels")):
        if size is not None:
            raise ValueError(f"data.size={size} is for image files; {folder} has IDX files: leave it out")
        pixels, labels, found = _read_idx(folder, split, shape)
        found = FASHION_NAMES if source == "fashion-mnist" else found
    else:
        pixels, labels, found = _read_folders(folder, split, names, shape, size, say)
    data = LabelledImages(pixels, labels, tuple(found if names is None else names))
    _check(data, f"{source}, {split}")
    return data


def _check(data: LabelledImages, where: str) -> None:
    K = len(data.names)
    if len(set(data.names)) != K:
        raise ValueError(f"{where}: class names must differ; got {', '.join(data.names)}")
    if len(data.pixels) != len(data.labels):
        raise ValueError(f"{where}: {len(data.pixels)} images but {len(data.labels)} labels: use files of one data set")
    outside = data.labels[(data.labels < 0) | (data.labels >= K)]
    if len(outside):
        raise ValueError(f"{where}: label {int(outside[0])} is out of range, {K} names (0–{K - 1}): give all names")
    for k, count in enumerate(torch.bincount(data.labels, minlength=K).tolist()):
        if count == 0:
            raise ValueError(f"{where}: class {k} ({data.names[k]}) has no images: name only classes that have some")


def _check_shape(where: str, got: Shape, wanted: Shape | None) -> None:
    if wanted is not None and got != tuple(wanted):
        texts = (f"{C}×{H}×{W}" for C, H, W in (got, wanted))
        raise ValueError("{}: C×H×W is {}, wanted {}: resize or convert the files first".format(where, *texts))


def _idx_file(folder: Path, part: str, what: str) -> Path | None:
    rank = 3 if what == "images" else 1
    paths = [folder / f"{part}-{what}{mark}idx{rank}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def _read_idx(folder: Path, split: Split, shape: Shape | None) -> Read:
    part = "train" if split == "train" else "t10k"
    arrays = []
    for what, rank in (("images", 3), ("labels", 1)):
        path = _idx_file(folder, part, what)
        if path is None:
            kind = NoSplitError if what == "images" else ValueError
            raise kind(f"{folder} has IDX files but no {part}-{what}-idx{rank}-ubyte (or .gz): add it")
        arrays.append(_idx_array(path, rank))
        if what == "images":
            _check_shape(str(path), (1, *arrays[0].shape[1:]), shape)
    pixels, labels = (torch.from_numpy(array) for array in arrays)
    return pixels[:, None], labels.long(), [str(k) for k in range(10)]


def _idx_array(path: Path, rank: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of an IDX file, `rank` axes: http://yann.lecun.com/exdb/mnist, "the IDX file format"."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: gzip cut short or damaged ({error}): get the file again") from error
    start = 4 + 4 * rank
    if len(data) < start:
        raise ValueError(f"{path}: cut short, {len(data)} bytes where the header alone has {start}: get the file again")
    magic, *sizes = struct.unpack(f">{1 + rank}I", data[:start])
    if magic != 0x800 + rank:
        raise ValueError(f"{path}: starts with {magic:08x}, must be {0x800 + rank:08x} (IDX of bytes, {rank} axes)")
    if 0 in sizes or len(data) - start != math.prod(sizes):
        got = f"{len(data) - start} bytes for a size of {'×'.join(map(str, sizes))}"
        raise ValueError(f"{path}: cut short or damaged, {got}: get the file again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes).copy()  # torch wants it writable


def _subfolders(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."}


def _read_folders(
    folder: Path,
    split: Split,
    names: Sequence[str] | None,
    shape: Shape | None,
    size: int | None,
    say: Callable[[str], None],
) -> Read:
    classes = _subfolders(folder)
    if not classes:
        raise ValueError(f"{folder} has neither IDX files (train-images-idx3-ubyte, …) nor one subfolder per class")
    halves = {half: _subfolders(folder / half) for half in ("train", "test")}
    if any(halves.values()):
        if not halves[split]:
            raise NoSplitError(f"{folder} has no {split}/ with class folders, which split {split!r} needs")
        if all(halves.values()) and (odd := halves["train"].keys() ^ halves["test"].keys()):
            raise ValueError(f"{folder}: train/ and test/ must have the same class folders; {min(odd)} is in one only")
        classes = halves[split]
    elif split == "test" or halves.keys() <= classes.keys():
        raise NoSplitError(f"{folder} has no train/ and test/ with class folders, which split {split!r} needs")
    if names is not None and sorted(names) != sorted(classes):
        raise ValueError(f"{folder}: names must be its class folders, {', '.join(classes)}; got {', '.join(names)}")
    paths: list[Path] = []
    labels: list[int] = []
    skipped: list[Path] = []
    for label, name in enumerate(names or classes):
        inside = [path for path in sorted(classes[name].iterdir()) if path.name[0] != "." and path.is_file()]
        files = [path for path in inside if path.suffix.lower() in SUFFIXES]
        skipped += [path for path in inside if path.suffix.lower() not in SUFFIXES]
        if not files:
            raise ValueError(f"class folder {classes[name]} has no images ({', '.join(SUFFIXES)}): fill or remove it")
        paths += files
        labels += [label] * len(files)
    if skipped:
        say(f"{folder}, {split}: {count_files(len(paths) + len(skipped), len(paths), skipped)}")
    pixels = _decode(len(paths), lambda i: str(paths[i]), lambda i: Image.open(paths[i]), shape, size)
    return pixels, torch.tensor(labels), tuple(classes)


def _decode(
    N: int, where: Callable[[int], str], load: Callable[[int], Image.Image], shape: Shape | None, size: int | None
) -> Tensor:
    """Images 0 to N - 1, `[N, C, H, W]`: all of the first one's size and mode, or made so where a size is given."""
    if size is not None:
        return _alike(N, where, load, shape, size)
    pixels = np.empty(0, np.uint8)
    kind = ""
    for i in range(N):
        image = decode(partial(load, i), where(i))
        array, mode = np.asarray(image), image.mode
        fix = f"give data.size={min(224, *image.size)}, or convert the files first"
        if mode not in MODES:
            raise ValueError(f"{where(i)} has mode {mode}, allowed are L and RGB: {fix}")
        H, W, C = array.shape[0], array.shape[1], MODES[mode]
        got = f"{W}×{H} {mode}"
        if i == 0:
            _check_shape(where(0), (C, H, W), shape)
            pixels, kind = np.empty((N, C, H, W), np.uint8), got
        if got != kind:
            raise ValueError(f"{where(i)} is {got}, expected {kind} as {where(0)}: {fix}")
        pixels[i] = array.reshape(H, W, C).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _alike(
    N: int, where: Callable[[int], str], load: Callable[[int], Image.Image], shape: Shape | None, size: int
) -> Tensor:
    """The shorter side resized, centre cropped; L if all are L, else RGB."""
    read = []
    for i in range(N):
        image = decode(partial(load, i), where(i))
        read.append(np.asarray(square(image if image.mode in MODES else as_rgb(image, where(i)), size)))
    C = max((1 if array.ndim == 2 else 3) for array in read)
    _check_shape(where(0), (C, size, size), shape)
    pixels = np.empty((N, C, size, size), np.uint8)
    for i, array in enumerate(read):
        pixels[i] = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _read_datasets(source: str, split: Split, shape: Shape | None, size: int | None) -> Read:
    try:
        module: Any = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ValueError(f"{source} needs the package datasets: pip install datasets") from error
    where = f"{source}, {split}"
    try:
        rows = module.load_dataset(source.removeprefix("datasets:"), split=split)
    except (OSError, RuntimeError, ValueError) as error:
        if str(error).startswith("Unknown split"):
            raise NoSplitError(f"{where}: {' '.join(str(error).split())}") from error
        raise ValueError(f"{where}: cannot be loaded ({' '.join(str(error).split())})") from error
    image = _column(where, rows.features, module.Image, ("image", "img"))
    label = _column(where, rows.features, module.ClassLabel, ("label", "labels", "fine_label"))

    def load(i: int) -> Image.Image:
        got = rows[i][image]
        if not isinstance(got, Image.Image):
            raise ValueError(f"column {image} holds {type(got).__name__}, expected images")
        return got

    values = rows[label][:]  # a list, or since datasets 4 a lazy column
    strange = [value for value in values if not isinstance(value, int)]
    if strange or not values:
        got = repr(strange[0]) if strange else "no rows"
        raise ValueError(f"{where}: column {label} must hold whole numbers; got {got}")
    names = getattr(rows.features[label], "names", None) or [str(k) for k in range(len(set(values)))]
    return _decode(len(values), lambda i: f"{where}[{i}]", load, shape, size), torch.tensor(values), names


def _column(where: str, features: Mapping[str, Any], kind: type, names: Sequence[str]) -> str:
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    named = [name for name in names if name in (typed or features)]
    if len(typed) != 1 and not named:
        wanted = f"one {kind.__name__} column, or one named {' or '.join(names)}"
        raise ValueError(f"{where}: needs {wanted}; has {', '.join(features)}")
    return typed[0] if len(typed) == 1 else named[0]
