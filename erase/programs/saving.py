"""What a run keeps: the erased model, a delta to its base, or a LoRA; and where it says how it was made."""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from erase.classification import folders as classifiers
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.single_file import EMA, SingleFile
from erase.engine.saliency import Mask
from erase.programs.folder import versions
from erase.store import files, weights
from erase.store.delta import write_delta
from erase.store.safetensors import Lazy, digest

TextSource = folders.Source | SingleFile
"""A diffusion model on disk."""
Source = TextSource | classifiers.Source
"""A model on disk, of any pipeline."""
Form = Literal["full", "delta", "lora"]
MODEL, DELTA, LORA = "model", "delta.safetensors", "lora.safetensors"


def provenance(
    config: Any,
    preset: str,
    source: Source,
    target: Mapping[str, str],
    mask: Mask | None,
    steps: int | None = None,
) -> dict[str, str]:
    """How a model is erased, for the header of its weights and its card: no prompt, no path, no date.

    Args:
        config: has `method`, `seed` and `train`.
        preset: its name or file.
        source: the base model.
        target: what is to be forgotten, by its hash, as a key of the header (see `hidden`).
        mask: the mask, if there is one.
        steps: how many were done, if not all.
    """
    averages = [n for n in source.open()[0] if n.startswith(EMA)] if isinstance(source, SingleFile) else []
    made = describe(config, preset, base_name(source), digest(tensors(source)), target, mask, steps)
    loras = () if isinstance(source, classifiers.Source) else source.loras
    if loras:
        made["erase_loras"] = json.dumps({lora.title: lora.sha256 for lora in loras})
    return made | ({"erase_left_out": f"{len(averages)} tensors of {EMA}*"} if averages else {})


def base_name(source: Source) -> str:
    """What a model on disk is called: the hub's id, the embedded name, or the folder or file without the path."""
    where = Path(source.name)
    return where.resolve().name if where.exists() else source.name


def describe(
    config: Any,
    preset: str,
    base: str,
    base_sha256: str,
    target: Mapping[str, str],
    mask: Mask | None,
    steps: int | None = None,
) -> dict[str, str]:
    """As `provenance`, of a base that has a name and a digest of its weights."""
    all_steps, form = config.train.steps, " as a LoRA" if getattr(config.train, "form", "dense") == "lora" else ""
    done = f"{all_steps} steps" if steps in (None, all_steps) else f"{steps} of {all_steps} steps"
    return {
        "erase": versions()["erase"],
        "erase_method": str(config.method["name"]),
        "erase_settings": json.dumps(dict(config.method), sort_keys=True),
        "erase_preset": Path(preset).stem,
        "erase_train": f"{getattr(config.train, 'parameters', 'full')}{form}, {done}, seed {config.seed}",
        **target,
        "erase_base": base,
        "erase_base_sha256": base_sha256,
        "erase_mask_density": "none" if mask is None else f"{mask.density:.6f}",
        "erase_versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }


def hidden(target: Mapping[str, Any]) -> dict[str, str]:
    """Prompts or classes to be forgotten and their anchors, for `provenance`."""
    return {"erase_prompts_sha256": hashlib.sha256(json.dumps(target, sort_keys=True).encode()).hexdigest()}


def mark(name: str) -> str:
    """A short hash, by which a prompt is known again and not told: 16 hexadecimal digits."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _folders(source: Source) -> Any:
    """The module that reads and writes models of this kind."""
    return classifiers if isinstance(source, classifiers.Source) else folders


def tensors(source: Source) -> Lazy:
    """The weights that erasing may change, as they are stored: the UNet's, or all of a classifier."""
    found: Lazy = _folders(source).tensors(source)
    return found


def header(source: Source) -> dict[str, str]:
    """The header of the file that holds them."""
    found: dict[str, str] = _folders(source).header(source)
    return found


def write(
    source: Source,
    values: Mapping[str, Tensor],
    out: Path,
    meta: Mapping[str, str],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a model again with other weights, in the form it came in; arguments as those of `folders.save`."""
    _folders(source).save(source, values, out, meta, progress)


def save(source: Source, values: Mapping[str, Tensor], out: Path, meta: Mapping[str, str], form: Form) -> None:
    """Write the erased model into a run's folder; and as a delta, if that is what will be kept (see `settle`).

    Args:
        source: the base model.
        values: new values of the trained weights.
        out: the run's folder.
        meta: provenance.
        form: what will be kept.
    """
    model = out / MODEL
    if not model.exists():
        write(source, values, model, meta)
    if form == "delta" and not (out / DELTA).exists():
        erased = tensors(_folders(source).saved(source, model))
        base = source if isinstance(source, classifiers.Source) else replace(source, loras=())  # what a user has
        write_delta(tensors(base), erased, out / DELTA, meta, weights.provenance(header(source)))


def check_form(source: TextSource, form: Form) -> None:
    """Find out now, not after the training, that a model cannot be kept in a form.

    Raises:
        ValueError: for a delta where LoRAs change text encoders, which a delta does not hold.
    """
    own = folders.learner(source)
    for lora in source.loras if form == "delta" else ():
        if lora.parts.keys() - {own}:
            raise ValueError(
                f"--save delta only holds changes of the {own}, and {lora.path} changes more: use --save full"
            )


def finished(out: Path) -> bool:
    """Whether a run's folder holds what the run was for."""
    return any((out / name).exists() for name in (MODEL, DELTA, LORA)) and (out / "report.json").exists()


def check_kept(out: Path, form: Form) -> None:
    """Find out that a finished run kept its model in the form that is asked for now.

    What lies in its folder does not tell alone: somebody may have put a LoRA beside the model.

    Raises:
        ValueError: if it kept another.
    """
    kept: Form = "delta" if (out / DELTA).exists() else "full"
    if "lora" in files.read_json(out / "report.json"):
        kept = "lora"
    if form == kept or (form == "full" and (out / MODEL).exists()):
        return
    how = "choose another --out"
    if form == "lora":
        how = f"{shlex.join(['erase', 'convert', str(out), str(out) + '-' + LORA])} --to lora makes one"
    elif (kept, form) == ("delta", "full"):
        how = f"{rebuilding(out, files.read_json(out / 'run.json')['config']['model'])} makes the model"
    raise ValueError(f"{out} has finished with --save {kept}, and keeps nothing for --save {form}: {how}")


def rebuilding(out: Path, base: str) -> str:
    """The command that makes the model of a run that kept its delta."""
    return shlex.join(["erase", "apply", base, str(out / DELTA), "--out", str(out / MODEL)])


def settle(out: Path, form: Form) -> None:
    """Remove the model of a run that keeps the delta or LoRA alone, whole: it was needed to be measured."""
    kept = {"delta": out / DELTA, "lora": out / LORA}.get(form)
    if kept is not None and kept.exists() and (out / MODEL).exists():
        with tempfile.TemporaryDirectory(prefix=f".{MODEL}.", suffix=".tmp", dir=out) as temporary:
            (out / MODEL).rename(Path(temporary) / MODEL)
