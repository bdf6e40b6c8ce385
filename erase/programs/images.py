"""Images and data that models generate, and what classifiers see in them, shared by the processes of a launch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from erase.config import Draw, DrawLabels
from erase.diffusion.model import Model
from erase.engine import distributed
from erase.engine.precision import Precision
from erase.evaluation import classes
from erase.evaluation.generate import Sampler, generate
from erase.evaluation.prompt_files import PromptRow
from erase.programs.progress import advance, bar
from erase.store.safetensors import read_safetensors, write_safetensors


def generated_data(
    draw: Callable[[slice], Tensor], total: int, batch_size: int, what: str, kept: Path | None = None
) -> Tensor:
    """What a model draws to learn from, a batch at a time with a progress bar, shared by the processes: `[N, C, H, W]`.

    Args:
        draw: the latents of a part of what is asked for, `[B, C, H, W]`.
        total: N.
        batch_size: B.
        what: the side's name, for the bar.
        kept: a file that has the same data, or will: it is read where it exists.
    """
    if kept is not None and distributed.on_main(kept.exists):
        return read_safetensors(kept)[0]["latents"]
    with bar(total, f"generating {what} data") as shown:

        def part(start: int) -> Tensor:
            drawn = draw(slice(start, start + batch_size))
            shown.update(len(drawn) * distributed.world())
            return drawn

        found = torch.cat(distributed.spread(part, range(0, total, batch_size)))
    if kept is not None:
        distributed.on_main(lambda: write_safetensors(kept, {"latents": found}, {}))
    return found


def sampling_settings(draw: Draw | DrawLabels) -> dict[str, Any]:
    """What of `draw` an image depends on; the model's own sampler goes without saying."""
    found = asdict(draw)
    return {key: value for key, value in found.items() if key != "cache" and (key, value) != ("sampler", None)}


def kept_at(config: Any, model: Model, *what: Any) -> Path | None:
    """Where `draw.cache` keeps data that a model generates: named by a hash of all that they depend on, to the bit.

    Args:
        config: has `draw`, `precision` and `seed`.
        model: which generates.
        what: what else they depend on, as JSON can hold it.

    Raises:
        ValueError: for a model in memory, which no hash of files tells.
    """
    cache: Path | None = config.draw.cache
    if cache is None:
        return None
    if model.source is None:
        raise ValueError(f"draw.cache={cache} is for models on disk, not for one in memory: leave it out")
    files = [model.weights, model.config_hashes]
    made = [*files, sampling_settings(config.draw), config.precision, str(model.device), config.seed]
    text = json.dumps([*made, *what, distributed.world(), torch.__version__])
    return cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def sampler_of(model: Model, draw: Draw | DrawLabels, precision: Precision) -> Callable[..., list[Image.Image]]:
    """How a model generates images by a run's settings, as `generate_images` takes it."""
    return model.sampler(steps=draw.steps, guidance=draw.guidance, sampler=draw.sampler, autocast=precision.sampling)


def generate_images(
    sample: Sampler,
    rows: Sequence[PromptRow],
    folder: Path,
    *,
    images: int,
    batch_size: int,
    resume: bool,
    settings: dict[str, Any],
    reuse: Path | None = None,
) -> None:
    """The evaluation's images of one model, with a progress bar; arguments as those of `generate`.

    Several processes draw a batch each at a time; the first one asks for them and writes.
    """
    world = distributed.world()
    if distributed.rank() > 0:
        asked: Callable[[], Any] = lambda: None  # noqa: E731
        while (wanted := distributed.on_main(asked)) is not None:
            _generate_part(sample, wanted, batch_size)
        return

    def together(prompts: list[str], generators: list[torch.Generator], **given: Any) -> list[Image.Image]:
        wanted = (prompts, [g.initial_seed() for g in generators], given)
        distributed.on_main(lambda: wanted)
        return _generate_part(sample, wanted, batch_size)

    with bar(len(rows) * images, f"images: {folder.name}") as shown:
        generate(
            sample if world == 1 else together,
            rows,
            folder,
            per_prompt=images,
            batch_size=batch_size * world,
            resume=resume and folder.exists(),
            reuse=reuse,
            progress=lambda done, total: advance(shown, done),
            settings=settings,
        )
    distributed.on_main(lambda: None)


def _generate_part(
    sample: Sampler, wanted: tuple[list[str], list[int], dict[str, Any]], size: int
) -> list[Image.Image]:
    """A batch by each process, from the seeds of generators on the CPU; all images, in order."""
    prompts, seeds, given = wanted

    def draw(start: int) -> list[Image.Image]:
        part = slice(start, start + size)
        return sample(prompts[part], [torch.Generator("cpu").manual_seed(s) for s in seeds[part]], **given)

    return [image for part in distributed.spread(draw, range(0, len(prompts), size)) for image in part]


def classified(paths: Sequence[Path], classifier: Path, **settings: Any) -> classes.ClassPredictions:
    """What a classifier sees, each process looking at its share; arguments as those of `classify`."""
    parts = distributed.spread(lambda share: classes.classify(share, classifier, **settings), distributed.shares(paths))
    return classes.joined(parts)
