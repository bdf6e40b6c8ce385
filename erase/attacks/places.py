"""Places in a prompt whose embeddings an attack sets: each `*` stands for a vector, in every text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from erase.diffusion.model import Model

WORD = "*"
"""What stands for a vector in a prompt."""
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
"""The text encoders that pipelines of diffusers have, and what each reads with."""


def tables(model: Model) -> dict[str, Tensor]:
    """The token embeddings of each text encoder that the model has, `[V, D]`."""
    found = {}
    for name in ENCODERS:
        if (encoder := getattr(model.pipe, name, None)) is not None:
            found[name] = encoder.get_input_embeddings().weight
    return found


def word_tokens(model: Model) -> dict[str, int]:
    """The token of `WORD` in each text encoder that the model has."""
    found = {}
    for encoder, tokenizer in ENCODERS.items():
        if getattr(model.pipe, encoder, None) is not None:
            ids = getattr(model.pipe, tokenizer)(WORD, add_special_tokens=False).input_ids
            found[encoder] = int(ids[-1])  # SentencePiece may put a space before it
    return found


def check_places(model: Model, prompts: Sequence[str], count: int, what: str) -> dict[str, int]:
    """The token of a place, for each text encoder.

    Args:
        model: the model.
        prompts: each with its places.
        count: how many each must have.
        what: the setting that is wrong if not, and what it must be.

    Raises:
        ValueError: for a prompt with another number of places as words of their own, or one that is too long.
    """
    tokens = word_tokens(model)
    for prompt in prompts:
        for encoder, token in tokens.items():
            if getattr(model.pipe, ENCODERS[encoder])(prompt).input_ids.count(token) != count:
                raise ValueError(f"{what}; got {prompt!r}")
    model.check_prompts(prompts)
    return tokens


@contextmanager
def meaning(model: Model, vectors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the k-th `*` of a prompt has the k-th of these embeddings.

    They are `[D]`, `[K, D]`, or `[B, K, D]` for B prompts that are read together, for each text encoder. The encoders
    of a lean model stay in memory meanwhile, and nothing that they say is remembered.
    """
    handles, lean = [], model.lean
    model.ready(*vectors)
    model.lean = False

    def exchange(token: int, name: str) -> Callable[..., Tensor]:
        def exchanged(_: nn.Module, args: tuple[Tensor, ...], found: Tensor) -> Tensor:
            here = args[0] == token
            own = vectors[name].to(found)
            own = own.expand(len(here), *own.shape[-2:]) if own.ndim > 1 else own.expand(len(here), 1, -1)
            which = (here.long().cumsum(1) - 1).clamp(0, own.shape[1] - 1)
            chosen = own.gather(1, which.unsqueeze(-1).expand(-1, -1, own.shape[-1]))
            return torch.where(here.unsqueeze(-1), chosen, found)

        return exchanged

    for name, token in word_tokens(model).items():
        table = tables(model)[name]
        for module in getattr(model.pipe, name).modules():  # T5 has the table twice, and reads the second
            if isinstance(module, nn.Embedding) and module.weight is table:
                handles.append(module.register_forward_hook(exchange(token, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.lean = lean
        if lean:
            model.release(*vectors)
