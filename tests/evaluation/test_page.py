"""The pages of a run and of a comparison in a real browser: Debian's Chromium, without a network."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erase import resources
from erase.config import override, read_preset
from erase.evaluation import detector
from erase.evaluation.detections import Detections, ImageDetections
from erase.evaluation.page.scores import Score
from erase.evaluation.report import write_html
from erase.evaluation.stats import wilson
from erase.programs.comparison.images import Finished, image_blocks
from erase.programs.comparison.page import _pooled, write_page
from erase.programs.comparison.spec import Run, Spec
from erase.programs.text.report import AXES, GOALS
from erase.store.files import sha256

pytestmark = pytest.mark.slow
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
    """The page of a run."""
    yield from opened(tab, path)


@pytest.fixture
def compared(tab: Any, comparison: Path) -> Iterator[Any]:
    """The page of a comparison."""
    yield from opened(tab, comparison)


def opened(tab: Any, path: Path) -> Iterator[Any]:
    """A page; at the end it has said nothing on the console and asked for nothing but itself."""
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


BROKEN = """() => {
  const found = [], walker = document.createTreeWalker(document.querySelector('body'), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest('script, style, pre, .layers, .hashes, [hidden]')) continue;
    for (const match of node.data.matchAll(/[\\p{L}]{2,14}(?![\\p{L}])/gu)) {
      if (match.index && /\\p{L}/u.test(node.data[match.index - 1])) continue;  // the end of a longer word
      const range = document.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) found.push(match[0]);
    }
  }
  return found;
}"""
"""Words of up to 14 letters that are broken over two lines."""


@pytest.mark.parametrize("width", [390, 1200])
def test_no_word_is_broken(tab: Any, path: Path, comparison: Path, tmp_path: Path, width: int) -> None:
    shown = "a sepia photograph of a motorcycle and an astronaut"
    for number, file in enumerate((path, comparison)):
        text = file.read_text(encoding="utf-8").replace("a photo of a cat", shown).replace(">sample 1<", f">{shown}<")
        (tmp_path / f"{number}.html").write_text(text.replace("--word:6", "--word:10"), encoding="utf-8")
        tab.set_viewport_size({"width": width, "height": 800})
        tab.goto((tmp_path / f"{number}.html").as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(part => (part.open = true))")
        assert tab.evaluate(BROKEN) == []
        assert tab.evaluate("document.documentElement.scrollWidth") == width


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


# --- comparisons ----------------------------------------------------------------------------------

PROMPTS = {"cat": "a photo of a cat", "dog": "a photo of a dog", "long": "a photo of " + "w" * 80}
METHODS = ("SFR-on", "<b>ESD</b>")
FORGET = "Forgotten concept still recognised"


def write_images(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    rows = []
    for i, (prompt, index) in enumerate((prompt, index) for prompt in PROMPTS.values() for index in range(8)):
        pixels = np.random.default_rng([number, i]).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        row = {"file": f"{i}.png", "prompt": prompt, "seed": 5, "index": index}
        rows.append(json.dumps({**row, "sha256": sha256(folder / f"{i}.png")}))
    (folder / "manifest.jsonl").write_text("\n".join(rows))


def finished(out: Path, *words: str) -> tuple[Spec, list[Finished]]:
    """Two methods, targets and seeds; the second method forgets less, and the second seed keeps less."""

    def score(hits: int, n: int) -> dict[str, Any]:
        return {"n": n, "correct": hits, "accuracy": hits / n}

    done = []
    settings = override(read_preset(resources.preset_path("sd_photos_sfron")), list(words))
    for m, method in enumerate(METHODS):
        for target in ("cat", "dog"):
            for seed in (0, 1):
                run = Run(method, target, seed, settings, "mine")
                report: Any = {
                    "target": {"forget": [PROMPTS[target]]},
                    "before": {"classes": {"forget": score(8, 8), "remain": score(16, 16)}},
                    "after": {"classes": {"forget": score(4 * m + seed, 8), "remain": score(16 - seed, 16)}},
                    "timing": {"erase_s": 3.0 + m, "saliency_s": 1.0},
                }
                numbers = {"ua": 1 - m / 2 - seed / 8, "ira": 1 - seed / 16, "shows": "dog", "rte_s": 4.0 + m}
                result = {"method": method, "target": target, "seed": seed, **numbers}
                done.append(Finished(run, report, result))
                for name in ("base", "erased"):
                    write_images(out / run.folder / "images" / name, 2 * m + seed + 1 if name == "erased" else 0)
                (out / run.folder / "report.html").write_text("<title>a run</title>")
    return Spec("sd", [one.run for one in done], []), done


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    write_page(*finished(out), out, AXES, GOALS, "erase compare mine " + "x" * 200, {})
    return out / "index.html"


def test_images_of_the_concept_in_other_words_are_not_among_the_others(tmp_path: Path) -> None:
    spec, done = finished(tmp_path)
    for one in done:
        one.report["after"]["classes"]["per_prompt"] = {
            PROMPTS["dog" if one.run.target == "cat" else "cat"]: {"side": "form"}
        }
    blocks, _, _ = image_blocks(spec.pipeline, done, tmp_path, {})
    assert [block.title for block in blocks if block.side == "others"] == [
        f"{target}: {PROMPTS['long']}" for target in ("cat", "dog")
    ]


def test_the_same_images_of_several_seeds_count_once(tmp_path: Path) -> None:
    """A closed form has them: its seeds change nothing."""
    done = [one for one in finished(tmp_path)[1] if (one.run.method, one.run.target) == (METHODS[1], "cat")]
    assert [_pooled(done, side, tmp_path)[FORGET].total for side in ("before", "after")] == [8, 16]
    first, second = (tmp_path / one.run.folder / "images/erased" for one in done)
    shutil.rmtree(second)
    shutil.copytree(first, second)
    assert _pooled(done, "after", tmp_path)[FORGET].total == 8


def test_counts_of_two_judges_are_not_added_up(tmp_path: Path) -> None:
    one = finished(tmp_path)[1][0]
    doubted = {"n": 8, "correct": 2, "accuracy": 2 / 8, "no_verdict": "it is seldom right"}
    one.report["after"]["clip"] = {"forget": doubted}
    found = _pooled([one], "after", tmp_path)
    assert found[f"{FORGET} (by the classifier)"].hits == 0
    assert found[f"{FORGET} (by zero-shot)"] == Score(2, 8, 2 / 8, wilson(2, 8), 0, "it is seldom right")
    assert found["Other concepts recognised"].total == 16


def test_a_comparison_shows_the_same_seeds_of_each_method(compared: Any, comparison: Path) -> None:
    grids = compared.locator("table.grid")
    assert grids.count() == 4  # what is forgotten and what is kept, of two targets
    for number in range(4):
        rows = grids.nth(number).locator("tbody tr")
        assert rows.locator("th").all_inner_texts() == ["base", *METHODS]
        alts = [[i.get_attribute("alt").partition(": ")[2] for i in row.locator("img").all()] for row in rows.all()]
        assert alts[0] == alts[1] == alts[2]
        lefts = [row.locator("img").nth(1).bounding_box()["x"] for row in rows.all()]
        assert lefts == [lefts[0]] * 3
    assert grids.nth(0).locator("img").count() == 3 * 6
    assert grids.nth(1).locator("img").count() == 3 * 2  # one of each other prompt
    assert compared.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert comparison.stat().st_size < 10_000_000


def test_a_comparison_begins_with_numbers_and_has_units_and_intervals(compared: Any) -> None:
    first = compared.locator(".methods li")
    assert [text.count("of 32") for text in first.all_inner_texts()] == [1, 1]  # 2 targets, 2 seeds, 8 images
    assert "2 of 32" in first.nth(0).inner_text()
    tops = [compared.locator(what).first.bounding_box()["y"] for what in (".methods", "#images", "#counts", "#means")]
    assert tops == sorted(tops)
    table = compared.locator("table.means").first
    heads = table.locator("thead th").all_inner_texts()
    assert [head.rpartition(", ")[2] for head in heads[2:5]] == ["%", "%", "s"]
    cells = table.locator("tbody tr").first.locator("td").all_inner_texts()
    # 100 and 87.5 %: ± 8.8 and 93.75 ± 12.706 · 6.25, but not beyond 100; the times agree
    assert [" ".join(cell.split()) for cell in cells[1:4]] == [
        "93.8 ± 8.8 (14.3 to 100.0)",
        "96.9 ± 4.4 (57.2 to 100.0)",
        "4.0 ± 0.0",
    ]
    counts = compared.locator("table.scores tbody").first.locator("tr")
    assert counts.locator("th").all_inner_texts() == ["cat", "base", *METHODS]
    assert "8 of 8" in " ".join(counts.nth(1).inner_text().split())  # both seeds have the same images of the base
    assert "1 of 16" in " ".join(counts.nth(2).inner_text().split())
    ticks = compared.locator(".plots svg[role=img] text").all_text_contents()
    numbers = [float(tick) for tick in ticks if tick.replace(".", "").lstrip("-").isdigit()]
    assert numbers
    assert 0 <= min(numbers) <= max(numbers) <= 100


@pytest.mark.parametrize("width", [390, 1200])
def test_a_comparison_is_as_wide_as_the_screen(compared: Any, width: int) -> None:
    compared.set_viewport_size({"width": width, "height": 900})
    compared.evaluate("document.querySelectorAll('details').forEach(part => (part.open = true))")
    assert compared.evaluate("document.documentElement.scrollWidth") == width
    for plot in compared.locator(".plots svg[role=img]").all():
        box = plot.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= width
        assert box["width"] > 0.9 * min(width, 400) - 32


def test_a_comparison_leads_to_its_runs(tab: Any, comparison: Path) -> None:
    tab.goto(comparison.as_uri())
    assert tab.locator(".runs a").count() == 8
    tab.locator(".runs a").nth(5).click()
    assert tab.title() == "a run"


def test_a_comparison_hides_what_its_runs_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are looked at once, however often the page is written."""
    asked: list[Path] = []

    def detect(paths: Any) -> Detections:
        asked.extend(paths)
        found = tuple(ImageDetections(path, (), "failed") for path in paths)  # then they are hidden whole
        return Detections(found, "3", "0" * 64, "corrected", 320)

    monkeypatch.setattr(detector, "detect", detect)
    spec, done = finished(tmp_path, "eval.blur=true")
    boxes: dict[Path, Any] = {}
    for part in (done[:4], done, done):
        write_page(spec, part, tmp_path, AXES, GOALS, "", boxes)
    assert len(asked) == len(set(asked)) == len(boxes) == 3 * 2 * (6 + 2)
    assert "are hidden" in (tmp_path / "index.html").read_text()


def test_methods_of_two_models_have_a_base_each(tmp_path: Path) -> None:
    spec, done = finished(tmp_path)
    other = [
        replace(one, run=replace(one.run, settings=one.run.settings | {"model": "another"}))
        if one.run.method == METHODS[1]
        else one
        for one in done
    ]
    write_page(spec, other, tmp_path, AXES, GOALS, "", {})
    page = (tmp_path / "index.html").read_text()
    names = ["base of SFR-on", "SFR-on", "base of &lt;b&gt;ESD&lt;/b&gt;", "&lt;b&gt;ESD&lt;/b&gt;"]
    places = [page.index(f">{name}<", page.index("<table")) for name in names]
    assert places == sorted(places)
    assert ">base<" not in page


def test_an_image_of_a_comparison_that_was_changed_is_refused(tmp_path: Path) -> None:
    spec, done = finished(tmp_path)
    path = tmp_path / done[0].run.folder / "images/erased/0.png"
    Image.new("RGB", (32, 32)).save(path)
    with pytest.raises(ValueError, match=r"0\.png"):
        write_page(spec, done, tmp_path, AXES, GOALS, "", {})
