"""What NudeNet found in images: its labels, the record of every detection, and that record as a JSON file.

The record keeps all classes and scores, so that it can be counted by any protocol (`erase.evaluation.nudity`) without
detecting again, and says what made it. It also gives the boxes to hide before a person sees the images.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from erase.store.files import json_text, read_json, replacing

Box = tuple[int, int, int, int]
"""Left, top, width, height, in pixels."""
Channels = Literal["corrected", "as_shipped"]
SCORE_FLOOR = 0.2
NMS_FLOOR = 0.25
LABELS: tuple[str, ...] = (
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)
"""NudeNet 3's labels, in the network's order."""
EXPOSED: tuple[str, ...] = tuple(label for label in LABELS if label.endswith("_EXPOSED"))
"""The 9 exposed body parts."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One body part found."""

    label: str
    score: float
    box: Box


@dataclass(frozen=True, slots=True)
class ImageDetections:
    """All that was found in an image, or why it could not be looked at."""

    file: Path
    detections: tuple[Detection, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Detections:
    """Every detection of every class, with what made them; each table is a view of this record."""

    images: tuple[ImageDetections, ...]
    nudenet: str
    """Package version."""
    model_sha256: str
    channels: Channels
    resolution: int
    """Side in pixels of the network's input; images are padded to a square and scaled to it."""
    score_floor: float = SCORE_FLOOR
    nms_floor: float = NMS_FLOOR

    @property
    def provenance(self) -> dict[str, Any]:
        """All but the images."""
        return {
            "nudenet": self.nudenet,
            "model_sha256": self.model_sha256,
            "channels": self.channels,
            "resolution": self.resolution,
            "score_floor": self.score_floor,
            "nms_floor": self.nms_floor,
        }


def save_detections(detections: Detections, path: Path) -> None:
    """Write the record as JSON, atomically; image paths are relative to it, so that a run can be moved.

    An image is a line, written as it comes: the text of millions is never all in memory.
    """
    folder = Path(path).resolve().parent

    def line(image: ImageDetections) -> str:
        file = Path(os.path.relpath(image.file.resolve(), folder)).as_posix()
        found = {"file": file, "error": image.error, "detections": [asdict(d) for d in image.detections]}
        return json.dumps(found, ensure_ascii=False, allow_nan=False)

    head = json_text({"schema": 1, **detections.provenance}).removesuffix("\n}\n")
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{head},\n  "images": [')
        for number, image in enumerate(detections.images):
            file.write(f"{',' if number else ''}\n    {line(image)}")
        file.write("\n  ]\n}\n")


def load_detections(path: Path) -> Detections:
    """Read what `save_detections` wrote; image paths come back relative to where ``path`` is.

    Raises:
        ValueError: the file is missing, is not JSON, or is not such a record.
    """
    value = read_json(path)
    folder = Path(path).parent
    try:
        if value["schema"] != 1:
            raise ValueError(f"schema is {value['schema']}, expected 1")
        images = tuple(
            ImageDetections(
                folder / image["file"],
                tuple(
                    Detection(str(d["label"]), float(d["score"]), cast(Box, tuple(map(int, d["box"]))))
                    for d in image["detections"]
                ),
                image["error"],
            )
            for image in value["images"]
        )
        return Detections(
            images,
            nudenet=str(value["nudenet"]),
            model_sha256=str(value["model_sha256"]),
            channels=value["channels"],
            resolution=int(value["resolution"]),
            score_floor=float(value["score_floor"]),
            nms_floor=float(value["nms_floor"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a record of detections ({what})") from error


def exposed_boxes(detections: Detections, *, threshold: float = NMS_FLOOR) -> dict[Path, list[Box]]:
    """The boxes to hide from a person, for each image: exposed parts with a score of at least ``threshold``.

    Every image has an entry, most of them empty: an image without one was not looked at. An image on which
    the detector failed is hidden whole.
    """
    everything: Box = (0, 0, 2**31, 2**31)
    return {
        image.file: [everything]
        if image.error is not None
        else [d.box for d in image.detections if d.label in EXPOSED and d.score >= threshold]
        for image in detections.images
    }
