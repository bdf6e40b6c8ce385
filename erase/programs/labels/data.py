"""What a class-conditional model learns from: images of the data, or its own, and their classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from erase.config import DdpmConfig
from erase.diffusion.data import LatentSet
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.losses import Redirect
from erase.diffusion.model import Model
from erase.engine.backend import map_batch, seeded
from erase.engine.precision import Precision
from erase.evaluation import generate
from erase.programs.images import generated_data, kept_at
from erase.programs.labels.plan import Plan
from erase.store.labelled import scaled


def gather(
    config: DdpmConfig,
    plan: Plan,
    diffuser: Model,
    precision: Precision,
    fresh: bool,
    say: Callable[[str], None] = lambda line: None,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[LatentSet | None, LatentSet | None]:
    """Both sides as the network sees them, where wanted: from the data, or drawn by the model itself."""
    table = {"label": torch.arange(len(plan.labels))}

    def side(which: Sequence[int], count: int | None, what: str) -> LatentSet:
        if plan.data is not None:
            parts = [plan.data.of([i]) for i in which]
            chosen = [p if count is None else p.subset(min(count, len(p)), config.seed) for p in parts]
            pixels, labels = torch.cat([p.pixels for p in chosen]), torch.cat([p.labels for p in chosen])
            if config.data is not None and config.data.flip:
                pixels = mirrored(pixels, seeded("cpu", config.seed, 5, *which))
            mean, std = encoded(diffuser, pixels, config.draw.batch_size)
            return LatentSet(mean, labels, table, std)
        assert count is not None
        words = [i for i in which for _ in range(count)]
        generators = [generate.image_generator(config.seed, n) for n in range(len(words))]

        def draw(part: slice) -> Tensor:
            return diffuser.generate_latents(
                [plan.labels[i] for i in words[part]],
                generators[part],
                steps=config.draw.steps,
                guidance=config.draw.guidance,
                sampler=config.draw.sampler,
                batch_size=config.draw.batch_size,
                autocast=precision.sampling,
            )

        scale = diffuser.guidance if config.draw.guidance is None else config.draw.guidance
        kept = kept_at(config, diffuser, words, scale, diffuser.has_null)
        return LatentSet(
            generated_data(draw, len(words), config.draw.batch_size, what, kept), torch.tensor(words), table
        )

    if fresh:
        return None, side(plan.remain, config.remain.count, "remain")
    lots = dict.fromkeys(plan.forget, plan.among or plan.remain)
    remain: LatentSet | None = None
    by_lot = wanted[0] and config.forget.among == "far"
    if wanted[1] or by_lot:
        balanced = -(-config.forget.count * len(plan.forget) // len(plan.remain))
        remain = side(plan.remain, config.remain.count or balanced, "remain")
        if by_lot or config.remain.share == "near":
            model = diffuser.denoiser()
            apart = {label: distances(plan, model, remain, label, precision, config.seed) for label in plan.forget}
            if by_lot:
                for label in plan.forget:
                    lots[label] = far(apart[label])
                    say(f"{plan.labels[label]} becomes one of {', '.join(plan.labels[i] for i in lots[label])}")
            if config.remain.share == "near":
                remain = leaning(remain, list(apart.values()))
    return forgotten(config, plan, lots, side) if wanted[0] else None, remain


def forgotten(
    config: DdpmConfig,
    plan: Plan,
    lots: Mapping[int, Sequence[int]],
    side: Callable[[Sequence[int], int, str], LatentSet],
) -> LatentSet:
    """The forget side.

    Args:
        config: the settings.
        plan: the classes.
        lots: of each forgotten class, those that are drawn by lot in its place.
        side: gives so many images of each of some classes.
    """
    parts: list[LatentSet] = []
    """Images, the forgotten class that asks for each, and its anchor."""
    if config.forget.pictures != "anchor":
        own = side(plan.forget, config.forget.count, "forget")
        cond = own.cond
        if plan.anchors:
            of = torch.zeros(len(plan.labels), dtype=torch.long)
            of[plan.forget] = torch.tensor(plan.anchors)
            anchor = of[cond]
        else:  # another class by lot
            generator = seeded("cpu", config.seed, 2)
            anchor = torch.empty_like(cond)
            for label, others in lots.items():
                here = cond == label
                anchor[here] = torch.tensor(others)[torch.randint(len(others), (int(here.sum()),), generator=generator)]
        parts.append(replace(own, anchor=anchor))
    if config.forget.pictures != "own":
        for number, label in enumerate(plan.forget):
            where = [plan.anchors[number]] if plan.anchors else lots[label]
            shown = side(where, -(-config.forget.count // len(where)), "anchor")
            parts.append(replace(shown, cond=torch.full_like(shown.cond, label), anchor=shown.cond))
    forget = joined(parts)
    if config.forget.loss == "surrogate":
        uniform = torch.rand(forget.mean.shape, generator=seeded("cpu", config.seed, 3)) * 2 - 1
        true = forget if config.saliency.per == "image" else None
        forget = replace(forget, mean=uniform, std=None, stands_for=true)
    return forget if config.forget.loss == "redirect" else replace(forget, anchor=None)


def mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images `[N, C, H, W]`, each of them turned left to right with probability 1/2."""
    turned = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(turned.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


def encoded(diffuser: Model, pixels: Tensor, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """Latent mean and standard deviation of images `[N, C, H, W]`, uint8, by batches; as `Model.encode` of them."""
    means, stds = zip(*(diffuser.encode(scaled(part)) for part in torch.split(pixels, batch_size)), strict=True)
    return torch.cat(means), None if stds[0] is None else torch.cat(stds)


def joined(parts: Sequence[LatentSet]) -> LatentSet:
    """Sets of one table, one after another."""
    columns: dict[str, Any] = {}
    for name in ("mean", "cond", "std", "anchor"):
        values = [getattr(part, name) for part in parts]
        columns[name] = None if values[0] is None else torch.cat(values)
    return LatentSet(table=parts[0].table, **columns)


@torch.no_grad()
def distances(
    plan: Plan, model: Denoiser, remain: LatentSet, label: int, precision: Precision, seed: int, count: int = 16
) -> dict[int, float]:
    """How far the classes that stay are from a label.

    The mean of `MSE(ε(x_t, label), ε(x_t, own))` over `count` images of the class, each at another timestep.
    """
    apart = {}
    for other in plan.remain:
        index = (remain.cond == other).nonzero().flatten()[:count]
        batch = {**remain.gather(index), "anchor": {"label": torch.full_like(index, other)}}
        batch["cond"] = {"label": torch.full_like(index, label)}
        batch = map_batch(lambda x: x.to(precision.device), batch)
        with precision.autocast():
            apart[other] = float(Redirect()(model, batch, seeded(precision.device, seed, 4)).mean())
    return apart


def far(apart: Mapping[int, float]) -> list[int]:
    """The farther half of the classes, the middle one among them."""
    return sorted(sorted(apart, key=lambda other: -apart[other])[: -(-len(apart) // 2)])


def leaning(remain: LatentSet, apart: Sequence[Mapping[int, float]]) -> LatentSet:
    """As many images, of each class the more the nearer it is to a forgotten one: `1 / distance` of each.

    What a class has too few of comes again.
    """
    near = {other: 1 / max(min(one[other] for one in apart), 1e-12) for other in apart[0]}
    index = []
    for other, weight in near.items():
        there = (remain.cond == other).nonzero().flatten()
        index.append(there[torch.arange(max(1, round(len(remain) * weight / sum(near.values())))) % len(there)])
    chosen = torch.cat(index)
    std = None if remain.std is None else remain.std[chosen]
    return LatentSet(remain.mean[chosen], remain.cond[chosen], remain.table, std)
