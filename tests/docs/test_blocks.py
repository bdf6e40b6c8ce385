"""Every shell and Python block of README, quickstart and tutorials runs, on embedded and micro models."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import micro
import micro_classify
import micro_ddpm
import micro_dit
import micro_own
import micro_sdxl
import pytest
import typer
import yaml
from blocks import FEW, LABELS, PAGES, ROOT, TEXT, Block, blocks, commands, shortened

import erase
from erase import cli, config, resources
from erase.cli.common import app
from erase.diffusion import class_conditional
from erase.programs.comparison.spec import read_spec

ALL = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
NOT_RUN = ("pip", "git", ".", "cd", "accelerate", "mkdocs")
"""Commands that install, or start processes."""
LONG = ("compare photos-objects",)
"""Commands of many runs: `test_commands_are_understood` has their settings checked."""
CLASSES = ("bag", "cat", "coat")
OBJECTS, STYLES = ("woman", "cat", "rocket", "horse"), ("plain", "sepia")
"""Of the embedded model's prompts, those that pages forget, and some that stay."""


def classifier(folder: Path) -> None:
    """A ViT whose classes are those of the pages."""
    micro_classify.write_foreign("vit", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    (folder / "config.json").write_text(json.dumps(settings))


def images(folder: Path, count: int = 2, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(micro_own.images(first + count)[first:]):
        image.save(folder / f"{i}.png")


MODELS: dict[str, Callable[[Path], Any]] = {
    "path/to/sdxl": lambda folder: micro_sdxl.pipeline(folder.parent).save_pretrained(folder),
    "path/to/ddpm": lambda folder: class_conditional.save_new(micro_ddpm.model(tuple("abcdefghij")), folder),
    "path/to/dit": lambda folder: micro_dit.pipeline(folder.parent).save_pretrained(folder),
    "path/to/clip": lambda folder: micro.write_clip(folder),
    "path/to/vit": classifier,
    "path/to/class-folders": lambda folder: [images(folder / name, 8) for name in CLASSES],
    "my-images": images,
    "other-images": images,
    '"forget"': lambda folder: [images(folder / name) for name in CLASSES],
    '"remain"': lambda folder: [images(folder / name, first=2) for name in CLASSES],
}
"""What pages name, and how it is made."""


def prepare(page: str, folder: Path) -> None:
    """Everything that a page names, in the folder that its commands run in."""
    rows = (ROOT / "prompts/photos.csv").read_text(encoding="utf-8").splitlines()
    few = [row for row in rows if row.split(",")[1] in OBJECTS and row.split(",")[2] in STYLES]
    (folder / FEW).write_text("\n".join([rows[0], *few]))
    text = (ROOT / page).read_text(encoding="utf-8")
    classify = "erase run classify" in text
    for name, make in MODELS.items():
        if name in text or (classify and name == "path/to/class-folders"):
            place = folder / name.strip('"')
            place.parent.mkdir(parents=True, exist_ok=True)
            make(place)
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one folder."""
    monkeypatch.chdir(tmp_path)
    prepare(page, tmp_path)
    forget = erase.forget
    ran = 0
    for block in blocks(page):
        if block.language == "python":
            monkeypatch.setattr(erase, "forget", partial(short_forget, forget, block.text), raising=False)
            exec(compile(block.text, page, "exec"), {})
            ran += 1
        for words in commands(block) if block.language == "bash" else ():
            ran += run(words, monkeypatch)
    assert ran > 0


def short_forget(forget: Callable[..., Any], block: str, *given: Any, **named: Any) -> Any:
    """`erase.forget` with settings that make it short, as the commands have them."""
    kind = LABELS[:-2] if "label=" in block else TEXT[:4] if "vit" in block else TEXT[:-1]
    kept = [s for s in kind if not s.startswith("eval.") and not ("images=" in block and s.startswith("forget.count"))]
    return forget(*given, **{**named, "steps": 1, "settings": kept})


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a line as a shell would; whether it was one of ours."""
    if words[0] in NOT_RUN:
        return 0
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return 0
    assert words[0] == "erase"
    if " ".join(words[1:3]) in LONG:
        return 0
    monkeypatch.setattr("sys.argv", ["erase", *shortened(words[1:])])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None), words
    return 1


@pytest.mark.parametrize("page", ["README.md", *ALL])
def test_commands_are_understood(page: str) -> None:
    """Every `erase …` of every page: its options exist, and its preset takes its settings."""
    for block in blocks(page):
        for words in commands(block) if block.language == "bash" else ():
            if words[0] == "erase" and "COMMAND" not in words:
                understood(words[1:], page, block)


def understood(words: list[str], page: str, block: Block) -> None:
    command = typer.main.get_command(app)
    context = None
    while hasattr(command, "commands"):
        if words[0].startswith("-"):
            return
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, list(words), resilient_parsing=False)
    given = context.params
    settings = given.get("settings") or []
    if "dry_run" in given and settings:
        data = config.override(config.read_preset(resources.preset_path(given["preset"])), settings)
        config.parse(data, config.PIPELINES[data["pipeline"]])
    if "spec" in given and not given["spec"].endswith(".yaml"):
        read_spec(config.read_preset(resources.comparison_path(given["spec"])), settings)


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150


def test_yaml_blocks_are_comparisons() -> None:
    """Whole ones are checked as `erase compare` checks them."""
    found = [b for page in PAGES for b in blocks(page) if b.language == "yaml" and b.title]
    assert found
    for block in found:
        assert read_spec(yaml.safe_load(block.text)).runs
