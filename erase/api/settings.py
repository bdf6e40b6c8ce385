"""The settings of a call: a preset, what the call asks for, and settings by the names that `erase run` has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erase import resources
from erase.config import PIPELINES, over, parse, put, read_preset, read_words
from erase.engine.method import Method
from erase.engine.precision import Precision, resolve
from erase.methods import Entry, find_method
from erase.programs.inputs import check_needs
from erase.programs.progress import Listener
from erase.programs.settings import read_method
from erase.store import files

PRESETS = {
    **dict.fromkeys(("sd", "sdxl", "sd3", "flux", "pixart", "lumina2"), "sd_concept_sfron"),
    "ddpm": "ddpm_sfron",
    "dit": "dit_imagenet_sfron",
    "classifier": "classify_sfron",
    "network": "classify_sfron",
}
"""Where values come from that a call does not name, by family; none of what the presets forget or stay with."""
OF_RUNS = ("pipeline", "model", "eval", "until", "attack", "tracker", "checkpoint_every", "cache", "recipe")
"""Settings that a run has and a call has not."""
HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Call:
    """What every kind of model takes."""

    steps: int | None = None
    seed: int = 0
    preset: str | Path | None = None
    settings: Mapping[str, Any] | Sequence[str] = ()
    progress: Listener | None = None
    keep_base: bool = True


@dataclass(frozen=True)
class Chosen:
    """Settings, resolved."""

    config: Any
    preset: str
    """Its name."""
    entry: Entry
    method: Method
    precision: Precision


def choose(
    call: Call,
    kind: str,
    asked: Mapping[str, Any],
    rare: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Chosen:
    """Put settings over each other: the preset's, what is asked for, the call's own.

    Args:
        call: the user's.
        kind: a key of `PRESETS`.
        asked: nested settings.
        rare: what the method may need besides what every program gives (`erase.programs.inputs`).
        device: of the network.
        dtype: of its weights; those in 16 bits fix the precision.

    Raises:
        ValueError: for settings that are unknown, of a run alone, or do not go together.
    """
    preset = str(call.preset or PRESETS[kind])
    words = [call.settings] if isinstance(call.settings, str) else call.settings
    given = files.paths(words) if isinstance(words, Mapping) else read_words(words)
    for path in given:
        if path.split(".")[0] in OF_RUNS:
            raise ValueError(f"settings has {path}, which only erase run takes: leave it out")
    below = {key: value for key, value in read_preset(resources.preset_path(preset)).items() if key not in OF_RUNS[2:]}
    # Pipelines of 16 bits compute in them; of 32 bits, where that is fast.
    below["precision"] = HALVES.get(dtype, "auto")
    if call.steps is not None:
        given = {"train.steps": call.steps, **given}
    data = put(over(below, {"seed": call.seed, **asked}), given)
    config: Any = parse(data, PIPELINES[data["pipeline"]])
    name = resolve(config.precision, device)
    if dtype in HALVES and name != HALVES[dtype]:
        raise ValueError(
            f"precision={name} needs weights in float32, and these are in {HALVES[dtype]}: leave out precision"
        )
    if find_method(str(config.method.get("name", ""))).fresh:
        raise ValueError(
            f"{config.method['name']} trains new weights, which erase.forget does not do: choose another method"
        )
    entry, method = read_method(config)
    check_needs(entry, rare)
    return Chosen(config, Path(preset).stem, entry, method, Precision(name, device))
