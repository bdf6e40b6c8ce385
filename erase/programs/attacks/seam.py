"""What an attack is given: a model, images of the concept, and how what the model generates is judged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from erase.config import SdConfig
from erase.diffusion.condition import Condition
from erase.diffusion.data import ImageItem, LatentSet, encode_in_batches
from erase.diffusion.loading import networks
from erase.diffusion.model import Model, open_model
from erase.engine.precision import Precision
from erase.evaluation.generate import Sampler
from erase.evaluation.manifest import images_of
from erase.evaluation.prompt_files import PromptRow
from erase.programs.images import generate_images, sampling_settings
from erase.programs.progress import bar
from erase.programs.text.images import generate_rows, generated_latents
from erase.programs.text.judge import share
from erase.programs.text.judges.seam import Judge
from erase.programs.text.plan import Plan

EXAMPLES = 6
"""Most images of an attack that a page shows."""
ATTACKER = 2**20
"""The first sample of a seed that is an attacker's: no image of these samples is trained on or counted."""


@dataclass(frozen=True)
class Images:
    """What attackers learn from: images of the concept, from a model that knows it."""

    data: LatentSet
    prompts: list[str]
    """Of each image."""


@dataclass(frozen=True)
class Target:
    """A model under attack."""

    name: str
    """`base` or `erased`."""
    config: SdConfig
    plan: Plan
    judge: Judge
    model: Model
    base: Any
    """Where the base model is."""
    images: Images | None
    """`None` where no attack learns from them."""
    top: Path
    """Of what all attacks write."""
    accelerator: Accelerator
    precision: Precision
    resume: bool

    @property
    def made(self) -> dict[str, Any]:
        """By which weights its images are made."""
        return {"weights": self.model.weights}

    @property
    def known(self) -> Images:
        """The images of the concept, for attacks that learn from them."""
        assert self.images is not None
        return self.images

    def shows(self, rows: Sequence[PromptRow], images: int, folder: Path, made: Mapping[str, Any] = {}) -> list[bool]:
        """Whether each of some images shows the concept; they are generated where they are not there yet.

        Args:
            rows: what is asked for.
            images: of each row.
            folder: of the images.
            made: what they depend on besides the weights.
        """
        made = {**self.made, **made}
        self.model.remember([row.prompt for row in rows if row.prompt not in self.model.given] + [""])
        generate_rows(self.config, rows, images, self.model, self.precision, folder, self.resume, made)
        return self.judge.judge(images_of(folder), [row for row in rows for _ in range(images)]).shows

    def share(self, shown: Sequence[bool], *folders: Path) -> dict[str, Any]:
        """How many of N images show the concept, and some that do: `n, shown, rate, ci95, through`.

        Args:
            shown: whether each does.
            folders: of the images, one after another.
        """
        paths = [path for folder in folders for path in images_of(folder)]
        through = [path for path, hit in zip(paths, shown, strict=True) if hit][:EXAMPLES]
        return {**share(shown), "through": [path.relative_to(self.top.parent).as_posix() for path in through]}

    def shows_made(
        self, sample: Sampler, rows: Sequence[PromptRow], folder: Path, made: Mapping[str, Any]
    ) -> list[bool]:
        """As `shows`, of one image a row that `sample` makes."""
        settings = {
            **self.made,
            **made,
            "configs": self.model.config_hashes,
            "draw": sampling_settings(self.config.draw),
            "precision": self.config.precision,
        }
        size = self.config.draw.batch_size
        generate_images(sample, rows, folder, images=1, batch_size=size, resume=self.resume, settings=settings)
        return self.judge.judge(images_of(folder), rows).shows

    def again(self) -> Model:
        """The model as it is on the disk, for an attack that changes its weights; the networks in memory are freed."""
        assert self.model.source is not None
        self.model.free(*networks(self.model.pipe))
        return open_model(self.model.source, self.accelerator.device, self.precision.name)


@dataclass(frozen=True)
class Kind:
    """An attack, as the program knows it."""

    attack: Callable[[Target, dict[str, Any]], None]
    """Attacks one model, and adds to what a report says of the attack."""
    check: Callable[[SdConfig, Plan, Model], None] = lambda *_: None
    """Finds out before the training that the attack cannot be made."""
    learns: bool = True
    """Whether it learns from images of the concept."""
    trains: bool = False
    """Whether it trains the model's weights: then the base model, which needs no training, is no control."""


def concept_images(config: SdConfig, plan: Plan, model: Model, precision: Precision) -> Images:
    """What attackers learn from: images given, or generated by the base model from noise of the attacker's own.

    `attack.count` of them, of all prompts in turn.
    """
    if plan.forget_images is not None:
        items = in_turn_by(plan.forget_images, config.attack.count)
        words = [item.prompt for item in items]
        mean, std = encode_in_batches(items, model.encode, model.resolution)
    else:
        prompts, std = plan.forget, None
        words = [prompts[k % len(prompts)] for k in range(config.attack.count)]
        samples = [ATTACKER + k // len(prompts) for k in range(config.attack.count)]
        mean = generated_latents(config, model, precision, words, samples, "attacker's")
    distinct = list(dict.fromkeys(words))
    index = torch.tensor([distinct.index(word) for word in words])
    return Images(LatentSet(mean, index, model.embed(distinct), std), words)


def in_turn_by(items: Sequence[ImageItem], total: int) -> list[ImageItem]:
    """So many of some images at most: the first of each prompt, then the second of each."""
    by_prompt: dict[str, list[ImageItem]] = {}
    for item in items:
        by_prompt.setdefault(item.prompt, []).append(item)
    rounds = itertools.zip_longest(*by_prompt.values())
    return [item for several in rounds for item in several if item is not None][:total]


@contextmanager
def given(model: Model, conditions: Mapping[str, Condition]) -> Iterator[None]:
    """Within the context the model generates with these conditions, leaves `[1, …]`, for these prompts."""
    model.given.update(conditions)
    try:
        yield
    finally:
        for prompt in conditions:
            del model.given[prompt]


@contextmanager
def counted(total: int, what: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar, and what moves it on by a step."""
    with bar(total, what) as shown:
        yield partial(_advance, shown)


def _advance(shown: Any, row: Mapping[str, Any]) -> None:
    shown.update()
