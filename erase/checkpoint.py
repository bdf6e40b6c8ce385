"""Weights and run state on disk: safetensors and JSON, atomic, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from erase import files

STATE_FORMAT = "erase-state-1"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a safetensors file.

    Raises:
        ValueError: for a file that is missing, cut short or no safetensors, naming it.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut short or no safetensors file ({error}): get it again") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata=dict(meta))
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a header in order, in place: the library's order is random, and with it the file's hash."""
    with path.open("r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            f.seek(8)
            f.write(text.ljust(size))


def pack(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON-able copy of a tree of mappings, lists and scalars; its tensors go into `tensors` under dotted names."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach().to("cpu", copy=True)  # off the accelerator first: it may be full
        return {"__tensor__": prefix}
    if isinstance(tree, Mapping):
        return {"__map__": [[k, pack(v, f"{prefix}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, tuple | list):
        return [pack(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{prefix}: {type(tree).__name__} has no place in a run state")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` took."""
    if isinstance(packed, dict):
        if "__tensor__" in packed:
            return tensors[packed["__tensor__"]]
        return {k: unpack(v, tensors) for k, v in packed["__map__"]}
    if isinstance(packed, list):
        return [unpack(v, tensors) for v in packed]
    return packed


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run state: any tree of mappings, lists, scalars and tensors."""
    tensors: dict[str, Tensor] = {}
    tree = pack(state, "state", tensors)
    if not tensors:
        tensors["empty"] = torch.zeros(0)
    write_safetensors(path, tensors, {"format": STATE_FORMAT, "tree": json.dumps(tree)})


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        ValueError: for a file that is missing, broken, or no run state.
    """
    tensors, meta = read_safetensors(path)
    if meta.get("format") != STATE_FORMAT:
        raise ValueError(f"{path} is no run state (format {meta.get('format')!r}, expected {STATE_FORMAT!r})")
    state: dict[str, Any] = unpack(json.loads(meta["tree"]), tensors)
    return state
