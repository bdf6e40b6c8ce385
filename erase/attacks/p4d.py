"""Prompting4Debugging (P4D): words before a prompt with which the erased model predicts what the base model does.

Source: Chin et al., "Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts",
ICML 2024, arXiv 2309.06135.

    min over words w  E_ε ‖ε_θ(z_t, t, [w, prompt]) - ε0(z_t, t, prompt)‖²        ε0: the base model

Words are vectors that are stepped by Adam; what the loss sees is the nearest word of each by cosine, and the gradient
there is taken for that of the vector. They start from words drawn at random.

Deliberate differences: words stand before the prompt, at the same timesteps and with the same number of iterations as
`prompt_search`, and with its number of words, optimizer and rate, which is how that attack's authors compare the two;
P4D's own script has 16 words, AdamW at the rate 0.1, random timesteps and 3,000 iterations. Several encoders of one
vocabulary read the same words, the nearest by the sum of their cosines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erase.attacks.prefixes import Loss, Vocabulary
from erase.diffusion.condition import Condition
from erase.diffusion.denoiser import Denoiser


def match_base(model: Denoiser, base: nn.Module, asked: Condition) -> Loss:
    """The distance to what another network predicts for the prompts `asked`, leaves `[B, …]`: `[B]`."""

    def loss(cond: Condition, batch: dict[str, Any]) -> Tensor:
        noisy, t = model.noisy(batch), batch["t"]
        prediction = model.predict(noisy, t, cond)
        with torch.no_grad():
            target = model.predict(noisy, t, asked, base)
        return model.error(prediction, target)

    return loss


class Nearest:
    """Words as vectors, `[B, K, D]` for each encoder, of which the nearest words are read."""

    def __init__(
        self, vocabularies: Sequence[Vocabulary], searches: int, words: int, generator: torch.Generator
    ) -> None:
        self.vocabularies = vocabularies
        self.names = [name for vocabulary in vocabularies for name in vocabulary.tables]
        self.params: list[Tensor] = []
        for vocabulary in vocabularies:
            allowed = vocabulary.allowed.nonzero().flatten()
            drawn = torch.randint(len(allowed), (searches, words), generator=generator, device=generator.device)
            for table in vocabulary.tables.values():
                self.params.append(table[allowed.to(table.device)[drawn]].float().clone())

    def embedded(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Of the nearest words; their gradient is taken for the vectors'."""
        own, found = dict(zip(self.names, self.params, strict=True)), {}
        for vocabulary, ids in zip(self.vocabularies, self.tokens(), strict=True):
            for name, table in vocabulary.tables.items():
                x = own[name]
                found[name] = x + (table[ids.to(table.device)].to(x) - x).detach()
        return found

    def project(self) -> None:
        """Nothing: vectors are free."""

    @torch.no_grad()
    def tokens(self) -> list[Tensor]:
        """The nearest words."""
        own, found = dict(zip(self.names, self.params, strict=True)), []
        for vocabulary in self.vocabularies:
            alike: Any = 0
            for name, table in vocabulary.tables.items():
                alike = alike + F.normalize(own[name], dim=-1) @ F.normalize(table.float(), dim=-1).T
            alike = alike.masked_fill(~vocabulary.allowed.to(alike.device), -torch.inf)
            found.append(alike.argmax(-1).cpu())
        return found
