"""A toy network that reads text of width 6, for closed forms."""

from typing import Any

import torch
import toys
from torch import nn

from erase.engine.loop import unlearn
from erase.engine.method import Method


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, rows in (("to_q", 5), ("to_k", 5), ("to_v", 7)):
            setattr(self, name, nn.Linear(6, rows, bias=False))


class Net(nn.Module):
    """Keys and values of text of width 6, and weights that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"attn1": Attention(), "attn2": Attention()})
        toys.randomize(self)
        self.double()


def go(method: Method, net: Net, **changes: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    settings = {"steps": 1, "optimizer": lambda p: torch.optim.Adam(p, lr=0.1), "seed": 0, "log": rows.append}
    unlearn(toys.Plain(net), method, None, None, **{**settings, **changes})
    return rows
