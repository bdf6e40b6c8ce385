"""`erase generate`: images of any family, each of its row's seed and settings alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erase.diffusion import class_conditional, text
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.texts import config_hashes
from erase.diffusion.families import family
from erase.diffusion.lora.read import with_loras
from erase.diffusion.model import open_model
from erase.engine import distributed
from erase.engine.precision import Precision
from erase.evaluation.prompt_files import PromptRow
from erase.programs.folder import versions, working_in
from erase.programs.images import generate_images
from erase.programs.launching import launch
from erase.store import files

SMALL = 5 * 10**7
"""Weights up to which one CPU thread is as fast as several, and the pixels are the same whatever a launcher gives."""
MADE_BY = ("erase", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Wanted:
    """How images are generated."""

    images: int = 1
    """Per row."""
    steps: int = 50
    guidance: float | None = None
    """Of rows that name none; by default 7.5 for text, and the model's own for class labels."""
    batch_size: int = 8
    precision: str = "no"
    sampler: str | None = None
    """By default the model's own."""
    threads: int | None = None
    """CPU threads; by default 1 for small models, else all."""
    labels: tuple[str, ...] = ()
    """Names of the classes of a model that names none."""
    components: str | None = None
    """The folder or hub id with the rest of a single file that holds the network alone."""
    loras: tuple[str, ...] = ()
    """LoRA files that are merged into the model, each with a scale or without."""


def generate(
    model: str,
    file: Path | None,
    rows: Sequence[PromptRow],
    out: Path,
    wanted: Wanted,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Generate the images of rows into a folder; they are of a prompt file, or typed.

    Raises:
        ValueError: for a model that cannot be loaded, a size that it does not have, a label that it does not know, or
            a folder in which another process is at work.
    """
    device = launch().device
    base = locate(model, labels=wanted.labels, components=wanted.components)
    source = with_loras(base, wanted.loras, "--lora")
    known = family(source.family)
    reads_text = known.CONDITION == "text"
    named = file or "PROMPTS"
    if reads_text:  # before the model is loaded
        if wanted.labels:
            raise ValueError(f"--labels names classes, and {model} reads text: leave it out")
        if file is None and len(rows) > 2 and not any(" " in row.prompt for row in rows):
            say(f"note: got {len(rows)} prompts of one word each; put a prompt of several words in quotes")
        for number, row in enumerate(rows, 1):
            text.check_size(row.width, row.height, f"{named}: row {number}", known.STRIDE)
    found = open_model(source, device, wanted.precision)
    if not reads_text:
        for number, row in enumerate(rows, 1):
            class_conditional.check_row(found, row.prompt, row.width, row.height, f"{named}: row {number}")
    scheduler = found.scheduler(wanted.sampler)
    cut = text.cut_prompts(found, [row.prompt for row in rows]) if reads_text else []
    if cut and distributed.rank() == 0:
        say(text.say_cut(found, cut, len(rows)))
    guidance = wanted.guidance
    if guidance is None:
        guidance = 7.5 if reads_text else found.guidance
    found.remember([*(row.prompt for row in rows), ""])
    settings = {
        "model": model,
        "weights": folders.fingerprint(source),
        "configs": config_hashes(source),
        "dtype": str(found.dtype).removeprefix("torch."),
        "precision": wanted.precision,
        "draw": {"steps": wanted.steps, "guidance": guidance},
        **settings_of(scheduler),
        "prompt_file": None if file is None else {"name": file.name, "sha256": files.sha256(file)},
        "truncated_prompts": cut,
        "versions": {name: value for name, value in versions().items() if name in MADE_BY},
    }
    if device.type == "cpu":
        small = sum(p.numel() for p in found.net.parameters()) < SMALL
        torch.set_num_threads(wanted.threads or (1 if small else torch.get_num_threads()))
        settings["threads"] = torch.get_num_threads()
    sampling = Precision(wanted.precision, device).sampling
    with working_in(out):
        generate_images(
            found.sampler(steps=wanted.steps, guidance=guidance, sampler=wanted.sampler, autocast=sampling),
            rows,
            out,
            images=wanted.images,
            batch_size=wanted.batch_size,
            resume=resume,
            settings=settings,
        )


def settings_of(scheduler: Any) -> dict[str, Any]:
    """A sampler's class and configuration, as JSON can hold them: infinity is text."""
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in config.items()}
    return {"scheduler": type(scheduler).__name__, "scheduler_config": plain}
