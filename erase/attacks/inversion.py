"""Textual inversion: a word for the concept is learned, and no weight of the model changes.

Sources: textual inversion, Gal et al., ICLR 2023, arXiv 2208.01618, turned on erased models by Pham et al., ICLR 2024,
arXiv 2308.01508. Differences: the word takes the place of the token `*`, whose embedding it starts from, in a prompt of
the user's; no words are added to the tokenizer, and no weight of the model changes.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from erase.attacks.learned import PromptBackend, Vectors, learn
from erase.attacks.places import WORD, check_places, meaning, tables
from erase.config import Inversion
from erase.diffusion.condition import Condition
from erase.diffusion.model import Model
from erase.engine.batches import Samples
from erase.engine.loop import Log


def check_word(model: Model, prompt: str) -> dict[str, int]:
    """The token that the learned word replaces, for each text encoder.

    Raises:
        ValueError: unless the prompt holds it just once, as a word of its own, and is short enough.
    """
    needed = f"attack.inversion.prompt must hold the word {WORD} once, such as 'a photo of {WORD}'"
    return check_places(model, [prompt], 1, needed)


def learn_word(
    model: Model,
    data: Samples,
    wanted: Inversion,
    seed: int,
    accelerator: Accelerator | None = None,
    log: Log | None = None,
) -> dict[str, Tensor]:
    """Textual inversion: the word that makes a frozen model generate images like these, `[D]` for each text encoder.

    Args:
        model: the model.
        data: latents of the images.
        wanted: the prompt, steps, rate and batch size.
        seed: of order, timesteps and noise.
        accelerator: as that of `unlearn`.
        log: as that of `unlearn`.

    Raises:
        ValueError: for a prompt without the word.
    """
    tokens = check_word(model, wanted.prompt)
    model.ready(model.family.TRAINED, *tokens)
    model.net.requires_grad_(False)
    net = Vectors({name: table[tokens[name]].detach().float().clone() for name, table in tables(model).items()})

    def cond() -> Condition:
        return model.family.embed(model.pipe, [wanted.prompt])

    with meaning(model, dict(net.values.items())):
        return learn(PromptBackend(net, model.denoiser(), cond), data, wanted, seed, accelerator, log)
