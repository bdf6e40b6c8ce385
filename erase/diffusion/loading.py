"""Open a checkpoint as a diffusers pipeline, and find out that no weight is missing or broken."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase.diffusion.checkpoints import folders, single_file
from erase.diffusion.checkpoints.folders import HIDES, Source
from erase.diffusion.checkpoints.networks import network, text_config
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.store.safety import check_finite


def open_pipeline(
    source: Source | SingleFile,
    kind: Any,
    trained: str,
    device: torch.device | str = "cpu",
) -> Any:
    """The whole pipeline in float32, frozen, in eval mode, and without a safety checker.

    Args:
        source: the checkpoint.
        kind: the pipeline's class.
        trained: the component that learns.
        device: where its networks go.

    Raises:
        ValueError: for weights that are missing, do not fit their configuration, or are NaN or infinite.
    """
    try:
        pipe = _open_file(source, kind) if isinstance(source, SingleFile) else _open_folder(source, kind, trained)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{source.place} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    for name, net in networks(pipe).items():
        # Weights that their files lack: diffusers leaves them on "meta".
        missing = [weight for weight, p in net.named_parameters() if p.is_meta]
        if missing:
            raise ValueError(
                f"{source.place / name}: {len(missing)} weights are missing, such as {missing[0]}: get it again"
            )
        check_finite(dict(net.named_parameters()), source.place / name)
        net.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that have weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _open_folder(source: Source, kind: Any, trained: str) -> Any:
    index = folders.read_index(source.folder)
    loaded: dict[str, Any] = {}
    for name, value in index.items():
        if not isinstance(value, list) or name in HIDES or value[0] not in ("diffusers", "transformers"):
            continue
        made = getattr(importlib.import_module(value[0]), value[1])
        if not (isinstance(made, type) and issubclass(made, nn.Module)):
            continue
        where = source.trained if name == trained else name
        given: dict[str, Any] = {"subfolder": where, "variant": source.variant, "dtype": torch.float32}
        loader: Any = made
        if value[0] == "diffusers":
            loaded[name] = loader.from_pretrained(source.folder, **given)
            continue
        loaded[name], info = loader.from_pretrained(source.folder, **given, output_loading_info=True)
        absent = sorted(info["missing_keys"])  # transformers makes them up
        if absent:
            raise ValueError(
                f"{source.folder / name}: {len(absent)} weights are missing, such as {absent[0]}: get it again"
            )
    return _assemble(source.folder, kind, loaded)


def _open_file(source: SingleFile, kind: Any) -> Any:
    def values(part: str) -> dict[str, Tensor]:
        return {name: tensor.to(torch.float32, copy=True) for name, tensor in source.part(part).items()}

    from transformers.models.clip.modeling_clip import CLIPTextModel

    nets: dict[str, Any] = {}
    for part in ("unet", "vae"):
        with torch.device("meta"):
            nets[part] = network(part, source.config(part))
        nets[part].load_state_dict(values(part), assign=True)
    encoder: Any = CLIPTextModel
    nets["text_encoder"] = encoder.from_pretrained(
        None, config=text_config(source.texts), state_dict=values("text_encoder"), dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        single_file.write_texts(source.texts, Path(folder))
        return _assemble(Path(folder), kind, nets)


def _assemble(folder: Path, kind: Any, parts: Mapping[str, Any]) -> Any:
    """The pipeline of a folder, whose networks are loaded."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    hidden: dict[str, Any] = dict.fromkeys((name for name in HIDES if name in index), None)
    if "safety_checker" in index:
        hidden["requires_safety_checker"] = False
    return kind.from_pretrained(folder, dtype=torch.float32, **hidden, **parts)
