"""What a checkpoint from elsewhere may not do: point out of its folder, or be no floating-point weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.store.safetensors import KINDS

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def check_name(name: Any, where: Path) -> str:
    """A file or folder name that a checkpoint's index gives.

    Raises:
        ValueError: unless it is a plain one: letters, digits, `.`, `_` and `-`, of ASCII, in no other folder.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where} names {name!r}: a name may only have letters, digits, '.', '_' and '-', and no folder"
        )
    return name


def check_components(index: Mapping[str, Any], where: Path) -> None:
    """The components that a `model_index.json` lists.

    Raises:
        ValueError: for a name that is none, or a class of another library: it could be any code.
    """
    for name, value in index.items():
        if isinstance(value, list) and not name.startswith("_"):
            check_name(name, where)
            if value and value[0] not in LIBRARIES:
                raise ValueError(f"{where} takes {name} from {value[0]!r}; allowed: diffusers, transformers")


def check_links(folder: Path) -> None:
    """Links in a folder; those of the hub's cache lead to its own files.

    Raises:
        ValueError: for one that leads out: what it leads to would be copied into every model that is made of this one.
    """
    top = folder.resolve()
    within = [top, top.parents[1] / "blobs"] if top.parent.name == "snapshots" else [top]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in within):
            raise ValueError(f"{path} is a link out of the folder, to {path.readlink()}: put the file itself there")


def check_kinds(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Dtypes of weights.

    Raises:
        ValueError: for one that is no floating-point number of 16 bits or more.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            kind = KINDS.get(tensor.dtype, str(tensor.dtype))
            raise ValueError(f"{where}: {name} is of {kind}; weights are F16, BF16, F32 or F64")


def check_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Values of weights.

    Raises:
        ValueError: for one that is NaN or infinite.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or infinite values: the file is broken, get it again")
