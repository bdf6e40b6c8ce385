"""Textual inversion: a word for the concept is learned, and no weight of the model changes.

Sources: textual inversion, Gal et al., ICLR 2023, arXiv 2208.01618, turned on erased models by Pham et al., ICLR 2024,
arXiv 2308.01508. Differences: the word takes the place of the token `*`, whose embedding it starts from, in a prompt of
the user's; no words are added to the tokenizer, and no weight of the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from erase.config import Inversion
from erase.diffusion import condition
from erase.diffusion.condition import Condition
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.model import Model
from erase.engine.batches import Batches, Samples
from erase.engine.loop import Log, unlearn
from erase.methods.finetune import finetune

WORD = "*"
"""What stands for the learned word in a prompt."""


ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
"""The text encoders that pipelines of diffusers have, and what each reads with."""


class Word(nn.Module):
    """A word's embeddings that learn, `[D]` for each text encoder."""

    def __init__(self, vectors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.vectors = nn.ParameterDict({name: nn.Parameter(x) for name, x in vectors.items()})


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


def word_tokens(model: Model) -> dict[str, int]:
    """The token of `WORD` in each text encoder that the model has."""
    found = {}
    for encoder, tokenizer in ENCODERS.items():
        if getattr(model.pipe, encoder, None) is not None:
            ids = getattr(model.pipe, tokenizer)(WORD, add_special_tokens=False).input_ids
            found[encoder] = int(ids[-1])  # SentencePiece may put a space before it
    return found


def check_word(model: Model, prompt: str) -> dict[str, int]:
    """The token that the learned word replaces, for each text encoder.

    Raises:
        ValueError: unless the prompt holds it just once, as a word of its own, and is short enough.
    """
    tokens = word_tokens(model)
    for encoder, token in tokens.items():
        if getattr(model.pipe, ENCODERS[encoder])(prompt).input_ids.count(token) != 1:
            raise ValueError(
                f"attack.inversion.prompt must hold the word {WORD} once, such as 'a photo of {WORD}'; got {prompt!r}"
            )
    model.check_prompts([prompt])
    return tokens


@contextmanager
def meaning(model: Model, vectors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context `*` is a word with these embeddings, `[D]` for each text encoder.

    The encoders of a lean model stay in memory meanwhile, and nothing that they say is remembered.
    """
    handles, lean = [], model.lean
    model.ready(*vectors)
    model.lean = False

    def exchange(token: int, vector: Tensor) -> Callable[..., Tensor]:
        def exchanged(_: nn.Module, args: tuple[Tensor, ...], found: Tensor) -> Tensor:
            return torch.where((args[0] == token).unsqueeze(-1), vector.to(found), found)

        return exchanged

    for name, token in word_tokens(model).items():
        encoder = getattr(model.pipe, name)
        table = encoder.get_input_embeddings().weight
        for module in encoder.modules():  # T5 has the table twice, and reads the second
            if isinstance(module, nn.Embedding) and module.weight is table:
                handles.append(module.register_forward_hook(exchange(token, vectors[name])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.lean = lean
        if lean:
            model.release(*vectors)


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
        data: latents of the pictures.
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
    tables = {name: getattr(model.pipe, name).get_input_embeddings().weight for name in tokens}
    net = Word({name: table[tokens[name]].detach().float().clone() for name, table in tables.items()})

    def cond() -> Condition:
        return model.family.embed(model.pipe, [wanted.prompt])

    with meaning(model, dict(net.vectors.items())):
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
    return {name: x.detach() for name, x in net.vectors.items()}
