"""Code blocks of the documentation, and how they are made short enough for a test.

A command is run as it is written; settings that `erase settings` documents are added behind its own, so that it takes a
second. A model that a page calls `path/to/…` is a micro model there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/quickstart.md",
    *sorted(f"docs/tutorials/{p.name}" for p in ROOT.glob("docs/tutorials/*.md")),
]
"""Whose blocks are run."""
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)

LOOP = ("train.steps=1", "train.batch_size=2", "saliency.count=2", "saliency.batch_size=2")
DRAWN = ("saliency.draws=1", "forget.count=2", "remain.count=1", "draw.steps=2")
FEW = "few.csv"  # labelled rows of the embedded model's prompts
TEXT = (*LOOP, *DRAWN, "eval.images=1", f"remain.prompts={FEW}", f"eval.prompts={FEW}")
LABELS = (*LOOP, *DRAWN, "eval.images=0", "eval.labels=[]")
FOLDERS = "data.source=path/to/class-folders"
CLASSIFY = (*LOOP, FOLDERS, "data.size=32", "recipe.epochs=1", "recipe.batch_size=4", "eval.svc=false")
ATTACK = (
    *("attack.count=2", "attack.inversion.steps=1", "attack.inversion.images=2"),
    *(
        "attack.inversion.batch_size=2",
        "attack.relearn.at=[1]",
        "attack.relearn.images=1",
        "attack.relearn.batch_size=2",
    ),
    *("attack.paraphrases.images=1", f"attack.paraphrases.prompts={FEW}"),
)
SHORT = {
    ("run", "sd"): (*TEXT, *ATTACK),
    ("run", "ddpm"): LABELS,
    ("run", "classify"): CLASSIFY,
    ("attack",): ATTACK,
    ("compare",): TEXT,
    ("generate",): ("--steps", "2", "--images", "1"),
}
"""What is added to which command."""
SAME = {("demo",): ("run", "sd", "sd_photos_sfron")}
"""A command without settings, and the one that it stands for."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    return [Block(kind, title, text) for kind, title, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, each as its words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def shortened(words: list[str]) -> list[str]:
    """The words of `erase …` with what makes it short; settings of the page's own are left alone."""
    for start, same in SAME.items():
        if words[: len(start)] == list(start):
            words = [*same, *words[len(start) :]]
    given = {word.split("=")[0] for word in words}
    for start, added in SHORT.items():
        if words[: len(start)] == list(start):  # of an option that is given twice the last one counts
            return [*words, *(word for word in added if "=" not in word or word.split("=")[0] not in given)]
    return words
