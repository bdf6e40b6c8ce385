"""Presets, comparisons, prompt sets and tiny models, found in a checkout or in an installed wheel.

In a wheel they lie in `erase/_resources/`; in a checkout (and so in an editable install) `pipelines/` and
`prompts/` lie beside the package. A name that we ship comes before a file of that name in the working folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from erase.nearest import meant

LISTED = {"preset": "presets", "comparison": "comparisons", "prompt set": "prompts", "embedded model": "models"}
"""What `erase ls` calls each kind."""
_PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = _PACKAGE / "_resources"
_ROOT = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent


def preset_path(name: str | os.PathLike[str], pipeline: str | None = None) -> Path:
    """The YAML file of a preset, by its name or by a path of one's own.

    Args:
        name: the name or path.
        pipeline: whose presets are meant where there is none of that name; by default those of all.

    Raises:
        ValueError: no preset has that name, or the path is missing.
    """
    known = _presets()
    if os.fspath(name) not in known and pipeline is not None:
        known = {each: known[each] for each in presets_of(pipeline)}
    return _find(name, "preset", known, ".yaml", ".yml")


def presets_of(pipeline: str) -> list[str]:
    """Names of the presets of a pipeline that we ship, sorted."""
    wanted = re.compile(rf"^pipeline: *{pipeline}\s*$", re.MULTILINE)
    return sorted(name for name, path in _presets().items() if wanted.search(path.read_text(encoding="utf-8")))


def prompt_path(name: str | os.PathLike[str]) -> Path:
    """The file of a prompt set, by its name or by a path of one's own.

    Raises:
        ValueError: no prompt set has that name, or the path is missing.
    """
    return _find(name, "prompt set", _prompts(), ".csv", ".txt")


def tiny_path(name: str | os.PathLike[str]) -> Path:
    """The folder of an embedded tiny model, by its name or by a path of one's own.

    Raises:
        ValueError: no embedded model has that name, or the path is missing.
    """
    return _find(name, "embedded model", _tiny())


def clip_merges_path() -> Path:
    """The merges of CLIP's byte-pair encoding, gzipped text."""
    return _ROOT / "pipelines" / "clip" / "merges.txt.gz"


def list_presets() -> list[str]:
    """Names of the presets that we ship, sorted."""
    return sorted(_presets())


def list_prompts() -> list[str]:
    """Names of the prompt sets that we ship, sorted."""
    return sorted(_prompts())


def list_tiny() -> list[str]:
    """Names of the embedded tiny models, sorted."""
    return sorted(_tiny())


def comparison_path(name: str | os.PathLike[str]) -> Path:
    """The file of a comparison, by its name or by a path of one's own.

    Raises:
        ValueError: no comparison has that name, or the path is missing.
    """
    return _find(name, "comparison", _comparisons(), ".yaml", ".yml")


def list_comparisons() -> list[str]:
    """Names of the comparisons that we ship, sorted."""
    return sorted(_comparisons())


def _presets() -> dict[str, Path]:
    return {p.stem: p for p in (_ROOT / "pipelines" / "presets").glob("*.yaml")}


def _comparisons() -> dict[str, Path]:
    return {p.stem: p for p in (_ROOT / "pipelines" / "comparisons").glob("*.yaml")}


def _prompts() -> dict[str, Path]:
    return {p.stem: p for p in (_ROOT / "prompts").glob("*.csv")}


def _tiny() -> dict[str, Path]:
    # every kind of model that we embed keeps its settings at its top level
    return {p.parent.name: p.parent for p in (_ROOT / "pipelines" / "tiny").glob("*/*.json")}


def _find(name: str | os.PathLike[str], kind: str, known: dict[str, Path], *suffixes: str) -> Path:
    text = os.fspath(name)
    if text in known:
        return known[text]
    path = Path(text)
    if text and path.exists():
        return path
    file = " file" if os.sep in text or path.suffix in suffixes else ""
    listing = f"erase ls {LISTED[kind]} lists all"
    raise ValueError(
        f"no {kind}{file} {text!r}{meant(path.stem if file else text, sorted(known), f'{kind}s', listing)}"
    )
