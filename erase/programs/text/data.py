"""What a text-to-image model learns from: latents and conditions of both sides, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from erase.config import Remain, SdConfig
from erase.diffusion import condition
from erase.diffusion.data import ImageItem, LatentSet, encode_in_batches
from erase.diffusion.model import Model
from erase.diffusion.nearness import nearness
from erase.engine import distributed
from erase.engine.precision import Precision
from erase.programs.settings import near_images
from erase.programs.text.images import generated_latents
from erase.programs.text.plan import Plan, own_of


def samples_of(prompts: Sequence[str], count: int) -> list[tuple[str, int]]:
    """Each prompt with the numbers of its samples."""
    return [(prompt, i) for prompt in prompts for i in range(count)]


def num_near(remain: Remain, prompts: Sequence[str]) -> int:
    """How many of the remain prompts are near ones, by the settings: `remain.count` images of each.

    Raises:
        ValueError: if it is all of them, or more.
    """
    found = -(-near_images(remain) // remain.count)
    if found >= len(prompts) and remain.near:
        raise ValueError(
            f"remain.near={remain.near} asks for the {found} nearest of {len(prompts)} remain prompts, {remain.count} "
            "images each: name more remain.prompts, raise remain.count, or set remain.near=0"
        )
    return found


def find_near(config: SdConfig, plan: Plan, model: Model) -> dict[str, float]:
    """The remain prompts that are nearest to a forgotten one, nearest first, and how near they are."""
    number = num_near(config.remain, plan.remain)
    if not number:
        return {}
    near = distributed.on_main(partial(nearness, model.embed, plan.remain, plan.forget))
    order = sorted(range(len(near)), key=lambda k: -near[k])[:number]
    return {plan.remain[k]: near[k] for k in order}


def remain_samples(config: SdConfig, prompts: Sequence[str], near: Sequence[str] = ()) -> list[tuple[str, int]]:
    """The remain prompts' samples: `remain.count` of each, or `remain.total` in all, by lot.

    Of a total the `near` prompts have the share `remain.near`.
    """
    if config.remain.total is None:
        return samples_of(prompts, config.remain.count)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    led = in_turn(near, near_images(config.remain) if near else 0)
    others = [prompts[k] for k in order if prompts[k] not in near]
    return [*led, *in_turn(others, config.remain.total - len(led))]


def in_turn(prompts: Sequence[str], total: int) -> list[tuple[str, int]]:
    """So many samples in all: one of each prompt, then another of each."""
    return [(prompts[k % len(prompts)], k // len(prompts)) for k in range(total)]


def cache(
    config: SdConfig,
    plan: Plan,
    diffuser: Model,
    precision: Precision,
    wanted: tuple[bool, bool] = (True, True),
    near: Sequence[str] = (),
) -> tuple[LatentSet | None, LatentSet | None, dict[str, Tensor]]:
    """Latents and embeddings of both sides, computed once, where wanted; and the empty prompt's embedding.

    `near` are the remain prompts of `find_near`.
    """

    def side(
        asked: Sequence[tuple[str, int]], items: list[ImageItem] | None, what: str
    ) -> tuple[list[str], Tensor, Tensor | None]:
        if items is not None:
            mean, std = encode_in_batches(items, diffuser.encode, diffuser.resolution)
            return [item.prompt for item in items], mean, std
        words, samples = [word for word, _ in asked], [sample for _, sample in asked]
        return words, generated_latents(config, diffuser, precision, words, samples, what), None

    forget_words: list[str] = []
    means: list[Tensor] = []
    forget_std: Tensor | None = None
    if wanted[0] and config.forget.pictures != "anchor":
        forget_words, mean, forget_std = side(
            samples_of(plan.forget, config.forget.count), plan.forget_images, "forget"
        )
        means.append(mean)
    if wanted[0] and config.forget.pictures != "own":
        # What the forget prompts should become: the noisy images that the erased model will pass through.
        _, mean, _ = side(samples_of(plan.anchors, config.forget.count), None, "anchor")
        forget_words += [word for word in plan.forget for _ in range(config.forget.count)]
        means.append(mean)
        if forget_std is not None:
            forget_std = torch.cat([forget_std, torch.zeros_like(mean)])
    kept: tuple[list[str], Any, Tensor | None] = ([], None, None)
    if wanted[1]:
        kept = side(remain_samples(config, plan.remain, near), plan.remain_images, "remain")
    remain_words, remain_mean, remain_std = kept
    anchor_of, attribute_of = own_of(plan, plan.anchors), own_of(plan, plan.attributes)
    weight_of = own_of(plan, plan.weights)
    distinct = list(dict.fromkeys([*forget_words, *anchor_of.values(), *attribute_of.values(), *remain_words, ""]))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    table = diffuser.embed(distinct)

    def rows(words: Sequence[str]) -> Tensor:
        return torch.tensor([place[w] for w in words])

    forget, remain = None, None
    if wanted[0]:
        anchors = rows([anchor_of[w] for w in forget_words]) if anchor_of else None
        attributes = rows([attribute_of[w] for w in forget_words]) if attribute_of else None
        weights = torch.tensor([weight_of[w] for w in forget_words]) if weight_of else None
        if weights is not None:
            weights = weights / weights.mean()
        forget = LatentSet(
            torch.cat(means), rows(forget_words), table, forget_std, anchors, attribute=attributes, weight=weights
        )
    if wanted[1]:
        remain = LatentSet(remain_mean, rows(remain_words), table, remain_std)
    return forget, remain, condition.take(table, rows([""]))
