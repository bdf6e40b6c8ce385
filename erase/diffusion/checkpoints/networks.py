"""Networks from their configurations alone: their classes, and what tensors they need."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from erase.diffusion.checkpoints.layout import Part, Shapes

BLOCKS = ("num_layers", "num_single_layers", "num_hidden_layers", "layers_per_block", "transformer_layers_per_block")
MOST = 1000
"""Blocks of a network; a configuration that says more is of no model, and would take hours to build."""

FILLS = frozenset(
    getattr(nn.init, f"{name}_")
    for name in ("kaiming_uniform", "xavier_uniform", "uniform", "normal", "trunc_normal", "constant", "ones", "zeros")
) | {Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_}
"""What gives new weights their values."""


class Unfilled(TorchFunctionMode):
    """Nothing fills weights on the "meta" device meanwhile: they keep no values, and it takes half of the time."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if function in FILLS:
            tensor = given["tensor"] if "tensor" in given else args[0]
            if tensor.is_meta:
                return tensor
        return function(*args, **given)


def shapes(texts: Mapping[str, str], parts: Mapping[str, Part]) -> Shapes:
    """Of the tensors that the networks of a folder's configuration have, by part and name.

    Raises:
        ValueError: for a configuration that makes no network.
    """
    try:
        for name in parts:
            _check_blocks(config_of(texts, name))
        return {name: dict(_shapes(kind_of(part), texts[f"{name}/config.json"])) for name, part in parts.items()}
    except Exception as error:  # configurations of others break in a dozen unrelated ways
        raise ValueError(f"the configuration does not make a network ({first_line(error)}): get it again") from error


def _check_blocks(config: Mapping[str, Any]) -> None:
    """Refuse a configuration of more blocks than any model has."""
    for key in BLOCKS:
        counts = config.get(key, 1)
        for count in counts if isinstance(counts, list) else [counts]:
            if isinstance(count, int) and count > MOST:
                raise ValueError(f"{key} is {count}; at most {MOST} are read: get the file again")


@lru_cache(maxsize=64)  # files are opened again and again, and a large network takes half a second
def _shapes(kind: Any, config: str) -> dict[str, torch.Size]:
    """Of a network's tensors; of those that share their values, files hold the first."""
    with torch.device("meta"), Unfilled():
        net = network(kind, json.loads(config))
    tied = set(getattr(net, "_tied_weights_keys", None) or ())
    return {name: tensor.shape for name, tensor in net.state_dict().items() if name not in tied}


def first_line(error: Exception) -> str:
    """What a library says of an error, or the error's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def config_of(texts: Mapping[str, str], part: str) -> dict[str, Any]:
    """`config.json` of a part."""
    found: dict[str, Any] = json.loads(texts[f"{part}/config.json"])
    return found


def kind_of(part: Part) -> Any:
    """The class of a network."""
    return getattr(importlib.import_module(part.library), part.kind)


def network(kind: Any, config: dict[str, Any]) -> nn.Module:
    """The network of a class and a configuration, with new weights."""
    made: nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(text_config(kind, config))
    return made


def text_config(kind: Any, config: dict[str, Any]) -> Any:
    """A configuration as a class of transformers takes it."""
    return kind.config_class.from_dict(config)
