"""Tensors on disk: safetensors, atomic, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erase.store import files

KINDS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Names of dtypes in a header."""


class Lazy(Mapping[str, Tensor]):
    """Tensors made anew each time they are asked for: never all in memory.

    Args:
        names: of the tensors.
        make: makes one.
        sketch: makes one without data, on torch's "meta" device; by default of the tensor itself.
    """

    def __init__(
        self,
        names: Iterable[str],
        make: Callable[[str], Tensor],
        sketch: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.names, self.make, self.sketch = dict.fromkeys(names), make, sketch

    def sketches(self) -> Iterator[tuple[str, Tensor]]:
        """Names, and tensors with shape and dtype and no data: of a file, its header alone is read."""
        for name in self.names:
            yield name, self.sketch(name) if self.sketch is not None else self.make(name).to("meta")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __contains__(self, name: object) -> bool:  # the inherited one makes the tensor
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def open_safetensors(path: Path) -> tuple[Lazy, dict[str, str]]:
    """Tensors of a safetensors file, each read when it is asked for, and the header's metadata.

    Raises:
        ValueError: for a file that is missing, cut short or no safetensors, naming it.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        f: Any = safe_open(path, framework="pt")  # half of its methods are unannotated

        def sketch(name: str) -> Tensor:
            part = f.get_slice(name)
            dtype = next((dtype for dtype, kind in KINDS.items() if kind == part.get_dtype()), None)
            if dtype is not None:
                return torch.empty(part.get_shape(), dtype=dtype, device="meta")
            try:
                found: Tensor = f.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{path}: {name} is of {part.get_dtype()}, which torch does not have") from error
            return found

        return Lazy(f.keys(), f.get_tensor, sketch), dict(f.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut short or not a safetensors file ({error}): get it again") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header's metadata; raises as `open_safetensors`."""
    tensors, meta = open_safetensors(path)
    return dict(tensors), meta


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, str],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a safetensors file under a temporary name, then rename it; its bytes follow from the arguments.

    Tensors are written one after another, in the order of `written_order`: lazy ones are never all in memory. (The
    library's own writer holds all of them twice, and orders the metadata at random.)

    Args:
        path: the file.
        tensors: by name.
        meta: the header's metadata.
        progress: called with 1 for each tensor that is written.
    """
    kinds = _kinds(tensors)
    order = _ordered(kinds)
    header: dict[str, Any] = {"__metadata__": dict(sorted(meta.items()))} if meta else {}
    end = 0
    for name in order:
        dtype, shape = kinds[name]
        begin, end = end, end + dtype.itemsize * shape.numel()
        header[name] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with files.replacing(path) as temporary, temporary.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            f.write(_raw(tensors[name]))
            if progress is not None:
                progress(1)


def written_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors in the order in which `write_safetensors` asks for them."""
    return _ordered(_kinds(tensors))


def _ordered(kinds: Mapping[str, tuple[torch.dtype, torch.Size]]) -> list[str]:
    return sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    named = tensors.sketches() if isinstance(tensors, Lazy) else tensors.items()
    return {name: (t.dtype, t.shape) for name, t in named}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values: whatever files they lie in, and whatever their headers say."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {KINDS[tensor.dtype]} {list(tensor.shape)}\n".encode())
        found.update(_raw(tensor))
    return found.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
