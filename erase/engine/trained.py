"""The weights that a run trains, and everything that steps them or is a copy of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from erase.engine.backend import trainable
from erase.engine.fast_step import FastStep, like, mask_of
from erase.engine.method import Method
from erase.engine.sharding import Pieces, as_shard, is_sharded, local, piece, restored
from erase.engine.updates import Descent, InTurn, Joint

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Trained:
    """Trainable parameters, the optimizers, the mask, and the copies of the weights that a method asks for."""

    def __init__(self, net: nn.Module, method: Method, optimizer: MakeOptimizer) -> None:
        update = method.update
        self.net = net
        self.named = trainable(net)
        self.params = list(self.named.values())
        self.slow = optimizer(self.params)
        self.base_rates = [float(g["lr"]) for g in self.slow.param_groups]
        self.fast = None if update.own_rule is None else FastStep(self.named, method.mask, update.own_rule)
        self.keep: dict[str, Tensor] | None = None
        if method.mask is not None and update.whole_mask:
            self.keep = {name: mask_of(method.mask, name, p) for name, p in self.named.items()}
        self.held: dict[str, Tensor] = {}
        """Values of the masked weights that weight decay moves and `restore_masked` restores, `[masked]` of each."""
        decays = any(group.get("weight_decay") for group in self.slow.param_groups)
        if decays and isinstance(update, Joint | InTurn | Descent) and update.mask_all:
            self.held = {name: local(self.named[name]).detach()[~keep] for name, keep in (self.keep or {}).items()}
        norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
        self.statistics = [buffer for m in norms for buffer in m.buffers(recurse=False)]
        """Running statistics, which forward passes change."""
        self.decay = method.average
        self.anchor = self._copy() if update.outer_rate < 1 else None
        """φ"""
        self.average = self._copy() if method.average else None

    def _copy(self) -> list[Tensor]:
        return [local(p).detach().clone() for p in self.params]

    def set_learning_rate(self, factor: float) -> None:
        """Set the slow optimizer's learning rate to a multiple of what it began with."""
        for group, base in zip(self.slow.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor

    @torch.no_grad()
    def restore_masked(self) -> None:
        """Undo what weight decay did to masked weights: their values are restored, their moments are 0."""
        for name, values in self.held.items():
            assert self.keep is not None
            p, masked = self.named[name], ~self.keep[name]
            local(p)[masked] = values
            for key, moment in self.slow.state.get(p, {}).items():
                if key != "step" and isinstance(moment, Tensor) and moment.is_floating_point():
                    local(moment).masked_fill_(masked, 0)

    @torch.no_grad()
    def follow(self, t: int) -> None:
        """Step the running mean of the weights. Early steps are larger, so that it forgets where it began."""
        if self.average is not None:
            decay = min(self.decay, (1 + t) / (10 + t))
            torch._foreach_lerp_(self.average, [local(p) for p in self.params], 1 - decay)

    @torch.no_grad()
    def end(self) -> None:
        """Put the running mean in the place of the weights, where there is one."""
        if self.average is not None:
            torch._foreach_copy_([local(p) for p in self.params], self.average)

    # ------------------------------------------------------------ state

    def _buffers(self) -> dict[str, Tensor]:
        """What a network keeps besides its weights: running statistics of batch normalisation."""
        kept = self.net.state_dict()
        return {name: b for name, b in self.net.named_buffers() if name in kept}

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, moments and copies."""
        slow = self.slow.state_dict()
        if is_sharded(self.params[0]):
            slow["state"] = {
                i: {key: piece(local(x), p) if is_sharded(x) else x for key, x in slow["state"][i].items()}
                for i, p in enumerate(self._in_slow())
                if i in slow["state"]
            }
        return {
            "params": {name: piece(local(p).detach(), p) for name, p in self.named.items()},
            "buffers": self._buffers(),
            "slow": slow,
            "fast": self.fast.state_dict() if self.fast is not None else {},
            **{
                name: [piece(x, p) for x, p in zip(copies or [], self.params if copies else [], strict=True)]
                for name, copies in (("anchor", self.anchor), ("average", self.average))
            },
        }

    def _in_slow(self) -> list[nn.Parameter]:
        """The weights in the order of the slow optimizer's state."""
        return [p for group in self.slow.param_groups for p in group["params"]]

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: for other trainable parameters.
        """
        if state["params"].keys() != self.named.keys():
            raise ValueError("it holds other trainable parameters than this run: use the same train.parameters")
        for name, p in self.named.items():
            local(p).copy_(restored(state["params"][name], p))
        for name, b in self._buffers().items():
            b.copy_(state["buffers"][name])
        for copies, saved in ((self.anchor, state["anchor"]), (self.average, state["average"])):
            for mine, theirs, p in zip(copies or [], saved, self.params if saved else [], strict=True):
                mine.copy_(restored(theirs, p))
        moments = {}
        for i, p in enumerate(self._in_slow()):
            if i in state["slow"]["state"]:
                of_weight = state["slow"]["state"][i].items()
                moments[i] = {key: self._moment(value, p) for key, value in of_weight}
        self.slow.load_state_dict({**state["slow"], "state": moments})
        for p in self.params:  # files hold row-major tensors; fused optimizers need the weight's own layout
            own = {} if is_sharded(p) else self.slow.state.get(p, {})
            own.update({k: like(p, v) for k, v in own.items() if isinstance(v, Tensor) and v.shape == p.shape})
        if self.fast is not None:
            self.fast.load_state_dict(state["fast"])

    def _moment(self, saved: Any, p: nn.Parameter) -> Any:
        """A part of the slow optimizer's state as the weight `p` needs it: spread, where that is."""
        whole = isinstance(saved, Pieces) or (isinstance(saved, Tensor) and saved.shape == p.shape)
        return as_shard(restored(saved, p), p) if whole else saved
