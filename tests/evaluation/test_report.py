import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erase.evaluation import report
from erase.evaluation.grid import grid_from_folders, save_image
from erase.evaluation.report import write_html

VOID = {"meta", "img", "br", "hr", "link", "input", "polyline"}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers text, images and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " " if tag in ("th", "td") else ""
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "xlink:href", "data", "srcset"):
                self.addresses.append(value or "")
            if tag == "img" and name == "src":
                self.images.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    parsed = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert "url(" not in text
    assert "@import" not in text
    return parsed


def squeeze(text: str) -> str:
    return " ".join(text.split())


def nudity(flagged: int, images: int, ci95: list[float], belly: int) -> dict[str, Any]:
    return {
        "preset": "i2p",
        "images": images,
        "flagged": flagged,
        "rate": flagged / images,
        "ci95": ci95,
        "counts": {"BELLY_EXPOSED": belly},
        "errors": [],
    }


def score(correct: int, n: int) -> dict[str, Any]:
    return {"n": n, "correct": correct, "accuracy": correct / n, "ci95": [0.1, 0.9]}


REPORT: dict[str, Any] = {
    "schema": 1,
    "command": ["erase", "run", "sd", "demo", "forget.prompts=a <b> c"],
    "method": "sfron",
    "seed": 7,
    "target": "<script>alert(1)</script>",
    "mask": {"density": 0.251, "per_layer": {"down.0.attn2.to_k": 0.5, "up.1.attn2.to_v": 0.125}},
    "before": {
        "nudity": nudity(12, 40, [0.181, 0.454], 9),
        "classes": {"forget": score(9, 10), "remain": score(18, 20), "per_label": {"cat": score(9, 10)}},
    },
    "after": {
        "nudity": nudity(0, 40, [0.0, 0.088], 0),
        "classes": {"forget": score(1, 10), "remain": score(17, 20), "per_label": {"cat": score(1, 10)}},
    },
    "paired": {"nudity mcnemar p": 0.000488},
    "timing": {"saliency_s": 1.5, "erase_s": 60.25, "steps": 100, "step_s": 0.6},
    "versions": {"torch": "2.13", "erase": "0.1"},
    "metrics": {"unlearned": {"FA": 0.1}},
}


def images(folder: Path, number: int, size: int = 32) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(number)
    lines = []
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "prompt": f"prompt <{i}>", "seed": i, "index": 0, "sha256": ""}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "run.json").write_text(json.dumps({"config": {"train": {"steps": 100}}, "note": "</pre>"}))
    rows = [
        {
            "step": i,
            "forget_loss": 1 + i / 10,
            "remain_loss": 1 - i / 200,
            "fast_rate": 0.1 * (100 - i),
            "skipped_fast": 0,
            "seconds": i * 0.6,
        }
        for i in range(100)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images(tmp_path / "images" / "base", 15)
    images(tmp_path / "images" / "erased", 15)
    save_image(grid_from_folders([tmp_path / "images" / "base", tmp_path / "images" / "erased"]), tmp_path / "grid.png")
    return tmp_path


def test_a_whole_run(run_dir: Path) -> None:
    path = write_html(run_dir)
    assert path == run_dir / "report.html"
    parsed = page(path)
    text = squeeze(parsed.text)
    nudity_line = (
        "nudity: 12 of 40 (30.0 %; 95 % interval 18.1 to 45.4 %) → 0 of 40 (0.0 %; 95 % interval 0.0 to 8.8 %)"
    )
    forget_line = "classes forget: 9 of 10 (90.0 %; 95 % interval 10.0 to 90.0 %) → 1 of 10 (10.0 %"
    assert 0 < text.index(nudity_line) < text.index(forget_line) < text.index("classes remain: 18 of 20")
    assert text.index("classes remain:") < text.index("Pictures") < text.index("Counts") < text.index("Training")
    assert text.index("Training") < text.index("Mask") < text.index("Time") < text.index("How it was made")
    assert "images flagged by the 'i2p' protocol" in text
    assert "counts BELLY_EXPOSED 9 0" in text
    assert "erase run sd demo 'forget.prompts=a <b> c'" in text
    assert "25.1 % of the trainable weights may change" in text
    assert "up.1.attn2.to_v 12.5 %" in text
    assert "saliency_s 1.5" in text
    assert "torch 2.13" in text
    assert "unlearned FA 0.1" in text
    assert "nudity mcnemar p 0.000488" in text
    assert "<script>alert(1)</script>" in text  # as text: no such tag was parsed
    assert "The first 12 of 15" in text
    assert len(parsed.images) == 1 + 2 * report.MAX_PAIRS
    assert parsed.tags.count("svg") == 2  # the losses together, and the fast rate; counters at 0 are not drawn
    assert "prompt <0>, seed 0" in text


def test_attacks_are_a_section(run_dir: Path) -> None:
    def share(shown: int, n: int) -> dict[str, Any]:
        return {"n": n, "shown": shown, "rate": shown / n, "ci95": [0.1, 0.9]}

    sides = {"base": share(4, 5), "erased": share(1, 5)}
    robust = {
        "concept": ["<cat>"],
        "judge": "mine",
        "paraphrases": {**sides, "prompts": 2, "by_prompt": {"a <kitten>": sides}},
        "inversion": {"prompt": "a *", "steps": 9, "erased": share(2, 4)},  # without its control
        "relearn": {
            "parameters": "full",
            "lr": 0.1,
            "batch_size": 8,
            "curve": [{"steps": 0, **share(0, 4)}, {"steps": 5, **share(3, 4)}],
        },
    }
    (run_dir / "report.json").write_text(json.dumps({**REPORT, "robustness": robust}))
    text = squeeze(page(write_html(run_dir)).text)
    assert "Pictures that show <cat>, by mine" in text
    base, erased = ("of 5 (80.0 %; 95 % interval 10.0 to 90.0 %)", "of 5 (20.0 %; 95 % interval 10.0 to 90.0 %)")
    assert f"paraphrases, 2 prompts 4 {base} 1 {erased}" in text
    assert f"a <kitten> 4 {base} 1 {erased}" in text
    assert "inversion, 9 steps – 2 of 4 (50.0 %" in text
    assert "the * of “a *”" in text
    assert "0 steps 0 of 4 (0.0 %" in text
    assert "5 steps 3 of 4 (75.0 %" in text
    assert "by_prompt" not in text  # nor as a plain table
    assert report.robustness_lines(robust)[0] == f"paraphrases, 2 prompts: base 4 {base}; erased 1 {erased}"
    assert report.robustness_lines({}) == []


def decoded(source: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"))


def test_pictures_are_those_of_the_run_and_blurred_on_request(run_dir: Path) -> None:
    base = np.asarray(Image.open(run_dir / "images" / "base" / "0.png"))
    shown = page(write_html(run_dir)).images
    assert np.array_equal(decoded(shown[0]), np.asarray(Image.open(run_dir / "grid.png")))
    assert np.array_equal(decoded(shown[1]), base)
    paths = sorted((run_dir / "images").glob("*/*.png"))
    parsed = page(write_html(run_dir, blur={path: [(0, 0, 32, 32)] for path in paths}))
    assert "Exposed body parts that the detector found are hidden" in parsed.text
    assert len(np.unique(decoded(parsed.images[1]).reshape(-1, 3), axis=0)) <= 16
    with pytest.raises(ValueError, match="not among the 0 images scanned"):
        write_html(run_dir, blur={})


def test_large_images_become_thumbnails(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    images(tmp_path / "images" / "erased", 1, size=300)
    parsed = page(write_html(tmp_path))
    assert decoded(parsed.images[0]).shape == (256, 256, 3)


def test_what_is_not_there_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"command": "erase run", "after": {"nudity": {"images": 0}}}))
    text = page(write_html(tmp_path)).text
    for heading in ("Pictures", "Training", "Mask", "Time", "run.json", "Paired"):
        assert heading not in text
    assert "erase run" in text


def test_images_that_failed_are_a_warning(tmp_path: Path) -> None:
    after = nudity(0, 3, [0.0, 0.5], 0) | {"errors": [{"file": "a.png", "error": "cut short"}]}
    (tmp_path / "report.json").write_text(json.dumps({"after": {"nudity": after}}))
    text = squeeze(page(write_html(tmp_path)).text)
    assert "1 image could not be looked at, and is in no count: after, nudity: a.png: cut short" in text


def test_no_images_is_not_zero(tmp_path: Path) -> None:
    after = {"forget": {"n": 0, "correct": 0, "accuracy": None, "ci95": None}}
    (tmp_path / "report.json").write_text(json.dumps({"after": {"classes": after}}))
    assert "classes forget: after no images" in squeeze(page(write_html(tmp_path)).text)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("report.json", None, r"report\.json: no such file"),
        ("report.json", '{"before": {', r"report\.json: not JSON, or cut short"),
        ("report.json", "[]", r"report\.json: holds a list"),
        ("report.json", '{"before": 3}', r"'before' is not a mapping"),
        ("report.json", '{"mask": {"per_layer": {"a": "b"}}}', r"mask\.per_layer"),
        ("run.json", "{", r"run\.json: not JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"st', r"metrics\.jsonl: line 2 is not JSON, or cut short"),
        ("metrics.jsonl", "3\n", r"metrics\.jsonl: line 1 holds a int"),
        ("images/base/manifest.jsonl", "{}\n", r"manifest\.jsonl: line 1 is not a row"),
    ],
)
def test_malformed_files_are_named(run_dir: Path, file: str, text: str | None, message: str) -> None:
    (run_dir / file).unlink()
    if text is not None:
        (run_dir / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        write_html(run_dir)
    assert not (run_dir / "report.html").exists()


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such run folder"):
        write_html(tmp_path / "absent")


def test_curves_are_the_numbers(tmp_path: Path) -> None:
    rows = [{"step": 10, "a_loss": 1.0}, {"step": 20, "a_loss": 3.0}, {"step": 30, "a_loss": 2.0}]
    (chart,) = report._charts(rows)
    assert chart.lines[0].runs == ("0.0,150.0 300.0,0.0 600.0,75.0",)
    assert (chart.low, chart.high, chart.first, chart.last, chart.lines[0].last) == ("1", "3", "10", "30", "2")


def test_values_that_are_not_numbers_are_gaps_and_said(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    values = ["1.0", "2.0", "NaN", "null", "4.0"]
    lines = [f'{{"step": {i}, "a_loss": {value}}}\n' for i, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    path = write_html(tmp_path)
    assert "2 values were not numbers" in page(path).text
    assert re.findall(r'points="([^"]*)"', path.read_text()) == ["0.0,150.0 150.0,100.0", "600.0,0.0"]


def test_thinning_keeps_spikes() -> None:
    run = [(float(i), 0.0) for i in range(100_000)]
    run[12_345], run[54_321] = (12_345.0, 9.0), (54_321.0, -9.0)
    thin = report._thin(run)
    assert len(thin) <= report.MAX_POINTS
    assert run[12_345] in thin
    assert run[54_321] in thin
    assert thin == sorted(thin)


def test_the_verdict_for_a_terminal() -> None:
    score = {"n": 4, "correct": 3, "accuracy": 0.75}
    before = {"classes": {"remain": score, "per_label": {"cat": score}, "per_prompt": {"a cat": score}}}
    lines = report.verdict(
        {"before": before, "after": {"classes": {"remain": {**score, "correct": 1, "accuracy": 0.25}}}}
    )
    assert lines == ["classes remain: 3 of 4 (75.0 %) → 1 of 4 (25.0 %)"]
    assert report.verdict({}) == []
