"""What a text-to-image model generates by a run's settings: images to look at, latents to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.config import SdConfig
from erase.diffusion import text
from erase.diffusion.model import Model
from erase.engine import distributed
from erase.engine.precision import Precision
from erase.evaluation import generate
from erase.evaluation.prompt_files import PromptRow
from erase.programs.images import generate_images, generated_data, kept_at, sampler_of, sampling_settings
from erase.store.safetensors import read_safetensors, write_safetensors


def generate_rows(
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
    """Generate images of a model by the run's settings; `made` says what else they depend on."""
    settings: dict[str, Any] = {
        **made,
        "configs": diffuser.config_hashes,
        "draw": sampling_settings(config.draw),
        "precision": config.precision,
        "scheduler": type(diffuser.scheduler(config.draw.sampler)).__name__,
    }
    if cut := text.cut_prompts(diffuser, [row.prompt for row in rows]):
        settings["truncated_prompts"] = cut
    generate_images(
        sampler_of(diffuser, config.draw, precision),
        rows,
        out,
        images=images,
        batch_size=config.draw.batch_size,
        resume=resume,
        settings=settings,
        reuse=reuse,
    )


def generated_latents(
    config: SdConfig, diffuser: Model, precision: Precision, words: Sequence[str], samples: Sequence[int], what: str
) -> Tensor:
    """What the model generates for prompts, one sample of the run's seed each, `[N, C, H, W]`, with a progress bar.

    `draw.cache` keeps each by itself. Batches are then full, so that none depends on which others were there: the last
    one generates its first sample again.
    """
    asked, size = list(zip(words, samples, strict=True)), config.draw.batch_size

    def draw(some: Sequence[tuple[str, int]]) -> Tensor:
        return diffuser.generate_latents(
            [word for word, _ in some],
            [generate.image_generator(config.seed, sample) for _, sample in some],
            steps=config.draw.steps,
            guidance=config.draw.guidance,
            sampler=config.draw.sampler,
            batch_size=size,
            autocast=precision.sampling,
        )

    kept = {one: path for one in asked if (path := kept_at(config, diffuser, *one)) is not None}
    if not kept:
        return generated_data(lambda part: draw(asked[part]), len(asked), size, what)
    new = distributed.on_main(lambda: [one for one, path in kept.items() if not path.exists()])

    def draw_full(part: slice) -> Tensor:
        some = new[part]
        return draw([*some, *some[:1] * (size - len(some))])[: len(some)]

    def keep(found: Tensor) -> None:
        for one, latent in zip(new, found, strict=True):
            write_safetensors(kept[one], {"latents": latent}, {})

    if new:
        distributed.on_main(partial(keep, generated_data(draw_full, len(new), size, what)))
    return torch.stack([read_safetensors(kept[one])[0]["latents"] for one in asked])
