"""What a checkpoint is, for `erase inspect`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.folders import Source, read_index
from erase.diffusion.checkpoints.locate import COMMANDS, name_family
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.families import FAMILIES, family
from erase.diffusion.model import open_model
from erase.store import files
from erase.store.safetensors import KINDS, open_safetensors


def describe(source: Source | SingleFile) -> dict[str, Any]:
    """Of a text model from configurations and headers alone; a class-conditional one is loaded."""
    known = family(source.family)
    tensors = [tensor for _, tensor in folders.tensors(source).sketches()]
    found: dict[str, Any] = {
        "kind": f"{known.NAME} {'single file' if isinstance(source, SingleFile) else 'pipeline'}",
        f"{known.TRAINED}_weights": sum(tensor.numel() for tensor in tensors),
        "dtype": "/".join(sorted({KINDS[tensor.dtype] for tensor in tensors})),
    }
    if known.CONDITION == "label":
        model = open_model(source)
        null = model.null()
        return {
            **found,
            "image": dict(zip(("channels", "height", "width"), model.shape, strict=True)),
            "labels": model.labels,
            "null_class": None if null is None else int(null["label"]),
            "guidance": model.guidance,
            "prediction_type": model.pipe.scheduler.config.prediction_type,
        }
    scheduler, index = (_config(source, name) for name in ("scheduler/scheduler_config.json", "model_index.json"))
    empty = open_model(source, hollow=True)
    _, condition = known.example(empty.configs)
    predicts = "flow" if "Flow" in str(scheduler.get("_class_name")) else "epsilon"
    return {
        **found,
        "resolution": empty.resolution,
        "tokens": condition["text"].shape[1],
        "text_width": condition["text"].shape[2],
        "prediction_type": scheduler.get("prediction_type", predicts),
        "ema": isinstance(source, Source) and source.trained.endswith("_ema"),
        "index": index,
    }


def describe_network(path: Path, name: str) -> dict[str, Any]:
    """Of a single file that holds a family's network without the rest, by its tensors alone."""
    known, tensors = family(name), [tensor for _, tensor in open_safetensors(path)[0].sketches()]
    return {
        "kind": f"{known.NAME} single file without the whole pipeline",
        "weights": sum(tensor.numel() for tensor in tensors),
        "dtype": "/".join(sorted({KINDS.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors})),
    }


def describe_pipeline(folder: Path) -> dict[str, Any]:
    """Of a folder of any pipeline, from its `model_index.json` and the sizes of its files alone.

    Raises:
        ValueError: for a folder without one.
    """
    index = read_index(folder)
    kind = str(index["_class_name"])
    known: Any = importlib.import_module("diffusers")
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value != [None, None]}
    return {
        "kind": "pipeline of diffusers" if kind in dir(known) else "pipeline of a class that diffusers does not have",
        "class": kind,
        "parts": {name: _part(folder / name, value) for name, value in parts.items()},
        "support": support(index, folder),
    }


def _part(folder: Path, value: list[Any]) -> dict[str, Any]:
    """Class and size of a component."""
    there = folder.is_dir()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if there else None
    return {"class": ".".join(str(word) for word in value), "bytes": size if there else "missing"}


def support(index: Mapping[str, Any], folder: Path) -> str:
    """What erase can do with a pipeline."""
    try:
        known = family(name_family(index, folder))
    except ValueError:
        taken = []
        for condition, command in COMMANDS.items():
            names = [name for name in FAMILIES if condition == family(name).CONDITION]
            taken.append(f"{command} takes {', '.join(kind for name in names for kind in FAMILIES[name])}")
        return f"not supported: {'; '.join(taken)}"
    return f"supported as {known.NAME}: {COMMANDS[known.CONDITION]}"


def _config(source: Source | SingleFile, file: str) -> Mapping[str, Any]:
    """A configuration as it is on disk."""
    found: Mapping[str, Any]
    found = json.loads(source.texts[file]) if isinstance(source, SingleFile) else files.read_json(source.folder / file)
    return found
