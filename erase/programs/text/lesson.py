"""What a text-to-image model learns from, while its encoders are there; then what is done with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from erase.config import SdConfig
from erase.diffusion import text
from erase.diffusion.data import LatentSet
from erase.diffusion.lora.train import dense
from erase.diffusion.model import Model
from erase.engine.loop import Probe
from erase.engine.method import Method
from erase.engine.precision import Precision
from erase.engine.updates import ClosedForm
from erase.methods import Entry
from erase.methods.uce import Reading
from erase.programs.inputs import denoising, learning, sides_read
from erase.programs.run import Lesson
from erase.programs.text.data import cache, find_near, num_near
from erase.programs.text.plan import Plan


@dataclass(frozen=True)
class Sides:
    """All that the encoders and the VAE are needed for."""

    forget: LatentSet | None
    remain: LatentSet | None
    null: dict[str, Tensor]
    """The empty prompt's condition, leaves `[1, …]`."""
    resources: dict[str, Any] = field(default_factory=dict)
    """Text embeddings, for closed forms."""
    near: Mapping[str, float] = field(default_factory=dict)
    """The remain prompts that have the share `remain.near` of the images, and how near each is."""


def readable(config: SdConfig, plan: Plan, model: Model, say: Callable[[str], None]) -> Plan:
    """The plan without rows of remain sets that the model would cut; prompts that are written out are refused later."""
    cut = {row["prompt"] for row in text.cut_prompts(model, plan.remain)} - {*config.remain.prompts}
    remain = [prompt for prompt in plan.remain if prompt not in cut]
    if cut and remain:
        say(
            f"{len(cut)} of {len(plan.remain)} prompts of remain.prompts are too long for this model and not trained on"
        )
        plan = replace(plan, remain=remain)
    num_near(config.remain, plan.remain)  # refuses a share that they are too few for
    return plan


def read_sides(config: SdConfig, plan: Plan, model: Model, entry: Entry, method: Method, precision: Precision) -> Sides:
    """Latents and conditions of both sides."""
    edits = isinstance(method.update, ClosedForm) or config.forget.start == "uce"
    model.remember([*plan.words, "", *([text.blank_of(model)] if edits else [])])
    resources: dict[str, Any] = {}
    if edits:
        anchors = plan.anchors or [""] * len(plan.forget)
        edit: object = method.update.edit if isinstance(method.update, ClosedForm) else None
        tokens = edit.tokens if isinstance(edit, text.TokenEdit) else "all"
        weights = plan.weights or None
        resources["concepts"] = text.concepts(model, plan.forget, anchors, ["", *plan.remain], tokens, weights)
    used = sides_read(config, entry)
    near = find_near(config, plan, model) if used[1] else {}
    return Sides(*cache(config, plan, model, precision, used, list(near)), resources, near)


def make_lesson(
    config: SdConfig, model: Model, sides: Sides, until: Callable[[int], Probe | None] | None = None
) -> Lesson:
    """The denoiser with its data and objectives."""
    forget, remain = denoising(config, model.net)  # before the start is edited: targets are the model's own

    def begin(method: Method) -> Method:
        if config.forget.start == "uce" and not isinstance(method.update, ClosedForm):
            start_edited(model.net, sides.resources["concepts"])
        return method

    return Lesson(
        backend=learning(config.train, model.denoiser(sides.null)),
        forget=sides.forget,
        remain=sides.remain,
        forget_objective=forget,
        remain_objective=remain,
        resources=sides.resources,
        before_steps=begin,
        until=until,
        values=partial(dense, model.net) if config.train.form == "lora" else None,
    )


@torch.no_grad()
def start_edited(net: nn.Module, concepts: text.Concepts) -> None:
    """Give the weights that read text the values of UCE's closed form, with its default settings."""
    for name, new in Reading(concepts, 1.0, 0.1)(net).weights.items():
        net.get_parameter(name).copy_(new)
