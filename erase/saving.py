"""What a run keeps: the erased model, or a delta to its base; and where it says how it was made."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from erase.checkpoint import digest
from erase.delta import write_delta
from erase.diffusion import folders, single_file
from erase.diffusion.folders import Source
from erase.diffusion.ldm import EMA
from erase.diffusion.single_file import SingleFile
from erase.runs import versions
from erase.saliency import Mask

Form = Literal["full", "delta"]
MODEL, DELTA = "model", "delta.safetensors"


def provenance(
    config: Any,
    preset: str,
    source: Source | SingleFile,
    target: Mapping[str, Any],
    mask: Mask | None,
    steps: int | None = None,
) -> dict[str, str]:
    """How a model is erased, for the header of its weights and its card: no prompt, no path, no date.

    Args:
        config: has `method`, `seed` and `train`.
        preset: its name or file.
        source: the base model.
        target: what is to be forgotten, and its anchors.
        mask: the mask, if there is one.
        steps: how many were done, if not all.
    """
    all_steps = config.train.steps
    done = f"{all_steps} steps" if steps in (None, all_steps) else f"{steps} of {all_steps} steps"
    where = Path(source.name)
    averages = [n for n in source.open()[0] if n.startswith(EMA)] if isinstance(source, SingleFile) else []
    return {
        "erase": versions()["erase"],
        "erase_method": str(config.method["name"]),
        "erase_settings": json.dumps(dict(config.method), sort_keys=True),
        "erase_preset": Path(preset).stem,
        "erase_train": f"{config.train.parameters}, {done}, seed {config.seed}",
        "erase_prompts_sha256": hashlib.sha256(json.dumps(target, sort_keys=True).encode()).hexdigest(),
        "erase_base": where.resolve().name if where.exists() else source.name,
        "erase_base_sha256": digest(folders.unet_tensors(source)),
        "erase_mask_density": "none" if mask is None else f"{mask.density:.6f}",
        "erase_versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        **({"erase_left_out": f"{len(averages)} tensors of {EMA}*"} if averages else {}),
    }


def mark(name: str) -> str:
    """A short hash, by which a prompt is known again and not told: 16 hexadecimal digits."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def save(
    source: Source | SingleFile, tensors: Mapping[str, Tensor], out: Path, meta: Mapping[str, str], form: Form
) -> None:
    """Write the erased model into a run's folder; and as a delta, if that is what will be kept (see `settle`).

    Args:
        source: the base model.
        tensors: new values of the trained weights.
        out: the run's folder.
        meta: provenance.
        form: what will be kept.
    """
    if not (out / MODEL).exists():
        folders.save(source, tensors, out / MODEL, meta)
    if form == "delta" and not (out / DELTA).exists():
        erased = folders.unet_tensors(folders.saved(source, out / MODEL))
        before = single_file.provenance(folders.unet_header(source))
        write_delta(folders.unet_tensors(source), erased, out / DELTA, meta, before)


def finished(out: Path) -> bool:
    """Whether a run's folder holds what the run was for."""
    return ((out / MODEL).exists() or (out / DELTA).exists()) and (out / "report.json").exists()


def settle(out: Path, form: Form) -> None:
    """Remove the model of a run that keeps the delta alone, whole: it is needed no more once its pictures are drawn."""
    if form == "delta":
        with tempfile.TemporaryDirectory(prefix=f".{MODEL}.", suffix=".tmp", dir=out) as temporary:
            (out / MODEL).rename(Path(temporary) / MODEL)
