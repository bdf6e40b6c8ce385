"""Training in LoRA form: A and B learn beside frozen weights, by `peft`.

Masks and Fisher diagonals are of A and B themselves.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erase.engine.backend import drawn_from

ADAPTER = "erased"
"""The adapter's name in the network."""
RANK = 16
"""Of the layers, where none is asked for."""


def inject(net: nn.Module, weights: Sequence[str], rank: int, seed: int) -> list[str]:
    """Put A and B beside weights, and let nothing else learn; the names of their parameters.

    B is 0: the network says what it said. A is drawn as peft draws it.

    Args:
        net: the network; changed in place.
        weights: of linear layers and convolutions, by name.
        rank: of every pair, unless the weight has less.
        seed: of A.

    Raises:
        ValueError: where peft is missing.
    """
    check_peft("train.form=lora")
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name.removesuffix(".weight") for name in weights]
    least = {
        name: min(p.shape[0], p[0].numel()) for name, p in zip(layers, map(net.get_parameter, weights), strict=True)
    }
    small = {f"^{re.escape(name)}": limit for name, limit in least.items() if limit < rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="|".join(re.escape(name) for name in layers),
        rank_pattern=small,
        alpha_pattern=small,
    )
    hollow = any(p.is_meta for p in net.parameters())
    with drawn_from(seed):
        inject_adapter_in_model(config, net, ADAPTER, low_cpu_mem_usage=hollow)
    found = [name for name, p in net.named_parameters() if p.requires_grad]
    for name in found:
        p = net.get_parameter(name)
        p.data = p.data.float()
    return found


def check_peft(what: str) -> None:
    """Refuse a setting that needs peft, where it is missing.

    Raises:
        ValueError: if it is.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{what} needs peft, which is not installed: pip install 'erase[lora]'")


def pairs(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with an adapter of ours, by the name of the weight that they stand beside."""
    for name, module in net.named_modules():
        if ADAPTER in getattr(module, "lora_A", {}):
            yield f"{name}.weight", module


@torch.no_grad()
def dense(net: nn.Module) -> dict[str, Tensor]:
    """The weights with what A and B learned, float32, by the names that they have without adapters."""
    return {
        name: module.get_base_layer().weight.detach().float() + module.get_delta_weight(ADAPTER).float()
        for name, module in pairs(net)
    }
