"""Classifiers on disk: what their weight files hold, and the same folder again with other weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from erase import resources
from erase.store import card, files
from erase.store.safetensors import KINDS, Lazy, open_safetensors
from erase.store.safety import check_links
from erase.store.weights import HEAVY, rewrite, weight_files

STEM = "model"


@dataclass(frozen=True)
class Source:
    """A classifier's folder, as `transformers` writes it."""

    name: str
    """As the user gave it."""
    folder: Path

    @property
    def weights(self) -> list[Path]:
        """The weight files: one, or the shards."""
        alone = self.folder / f"{STEM}.safetensors"  # where there are both, transformers takes it
        return [alone] if alone.is_file() else weight_files(self.folder, STEM)


def locate(model: str | Path) -> Source:
    """A classifier: an embedded one's name, or a folder.

    Raises:
        ValueError: for a name or path that leads nowhere or to something else, and a link out of the folder.
    """
    name, names = str(model), resources.list_tiny()
    folder = resources.tiny_path(name) if name in names else Path(name)
    if not folder.is_dir():
        raise ValueError(f"no model {name!r}: give a folder, new, or one of: {', '.join(names)}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a transformers image classifier: it has no config.json")
    check_links(folder)
    source = Source(name, folder)
    if not source.weights:
        raise ValueError(f"{folder} is not a complete image classifier: it has no {STEM}.safetensors")
    return source


def fingerprint(source: Source) -> dict[str, str]:
    """SHA-256 of every weight file."""
    return {path.name: files.sha256(path) for path in source.weights}


def describe(source: Source) -> dict[str, Any]:
    """What the classifier is, from its configuration and header alone."""
    config = files.read_json(source.folder / "config.json")
    names = config.get("id2label") or {}
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        raise ValueError(f"{source.folder / 'config.json'}: id2label does not map numbers to names")
    found = tensors(source)
    return {
        "kind": "image classifier of transformers",
        "architectures": config.get("architectures"),
        "weights": sum(tensor.numel() for tensor in found.values()),
        "dtype": "/".join(sorted({KINDS[t.dtype] for t in found.values() if t.is_floating_point()})),
        "labels": [names[number] for number in sorted(names, key=int)],
    }


def tensors(source: Source) -> Lazy:
    """All tensors under the file's names, as they are stored."""
    found = {name: part for path in source.weights for part in [open_safetensors(path)[0]] for name in part}
    return Lazy(found, lambda name: found[name][name])


def header(source: Source) -> dict[str, str]:
    """The header of the weight file, or of the first shard."""
    return open_safetensors(source.weights[0])[1]


def saved(source: Source, out: Path) -> Source:
    """What `save` wrote, as a source."""
    return replace(source, folder=out)


def save(
    source: Source,
    values: Mapping[str, Tensor],
    out: Path,
    meta: Mapping[str, str],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write the folder again with other weights: files, shards, names and dtypes are the original's.

    Folders in it and other weights are left out: they could still hold what is forgotten. What is written appears
    whole or not at all.

    Args:
        source: the classifier.
        values: new values, by the file's names.
        out: the folder to write; must not exist.
        meta: provenance for the safetensors header and the model card, in the place of what was there.
        progress: called with 1 for each tensor that is written.

    Raises:
        ValueError: if `out` exists, a name is not among the file's tensors, or a value is beyond its dtype.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        target = Path(temporary) / out.name
        target.mkdir()
        shards = len(source.weights) > 1
        for path in source.folder.iterdir():
            listing = ".index." in path.name
            if path.is_file() and not path.name.lower().endswith(HEAVY) and (shards or not listing):
                shutil.copyfile(path, target / path.name)
        left = set(values)
        for path in source.weights:
            left -= rewrite(path, *open_safetensors(path), values, target / path.name, meta, progress)
        if left:
            raise ValueError(f"{source.folder} has no tensor named {min(left)!r}")
        card.write(target, meta, "transformers")
        target.rename(out)
