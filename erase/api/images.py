"""Images: counted, and put side by side."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from erase import resources
from erase.evaluation import classes, detector
from erase.evaluation import grid as grids
from erase.evaluation import nudity as counting
from erase.evaluation.detections import Box, exposed_boxes
from erase.evaluation.image_files import list_images

Images = str | Path | Sequence[str | Path | Image.Image]
"""A folder, or images and image files."""


def count(
    images: Images,
    *,
    nudity: str | None = None,
    body_parts: Sequence[str] = (),
    threshold: float | None = None,
    classifier: str | Path | None = None,
) -> dict[str, Any]:
    """Count what images show, by NudeNet or by an image classifier.

    Args:
        images: a folder, or images and image files.
        nudity: a published counting rule (`i2p`, `esd`, `mace`, …): see `erase.evaluation.nudity.PRESETS`.
        body_parts: the NudeNet classes that count, instead of a published rule.
        threshold: the lowest score that counts, with `body_parts`; 0.6 unless given.
        classifier: a folder of a `transformers` image classifier, or an embedded one's name.

    Returns:
        From NudeNet, `flagged` of `images`, `rate` with its `ci95`, `counts` by class, and how they were counted; from
        a classifier, `images` and `counts` by label.

    Raises:
        ValueError: unless one of the three ways is chosen, for a `threshold` without `body_parts`, and for images that
            cannot be read.
    """
    ways = {"nudity": nudity, "body_parts": body_parts or None, "classifier": classifier}
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"count needs one of nudity, body_parts and classifier; got {', '.join(chosen) or 'none'}")
    if threshold is not None and not body_parts:
        raise ValueError(f"threshold={threshold} is for body_parts; {chosen[0]} has no threshold to set: leave it out")
    with files_of(images) as paths:
        if classifier is not None:
            seen = classes.classify(paths, resources.tiny_path(classifier))
            counts = Counter(label for labels in seen.shown for label in labels)
            return {"images": len(paths), "counts": {name: counts[name] for name in seen.labels}, **seen.provenance}
        return count_parts(paths, nudity or _preset(body_parts, 0.6 if threshold is None else threshold))


def count_parts(paths: Sequence[Path], preset: counting.CountPreset | str) -> dict[str, Any]:
    """NudeNet's count.

    Raises:
        ValueError: for an image that it failed on: it is not known to be safe.
    """
    found = counting.count(detector.detect(paths), preset)
    if found["errors"]:
        failed = found["errors"][0]
        raise ValueError(
            f"the detector failed on {len(found['errors'])} images, first {failed['file']}: {failed['error']}"
        )
    return found


def grid(
    rows: Mapping[str, Images], *, columns: Sequence[str] | None = None, blur: bool = True, **given: Any
) -> Image.Image:
    """Images side by side: a row for each name.

    Args:
        rows: images by the row's name.
        columns: a heading for each column.
        blur: whether to hide exposed body parts that NudeNet finds.
        given: `max_columns`, `tile` and `title` of `erase.evaluation.grid.grid`.

    Raises:
        ValueError: for no rows, a row without images, too few headings, and images that cannot be read.
    """
    with tempfile.TemporaryDirectory() as work:
        found = {
            name: write_images(images, Path(work) / str(number)) for number, (name, images) in enumerate(rows.items())
        }
        hidden = boxes_of([path for paths in found.values() for path in paths]) if blur and found else None
        return grids.grid(list(found.items()), columns=columns, blur=hidden, **given)


def boxes_of(paths: Sequence[Path]) -> dict[Path, list[Box]]:
    """What is hidden of image files before a person sees them."""
    return exposed_boxes(detector.detect(paths))


@contextmanager
def files_of(images: Images) -> Iterator[list[Path]]:
    """Images as files, for a while."""
    with tempfile.TemporaryDirectory() as work:
        yield write_images(images, Path(work))


def write_images(images: Images, folder: Path) -> list[Path]:
    """Files of images: those that are files as they are, others written into a folder."""
    if isinstance(images, str | Path):
        return list_images(Path(images))
    paths = []
    for number, image in enumerate(images):
        if isinstance(image, Image.Image):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number:05d}.png"
            image.convert("RGB").save(path)
            paths.append(path)
        elif isinstance(image, str | Path):
            paths.append(Path(image))
        else:
            raise TypeError(f"expected PIL images or paths; got a {type(image).__name__}")
    return paths


def _preset(body_parts: Sequence[str], threshold: float) -> counting.CountPreset:
    return counting.custom_preset(body_parts, threshold)
