"""A soft prompt: a text embedding is learned that no words need have, and no weight of the model changes.

    min over c of  E_{z0, t, ε} ‖ε_θ(z_t, t, c) - target‖²

It is the strongest attack on the side of the prompt: whatever a search for words finds, this can find too. What learns
is what the network is told of the prompt itself, `text` `[T, D]` and, where there is one, `pooled` `[D']`, from the
embedding of a forget prompt on. Source: soft prompts, Lester et al., EMNLP 2021, arXiv 2104.08691, here at the output
of the text encoder; the encoder is then asked nothing, so that every family has this attack.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from erase.attacks.learned import PromptBackend, Vectors, learn
from erase.config import SoftPrompt
from erase.diffusion import condition
from erase.diffusion.condition import Condition
from erase.diffusion.model import Model
from erase.engine.batches import Samples
from erase.engine.loop import Log


def learn_prompt(
    model: Model,
    data: Samples,
    prompt: str,
    wanted: SoftPrompt,
    seed: int,
    accelerator: Accelerator | None = None,
    log: Log | None = None,
) -> dict[str, Tensor]:
    """The condition that makes a frozen model generate images like these, leaves `[1, …]`.

    Args:
        model: the model.
        data: latents of the images.
        prompt: whose embedding it starts from.
        wanted: steps, rate and batch size.
        seed: of order, timesteps and noise.
        accelerator: as that of `unlearn`.
        log: as that of `unlearn`.
    """
    start = condition.to(model.embed([prompt]), model.device)
    model.ready(model.family.TRAINED)
    model.net.requires_grad_(False)
    net = Vectors({name: x.clone() for name, x in start.items() if name in condition.WORDS})

    def cond() -> Condition:
        return {**start, **net.values}

    return {**start, **learn(PromptBackend(net, model.denoiser(), cond), data, wanted, seed, accelerator, log)}
