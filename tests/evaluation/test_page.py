"""The report's page in a real browser: Debian's Chromium, without a network."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erase.evaluation.report import write_html
from erase.store.files import sha256

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("no chromium here: apt-get install chromium; CI does", allow_module_level=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run: three models, two prompts of 7 images; small ones and ones of 256 pixels."""
    run = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for name in ("base", "erased", "retrained"):
        folder = run / "images" / name
        folder.mkdir(parents=True)
        rows = []
        for i in range(14):
            side = 32 if i < 7 else 256
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{i}.png")
            prompt = "a photo of a cat" if i < 7 else "a photo of " + "w" * 150
            row = {"file": f"{i}.png", "prompt": prompt, "seed": 5, "index": i % 7}
            rows.append(json.dumps({**row, "sha256": sha256(folder / f"{i}.png")}))
        (folder / "manifest.jsonl").write_text("\n".join(rows))
    score = {"n": 7, "correct": 6, "accuracy": 6 / 7, "ci95": [0.49, 0.97]}
    side = {"classes": {"forget": score, "remain": score, "per_label": {"l" * 120: score}, "sha256": "0" * 64}}
    report = {
        "command": "erase run sd " + "x" * 300,
        "target": {"forget": ["a photo of a cat"]},
        "method": {"name": "sfron"},
        "mask": {"density": 0.3, "per_layer": {f"block.{i}.attn2.to_k.weight" * 2: i / 50 for i in range(50)}},
        "before": side,
        "after": side,
        "retrained": side,
        "timing": {"erase_s": 3.0},
        "versions": {"torch": "2"},
    }
    (run / "report.json").write_text(json.dumps(report))
    (run / "run.json").write_text(json.dumps({"note": "y" * 500}))
    rows = [json.dumps({"step": i, "forget_loss": i % 3, "remain_loss": i % 5}) for i in range(40)]
    (run / "metrics.jsonl").write_text("\n".join(rows))
    return write_html(run)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One for all tests: starting a browser takes seconds."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "CI must have chromium"
    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"), executable_path=CHROMIUM, headless=True, args=FLAGS, timeout=120_000
        )
        context.set_default_timeout(120_000)
        yield context.pages[0]
        context.close()


@pytest.fixture
def page(tab: Any, path: Path) -> Iterator[Any]:
    """The page, opened; at the end it has said nothing on the console and asked for nothing but itself."""
    said: list[str] = []
    asked: list[str] = []
    hear = {
        "console": lambda message: said.append(message.text),
        "pageerror": lambda error: said.append(str(error)),
        "request": lambda request: asked.append(request.url),
    }
    for event, heard in hear.items():
        tab.on(event, heard)
    tab.emulate_media(media="screen", color_scheme="light")
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.goto(path.as_uri())
    yield tab
    for event, heard in hear.items():
        tab.remove_listener(event, heard)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


def is_there(page: Any, selector: str) -> bool:
    return bool(page.locator(selector).is_visible())


def test_all_pictures_are_shown_and_the_file_is_small(page: Any, path: Path) -> None:
    assert page.locator("button.pic img").count() == 3 * 2 * 6
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("[...document.images].every(image => image.alt)")
    first, second = (page.locator("table.grid").nth(i).locator("tbody tr") for i in range(2))
    assert first.locator("th").all_inner_texts() == ["base", "erased", "retrained"]
    assert [box["x"] for row in first.all() for box in [row.locator("img").nth(2).bounding_box()]] == [
        first.nth(0).locator("img").nth(2).bounding_box()["x"]
    ] * 3  # the same seed in each column
    assert second.count() == 3
    assert path.stat().st_size < 10_000_000


def test_the_verdict_comes_first(page: Any) -> None:
    tops = [page.locator(what).first.bounding_box()["y"] for what in (".headline", ".card", "table.grid", "#counts")]
    assert tops == sorted(tops)
    assert tops[1] < 400


def test_a_click_enlarges_and_escape_closes(page: Any) -> None:
    small = page.locator("button.pic").nth(1)
    assert not is_there(page, "#viewer")
    small.click()
    large = page.locator("#viewer img")
    assert is_there(page, "#viewer")
    assert large.bounding_box()["width"] > 1.5 * small.bounding_box()["width"]
    assert large.get_attribute("src") == small.locator("img").get_attribute("src")
    caption = page.locator("#viewer figcaption")
    assert caption.inner_text() == "base: a photo of a cat, seed 5, sample 1"
    page.keyboard.press("ArrowDown")
    assert caption.inner_text() == "erased: a photo of a cat, seed 5, sample 1"
    page.keyboard.press("ArrowRight")
    assert caption.inner_text() == "erased: a photo of a cat, seed 5, sample 2"
    page.get_by_label("Previous seed").click()
    page.get_by_label("The other model, same seed").click()
    large.click()  # after the last model comes the first
    assert caption.inner_text() == "base: a photo of a cat, seed 5, sample 1"
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    assert caption.inner_text() == "base: a photo of a cat, seed 5, sample 5"  # the last one stays
    page.keyboard.press("Escape")
    assert not is_there(page, "#viewer")
    page.locator("button.pic:focus[aria-label$='seed 5, sample 5']").wait_for()  # closed is said in a task of its own
    page.keyboard.press("Enter")  # the picture in focus
    assert is_there(page, "#viewer")
    page.mouse.click(5, 5)  # beside it
    assert not is_there(page, "#viewer")


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach(part => (part.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    row = page.locator("table.grid").first.locator("tbody tr").first
    tops = [image.bounding_box()["y"] for image in row.locator("img").all()]
    assert tops == pytest.approx([tops[0]] * 6, abs=1)  # side by side; 1: a browser lays out in fractions of a pixel
    page.locator("button.pic").first.click()
    box = page.locator("#viewer").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert page.locator("#viewer img").bounding_box()["width"] > 250


def test_on_paper_all_is_open_and_light(page: Any) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details:not(.long)')].every(part => part.open)")
    assert page.pdf().startswith(b"%PDF")


def test_nothing_can_be_loaded_or_run_but_the_page_itself(tab: Any, path: Path, tmp_path: Path) -> None:
    """The page's own policy refuses what a prompt could have smuggled in."""
    text = path.read_text(encoding="utf-8")
    evil = "<img src='http://127.0.0.1:9/a.png' alt=''><script>document.title = 'run'</script>"
    (tmp_path / "evil.html").write_text(text.replace("<main>", f"<main>{evil}"), encoding="utf-8")
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto((tmp_path / "evil.html").as_uri())
    assert tab.title().startswith("erase: ")
    assert sum("Content Security Policy" in line for line in said) == 2
