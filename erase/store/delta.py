"""What a run changed, and nothing else: sparse, exact in both directions, bound to one base by its hash.

A delta holds `base XOR erased` of the weights' bits, of changed elements alone. XOR is its own inverse: the same
numbers make the erased model of the base and the base of the erased model, bit for bit, whatever the dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erase.store.safetensors import KINDS, Lazy, digest, open_safetensors, write_safetensors

FORMAT = "erase-delta-1"
VALUES, BITS = "xor/", "at/"
"""Of a tensor: changed elements; one bit an element that tells which they are (absent where all changed)."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Delta:
    """A delta file; its tensors are read when asked for."""

    path: Path
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """The weights that changed."""
        return [name.removeprefix(VALUES) for name in self.tensors if name.startswith(VALUES)]

    @property
    def meta(self) -> dict[str, str]:
        """Provenance of the erased model: keys `erase` and `erase_…`."""
        return {key: value for key, value in self.header.items() if key == "erase" or key.startswith("erase_")}

    @property
    def base_meta(self) -> dict[str, str]:
        """Provenance of the base, if it was erased itself.

        Raises:
            ValueError: for a header that cannot be read.
        """
        try:
            found = json.loads(self.header.get("base_meta", "{}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} is damaged: base_meta in its header is not JSON ({error.msg})") from error
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def write_delta(
    base: Mapping[str, Tensor],
    erased: Mapping[str, Tensor],
    path: Path,
    meta: Mapping[str, str],
    base_meta: Mapping[str, str] | None = None,
) -> None:
    """Write the difference of two models' weights, as they are stored.

    Args:
        base: before.
        erased: after; of the same names, shapes and dtypes.
        path: the file.
        meta: provenance of the erased model (keys `erase` and `erase_…`).
        base_meta: that of the base, if it was erased itself.
    """
    assert base.keys() == erased.keys()

    def changed(name: str) -> Tensor:
        assert base[name].dtype == erased[name].dtype
        return _integers(base[name]) ^ _integers(erased[name])

    counts = {name: (int(changed(name).count_nonzero()), base[name].numel()) for name in base}
    keys = [VALUES + name for name, (some, _) in counts.items() if some]
    keys += [BITS + name for name, (some, all_) in counts.items() if 0 < some < all_]

    def get(key: str) -> Tensor:
        kind, name = key.split("/", 1)
        x = changed(name)
        return x[x != 0] if f"{kind}/" == VALUES else torch.from_numpy(np.packbits(x.numpy() != 0, bitorder="little"))

    header = {
        **meta,
        "format": FORMAT,
        "base_meta": json.dumps(dict(base_meta or {})),
        "base_sha256": digest(base),
        "erased_sha256": digest(erased),
        "changed": f"{sum(some for some, _ in counts.values())} of {sum(all_ for _, all_ in counts.values())}",
    }
    write_safetensors(path, Lazy(keys, get), header)


def open_delta(path: Path) -> Delta:
    """Read what `write_delta` wrote.

    Raises:
        ValueError: for a file that is missing, broken, or no delta.
    """
    tensors, header = open_safetensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a delta of erase (format {header.get('format')!r}, expected {FORMAT!r})")
    if lost := sorted({"base_sha256", "erased_sha256"} - header.keys()):
        raise ValueError(f"{path} is a damaged delta of erase: its header lacks {' and '.join(lost)}")
    return Delta(path, tensors, header)


def apply(delta: Delta, stored: Mapping[str, Tensor], *, undo: bool = False) -> Lazy:
    """The weights that change: from the base's to the erased model's, or back.

    The result is compared with the hash that the delta gives before anything is returned.

    Args:
        delta: the delta.
        stored: a model's weights, as they are stored.
        undo: from the erased model to the base.

    Raises:
        ValueError: for weights that the delta was not made from, or a delta that is damaged.
    """
    ends = delta.header["base_sha256"], delta.header["erased_sha256"]
    start, end = reversed(ends) if undo else ends
    found = digest(stored)
    if found != start:
        model = delta.meta.get("erase_base", "a model")
        what = "the model that it erased" if undo else f"its base, {model}"
        known = {ends[0]: f"they are its base's, {model}", ends[1]: "they are erased already"}
        reason = known.get(found, f"their SHA-256 is {found[:16]}…, expected {start[:16]}…")
        raise ValueError(f"{delta.path} takes the weights of {what}; {reason}")

    def get(name: str) -> Tensor:
        old = stored[name]
        x = _spread(delta, name, old)
        return (_integers(old) ^ x).view(old.dtype).view(old.shape)

    missing = [name for name in delta.names if name not in stored]
    if missing:
        raise ValueError(f"{delta.path} changes {missing[0]}, which the model does not have: the delta is damaged")
    new = Lazy(delta.names, get)
    if digest(Lazy(stored, lambda name: new[name] if name in new else stored[name])) != end:
        raise ValueError(f"{delta.path} is damaged: its result has another SHA-256 than it says")
    return new


def _spread(delta: Delta, name: str, old: Tensor) -> Tensor:
    """XOR of every element, `[N]`."""
    values = delta.tensors[VALUES + name]
    if values.dtype != _INTEGERS[old.dtype.itemsize] or values.ndim != 1:
        kind = KINDS.get(values.dtype, str(values.dtype))
        raise ValueError(f"{delta.path} is damaged: {name} is of {KINDS[old.dtype]}, its change of {kind}")
    if BITS + name not in delta.tensors:
        if values.shape != (old.numel(),):
            raise ValueError(f"{delta.path} is damaged: {name} has {old.numel()} elements, its change {len(values)}")
        return values
    packed = delta.tensors[BITS + name]
    if packed.dtype != torch.uint8 or packed.shape != (-(-old.numel() // 8),):
        raise ValueError(f"{delta.path} is damaged: the bits of {name} do not fit its {old.numel()} elements")
    at = np.unpackbits(packed.numpy(), count=old.numel(), bitorder="little").view(bool)
    if int(at.sum()) != len(values):
        raise ValueError(f"{delta.path} is damaged: {name} changes in {int(at.sum())} places by {len(values)} values")
    out = torch.zeros(old.numel(), dtype=values.dtype)
    out[torch.from_numpy(at)] = values
    return out


def _integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor's elements, `[N]`."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(_INTEGERS[tensor.dtype.itemsize])
