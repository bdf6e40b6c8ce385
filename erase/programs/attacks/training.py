"""Attacks that train the erased model: how soon the concept is back."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from erase.attacks import relearning
from erase.config import SdConfig
from erase.diffusion.model import Model
from erase.diffusion.parameters import select
from erase.programs.attacks.seam import Target
from erase.programs.text.judge import share
from erase.programs.text.plan import Plan


def check_parameters(config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse parameters that the model has not; what learns in it stays as it is."""
    chosen = [name for name, p in model.net.named_parameters() if p.requires_grad]
    select(model.net, config.attack.relearn.parameters, model.family.PARAMETERS)
    for name, p in model.net.named_parameters():
        p.requires_grad_(name in chosen)


def relearn(target: Target, numbers: dict[str, Any]) -> None:
    """Train the model on images of the concept, and look on the way."""
    config, plan, wanted = target.config, target.plan, target.config.attack.relearn
    own = replace(target, model=target.again())
    curve: list[dict[str, Any]] = []
    asked = [row for row in plan.rows if row.prompt in plan.forget]

    def after(done: int) -> None:
        made = {"relearn": {**asdict(wanted), "count": config.attack.count, "steps": done}}
        shown = own.shows(asked, wanted.images, target.top / "relearn" / f"{done:05d}", made)
        curve.append({"steps": done, **share(shown)})

    relearning.relearn(own.model, target.known.data, wanted, config.seed, after, target.accelerator)
    numbers |= {**asdict(wanted), "curve": curve}
