"""Which parameters of a network are trained: a family's sets of that name, or an expression over names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Learning:
    """What of a network learns, and in which form."""

    which: str
    """A name of the family's sets, or an expression (`train.parameters`)."""
    lora_safe: bool = False
    """Whether weights alone learn that a LoRA carries."""
    rank: int | None = None
    """Of A and B, which learn in the place of the weights that a LoRA carries; `None` where the weights learn."""
    seed: int = 0
    """Of A."""


def select(
    net: nn.Module, which: str, sets: Mapping[str, str], keep: Callable[[str, int], bool] = lambda name, ndim: True
) -> list[str]:
    """Give `requires_grad` to the parameters of a set and take it from all others; the chosen names.

    Args:
        net: the network.
        which: a name in `sets`, or else a regular expression searched in the names of parameters.
        sets: the family's (`erase.diffusion.families.Family.PARAMETERS`).
        keep: whether a parameter of the set is chosen, by its name and number of dimensions.

    Raises:
        ValueError: for an invalid expression, or a set without parameters.
    """
    try:
        pattern = re.compile(sets.get(which, which))
    except re.error as error:
        raise ValueError(
            f"train.parameters {which!r} is neither {', '.join(sets)} nor a regular expression ({error})"
        ) from error
    chosen = []
    for name, p in net.named_parameters():
        p.requires_grad_(pattern.search(name) is not None and keep(name, p.ndim))
        if p.requires_grad:
            chosen.append(name)
    if not chosen:
        example = next(iter(dict(net.named_parameters())))
        raise ValueError(
            f"train.parameters {which!r} matches no parameter of {type(net).__name__}; "
            f"allowed: {', '.join(sets)}, or a regular expression over names such as {example}"
        )
    return chosen
