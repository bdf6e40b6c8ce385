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
from erase.diffusion import stable_diffusion as sd
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.parameters import select
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
    cond: Callable[[], Tensor]
    """The prompt's embedding with the word as it is, `[1, T, D]`, differentiable in it."""

    def draw(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Add timesteps and noise."""
        return self.model.draw(batch, generator)

    def losses(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Denoising losses of the pictures under the prompt, `[B]`."""
        cond = self.cond().expand(len(batch["mean"]), -1, -1)
        return self.model.losses({**batch, "cond": cond}, generator)


def word_token(pipe: Any) -> int:
    """The token of `WORD` alone."""
    return int(pipe.tokenizer(WORD).input_ids[1])


def check_word(pipe: Any, prompt: str) -> int:
    """The token that the learned word replaces.

    Raises:
        ValueError: unless the prompt holds it just once, as a word of its own, and is short enough.
    """
    token = word_token(pipe)
    if pipe.tokenizer(prompt).input_ids.count(token) != 1:
        raise ValueError(
            f"attack.inversion.prompt must hold the word {WORD} once, such as 'a photo of {WORD}'; got {prompt!r}"
        )
    sd.check_prompts(pipe, [prompt])
    return token


@contextmanager
def meaning(pipe: Any, vector: Tensor) -> Iterator[None]:
    """Within the context the pipeline takes `*` for a word with the embedding `vector`, `[D]`."""
    token = word_token(pipe)

    def exchange(_: nn.Module, args: tuple[Tensor, ...], found: Tensor) -> Tensor:
        return torch.where((args[0] == token).unsqueeze(-1), vector.to(found), found)

    handle = pipe.text_encoder.get_input_embeddings().register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


def learn_word(
    pipe: Any,
    data: Samples,
    wanted: Inversion,
    seed: int,
    accelerator: Accelerator | None = None,
    log: Log | None = None,
) -> Tensor:
    """Textual inversion: the word that makes a frozen model draw pictures like these, `[D]`.

    Args:
        pipe: the model.
        data: latents of the pictures.
        wanted: the prompt, steps, rate and batch size.
        seed: of order, timesteps and noise.
        accelerator: as that of `unlearn`.
        log: as that of `unlearn`.

    Raises:
        ValueError: for a prompt without the word.
    """
    token = check_word(pipe, wanted.prompt)
    pipe.unet.requires_grad_(False)
    net = Word(pipe.text_encoder.get_input_embeddings().weight[token].detach().clone())

    def cond() -> Tensor:
        found: Tensor = pipe.encode_prompt([wanted.prompt], pipe.device, 1, False)[0]
        return found

    with meaning(pipe, net.vector):
        unlearn(
            WordBackend(net, sd.denoiser(pipe), cond),
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
    pipe: Any,
    data: Samples,
    wanted: Relearn,
    seed: int,
    look: Callable[[int], None],
    accelerator: Accelerator | None = None,
    log: Log | None = None,
) -> None:
    """Train a model, in place, on pictures of the concept and their prompts.

    Args:
        pipe: the model.
        data: latents and prompts of the pictures.
        wanted: which weights, the rate, batch size and steps.
        seed: of order, timesteps and noise.
        look: called with the number of steps done, at 0 and at each of `wanted.at`.
        accelerator: as that of `unlearn`.
        log: as that of `unlearn`.

    Raises:
        ValueError: for parameters that the model has not.
    """
    select(pipe.unet, wanted.parameters)
    look(0)
    unlearn(
        sd.denoiser(pipe),
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
