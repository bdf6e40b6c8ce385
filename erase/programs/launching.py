"""Join the processes of a launch, resolve the precision, show progress, and hold signals back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from erase.config import ClassifyConfig, DdpmConfig, SdConfig
from erase.engine import distributed, memory
from erase.engine.loop import check_launch
from erase.engine.precision import Precision, notice, resolve
from erase.programs.tracking import check_tracker
from erase.programs.training import check_adam8bit

C = TypeVar("C", SdConfig, DdpmConfig, ClassifyConfig)


def launch(precision: str = "no") -> Accelerator:
    """Join the other processes of this launch, if there are any; `precision` may be `auto`.

    Raises:
        ValueError: for FSDP or DeepSpeed.
    """
    cpu = not torch.accelerator.is_available()  # unsaid, processes on CPUs would run side by side
    # The others wait while the first one writes: longer than the ten minutes that NCCL would.
    state = PartialState(cpu=cpu, timeout=timedelta(hours=6))
    name: Any = resolve(precision, state.device)
    AcceleratorState._reset_state()  # a comparison's next run may have another precision; the processes stay joined
    accelerator = Accelerator(mixed_precision=name, cpu=cpu)
    check_launch(accelerator)
    return accelerator


def start(config: C, say: Callable[[str], None]) -> tuple[C, Accelerator, Precision, Callable[[str], None]]:
    """The settings with `precision: auto` resolved, the launch, its precision, and `say` of the first process alone.

    Raises:
        ValueError: for FSDP or DeepSpeed, a batch that does not divide over the processes, or an optional package
            that is missing.
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
