"""What a denoiser is conditioned on: named tensors with a common first dimension.

A Stable Diffusion UNet has one (`text`), SDXL three (`text`, `pooled`, `time_ids`), a class-conditional one a `label`.
The engine takes such mappings apart and together as it does batches (`erase.engine.backend.map_batch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Condition = Mapping[str, Tensor]
"""Leaves `[B, …]`; a table of distinct conditions has leaves `[P, …]`, the null condition `[1, …]`."""

WORDS = ("text", "pooled")
"""The leaves that come from a prompt's words; others tell a size, or which tokens are padding."""


def take(table: Condition, index: Tensor) -> dict[str, Tensor]:
    """Rows `index`, `[B]`, of every leaf."""
    return {name: x[index] for name, x in table.items()}


def size(condition: Condition) -> int:
    """B, the first dimension."""
    return len(next(iter(condition.values())))


def expand(one: Condition, count: int) -> dict[str, Tensor]:
    """A condition `[1, …]` for `count` samples, without a copy."""
    return {name: x.expand(count, *x.shape[1:]) for name, x in one.items()}


def where(choose: Tensor, a: Condition, b: Condition) -> dict[str, Tensor]:
    """`a` where `choose` `[B]` holds, else `b`, row by row; in the dtype and on the device of `b`."""
    found = {}
    for name, x in b.items():
        found[name] = torch.where(choose.view(-1, *[1] * (x.ndim - 1)), a[name].to(x), x)
    return found


def cat(parts: Sequence[Condition]) -> dict[str, Tensor]:
    """Conditions one after another."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def to(condition: Condition, device: torch.device | str) -> dict[str, Tensor]:
    """The same on another device."""
    return {name: x.to(device) for name, x in condition.items()}


def shapes(condition: Condition | Tensor) -> dict[str, torch.Size]:
    """Of every leaf; of a lone tensor under the empty name."""
    return {"": condition.shape} if isinstance(condition, Tensor) else {name: x.shape for name, x in condition.items()}
