"""How a run starts: precision, processes, optimizers."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy

from erase.config import Train
from erase.engine.sharding import asked
from erase.methods import find_method
from erase.programs import launching, training


@dataclass(frozen=True)
class Launched:
    precision: str
    tracker: str = "jsonl"
    train: Train = field(default_factory=lambda: Train(steps=1, batch_size=4))


def test_a_start_resolves_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    resolved, accelerator, precision, say = launching.start(Launched("auto"), said.append)  # type: ignore[type-var]
    assert resolved.precision == accelerator.mixed_precision == precision.name != "auto"
    say("heard")
    assert said == ["heard"]


@pytest.mark.parametrize(("kind", "words"), [("FSDP", "fsdp_version must be 2"), ("DEEPSPEED", "DEEPSPEED is not")])
def test_other_ways_to_shard_are_refused_before_work(monkeypatch: pytest.MonkeyPatch, kind: str, words: str) -> None:
    monkeypatch.setattr(launching.Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=words):
        launching.start(Launched("no"), lambda line: None)  # type: ignore[type-var]


def test_the_configuration_of_the_documentation_asks_for_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(Path(__file__).parents[2] / "docs/guides/fsdp2.yaml")
    assert load_config_from_file(path).distributed_type == DistributedType.FSDP
    args = launch_command_parser().parse_args(["--config_file", path, "-m", "erase"])
    args, *_ = _validate_launch_command(args)
    assert args.num_processes == 2
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = asked(PartialState(cpu=True))
    assert plugin is not None
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    assert not plugin.cpu_ram_efficient_loading


def test_every_process_loads_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --use_fsdp` has transformers read them in the first process alone, unless told otherwise."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    launching.launch()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize(
    ("pipeline", "method", "words"),
    [
        ("ddpm", "sfron", "erase run ddpm"),
        ("sd", "uce", "method uce, which needs"),
        ("sd", "sfron", "until"),
        ("sd", "sfron", "adam8bit"),
        ("sd", "sfron", "start=uce"),
    ],
)
def test_runs_that_need_whole_weights_are_refused_with_fsdp(
    monkeypatch: pytest.MonkeyPatch, pipeline: str, method: str, words: str
) -> None:
    config = SimpleNamespace(
        pipeline=pipeline,
        until=object(),
        saliency=SimpleNamespace(per="sample"),
        train=SimpleNamespace(form="full", optimizer="adam8bit" if words == "adam8bit" else "adam"),
        forget=SimpleNamespace(start="uce" if words == "start=uce" else None),
    )
    accelerator = launching.launch()
    launching.check_sharding(config, find_method(method), accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    launching.check_sharding(config, find_method(method), accelerator)  # one process spreads nothing
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match=words):
        launching.check_sharding(config, find_method(method), accelerator)


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers(name: Any, kind: Any) -> None:
    train = Train(steps=1, lr=0.02, optimizer=name, weight_decay=0.1, momentum=0.7)
    made = training.make_optimizer(train, list(toys.mlp().parameters()))
    assert type(made) is kind
    group = made.param_groups[0]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.02, 0.1, 4)
    assert group.get("momentum") == (0.7 if name == "sgd" else None)


def test_one_process_makes_runs_of_several_precisions() -> None:
    for name in ("no", "fp16", "bf16", "no"):  # as a comparison does
        config, accelerator, precision, _ = launching.start(Launched(name), lambda line: None)  # type: ignore[type-var]
        assert (config.precision, precision.name) == (name, name)
        assert accelerator.mixed_precision == name


def test_eight_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Launched("no", train=Train(steps=1, optimizer="adam8bit"))
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adam8bit needs bitsandbytes: pip install 'erase\[adam8bit\]', or use adam"):
        launching.start(config, lambda line: None)  # type: ignore[type-var]
    made: list[Any] = []
    optim = SimpleNamespace(Adam8bit=lambda params, **settings: made.append(settings))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    training.make_optimizer(Train(steps=1, optimizer="adam8bit", lr=0.1), [])
    assert made == [{"lr": 0.1, "weight_decay": 0.0}]


def test_eight_bits_are_tried_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cardless:
        def __init__(self, params: list[torch.nn.Parameter], **settings: float) -> None: ...

        def step(self) -> None:
            raise NotImplementedError("no CPU kernel")

    monkeypatch.setattr(launching, "find_spec", lambda name: object())
    monkeypatch.setattr(training, "version", lambda name: "0.43.0")
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(Adam8bit=Cardless)))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = Launched("no", train=Train(steps=1, optimizer="adam8bit"))
    with pytest.raises(ValueError, match=r"bitsandbytes 0\.43\.0 does not run on cpu \(no CPU kernel\): update it, or"):
        launching.start(config, lambda line: None)  # type: ignore[type-var]


def test_eight_bits_run_and_resume() -> None:
    pytest.importorskip("bitsandbytes")
    training.check_adam8bit(torch.device("cpu"))
    train = Train(steps=1, lr=0.1, optimizer="adam8bit")
    first, second = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    whole, stopped = training.make_optimizer(train, [first]), training.make_optimizer(train, [second])
    for step in range(4):
        if step == 2:
            state, stopped = stopped.state_dict(), training.make_optimizer(train, [second])
            stopped.load_state_dict(state)
        for weight, optimizer in ((first, whole), (second, stopped)):
            weight.grad = weight.detach() + step
            optimizer.step()
    assert {value.dtype for value in whole.state[first].values() if isinstance(value, torch.Tensor)} >= {torch.uint8}
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.ones(64, 64))


def test_steps_that_were_timed_speak_for_those_that_were_not() -> None:
    assert training.Steps(10, 0.5).timing == {"erase_s": 5.0, "steps": 10, "step_s": 0.5}
    assert training.Steps(10, None).timing == {"erase_s": None, "steps": 10, "step_s": None}
