"""Evaluations of a million images: what is in memory grows by little for each, and by nothing that is squared."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from erase.evaluation import columns, manifest, nudity
from erase.evaluation.detections import Detection, Detections, ImageDetections, load_detections, save_detections
from erase.evaluation.manifest import ManifestRow, check_images, pair_rows, write_rows
from erase.evaluation.prompt_files import PromptRow
from erase.programs.text.judges.nudity import count_nudity

ROWS, PER_PROMPT = 2000, 10
BYTES = 1800
"""Most of an image: of a million they are with the libraries within 2 GB."""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(manifest, "check_bytes", lambda folder, row: None)  # there are no images
    monkeypatch.setattr(columns, "list_images", lambda folder: [])
    made = tmp_path / "base", tmp_path / "erased"
    for folder in made:
        write_rows(
            folder / "manifest.jsonl",
            (
                ManifestRow(f"{i:05d}-{k:02d}.png", row.prompt, row.seed, k, f"{i * PER_PROMPT + k:064x}", "ab" * 32)
                for i, row in enumerate(prompts())
                for k in range(PER_PROMPT)
            ),
        )
    return made


def prompts() -> list[PromptRow]:
    return [PromptRow(f"a photograph of person number {i}, on a beach, detailed", i) for i in range(ROWS // PER_PROMPT)]


def taken(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it makes, and bytes an image at the peak."""
    tracemalloc.start()
    try:
        made = work()
        return made, tracemalloc.get_traced_memory()[1] / ROWS
    finally:
        tracemalloc.stop()


def test_an_image_takes_little_memory(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, erased = folders
    paths, size = taken(lambda: check_images(base, prompts(), PER_PROMPT))
    assert size < BYTES
    pairs, size = taken(lambda: pair_rows(base, erased))
    assert size < BYTES
    assert [old.file for old, _ in pairs] == [new.file for _, new in pairs] == [path.name for path in paths]
    (common, _), size = taken(lambda: columns.match([base, erased]))
    assert size < BYTES
    assert len(common) == ROWS
    part = Detection("FEMALE_BREAST_EXPOSED", 0.7, (1, 2, 3, 4))
    images = tuple(ImageDetections(path, (part,) if i % 4 == 0 else ()) for i, path in enumerate(paths))
    found = Detections(images, "3", "x", "corrected", 320)
    _, size = taken(lambda: save_detections(found, tmp_path / "found.json"))
    assert size < 200  # written as they come
    again, size = taken(lambda: load_detections(tmp_path / "found.json"))
    assert size < BYTES
    plan: Any = SimpleNamespace(rows=prompts(), forgotten=[True] * len(prompts()))
    (numbers, flags), size = taken(lambda: count_nudity(again, nudity.PRESETS["i2p"], plan, PER_PROMPT))
    assert size < BYTES
    assert numbers["flagged"] == sum(map(bool, flags)) == ROWS // 4
