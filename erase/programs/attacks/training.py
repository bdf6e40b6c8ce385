"""Attacks that train the erased model: how soon the concept is back."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Literal

import torch

from erase.attacks import relearning
from erase.config import Benign, Relearn, RelearnLora, SdConfig
from erase.diffusion.data import LatentSet
from erase.diffusion.lora.train import check_peft
from erase.diffusion.model import Model, open_model
from erase.programs.attacks.seam import ATTACKER, Target
from erase.programs.text.data import in_turn
from erase.programs.text.images import generated_latents
from erase.programs.text.plan import Plan

TrainingName = Literal["relearn", "relearn_lora", "benign"]


def check_parameters(name: TrainingName, config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse parameters that the model has not, or a LoRA without peft."""
    wanted: Relearn | RelearnLora | Benign = getattr(config.attack, name)
    if isinstance(wanted, RelearnLora):
        check_peft("eval.attacks=[relearn_lora]")
    try:
        model.select(relearning.learning_of(wanted))
    except ValueError as error:
        why = str(error).replace("train.parameters", f"attack.{name}.parameters")
        raise ValueError(why.replace("train.lora_safe and train.form=lora", f"eval.attacks=[{name}]")) from None


def trained_again(name: TrainingName, target: Target, numbers: dict[str, Any]) -> None:
    """Train the model on images of the concept, or on others, and look on the way."""
    config, plan = target.config, target.plan
    wanted: Relearn | RelearnLora | Benign = getattr(config.attack, name)
    data = other_images(target) if name == "benign" else target.known.data
    own = replace(target, model=target.again())
    curve: list[dict[str, Any]] = []
    asked = [row for row in plan.rows if row.prompt in plan.forget]
    own.model.remember([row.prompt for row in asked] + [""])  # before the network is there

    def after(done: int) -> None:
        made: dict[str, Any] = {name: {**asdict(wanted), "count": config.attack.count, "steps": done}}
        folder = target.top / name / f"{done:05d}"
        curve.append({"steps": done, **own.share(own.shows(asked, wanted.images, folder, made), folder)})

    relearning.relearn(own.model, data, wanted, config.seed, after, target.accelerator)
    numbers |= {**asdict(wanted), "curve": curve}


def other_images(target: Target) -> LatentSet:
    """Images of what stays, by the base model, from noise of the attacker's own."""
    config, prompts = target.config, target.plan.remain
    asked = in_turn(prompts, config.attack.count)
    words, samples = [word for word, _ in asked], [ATTACKER + sample for _, sample in asked]
    base = open_model(target.base, target.accelerator.device, target.precision.name)
    mean = generated_latents(config, base, target.precision, words, samples, "benign")
    distinct = list(dict.fromkeys(words))
    index = torch.tensor([distinct.index(word) for word in words])
    return LatentSet(mean, index, base.embed(distinct))
