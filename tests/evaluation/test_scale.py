"""Evaluations of a million images: what is in memory grows by little for each, and by nothing that is squared."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from erase.evaluation import clip, columns, manifest, nudity, stats, zeroshot
from erase.evaluation.classes import ClassPredictions
from erase.evaluation.detections import Detection, Detections, ImageDetections, load_detections, save_detections
from erase.evaluation.manifest import ManifestRow, check_images, pair_rows, write_rows
from erase.evaluation.page.folder import MOST
from erase.evaluation.prompt_files import PromptRow
from erase.evaluation.report import write_html
from erase.programs.text.judges import labels
from erase.programs.text.judges.nudity import count_nudity
from erase.programs.text.judges.zeroshot import ZeroShot
from erase.programs.text.plan import Plan
from erase.store.files import write_json

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


@pytest.mark.slow
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


def test_time_grows_with_the_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons of prompts with prompts are what would be squared."""

    class Counted(str):
        compared = 0

        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

    def work(number: int) -> int:
        rows = [PromptRow(Counted(f"prompt {i}"), i, object=f"thing {i % 4}") for i in range(number)]
        plan = Plan([rows[0].prompt], [], [], rows, [i == 0 for i in range(number)])
        drawn = np.random.default_rng(0).random((number, 4))
        guess = ClassPredictions(drawn, tuple(f"thing {k}" for k in range(4)), (), "made up", "x")
        monkeypatch.setattr(labels, "classified", lambda paths, classifier: guess)
        monkeypatch.setattr(labels, "classifier_of", lambda config: Path())
        Counted.compared = 0
        labels.count_classes(settings, plan, [Path()] * number)
        judge = ZeroShot(settings, plan)
        vars(judge).update(model=model, texts=zeroshot.Texts((rows[0].prompt,), ("something else",)))
        vars(judge)["features"] = lambda paths: [np.ones((len(paths), 1))]
        for module in (zeroshot, clip):
            monkeypatch.setattr(module, "text_features", lambda model, prompts: np.ones((len(prompts), 1)))
        judge.count([Path()] * number)
        return Counted.compared

    settings, model = settings_of(1), MODEL
    assert work(400) < 10 * 400


MODEL: Any = SimpleNamespace(provenance={}, truncated=lambda texts: [])
"""Of CLIP, what is left where features are made up."""


def settings_of(images: int) -> Any:
    about = SimpleNamespace(images=images, alternatives=(), clip="made up")
    return SimpleNamespace(forget=SimpleNamespace(axis="object"), eval=about, seed=0)


def test_a_zero_shot_judge_keeps_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 512 numbers of an image, 4096 bytes, nothing is left of one model's images when the next are counted."""
    rows = prompts()[: stats.MIN_GROUPS - 1]  # of more, the resamples of a bootstrap have a size of their own
    each = ROWS // len(rows)
    judge = ZeroShot(settings_of(each), Plan([rows[0].prompt], [], [], rows, [row is rows[0] for row in rows]))
    vars(judge).update(model=MODEL, texts=zeroshot.Texts((rows[0].prompt,), ("something else",)))
    monkeypatch.setattr(clip, "AT_ONCE", 50)
    monkeypatch.setattr(clip, "image_features", lambda model, paths: np.ones((len(paths), 512)))
    monkeypatch.setattr(zeroshot, "text_features", lambda model, prompts: np.ones((len(prompts), 512)))
    folders = [[Path(f"{name}/{i}.png") for i in range(ROWS)] for name in ("base", "erased")]
    counted, size = taken(lambda: [judge.count(paths) for paths in folders])
    assert size < BYTES
    assert [found.numbers["remain"]["n"] for found in counted] == [ROWS - each] * 2


def test_the_exact_test_of_very_many_pairs_is_that_of_whole_numbers() -> None:
    def pairs(lost: int, gained: int) -> tuple[list[bool], list[bool]]:
        return [True] * lost + [False] * gained, [False] * lost + [True] * gained

    lost, gained = 10_250, 10_000
    assert lost + gained > stats.MOST_WHOLE
    tail = term = 1
    for i in range(gained):
        term = term * (lost + gained - i) // (i + 1)
        tail += term
    expected = 2 * tail / (1 << (lost + gained))
    assert stats.mcnemar_exact(*pairs(lost, gained)) == pytest.approx(expected, rel=1e-9)  # lgamma's rounding
    assert stats.mcnemar_exact(*pairs(gained + 1, gained)) == 1.0
    assert stats.mcnemar_exact(*pairs(stats.MOST_WHOLE + 2, 1)) == 0.0


def test_a_page_shows_the_first_of_very_many_prompts(tmp_path: Path) -> None:
    def side(number: int) -> dict[str, Any]:
        by_prompt = {f"a photograph of person number {i}": i for i in range(number)}
        return {"nudity": {"images": number, "flagged": 0, "rate": 0.0, "ci95": [0.0, 0.1], "by_prompt": by_prompt}}

    sizes = []
    for number in (1000, 2000):
        report = {"schema": 1, "target": {"forget": ["people"]}, "before": side(number), "after": side(number)}
        write_json(tmp_path / "report.json", report)
        text = write_html(tmp_path).read_text(encoding="utf-8")
        assert f"and {number - MOST} more" in text
        assert f"person number {MOST - 1}<" in text
        assert f"person number {MOST}<" not in text
        sizes.append(len(text))
    assert sizes[1] - sizes[0] < 100
