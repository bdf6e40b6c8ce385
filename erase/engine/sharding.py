"""Weights that are spread over the processes of a launch: torch's FSDP2, and what the engine needs of it.

A process holds some rows of every weight, its shard, and gathers a block's whole weights only while it computes with
them. Masks, Fisher sums, moments and copies are elementwise: they are held for the shard alone. What is of all weights
together, such as a norm, is summed over processes. Of tensors that are not spread all functions here give what one
would write without them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from erase.store.safetensors import Lazy


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `start + len(local)` of a tensor with `rows` of them; other processes hold the others."""

    local: Tensor
    start: int
    rows: int


def asked(launched: Accelerator | PartialState) -> FullyShardedDataParallelPlugin | None:
    """What `accelerate launch --use_fsdp --fsdp_version 2` or the accelerator's plugin asks for; `None` of others.

    On CPUs accelerate itself ignores it.

    Raises:
        ValueError: for FSDP1, DeepSpeed and Megatron, and for weights that stay gathered after a forward pass.
    """
    kind = str(launched.distributed_type.value)
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"{kind} is not supported: launch with --use_fsdp --fsdp_version 2, or plainly (DDP)")
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if kind != "FSDP" and not wanted:
        return None
    given = getattr(launched.state, "fsdp_plugin", None) if isinstance(launched, Accelerator) else None
    plugin: FullyShardedDataParallelPlugin = given or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version must be 2; got {plugin.fsdp_version}: launch with --fsdp_version 2, or without --use_fsdp"
        )
    if not plugin.reshard_after_forward:
        raise ValueError(
            "fsdp_reshard_after_forward must be true; got false, with which a frozen target cannot be computed"
        )
    return plugin


def shard(
    net: nn.Module, device: torch.device, precision: torch.dtype | None = None, *, offload: bool = False
) -> nn.Module:
    """Spread a network's weights over all processes, in place; nothing where there is one process.

    The modules that diffusers and transformers name as indivisible are gathered one at a time, without such names the
    elements of the network's lists. Which weights learn must be decided before.

    Args:
        net: the same in every process; its weights may still be on the CPU.
        device: where it computes.
        precision: in which weights are gathered, and their gradients made; by default their own. Gradients are
            averaged in float32.
        offload: keep shards, their gradients and the optimizers' state on the CPU.

    Raises:
        ValueError: for weights that are not laid out row by row, and for a torch that does not average gradients.
    """
    world = PartialState(cpu=device.type == "cpu").num_processes
    if world == 1:
        return net
    for name, p in net.named_parameters():
        if not p.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous: weights in channels_last cannot be sharded; load them without it"
            )
    mesh = init_device_mesh(device.type, (world,))
    check_average(mesh.get_group(), device)
    wide = None if precision is None else torch.float32
    given: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,  # said, so that it holds for the root as well: see `exchanged`
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=wide, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),  # unpinned, hooks see it
    }
    for block in blocks(net):
        fully_shard(block, **given)
    fully_shard(net, **given)
    return net


def check_average(group: dist.ProcessGroup, device: torch.device) -> None:
    """See that gradients will be averaged: over CPU processes torch 2.7 sums them (pytorch issue 162338).

    Raises:
        ValueError: for a torch that does so.
    """
    found = torch.zeros(1, device=device)
    ones = torch.ones(dist.get_world_size(group), device=device)
    dist.reduce_scatter_tensor(found, ones, op=dist.ReduceOp.AVG, group=group)
    if found.item() != 1:
        raise ValueError(
            f"torch {torch.__version__} sums gradients over {device.type} processes where FSDP2 has it average them: "
            "install a newer torch, or launch without --use_fsdp"
        )


def blocks(net: nn.Module) -> list[nn.Module]:
    """The modules of a network that are gathered one at a time, inner ones first."""
    named = set(getattr(net, "_no_split_modules", None) or ())
    found = [module for module in net.modules() if type(module).__name__ in named and module is not net]
    if not found:
        lists = (part for part in net.modules() if isinstance(part, nn.ModuleList | nn.Sequential))
        found = [module for part in lists for module in part if any(True for _ in module.parameters())]
    return list(dict.fromkeys(reversed(found)))


def is_sharded(of: Tensor | nn.Module) -> bool:
    """Whether a tensor, or a network's weights, are spread over processes."""
    if isinstance(of, nn.Module):
        return any(isinstance(p, DTensor) for p in of.parameters())
    return isinstance(of, DTensor)


def local(x: Tensor) -> Tensor:
    """The process's own rows, sharing memory; all of a tensor that is not spread."""
    if not isinstance(x, DTensor):
        return x
    with torch.no_grad():
        mine: Tensor = x.to_local()
    return mine


def span(p: DTensor) -> tuple[int, int]:
    """Which rows of a weight this process holds: first and one past the last."""
    rows, world, rank = len(p), p.device_mesh.size(), p.device_mesh.get_local_rank()
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def cut(whole: Tensor, p: Tensor) -> Tensor:
    """Of a tensor with the shape of `p`, the rows that this process holds of `p`."""
    return whole[slice(*span(p))] if isinstance(p, DTensor) else whole


def as_shard(part: Tensor, p: Tensor) -> Tensor:
    """A tensor spread as `p` is, of which this process holds `part`."""
    if not isinstance(p, DTensor):
        return part
    made: Tensor = DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return made


def whole(part: Tensor, p: Tensor) -> Tensor:
    """The tensor of which this process holds the rows `part` that it holds of `p`; all processes must ask."""
    if not isinstance(p, DTensor):
        return part
    kind = torch.uint8 if part.dtype == torch.bool else part.dtype
    gathered: Any = as_shard(part.to(torch.device(p.device_mesh.device_type), kind), p)
    found: Tensor = gathered.full_tensor().to(part.dtype)
    return found


def piece(part: Tensor, p: Tensor) -> Tensor | Piece:
    """What a state keeps of a tensor of which this process holds the rows `part` that it holds of `p`."""
    return Piece(part, span(p)[0], len(p)) if isinstance(p, DTensor) else part


class Pieces:
    """A saved tensor that several files hold pieces of."""

    def __init__(self, pieces: list[tuple[Callable[[], Tensor], int]], count: int) -> None:
        self.pieces, self.count = pieces, count

    def rows(self, first: int, end: int) -> Tensor:
        """Rows `first` to `end`; only the pieces that hold some of them are read."""
        parts = []
        for number, (read, start) in enumerate(self.pieces):
            stop = self.pieces[number + 1][1] if number + 1 < len(self.pieces) else self.count
            if start < end and first < stop:
                parts.append(read()[max(first - start, 0) : end - start])
        return torch.cat(parts) if parts else self.pieces[0][0]()[:0]


def rows(saved: Tensor | Pieces, first: int, end: int) -> Tensor:
    """Rows of a saved tensor."""
    return saved.rows(first, end) if isinstance(saved, Pieces) else saved[first:end]


def restored(saved: Tensor | Pieces, p: Tensor) -> Tensor:
    """Of a saved tensor with the shape of `p`, the rows that this process holds of `p`."""
    if isinstance(p, DTensor):
        return rows(saved, *span(p))
    return saved.rows(0, saved.count) if isinstance(saved, Pieces) else saved


def summed(x: Tensor, p: Tensor) -> Tensor:
    """The sum over the processes that `p` is spread over, on the device of `x`."""
    if not isinstance(p, DTensor):
        return x
    found = x.to(torch.device(p.device_mesh.device_type))
    dist.all_reduce(found, group=p.device_mesh.get_group())
    return found.to(x.device)


def before(count: int, p: Tensor) -> tuple[int, int]:
    """Of counts that the processes have: the sum of those of lower ranks, and of all."""
    if not isinstance(p, DTensor):
        return 0, count
    each = torch.zeros(p.device_mesh.size(), dtype=torch.int64)
    rank = p.device_mesh.get_local_rank()
    each[rank] = count
    each = summed(each, p)
    return int(each[:rank].sum()), int(each.sum())


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all elements together."""
    norm = torch.nn.utils.get_total_norm([local(x) for x in tensors])
    if not is_sharded(tensors[0]):
        return norm
    return summed(norm.double().square(), tensors[0]).sqrt().to(norm.dtype)


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What to multiply tensors of this norm by, so that it is at most `limit`: as `torch.nn.utils.clip_grad_norm_`."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


@contextmanager
def exchanged(net: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """A network whose weights are spread, with some of them exchanged for a while, in place and without a copy.

    What a pass has gathered is not seen by the next: weights are spread again after every pass, and autocast's casts
    of gathered ones are dropped.
    """
    held = {name: p for name, p in net.named_parameters() if name in weights}

    def swap() -> None:
        torch.clear_autocast_cache()
        for name, p in held.items():
            mine, theirs = local(p), local(weights[name])
            present = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(present)

    with torch.no_grad():
        swap()
    try:
        yield net
    finally:
        with torch.no_grad():
            swap()


def gathered(named: Mapping[str, Tensor]) -> Lazy:
    """Tensors whole and on the CPU, each when it is asked for; all processes must ask for the same ones in turn."""
    return Lazy(
        named,
        lambda name: whole(local(named[name]), named[name]).detach().cpu(),
        lambda name: torch.empty(named[name].shape, dtype=named[name].dtype, device="meta"),
    )


def compute_device(p: Tensor) -> torch.device:
    """Where a weight is computed with: shards may be kept on the CPU."""
    if isinstance(p, DTensor) and p.device_mesh.device_type != p.device.type:
        return torch.device(p.device_mesh.device_type, torch.accelerator.current_device_index())
    return p.device
