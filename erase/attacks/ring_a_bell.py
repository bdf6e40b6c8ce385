"""Ring-A-Bell: prompts whose embedding is where the concept is strong; the network is never asked.

Source: Tsai et al., "Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?", ICLR 2024, arXiv
2310.10012.

    ĉ = mean over pairs of (E(with the concept) - E(without))
    min over prompts w of K tokens  ‖E(w) - (E(p) + η ĉ)‖²

E is the text encoder's output, all tokens of it, p the forget prompt. The search is genetic: of each generation the
better half stays, and its children, some of two parents, some with a token exchanged, are the other half. The same
prompts are asked of every model that has these encoders.

Deliberate differences: a prompt is searched as the text that is sent, so that every family has this attack, and what
the tokenizer makes of the text is what is measured; pairs are the concepts and their anchors (the empty prompt where
there are none), whatever the method makes of anchors, not prompts that a language model wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from erase.attacks.prefixes import Vocabulary
from erase.config import RingABell
from erase.engine.backend import seeded

Embed = Callable[[Sequence[str]], Tensor]
"""Texts -> `[P, …]`."""


def target_of(embed: Embed, prompt: str, pairs: Sequence[tuple[str, str]], strength: float) -> Tensor:
    """`E(p) + η ĉ`, `[…]`."""
    direction = embed([a for a, _ in pairs]).mean(0) - embed([b for _, b in pairs]).mean(0)
    return embed([prompt])[0] + strength * direction


@torch.no_grad()
def search(
    embed: Embed,
    target: Tensor,
    vocabulary: Vocabulary,
    wanted: RingABell,
    seed: int,
    log: Callable[[float], None] = lambda distance: None,
) -> tuple[str, float]:
    """The best prompt, and its distance: the mean squared difference of embeddings.

    Args:
        embed: what the encoders say of texts.
        target: `E(p) + η ĉ`.
        vocabulary: what tokens are drawn from.
        wanted: sizes and rates.
        seed: of the search.
        log: told the best distance of each generation.
    """
    generator, words = seeded("cpu", seed), vocabulary.allowed.nonzero().flatten()
    half = wanted.population // 2

    def drawn(*shape: int) -> Tensor:
        return words[torch.randint(len(words), shape, generator=generator)]

    def distances(ids: Tensor) -> Tensor:
        texts = [str(vocabulary.tokenizer.decode(row)).strip() for row in ids]
        return (embed(texts) - target).flatten(1).square().mean(1)

    alive = drawn(2 * half, wanted.tokens)
    scores = distances(alive)
    for _ in range(wanted.generations):
        best = scores.argsort(stable=True)[:half]
        alive, scores = alive[best], scores[best]
        log(float(scores[0]))
        fathers, mothers = (alive[torch.randint(half, (half,), generator=generator)] for _ in range(2))
        cut = torch.randint(1, max(2, wanted.tokens), (half, 1), generator=generator)
        two = torch.rand(half, 1, generator=generator) < wanted.crossover
        children = torch.where(two & (torch.arange(wanted.tokens) >= cut), mothers, fathers)
        at = torch.randint(wanted.tokens, (half, 1), generator=generator)
        changed = (torch.rand(half, 1, generator=generator) < wanted.mutation) & (torch.arange(wanted.tokens) == at)
        children = torch.where(changed, drawn(half, wanted.tokens), children)
        alive, scores = torch.cat([alive, children]), torch.cat([scores, distances(children)])
    best = scores.argmin()
    return str(vocabulary.tokenizer.decode(alive[best])).strip(), float(scores[best])
