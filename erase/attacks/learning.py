"""Attacks on an erased Stable Diffusion model: a learned word for the concept, and a few steps of training on it.

Sources: textual inversion, Gal et al., ICLR 2023, arXiv 2208.01618, turned on erased models by Pham et al., ICLR 2024,
arXiv 2308.01508. Differences: the word takes the place of the token `*`, whose embedding it starts from, in a prompt of
the user's; no words are added to the tokenizer, and no weight of the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from erase.config import Inversion, Relearn
from erase.diffusion import condition, text
from erase.diffusion.condition import Condition
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.model import Model
from erase.engine.batches import Batches, Samples
from erase.engine.loop import Log, unlearn
from erase.methods.finetune import finetune

WORD = "*"
"""What stands for the learned word in a prompt."""


class Word(nn.Module):
    """A word's embedding, `[D]`, that learns."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(vector)


@dataclass(frozen=True)
class WordBackend:
    """A denoiser of which nothing learns but a word of its prompt; it draws as the denoiser does."""

    net: Word
    model: Denoiser
    cond: Callable[[], Condition]
    """The prompt's condition with the word as it is, leaves `[1, …]`, differentiable in it."""

    def draw(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Add timesteps and noise."""
        return self.model.draw(batch, generator)

    def losses(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Denoising losses of the pictures under the prompt, `[B]`."""
        cond = condition.expand(self.cond(), len(batch["mean"]))
        return self.model.losses({**batch, "cond": cond}, generator)


def word_token(model: Model) -> int:
    """The token of `WORD` alone."""
    tokenizer, _ = model.family.tokenizer(model.pipe)
    return int(tokenizer(WORD).input_ids[1])


def check_word(model: Model, prompt: str) -> int:
    """The token that the learned word replaces.

    Raises:
        ValueError: unless the prompt holds it just once, as a word of its own, and is short enough.
    """
    token = word_token(model)
    tokenizer, _ = model.family.tokenizer(model.pipe)
    if tokenizer(prompt).input_ids.count(token) != 1:
        raise ValueError(
            f"attack.inversion.prompt must hold the word {WORD} once, such as 'a photo of {WORD}'; got {prompt!r}"
        )
    text.check_prompts(model, [prompt])
    return token


@contextmanager
def meaning(model: Model, vector: Tensor) -> Iterator[None]:
    """Within the context the pipeline takes `*` for a word with the embedding `vector`, `[D]`."""
    token = word_token(model)

    def exchange(_: nn.Module, args: tuple[Tensor, ...], found: Tensor) -> Tensor:
        return torch.where((args[0] == token).unsqueeze(-1), vector.to(found), found)

    handle = model.pipe.text_encoder.get_input_embeddings().register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


def learn_word(
    model: Model,
    data: Samples,
    wanted: Inversion,
    seed: int,
    accelerator: Accelerator | None = None,
    log: Log | None = None,
) -> Tensor:
    """Textual inversion: the word that makes a frozen model draw pictures like these, `[D]`.

    Args:
        model: the model.
        data: latents of the pictures.
        wanted: the prompt, steps, rate and batch size.
        seed: of order, timesteps and noise.
        accelerator: as that of `unlearn`.
        log: as that of `unlearn`.

    Raises:
        ValueError: for a prompt without the word.
    """
    token = check_word(model, wanted.prompt)
    model.ready(model.family.TRAINED)
    model.net.requires_grad_(False)
    net = Word(model.pipe.text_encoder.get_input_embeddings().weight[token].detach().clone())

    def cond() -> Condition:
        return model.family.embed(model.pipe, [wanted.prompt])

    with meaning(model, net.vector):
        unlearn(
            WordBackend(net, model.denoiser(), cond),
            finetune(),
            None,
            Batches(data, wanted.batch_size, seed),
            steps=wanted.steps,
            optimizer=lambda params: torch.optim.Adam(params, lr=wanted.lr),
            seed=seed,
            accelerator=accelerator,
            log=log,
        )
    return net.vector.detach()


def relearn(
    model: Model,
    data: Samples,
    wanted: Relearn,
    seed: int,
    look: Callable[[int], None],
    accelerator: Accelerator | None = None,
    log: Log | None = None,
) -> None:
    """Train a model, in place, on pictures of the concept and their prompts.

    Args:
        model: the model.
        data: latents and prompts of the pictures.
        wanted: which weights, the rate, batch size and steps.
        seed: of order, timesteps and noise.
        look: called with the number of steps done, at 0 and at each of `wanted.at`.
        accelerator: as that of `unlearn`.
        log: as that of `unlearn`.

    Raises:
        ValueError: for parameters that the model has not.
    """
    model.ready(model.family.TRAINED)
    model.choose(wanted.parameters)
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
