"""A model card beside saved weights: what was done to a model, in the form that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from erase.store import files

CARD, BASE = "README.md", "README.base.md"
TAG = "concept-erasure-by-erase"
"""Tells our cards."""
LICENCE = ("license", "license_name", "license_link")
UNTOLD = {"erase_labels"}
"""Keys of provenance that a reader has no use for: a thousand names of classes."""
Library = Literal["diffusers", "transformers"]
DONE: dict[Library, str] = {
    "diffusers": "A concept was erased from the UNet of `{base}` by `{method}`; the other networks are as they were.",
    "transformers": "Training images were forgotten: `{method}` unlearned them from the image classifier `{base}`.",
}
"""What was done, by the library that opens the model."""


def write(folder: Path, meta: Mapping[str, str], library: Library) -> None:
    """Write the card of a model's provenance (`erase.programs.saving`); the base's own card is kept beside it.

    Without provenance, as when an erasure is undone, the base's card is put back.
    """
    card, base = folder / CARD, folder / BASE
    if base.is_file():  # the folder was erased before: the card in it is ours
        base.replace(card)
    elif TAG in str(front(card).get("tags")):
        card.unlink()
    if "erase_method" not in meta:
        return
    known = {key: value for key, value in front(card).items() if key in LICENCE}
    if card.is_file():
        card.replace(base)
    files.write_text(card, render(meta, known, library))


def front(path: Path) -> dict[str, Any]:
    """A card's front matter; empty if it has none that can be read."""
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def render(meta: Mapping[str, str], licence: Mapping[str, Any], library: Library) -> str:
    """The card's text; `licence` is what the base's card says of it, if anything."""
    base, method = meta.get("erase_base", "an unnamed model"), meta["erase_method"]
    head: dict[str, Any] = {
        **(licence or {"license": "unknown"}),
        "library_name": library,
        "base_model": base,
        "tags": ["concept-erasure", "machine-unlearning", TAG, method],
    }
    told = sorted(meta.keys() - UNTOLD)
    rows = [f"| {key.removeprefix('erase_').replace('_', ' ')} | `{meta[key]}` |" for key in told]
    lines = [
        *("---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {base}, erased", ""),
        DONE[library].format(base=base, method=method),
        "What was to be forgotten is recorded as a hash. An erasure is not a guarantee: measure before you rely on it.",
        *("", "| | |", "|---|---|", *rows, ""),
    ]
    return "\n".join(lines)
