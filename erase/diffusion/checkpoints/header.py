"""What the header of a single file holds of the folder that it stands for: configurations and tokenizers."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from erase.diffusion.checkpoints import vocabulary
from erase.store import files
from erase.store.safety import check_components

TEXTS, NAMES = "diffusers_folder", "diffusers_names"
"""Keys of the header: files of the diffusers folder; tensors that the folder names in another way than we would."""
TEXT_FILE = re.compile(
    r"model_index\.json|(unet|transformer|vae|scheduler|(text_encoder|tokenizer)(_[23])?)/[A-Za-z0-9][\w.-]*\.(json|txt)"
    r"|tokenizer(_[23])?/[A-Za-z0-9][\w.-]*\.model",
    re.ASCII,
)


BASE64 = re.compile(r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
BINARY = ".model"
"""The suffix of tokenizers that are no text: a header has them as base64."""


def stored(path: Path, header: Mapping[str, str], parts: Iterable[str]) -> dict[str, str]:
    """The folder's files that a header holds; empty if it holds none.

    Args:
        path: the file, for messages.
        header: its header.
        parts: the networks that it holds.

    Raises:
        ValueError: for a header that is broken, or names other files than those of a diffusers folder.
    """
    if TEXTS not in header:
        return {}
    texts = mapping(path, header, TEXTS)
    configs = {}
    for name, text in texts.items():
        if not TEXT_FILE.fullmatch(name) or not isinstance(text, str):
            raise ValueError(
                f"{path}: its header names {name!r}, which is not a configuration of a diffusers folder: get it again"
            )
        if name.endswith(".json"):
            try:
                configs[name] = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}: {name} in its header is not JSON ({error}): get it again") from error
        elif name.endswith(BINARY) and not BASE64.fullmatch(text):
            raise ValueError(f"{path}: {name} in its header is not base64: get it again")
    missing = [f"{part}/config.json" for part in parts if f"{part}/config.json" not in configs]
    if missing:
        raise ValueError(f"{path}: its header lacks {missing[0]}: get it again")
    if not all(
        isinstance(config, dict) for name, config in configs.items() if name.endswith(("config.json", "index.json"))
    ):
        raise ValueError(f"{path}: the configurations in its header must be JSON objects: get it again")
    check_components(configs.get("model_index.json", {}), path)
    return texts


def mapping(path: Path, header: Mapping[str, str], key: str) -> dict[str, Any]:
    """What a header holds as JSON.

    Raises:
        ValueError: for something else than a mapping.
    """
    try:
        found = json.loads(header[key])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {key} in its header is not JSON ({error}): get it again") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: {key} in its header must be a JSON object; got a {type(found).__name__}: get it again"
        )
    return found


def write_texts(texts: Mapping[str, str], folder: Path) -> None:
    """A folder's configuration and tokenizers, with CLIP's vocabulary where one has no other."""
    for name, text in {**vocabulary.missing(texts), **texts}.items():
        if name.endswith(BINARY):
            files.write_bytes(folder / name, base64.b64decode(text))
        else:
            files.write_text(folder / name, text)
