"""Find a checkpoint that the user names: an embedded model, a diffusers folder, a single file, or a hub id."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from erase import resources
from erase.diffusion.checkpoints import folders, lora, networks, quantised, single_file
from erase.diffusion.checkpoints.folders import Source, check, check_parts, find, read_index
from erase.diffusion.checkpoints.layout import Prediction
from erase.diffusion.checkpoints.single_file import SUFFIXES, SingleFile
from erase.diffusion.checkpoints.texts import read_texts
from erase.diffusion.families import family, family_of, layout_of
from erase.store import files
from erase.store.class_names import class_names

COMMANDS = {"text": "erase run sd", "label": "erase run ddpm"}


def locate(
    model: str | Path,
    condition: Literal["text", "label"] | None = None,
    *,
    labels: Sequence[str] = (),
    components: str | Path | None = None,
    prediction: Prediction | None = None,
    trusted: bool = False,
) -> Source | SingleFile:
    """Find a checkpoint, and find out that it is whole.

    Args:
        model: as the user gave it; a folder may hold one single file instead of a pipeline.
        condition: what it must be conditioned on, if it matters: text, or class labels.
        labels: class names, for a folder that has none.
        components: for a single file that lacks networks of its pipeline, a folder or hub id that has them.
        prediction: what a single file of Stable Diffusion 2.x or XL predicts, if it does not say.
        trusted: whether a pickle may run code.

    Raises:
        ValueError: for a path or id that leads nowhere, a file or folder that holds something else, or a weight file
            that is broken.
    """
    if not str(model):
        raise ValueError("model is empty: give an embedded model's name, a folder, a file or a hub id")
    path = Path(model)
    if str(model) not in resources.list_tiny() and not (path / "model_index.json").exists():
        alone = [p for suffix in SUFFIXES for p in path.glob(f"*{suffix}")] if condition != "label" else []
        lone = condition is None and (path / "config.json").exists()
        path = alone[0] if len(alone) == 1 and not lone else path
    if path.is_file() and condition != "label":
        quantised.refuse_gguf(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is not a model: a single file is {' or '.join(SUFFIXES)}; name one, or a folder")
        rest = None if components is None else partial(_rest, components, path)
        return single_file.find(
            str(model), path, layout_of, networks.shapes, rest=rest, prediction=prediction, trusted=trusted
        )
    if components is not None:
        raise ValueError(f"components={components} is for a single file, and {model} is not one: leave it out")
    folder = find(model, DiffusionPipeline)
    lora.refuse_beside(folder)
    if not (folder / "model_index.json").exists():
        if (folder / "config.json").exists():
            return _with_labels(_lone_network(model, folder, condition), labels, {})
        _refuse_folder(folder)
    index = read_index(folder)
    kind, name = index["_class_name"], name_family(index, folder)
    known = family(name)
    if condition is not None and condition != known.CONDITION:
        raise ValueError(f"{folder} holds a {kind}, {known.NAME}: use {COMMANDS[known.CONDITION]}")
    found = check(str(model), folder, known.PARTS, (f"{known.TRAINED}_ema", known.TRAINED), name)
    return _with_labels(found, labels, index) if known.CONDITION == "label" else found


def _with_labels(source: Source, given: Sequence[str], index: Mapping[str, Any]) -> Source:
    """The same with names of its classes: those that are given, or that were when we erased it.

    Raises:
        ValueError: where these are different names.
    """
    kept = () if index.get("id2label") else folders.labels(source)
    names = tuple(given) or kept
    if kept and (len(names) != len(kept) or kept not in (names, class_names(len(kept)))):
        raise ValueError(
            f"{source.folder} was erased with labels={', '.join(kept)}; got {', '.join(names)}: leave out labels"
        )
    return replace(source, labels=names)


def _rest(components: str | Path, file: Path, name: str, held: Collection[str]) -> tuple[Source, dict[str, str]]:
    """The folder with the components that a single file lacks, and its configurations and tokenizers.

    Raises:
        ValueError: for a folder of another family, or one that is not whole.
    """
    # The hub is not asked for the networks that the file has.
    hub = SimpleNamespace(download=partial(DiffusionPipeline.download, **dict.fromkeys(held)))
    folder, known = find(components, hub), family(name)
    index = read_index(folder)
    if name_family(index, folder) != name:
        raise ValueError(
            f"components={components} is a {index['_class_name']}, but {file} is a model of "
            f"{known.NAME}: give a folder of {known.NAME}"
        )
    parts = [part for part in known.PARTS if part not in held]
    check_parts(folder, parts)
    for part in parts:
        weighed = not part.startswith(("tokenizer", "scheduler"))
        if weighed and not any(path.suffix in (".safetensors", ".bin") for path in (folder / part).iterdir()):
            raise ValueError(f"components={components}: {part} has no weights: name a folder that has them")
    source = Source(str(components), folder, known.TRAINED, family=name)
    return source, read_texts(source, [part for part, value in index.items() if isinstance(value, list)])


def name_family(index: Mapping[str, Any], folder: Path) -> str:
    """The family that opens a pipeline, by its `model_index.json`.

    Raises:
        ValueError: for a class that no family opens.
    """
    unet = index.get("unet")
    # A pipeline of anybody's around a UNet2DModel is a DDPM, whatever it calls itself.
    if isinstance(unet, list) and unet[-1] == "UNet2DModel":
        return "ddpm"
    return family_of(index["_class_name"], folder)


def _refuse_folder(folder: Path) -> None:
    """Say what to name instead of a folder that holds no pipeline.

    Raises:
        ValueError: where that is known.
    """
    if (folder / "run.json").exists():
        raise ValueError(f"{folder} is the folder of a run: name its model, {folder / 'model'}")
    single = sorted(path.name for suffix in SUFFIXES for path in folder.glob(f"*{suffix}"))
    if single:
        raise ValueError(
            f"{folder} holds single files instead of a pipeline: name one of them ({', '.join(single[:12])})"
        )


def _lone_network(model: str | Path, folder: Path, condition: str | None) -> Source:
    """A folder with a network's configuration and weights, and no pipeline around it."""
    config = files.read_json(folder / "config.json")
    kind = config.get("_class_name", "model of another kind") if isinstance(config, dict) else type(config).__name__
    if isinstance(config, dict) and any("ImageClassification" in str(name) for name in config.get("architectures", [])):
        raise ValueError(f"{folder} holds an image classifier: use erase run classify")
    if kind != "UNet2DModel" or condition == "text":
        raise ValueError(f"{folder} holds a {kind} without its pipeline: name the folder with its model_index.json")
    return check(str(model), folder, (), (".",), "ddpm")
