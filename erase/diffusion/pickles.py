"""The one place where a pickle is read: weights that others keep as `.bin` and `.ckpt`. Ours are never pickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


def read_pickle(path: Path, device: str = "cpu", *, trusted: bool = False) -> dict[str, Any]:
    """A pickled mapping; its tensors are read from the disk when they are used.

    Args:
        path: the file.
        device: where the tensors go; `meta` reads none.
        trusted: run whatever code the pickle holds. Otherwise nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: for a file that is no pickle of a mapping, is cut short, or holds more than weights.
    """
    try:
        found = torch.load(  # noqa: TID251  the ban is on pickles of ours; `weights_only` runs no code of others
            path, map_location=device, weights_only=not trusted, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # broken pickles raise a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is cut short, or holds more than weights ({reason.rstrip('. ')})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected weights by name")
    return found
