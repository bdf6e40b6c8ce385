"""Which parameters of a UNet are trained: `full`, `xattn`, `noxattn`, or a regular expression over names."""

from __future__ import annotations

import re

from torch import nn

SETS = {
    "full": r".*",
    "xattn": r"\.attn2\.",
    "noxattn": r"^(?!.*\.attn2\.)",
}


def select(net: nn.Module, which: str) -> list[str]:
    """Give `requires_grad` to the parameters of a set and take it from all others; the chosen names.

    Args:
        net: the network.
        which: `full` all, `xattn` cross-attention (attn2), `noxattn` all but that, else a regular expression
            searched in the names.

    Raises:
        ValueError: for an invalid expression, or a set without parameters.
    """
    try:
        pattern = re.compile(SETS.get(which, which))
    except re.error as error:
        raise ValueError(
            f"train.parameters {which!r} is neither {', '.join(SETS)} nor a regular expression ({error})"
        ) from error
    chosen = []
    for name, p in net.named_parameters():
        p.requires_grad_(pattern.search(name) is not None)
        if p.requires_grad:
            chosen.append(name)
    if not chosen:
        example = next(iter(dict(net.named_parameters())))
        raise ValueError(
            f"train.parameters {which!r} matches no parameter of {type(net).__name__}; "
            f"allowed: {', '.join(SETS)}, or a regular expression over names such as {example}"
        )
    return chosen
