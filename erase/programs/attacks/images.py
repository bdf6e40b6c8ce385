"""Attacks on the side of the image: what the model makes of noised, hidden and inverted images of the concept."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from erase.attacks import probes
from erase.config import HalfNoised, Inpaint, LatentSeed
from erase.diffusion import condition
from erase.diffusion.condition import Condition
from erase.diffusion.model import Model
from erase.evaluation.prompt_files import PromptRow
from erase.programs.attacks.seam import ATTACKER, Target

ProbeName = Literal["half_noised", "inpaint", "latent_seed"]


def probed(name: ProbeName, target: Target, numbers: dict[str, Any]) -> None:
    """Give the model images of the concept, one row each, and judge what it makes of them."""
    wanted: HalfNoised | Inpaint | LatentSeed = getattr(target.config.attack, name)
    prompts = target.known.prompts[: wanted.images]
    asked = [prompt if wanted.prompt is None else wanted.prompt for prompt in prompts]
    rows = [
        PromptRow(f"image {k}: {text}", (target.config.seed + ATTACKER + k) % 2**32) for k, text in enumerate(asked)
    ]
    model, place = target.model, {row.prompt: k for k, row in enumerate(rows)}
    draw = target.config.draw
    scale = 1.0 if draw.guidance is None else draw.guidance
    told = at_scale(model, model.embed(["", *asked]), scale)
    model.ready(model.family.TRAINED)
    null = condition.to({leaf: x[:1] for leaf, x in told.items()}, model.device)
    guided = model.has_null and model.family.CFG
    path = probes.Path(model.denoiser(null if guided else None), draw.steps, scale, target.precision.sampling)

    def sample(
        prompts: list[str],
        generators: list[torch.Generator],
        *,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> list[Image.Image]:
        which = torch.tensor([place[prompt] for prompt in prompts])
        data = target.known.data.mean[which].to(model.device)
        noise = torch.stack([torch.randn(data.shape[1:], generator=g) for g in generators]).to(model.device)
        cond = condition.to(condition.take(told, which + 1), model.device)
        return model.decode(probe(wanted, path, data, noise, condition.expand(null, len(data)), cond))

    folder = target.top / name / target.name
    shown = target.shows_made(sample, rows, folder, {name: asdict(wanted)})
    numbers |= {**asdict(wanted), target.name: target.share(shown, folder)}


def at_scale(model: Model, told: Condition, scale: float) -> Condition:
    """Conditions with the guidance scale where the network is told it."""
    if model.family.CFG:
        return told
    return {leaf: torch.full_like(x, scale) if leaf == "guidance" else x for leaf, x in told.items()}


def probe(
    wanted: HalfNoised | Inpaint | LatentSeed,
    path: probes.Path,
    data: Tensor,
    noise: Tensor,
    null: Condition,
    cond: Condition,
) -> Tensor:
    """What becomes of images, as latents `[B, C, H, W]`."""
    if isinstance(wanted, HalfNoised):
        return probes.half_noised(path, data, noise, cond, wanted.noise)
    if isinstance(wanted, Inpaint):
        return probes.inpaint(path, data, noise, cond, wanted.hidden)
    return probes.latent_seed(path, data, null, cond)
