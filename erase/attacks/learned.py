"""A prompt's vectors that learn from images of the concept, of a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from erase.config import Inversion, SoftPrompt
from erase.diffusion import condition
from erase.diffusion.condition import Condition
from erase.diffusion.denoiser import Denoiser
from erase.engine.batches import Batches, Samples
from erase.engine.loop import Log, unlearn
from erase.methods.finetune import finetune


class Vectors(nn.Module):
    """Tensors that learn, by name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterDict({name: nn.Parameter(x) for name, x in values.items()})


@dataclass(frozen=True)
class PromptBackend:
    """A denoiser of which nothing learns but vectors of its prompt; it draws as the denoiser does."""

    net: Vectors
    model: Denoiser
    cond: Callable[[], Condition]
    """The prompt's condition with the vectors as they are, leaves `[1, …]`, differentiable in them."""

    def draw(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Add timesteps and noise."""
        return self.model.draw(batch, generator)

    def losses(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Denoising losses of the images under the prompt, `[B]`."""
        cond = condition.expand(self.cond(), len(batch["mean"]))
        return self.model.losses({**batch, "cond": cond}, generator)


def learn(
    backend: PromptBackend,
    data: Samples,
    wanted: Inversion | SoftPrompt,
    seed: int,
    accelerator: Accelerator | None = None,
    log: Log | None = None,
) -> dict[str, Tensor]:
    """Train the vectors, and give them back, by name.

    Args:
        backend: the model and its prompt.
        data: latents of the images.
        wanted: steps, rate and batch size.
        seed: of order, timesteps and noise.
        accelerator: as that of `unlearn`.
        log: as that of `unlearn`.
    """
    unlearn(
        backend,
        finetune(),
        None,
        Batches(data, wanted.batch_size, seed),
        steps=wanted.steps,
        optimizer=lambda params: torch.optim.Adam(params, lr=wanted.lr),
        seed=seed,
        accelerator=accelerator,
        log=log,
    )
    return {name: x.detach() for name, x in backend.net.values.items()}
