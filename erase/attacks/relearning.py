"""Relearning: a few steps of training on images of the concept, under its prompts; or on others (benign tuning).

All weights of a set learn, or a LoRA beside them (`relearn_lora`): A and B of every layer of it, from A as `peft` draws
it and B = 0, in the form that `train.form=lora` trains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from erase.config import Benign, Relearn, RelearnLora
from erase.diffusion.model import Model
from erase.diffusion.parameters import Learning
from erase.engine.batches import Batches, Samples
from erase.engine.loop import Log, unlearn
from erase.methods.finetune import finetune


def learning_of(wanted: Relearn | RelearnLora | Benign, seed: int = 0) -> Learning:
    """What of the model learns, and in which form."""
    return Learning(wanted.parameters, rank=wanted.rank if isinstance(wanted, RelearnLora) else None, seed=seed)


def relearn(
    model: Model,
    data: Samples,
    wanted: Relearn | RelearnLora | Benign,
    seed: int,
    look: Callable[[int], None],
    accelerator: Accelerator | None = None,
    log: Log | None = None,
) -> None:
    """Train a model, in place, on images of the concept and their prompts.

    Args:
        model: the model.
        data: latents and prompts of the images.
        wanted: which weights, the rank of a LoRA of them, the rate, batch size and steps.
        seed: of order, timesteps, noise and a LoRA's A.
        look: called with the number of steps done, at 0 and at each of `wanted.at`.
        accelerator: as that of `unlearn`.
        log: as that of `unlearn`.

    Raises:
        ValueError: for parameters that the model has not.
    """
    model.ready(model.family.TRAINED)
    model.choose(learning_of(wanted, seed))
    look(0)
    unlearn(
        model.denoiser(),
        finetune(),
        None,
        Batches(data, wanted.batch_size, seed),
        steps=max(wanted.at),
        optimizer=lambda params: torch.optim.Adam(params, lr=wanted.lr),
        seed=seed,
        accelerator=accelerator,
        log=log,
        until=lambda done: look(done) if done in wanted.at else None,
    )
