"""UnlearnDiffAtk: words before a prompt under which the erased model is best at an image of the concept.

Source: Zhang et al., "To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe
Images ... For Now", ECCV 2024, arXiv 2310.11868. The erased model itself is the classifier: its denoising loss is low
on images that it takes for what the prompt says.

    min over words w  E_ε ‖ε_θ(z_t, t, [w, prompt]) - ε‖²        z_t: an image of the concept, noised

Each of K words is a distribution over the vocabulary, uniform at first. An iteration samples a word from each, takes
the gradient straight through the sampling, limited to [-1, 1], makes a step of Adam, and projects onto the simplex.
As in the authors' script, N iterations are made at each of 50 timesteps, the least noisy first; then the most probable
words are put to the test, until an image shows the concept.

Deliberate differences: words with a meaning of their own, such as the end of a text, are never sampled; the projection
is exact where theirs is by bisection; several encoders of one vocabulary read the same words; the image that puts words
to the test has noise of its own, where theirs has the seed of the image that was searched with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from erase.attacks.prefixes import Loss, Vocabulary
from erase.diffusion.condition import Condition
from erase.diffusion.denoiser import Denoiser


def own_loss(model: Denoiser) -> Loss:
    """The model's own denoising loss, `[B]`."""

    def loss(cond: Condition, batch: dict[str, Any]) -> Tensor:
        return model.losses({**batch, "cond": cond}, torch.Generator())

    return loss


class Distributions:
    """Words as distributions over the vocabulary, `[B, K, V]` each."""

    def __init__(self, vocabularies: Sequence[Vocabulary], searches: int, words: int, device: torch.device) -> None:
        self.vocabularies = vocabularies
        self.params: list[Tensor] = []
        for vocabulary in vocabularies:
            share = vocabulary.allowed.float().to(device)
            self.params.append((share / share.sum()).repeat(searches, words, 1))

    def embedded(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Of sampled words; the gradient goes straight through."""
        found = dict[str, Tensor]()
        for p, vocabulary in zip(self.params, self.vocabularies, strict=True):
            ids = torch.multinomial(p.detach().flatten(0, 1), 1, generator=generator).view(p.shape[:2])
            chosen: Tensor = Chosen.apply(p, ids)  # type: ignore[no-untyped-call]
            found |= {name: chosen.to(table.dtype) @ table for name, table in vocabulary.tables.items()}
        return found

    @torch.no_grad()
    def project(self) -> None:
        """The nearest distribution, of words that are allowed."""
        for p, vocabulary in zip(self.params, self.vocabularies, strict=True):
            allowed = vocabulary.allowed.to(p.device)
            p.copy_(torch.zeros_like(p).masked_scatter_(allowed.expand_as(p), onto_simplex(p[..., allowed])))

    def tokens(self) -> list[Tensor]:
        """The most probable words."""
        return [p.detach().argmax(-1).cpu() for p in self.params]


class Chosen(torch.autograd.Function):
    """One-hot rows `[B, K, V]` of chosen words `[B, K]`; backward, gradients limited to [-1, 1] reach the shares."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, ids: Tensor) -> Tensor:
        """One-hot."""
        return torch.zeros_like(shares).scatter_(-1, ids.unsqueeze(-1), 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Straight through."""
        return grads[0].clamp(-1, 1), None


def onto_simplex(x: Tensor) -> Tensor:
    """The nearest points whose last dimension is not negative and adds up to 1 (Duchi et al., ICML 2008)."""
    ordered = x.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device)
    last = (ordered * rank > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, last - 1) / last).clamp(min=0)
