"""Weight files in a folder, of any library: one or its shards, and the same again with other values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from erase.store import files
from erase.store.safetensors import Lazy, write_safetensors
from erase.store.safety import check_name

PROVENANCE = re.compile(r"erase(_\w+)?", re.ASCII)
"""Keys of a header that tell how a model was erased."""
HEAVY = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data")
"""Suffixes of files that hold weights."""


def index_file(folder: Path, stem: str, variant: str | None = None) -> Path:
    """Where the list of the shards is, if there are shards."""
    return folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The weight files of a component: one, or the shards; none if it has no such variant.

    Raises:
        ValueError: for a list of shards that is none, or leads out of the folder.
    """
    index = index_file(folder, stem, variant)
    if index.is_file():
        whole = files.read_json(index)
        listed = whole.get("weight_map") if isinstance(whole, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{index} lists no shards (weight_map)")
        return [folder / name for name in sorted({check_name(name, index) for name in listed.values()})]
    for suffix in (".safetensors", ".bin"):
        path = folder / f"{stem}{f'.{variant}' if variant else ''}{suffix}"
        if path.is_file():
            return [path]
    return []


def rewrite(
    path: Path,
    old: Mapping[str, Tensor],
    header: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    out: Path,
    meta: Mapping[str, str],
    progress: Callable[[int], object] | None = None,
) -> set[str]:
    """Write a weight file again with new values in the old dtypes; the names of those written.

    Args:
        path: the file.
        old: its tensors.
        header: its header's metadata.
        tensors: new values, by name; those of other files are left alone.
        out: the file to write.
        meta: provenance for the header, in the place of what was there.
        progress: called with 1 for each tensor that is written.

    Raises:
        ValueError: for another shape, or a value beyond its dtype.
    """
    taken = tensors.keys() & old.keys()

    def get(name: str) -> Tensor:
        return fitted(name, old[name], tensors[name], path) if name in taken else old[name]

    write_safetensors(out, Lazy(old, get), {"format": "pt", **without_provenance(header), **meta}, progress)
    return taken


def without_provenance(header: Mapping[str, str]) -> dict[str, str]:
    """A header as it was before `erase` wrote into it."""
    return {key: value for key, value in header.items() if not PROVENANCE.fullmatch(key)}


def provenance(header: Mapping[str, str]) -> dict[str, str]:
    """What `erase` wrote into a header of how a model was erased."""
    return {key: value for key, value in header.items() if PROVENANCE.fullmatch(key)}


def fitted(name: str, old: Tensor, new: Tensor, path: Path) -> Tensor:
    """A new value in the dtype that the file has.

    Raises:
        ValueError: for another shape, or a value that the dtype does not reach.
    """
    if old.shape != new.shape:
        raise ValueError(f"{path}: {name} has shape {list(old.shape)}, got {list(new.shape)}")
    value = new.detach().to("cpu", old.dtype)
    if not value.isfinite().all():
        raise ValueError(f"{name} holds values beyond the range of {str(old.dtype).removeprefix('torch.')}")
    return value
