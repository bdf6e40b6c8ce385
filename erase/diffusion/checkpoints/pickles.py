"""The one place where a pickle is read: weights that others keep as `.bin` and `.ckpt`. Ours are never pickled."""

from __future__ import annotations

import pickle  # noqa: TID251  for the name of an error
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from erase.store import files


class MoreThanWeightsError(ValueError):
    """A pickle that holds what is neither a tensor nor a plain value: to read it is to run its code."""


def read_pickle(path: Path, device: str = "cpu", *, trusted: bool = False) -> dict[str, Any]:
    """A pickled mapping; its tensors are read from the disk when they are used.

    Args:
        path: the file.
        device: where the tensors go; `meta` reads none.
        trusted: run whatever code the pickle holds. Otherwise nothing but tensors and plain values is unpickled.

    Raises:
        MoreThanWeightsError: for one that holds more than weights, unless it is trusted.
        ValueError: for a file that is no pickle of a mapping, or is cut short.
    """
    try:
        found = torch.load(  # noqa: TID251  the ban is on pickles of ours; `weights_only` runs no code of others
            path, map_location=device, weights_only=not trusted, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # broken pickles raise a dozen unrelated types
        raise _refusal(path, error, trusted) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected weights by name: get it again")
    return found


def _refusal(path: Path, error: Exception, trusted: bool) -> ValueError:
    """What is wrong with a pickle that torch did not read, by its first bytes; torch's own words are paragraphs."""
    with path.open("rb") as file:
        head = file.read(4)
    zipped = head == b"PK\x03\x04"
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked is None and not zipped and head[:1] != b"\x80":
        return ValueError(f"{path} is not a checkpoint, but {files.guess_kind(path)}")
    if zipped and not zipfile.is_zipfile(path):
        return ValueError(f"{path} is cut short: get it again")
    if isinstance(error, pickle.UnpicklingError) and not trusted:
        return MoreThanWeightsError(f"{path} holds more than weights{f' ({asked[1]})' if asked else ''}")
    if not zipped and (isinstance(error, EOFError | pickle.UnpicklingError) or "unexpected EOF" in str(error)):
        return ValueError(f"{path} is cut short: get it again")
    if isinstance(error, ImportError | AttributeError):
        return ValueError(f"{path} needs code that is not here ({error}): get it as .safetensors")
    return ValueError(f"{path} is damaged, or not a checkpoint of torch ({type(error).__name__}): get it again")
