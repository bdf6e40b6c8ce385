"""What a text-to-image model generates by a run's settings: images to look at, latents to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from erase.config import SdConfig
from erase.diffusion import text
from erase.diffusion.model import Model
from erase.engine.precision import Precision
from erase.evaluation import generate
from erase.evaluation.prompt_files import PromptRow
from erase.programs.images import draw_pictures, draw_settings, drawn_data, kept_at, sampler_of


def draw_rows(
    config: SdConfig,
    rows: Sequence[PromptRow],
    images: int,
    diffuser: Model,
    precision: Precision,
    out: Path,
    resume: bool,
    made: Mapping[str, Any],
    reuse: Path | None = None,
) -> None:
    """Pictures of a model by the run's settings; `made` says what else they depend on."""
    settings: dict[str, Any] = {
        **made,
        "draw": draw_settings(config.draw),
        "precision": config.precision,
        "scheduler": type(diffuser.scheduler(config.draw.sampler)).__name__,
    }
    if cut := text.cut_prompts(diffuser, [row.prompt for row in rows]):
        settings["truncated_prompts"] = cut
    draw_pictures(
        sampler_of(diffuser, config.draw, precision),
        rows,
        out,
        images=images,
        batch_size=config.draw.batch_size,
        resume=resume,
        settings=settings,
        reuse=reuse,
    )


def drawn_latents(
    config: SdConfig, diffuser: Model, precision: Precision, words: Sequence[str], samples: Sequence[int], what: str
) -> Tensor:
    """What the model draws for prompts, one sample of the run's seed each, `[N, C, H, W]`, with a progress bar."""
    generators = [generate.image_generator(config.seed, i) for i in samples]

    def draw(part: slice) -> Tensor:
        return diffuser.draw_latents(
            words[part],
            generators[part],
            steps=config.draw.steps,
            guidance=config.draw.guidance,
            sampler=config.draw.sampler,
            batch_size=config.draw.batch_size,
            autocast=precision.drawing,
        )

    kept = kept_at(config, diffuser, list(words), list(samples))
    return drawn_data(draw, len(words), config.draw.batch_size, what, kept)
