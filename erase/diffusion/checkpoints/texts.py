"""The configurations and tokenizers of a diffusers folder, as a single file's header has them; and their hashes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from erase.diffusion.checkpoints.folders import HIDES, Source, read_index
from erase.diffusion.checkpoints.header import BINARY, TEXT_FILE
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.store import files

CONFIGS = ("/config.json", "/scheduler_config.json")
"""How the file of a component's configuration ends."""


def read_texts(source: Source, carried: Iterable[str], *, bare: bool = False) -> dict[str, str]:
    """Files by their path in the folder.

    Args:
        source: the folder.
        carried: the components whose files are read; `model_index.json` has no others then.
        bare: whether to leave `model_index.json` out.
    """
    index, names = read_index(source.folder), list(carried)
    gone = {name: [None, None] for name, value in index.items() if isinstance(value, list) and name not in names}
    out = {} if bare else {"model_index.json": (source.folder / "model_index.json").read_text(encoding="utf-8")}
    if out and any(index[name] != value for name, value in gone.items()):
        whole = {**index, **gone}
        if "requires_safety_checker" in index:
            whole["requires_safety_checker"] = False
        out["model_index.json"] = json.dumps(whole, indent=2) + "\n"
    for part in names:
        folder = folder_of(source, part)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = f"{part}/{path.name}"
            if TEXT_FILE.fullmatch(name) and ".index." not in name:
                out[name] = _text_of(path)
    return out


def folder_of(source: Source, part: str) -> Path:
    """The subfolder of a component: that of the network that learns may be `unet_ema`."""
    return source.folder / (source.trained if part == source.component else part)


def config_hashes(source: Source | SingleFile) -> dict[str, str]:
    """A short hash of the configuration of every component, the scheduler's among them, by name.

    They say what weights do not, such as what the network predicts. Versions and places on a disk do not count.
    """
    if isinstance(source, SingleFile):
        found = {name: json.loads(text) for name, text in source.texts.items() if name.endswith(CONFIGS)}
    else:
        index = read_index(source.folder) if (source.folder / "model_index.json").exists() else {}
        parts = [name for name, value in index.items() if isinstance(value, list) and name not in HIDES]
        places = {part + end: Path(f"{folder_of(source, part)}{end}") for part in parts for end in CONFIGS}
        places[f"{source.component}{CONFIGS[0]}"] = source.folder / source.trained / "config.json"
        found = {name: files.read_json(path) for name, path in places.items() if path.is_file()}
    return {name.rpartition("/")[0]: _config_hash(config) for name, config in sorted(found.items())}


def _config_hash(config: Mapping[str, Any]) -> str:
    told = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _text_of(path: Path) -> str:
    if path.suffix == BINARY:
        return base64.b64encode(path.read_bytes()).decode("ascii")
    return _without_path(path.read_text(encoding="utf-8"))


def _without_path(text: str) -> str:
    """A configuration without the place on somebody's disk that it came from: files are passed on."""
    config: Any = json.loads(text) if "name_or_path" in text else None
    found = [key for key in ("_name_or_path", "name_or_path") if isinstance(config, dict) and key in config]
    local = {key: Path(config[key]).name for key in found if Path(str(config[key])).is_absolute()}
    return json.dumps({**config, **local}, indent=2) + "\n" if local else text
