"""Join the processes of a launch, resolve the precision, show progress, and hold signals back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from erase.config import ClassifyConfig, DdpmConfig, SdConfig
from erase.engine import distributed, memory
from erase.engine.loop import check_launch
from erase.engine.precision import DTYPES, Precision, notice, resolve
from erase.engine.sharding import asked, shard
from erase.methods import NEEDS, Entry
from erase.programs.tracking import check_tracker
from erase.programs.training import check_adam8bit

SHARDED = ("forget", "remain", "mask", "epoch", "denoiser")
"""What methods may need where weights are spread over processes."""
C = TypeVar("C", SdConfig, DdpmConfig, ClassifyConfig)


def launch(precision: str = "no") -> Accelerator:
    """Join the other processes of this launch, if there are any; `precision` may be `auto`.

    Raises:
        ValueError: for FSDP1, DeepSpeed or Megatron.
    """
    cpu = not torch.accelerator.is_available()  # unsaid, processes on CPUs would run side by side
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # with it transformers loads encoders in one process alone
    # The others wait while the first one writes: longer than the ten minutes that NCCL would.
    state = PartialState(cpu=cpu, timeout=timedelta(hours=6))
    name: Any = resolve(precision, state.device)
    AcceleratorState._reset_state()  # a comparison's next run may have another precision; the processes stay joined
    accelerator = Accelerator(mixed_precision=name, cpu=cpu)
    check_launch(accelerator)
    return accelerator


def check_sharding(config: Any, entry: Entry, launched: Accelerator) -> None:
    """Find out now that a run cannot work with weights that are spread over processes, where FSDP2 is asked for.

    Raises:
        ValueError: if it cannot.
    """
    if asked(launched) is None or launched.num_processes == 1:
        return
    why = None
    if config.pipeline != "sd":
        why = f"erase run {config.pipeline}"
    elif needs := [NEEDS[need] for need in entry.needs if need not in SHARDED]:
        why = f"method {entry.name}, which needs {needs[0]},"
    elif config.train.form == "lora":
        why = "train.form=lora"
    elif config.train.optimizer == "adam8bit":
        why = "train.optimizer=adam8bit"
    elif config.forget.start == "uce":
        why = "forget.start=uce"
    elif config.until is not None:
        why = "until"
    elif config.saliency.per == "image" and "mask" in entry.needs:
        why = "saliency.per=image"
    if why is not None:
        raise ValueError(f"{why} does not work with --use_fsdp: launch without it (DDP)")


def shard_network(net: nn.Module, launched: Accelerator, precision: Precision) -> None:
    """Spread a network over the processes where FSDP2 is asked for, by the launch's other settings of it."""
    plugin = asked(launched)
    if plugin is None:
        return
    if plugin.activation_checkpointing:
        known: Any = net
        known.enable_gradient_checkpointing()
    wanted = gathered_in(launched.device, precision)
    shard(net, launched.device, wanted, offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy))


def gathered_in(device: torch.device, precision: Precision) -> torch.dtype | None:
    """The dtype in which spread weights are gathered; `None` for their own.

    A CPU's norms take input and weights of one dtype alone: autocast casts what they are given on GPUs only.
    """
    return None if device.type == "cpu" else DTYPES.get(precision.name)


def start(config: C, say: Callable[[str], None]) -> tuple[C, Accelerator, Precision, Callable[[str], None]]:
    """The settings with `precision: auto` resolved, the launch, its precision, and `say` of the first process alone.

    Raises:
        ValueError: for FSDP1, DeepSpeed or Megatron, a batch that does not divide over the processes, or an optional
            package that is missing.
    """
    memory.give_back()
    accelerator = launch(config.precision)
    device: torch.device = accelerator.device
    name: Any = resolve(config.precision, device)
    train: Any = config.train
    if train is not None and train.batch_size % distributed.world():
        raise ValueError(f"train.batch_size {train.batch_size} does not divide over {distributed.world()} processes")
    check_tracker(config.tracker)
    if train is not None and train.optimizer == "adam8bit":
        if find_spec("bitsandbytes") is None:
            raise ValueError("train.optimizer=adam8bit needs bitsandbytes: pip install 'erase[adam8bit]', or use adam")
        check_adam8bit(device)
    heard = say if distributed.rank() == 0 else lambda line: None
    line = notice(name, device)
    if line is not None:
        heard(line)
    return replace(config, precision=name), accelerator, Precision(name, device), heard
