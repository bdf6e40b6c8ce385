"""Adversarial prefixes: tokens before a prompt that are searched for by gradients, what prompt search and P4D share.

B searches run at once, each with an image and a prompt of its own. The encoders of a model that read the same
vocabulary read the same tokens; where vocabularies differ (CLIP's and T5's), each has its own. What is found is judged
as token ids. The authors of both attacks decode it and read it again, and a tokenizer seldom reads the text of such
tokens in the same way: our attacker has the weights, and may give the network any tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from erase.attacks.places import ENCODERS, WORD, check_places, meaning, tables
from erase.config import PrefixSearch
from erase.diffusion import condition
from erase.diffusion.condition import Condition
from erase.diffusion.model import Model
from erase.engine.backend import seeded

Loss = Callable[[Condition, dict[str, Any]], Tensor]
"""`(condition, drawn batch) -> [B]`: what a search descends."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens, and the encoders that read them."""

    tables: Mapping[str, Tensor]
    """Embeddings `[V, D]` of each encoder."""
    allowed: Tensor
    """`[V]`, true for words, false for what has a meaning of its own, such as the end of a text."""
    tokenizer: Any


def vocabularies(model: Model) -> list[Vocabulary]:
    """The vocabularies that a model reads, each with its encoders."""
    groups: list[tuple[dict[str, int], Any, dict[str, Tensor]]] = []
    for encoder, table in tables(model).items():
        tokenizer = getattr(model.pipe, ENCODERS[encoder])
        words = tokenizer.get_vocab()
        same = next((own for known, _, own in groups if known == words), None)
        if same is None:
            groups.append((words, tokenizer, {encoder: table}))
        else:
            same[encoder] = table
    found = []
    for words, tokenizer, own in groups:
        allowed = torch.zeros(min(len(table) for table in own.values()), dtype=torch.bool)
        allowed[sorted({*words.values()} - {*tokenizer.all_special_ids})] = True
        found.append(Vocabulary({name: x[: len(allowed)].detach() for name, x in own.items()}, allowed, tokenizer))
    return found


def placed(prompt: str, count: int) -> str:
    """A prompt with `count` places before it."""
    return " ".join([*[WORD] * count, prompt])


def check_prefix(model: Model, prompts: Sequence[str], name: str, wanted: PrefixSearch) -> None:
    """Refuse a model without words, and prompts that leave no room for a prefix, or have places of their own.

    Raises:
        ValueError: for these.
    """
    if not tables(model):
        raise ValueError(f"attack.{name} searches for words, and {model.family.NAME} reads none: leave it out")
    _, allowed = model.family.tokenizer(model.pipe)
    prompts = [placed(prompt, wanted.tokens) for prompt in prompts]
    if (most := max(model.count_tokens(prompt) for prompt in prompts)) > allowed:
        raise ValueError(
            f"attack.{name}.tokens={wanted.tokens} makes a forget prompt {most} tokens, the model takes {allowed}: "
            "set it lower"
        )
    needed = f"attack.{name} puts {wanted.tokens} words before forget prompts, which must not hold the word {WORD}"
    check_places(model, prompts, wanted.tokens, needed)


class Relaxation(Protocol):
    """Tokens as something that has gradients."""

    params: list[Tensor]
    """What is stepped, each `[B, …]`."""

    def embedded(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Embeddings of tokens, `[B, K, D]` for each encoder, with gradients in `params`."""

    def project(self) -> None:
        """Bring `params` back to what is allowed, after a step."""

    def tokens(self) -> list[Tensor]:
        """The tokens found, `[B, K]` for each vocabulary."""


@dataclass
class Search:
    """B searches, and where they are."""

    model: Model
    prompts: list[str]
    """B, without prefix."""
    latents: Tensor
    """`[B, C, H, W]`, of the image of each."""
    wanted: PrefixSearch
    words: Sequence[Vocabulary]
    """Taken while the encoders were there: a lean model gives them up between rounds."""
    relaxation: Relaxation
    loss: Loss
    seed: int
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        """Prepare the first step."""
        self.model.ready(self.model.family.TRAINED)
        self.model.net.requires_grad_(False)
        for p in self.relaxation.params:
            p.requires_grad_(True)
        wanted = self.wanted
        self.optimizer = torch.optim.Adam(self.relaxation.params, lr=wanted.lr, weight_decay=wanted.weight_decay)
        denoiser = self.model.denoiser()
        self.draw = denoiser.draw_at
        self.times = denoiser.process.evenly(wanted.times, self.model.device)
        self.read = [placed(prompt, wanted.tokens) for prompt in self.prompts]

    def round(self, number: int) -> None:
        """All steps at one timestep."""
        t = self.times[number].expand(len(self.prompts))
        vectors = dict(tables(self.model))
        with meaning(self.model, vectors):  # of all steps, for a lean model loads its encoders here
            for step in range(self.wanted.steps):
                generator = seeded(self.model.device, self.seed, number, step)
                batch = self.draw({"mean": self.latents}, t, generator)
                vectors |= self.relaxation.embedded(generator)
                cond = self.model.family.embed(self.model.pipe, self.read)
                with self.autocast():
                    losses = self.loss(cond, batch)
                grads = torch.autograd.grad(losses.sum(), self.relaxation.params)
                for p, grad in zip(self.relaxation.params, grads, strict=True):
                    p.grad = grad
                self.optimizer.step()
                self.relaxation.project()

    @torch.no_grad()
    def conditions(self, tokens: Sequence[Tensor]) -> Condition:
        """What the network is told of the prompts with these tokens before them, `[B, K]` for each vocabulary."""
        found = dict[str, Tensor]()
        for vocabulary, ids in zip(self.words, tokens, strict=True):
            found |= {name: table[ids.to(table.device)] for name, table in vocabulary.tables.items()}
        with meaning(self.model, found):
            return condition.to(self.model.family.embed(self.model.pipe, self.read), "cpu")

    def texts(self, tokens: Sequence[Tensor]) -> list[str]:
        """The prompts with these tokens before them, as the first vocabulary writes them."""
        tokenizer = self.words[0].tokenizer
        return [f"{tokenizer.decode(ids)} {prompt}" for ids, prompt in zip(tokens[0], self.prompts, strict=True)]
