"""What a class-conditional model learns from, and what is done with it."""

from __future__ import annotations

from erase.config import DdpmConfig
from erase.diffusion import class_conditional
from erase.diffusion.data import LatentSet
from erase.diffusion.model import Model
from erase.programs.inputs import denoising, learning
from erase.programs.run import Lesson


def make_lesson(
    config: DdpmConfig, model: Model, forget: LatentSet | None, remain: LatentSet | None, desc: str = "unlearning"
) -> Lesson:
    """The denoiser with its data and objectives."""
    objectives = denoising(config, model.net)
    return Lesson(
        backend=learning(config.train, model.denoiser(model.null())),
        forget=forget,
        remain=remain,
        forget_objective=objectives[0],
        remain_objective=objectives[1],
        true_forget=None if forget is None or config.forget.pictures == "anchor" else forget.stands_for or forget,
        # not as the model began
        resources={"renew": lambda: class_conditional.renew(model.net, config.seed + 1)},
        desc=desc,
    )
