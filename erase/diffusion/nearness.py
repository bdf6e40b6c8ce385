"""How near prompts are to others in meaning: by what a model is told of them, for every family that reads text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.diffusion.condition import WORDS, Condition

AT_ONCE = 32
"""Prompts whose conditions are in memory at once: those of T5 are megabytes each."""


def summary(told: Condition) -> dict[str, Tensor]:
    """One vector a prompt of each leaf of words, `[P, D]`, float64: `text` averaged over the tokens that are read."""
    found = {}
    for name in WORDS:
        if name not in told:
            continue
        x = told[name].float()
        if x.ndim == 3 and "mask" in told:
            read = told["mask"].to(x)
            x = (x * read[..., None]).sum(1) / read.sum(1, keepdim=True)
        elif x.ndim == 3:
            x = x.mean(1)
        found[name] = x.double()
    return found


def nearness(
    embed: Callable[[Sequence[str]], Condition], prompts: Sequence[str], forgotten: Sequence[str]
) -> list[float]:
    """Of each of P prompts how near it is to the nearest forgotten one: a cosine in [-1, 1].

    What all P prompts have in common, the mean of their vectors, is subtracted before. Where a condition has several
    leaves of words, the cosine is the mean of theirs.

    Args:
        embed: gives the conditions of prompts, leaves `[P, …]`.
        prompts: those that stay.
        forgotten: the others.
    """

    def read(some: Sequence[str]) -> dict[str, Tensor]:
        parts = [summary(embed(some[start : start + AT_ONCE])) for start in range(0, len(some), AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    stay, gone = read(prompts), read(forgotten)
    cosines = []
    for name, x in stay.items():
        common = x.mean(0)
        cosines.append(F.normalize(x - common, dim=1) @ F.normalize(gone[name] - common, dim=1).T)
    found: list[float] = torch.stack(cosines).mean(0).amax(1).tolist()
    return found
