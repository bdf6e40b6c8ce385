"""An erasure as a LoRA: of a run, a delta, or an erased model and its base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.families import family
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.lora.read import with_loras
from erase.diffusion.lora.svd import Ranks, rounded
from erase.diffusion.lora.write import HEADER, Kept, check_new, difference, write_difference, write_lora
from erase.methods import find_method, list_methods
from erase.programs import saving
from erase.store import delta, files, weights
from erase.store.safetensors import digest, open_safetensors

Source = folders.Source | SingleFile
To = Literal["lora", "comfy-diff"]


@dataclass(frozen=True)
class Change:
    """What was erased from a model."""

    base: Source
    erased: Mapping[str, Tensor]
    """Weights after, by diffusers' names: those that may have changed."""
    meta: Mapping[str, str]
    """Provenance."""


def convert(
    change: Change,
    out: Path,
    to: To,
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
) -> Kept:
    """Write a change in a form that other programs load onto the base.

    Raises:
        ValueError: for a family without such a form, a path in use, or a change that the form does not carry.
    """
    check_new(out)
    layout = layout_of(change.base)
    before = folders.tensors(change.base)
    layers = layout.layers(before, folders.network_config(change.base))
    found = difference(before, change.erased)
    if to == "comfy-diff":
        return write_difference(found, layout, layers, out, change.meta, progress)
    return write_lora(
        found, layout, layers, out, change.meta, ranks, dtype, progress, lambda name: rounded(change.erased[name])
    )


def ranks_of(method: str | None, rank: int | None = None, energy: float | None = None) -> Ranks:
    """How ranks are chosen: as asked for, else .99 of a trained change, and all of a closed form, which has low rank.

    Args:
        method: its name; it may be none of ours.
        rank: see `Ranks`.
        energy: see `Ranks`.

    Raises:
        ValueError: for a rank or a share out of range.
    """
    if energy is None:
        energy = 1.0 if method in list_methods() and find_method(str(method)).closed else 0.99
    return Ranks(rank, energy)


def save(change: Change, out: Path, ranks: Ranks) -> None:
    """Write the LoRA of a run into its folder, unless it is there."""
    if not (out / saving.LORA).exists():
        convert(change, out / saving.LORA, "lora", ranks)


def about(path: Path) -> dict[str, Any]:
    """What a LoRA of ours holds, for a report: `layers`, `rank` (least and most), `kept`, `left_out`, `bytes`."""
    told: dict[str, Any] = json.loads(open_safetensors(path)[1][HEADER])
    return {**told, "bytes": path.stat().st_size}


def check_chosen(source: Source, chosen: Mapping[str, int]) -> None:
    """Find out now, not after the training, that a model or what learns of it has no LoRA form.

    Args:
        source: the model.
        chosen: dimensions of the tensors that learn, by name.

    Raises:
        ValueError: if it has none.
    """
    layout = layout_of(source)
    if not any(layout.carried(name, ndim) for name, ndim in chosen.items()):
        raise ValueError(
            f"--save lora: a LoRA cannot carry any of what learns, such as {next(iter(chosen))}: choose other "
            "train.parameters, or use --save delta"
        )


def layout_of(source: Source) -> LoraLayout:
    """The names of layers in LoRA files of a model's family.

    Raises:
        ValueError: for a family without.
    """
    known = family(source.family)
    if known.LORA is None:
        raise ValueError(
            f"{source.name} is a {known.NAME}, which no program loads LoRAs onto: use the model or a delta"
        )
    return known.LORA


def find_change(path: Path, base: str | None = None, components: str | None = None) -> Change:
    """The change of a run, of a delta, or of an erased model.

    Args:
        path: a run's folder, a delta, or a model.
        base: what it was erased from; by default as a run says, or as a delta names it.
        components: the rest of the pipeline, where the models are single files that hold the network alone.

    Raises:
        ValueError: for something else, a base that cannot be found, or another one than was erased.
    """
    loras: Sequence[str] = ()
    if path.is_dir() and (path / "run.json").exists():
        run = files.read_json(path / "run.json")
        config = run.get("config", {}) if isinstance(run, dict) else {}
        if config.get("pipeline") != "sd":
            raise ValueError(f"{path} is not a run of erase run sd: LoRAs are of text-to-image models; name such a run")
        model, kept = path / saving.MODEL, path / saving.DELTA
        if not (model.exists() or kept.exists()):
            there = (path / saving.LORA).exists()
            what = f"keeps only {saving.LORA}: use that" if there else "holds no erased model: --resume the run"
            raise ValueError(f"{path} {what}")
        base, loras = base or str(config["model"]), config.get("loras", [])
        components = components or config.get("components")
        path = model if model.exists() else kept
    if path.suffix == ".safetensors" and path.is_file() and is_delta(path):
        found = delta.open_delta(path)
        named = base or found.meta.get("erase_base", "")
        source = _base(named, components, f"{path} changes {named or 'a model'}")
        return Change(with_loras(source, loras), delta.apply(found, folders.tensors(source)), found.meta)
    if base is None:
        raise ValueError(f"{path} is not a run or a delta: name what it was erased from by --base")
    source = with_loras(_base(base, components, f"{path} was erased from {base}"), loras)
    erased = locate(path, "text", components=components)
    told = weights.provenance(folders.header(erased))
    before, after = folders.tensors(source), folders.tensors(erased)
    check_base(path, source, told.get("erase_base_sha256"))
    odd = sorted(before.keys() ^ after.keys())
    if odd:
        raise ValueError(f"{path} was not erased from {base}: one of them lacks {odd[0]}; name another --base")
    return Change(source, after, told)


def is_delta(path: Path) -> bool:
    """Whether a safetensors file is a delta of ours."""
    return open_safetensors(path)[1].get("format") == delta.FORMAT


def check_base(path: Path, source: Source, sha256: str | None) -> None:
    """Refuse another base than the one that was erased.

    Raises:
        ValueError: for it.
    """
    found = None if sha256 is None else digest(folders.tensors(source))
    if found != sha256:
        raise ValueError(
            f"{path} was erased from weights with the SHA-256 {str(sha256)[:16]}…; those of {source.name} have "
            f"{str(found)[:16]}…: name another --base"
        )


def _base(name: str, components: str | None, what: str) -> Source:
    try:
        return locate(name, "text", components=components)
    except ValueError as error:
        raise ValueError(f"{what}, which is not found: name its folder or file by --base ({error})") from error
