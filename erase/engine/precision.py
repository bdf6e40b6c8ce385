"""Mixed precision: one autocast and one loss scale, the same on a CPU and on a card.

accelerate leaves fp16 off on a CPU and says nothing. The loop therefore asks accelerate only *which* precision,
and runs torch's own autocast and `GradScaler`, which do work there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from erase.engine.sharding import is_sharded, local, total_norm

PrecisionName = Literal["no", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware: emulated, a convolution takes 14 times as long as float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent before torch 2.10
    return device.type == "cpu" and any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def resolve(name: str, device: torch.device) -> str:
    """What `auto` is on this device: `bf16` where that is fast, else `no`. Other names stay."""
    if name != "auto":
        return name
    return "bf16" if fast_bf16(device) else "no"


def notice(name: str, device: torch.device) -> str | None:
    """A line on what a precision does on this device, where that is not what one expects."""
    if device.type != "cpu" or name == "no" or (name == "bf16" and fast_bf16(device)):
        return None
    if name == "fp16":
        return "fp16 on a CPU: training uses torch's autocast and loss scaling (slow); images are generated in float32"
    return "bf16 on this CPU is emulated, many times slower than float32: set precision=no or auto"


class Precision:
    """Forward passes in `name`, weights and gradients in float32; a loss scale under fp16.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, name: str, device: torch.device, init_scale: float = 2.0**12) -> None:
        if name not in get_args(PrecisionName):
            raise ValueError(f"unknown precision {name!r}; allowed: {', '.join(get_args(PrecisionName))}")
        self.name, self.device = name, device
        self.scaler = (
            torch.amp.GradScaler(device.type, init_scale=init_scale, growth_interval=200) if name == "fp16" else None
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.name == "no":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.name])

    def sampling(self) -> AbstractContextManager[Any]:
        """The context of sampling: as `autocast`, but float32 for fp16 on a CPU, where half convolutions crawl."""
        if self.name == "fp16" and self.device.type == "cpu":
            return nullcontext()
        return self.autocast()

    @property
    def scale(self) -> float:
        """What a loss is multiplied by before its backward pass."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def backward(self, loss: Tensor) -> None:
        """Backward pass of the scaled loss."""
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def unscale(self, params: list[nn.Parameter]) -> None:
        """Divide gradients by the scale, once a phase, and adapt the scale: halved after an overflow."""
        if self.scaler is None or all(p.grad is None for p in params):
            return
        if is_sharded(params[0]):
            params = _shells(params)
        carrier = torch.optim.SGD(params, lr=0.0)
        self.scaler.unscale_(carrier)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The loss scale; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def _shells(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """This process's rows of weights and gradients; and as one more gradient the norm of all.

    That is not finite where one process has an overflow, so that all find it.
    """
    there = [(p, p.grad) for p in params if p.grad is not None]
    norm = total_norm([g for _, g in there]).reshape(1)
    shells = []
    for part, grad in [*((local(p), local(g)) for p, g in there), (torch.zeros_like(norm), norm)]:
        shell = nn.Parameter(part, requires_grad=False)
        shell.grad = grad
        shells.append(shell)
    return shells
