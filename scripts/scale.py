"""What a process holds and receives in a step of SFR-on, for models whose weights are spread over many (FSDP2).

    python scripts/scale.py                            # SD 1.x, SDXL, SD3.5-large and Flux.1 on 1 to 64 processes
    accelerate launch --config_file docs/guides/fsdp2.yaml scripts/scale.py --measure 2

Without `--measure` nothing is computed: memory is what `--dry-run` says, of networks without data; what is received
follows from when FSDP2 gathers weights and averages gradients (`received`). Prints a line of JSON for each model,
choice of weights and number of processes: the preset `sd_concept_sfron` in bf16, with a batch of 1 in each process.

With `--measure N`, in a launch: steps of an SD3 transformer of full width with N blocks, whose bytes are counted on
this machine's network interfaces, beside what `received` says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import bench
import torch
from accelerate import PartialState, init_empty_weights

from erase import resources
from erase.config import SdConfig
from erase.config.read import parse, put, read_preset
from erase.diffusion.losses import copies, forget_objective, remain_objective
from erase.diffusion.parameters import select
from erase.engine.backend import trainable
from erase.engine.loop import unlearn
from erase.engine.memory import shared
from erase.engine.precision import Precision
from erase.methods import find_method
from erase.methods.sfron import sfron
from erase.programs.inputs import denoising
from erase.programs.launching import launch, shard_network
from erase.programs.rehearsal import Work, largest_block

SIDES = {"sdxl": 1024, "sd3": 1024, "flux": 1024}
"""Pixels; 512 for SD 1.x."""
NAMES = {"sd1": "SD 1.x", "sdxl": "SDXL", "sd3": "SD3.5-large", "flux": "Flux.1"}
WHOLE: dict[str, dict[str, Any]] = {
    "sd3": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
        "pos_embed_max_size": 192,
    },
    "flux": {"num_layers": 19, "num_single_layers": 38},
}
"""Where these differ from the networks of `bench.py`."""
WORLDS = (1, 2, 4, 8, 64)
PASSES = 2
"""Of a step of `sd_concept_sfron`: a fast and a slow pass, each of which asks the first model too (forward alone)."""


def make(name: str) -> bench.Bench:
    """A model without data, in bf16."""
    if name != "sd1":
        net = bench.large_network(name, torch.bfloat16, **WHOLE.get(name, {}))
        return bench.large_bench(name, net, 1, SIDES[name], checkpointing=True)
    with init_empty_weights():
        net = bench.sd1_network()
    net.to(torch.bfloat16).requires_grad_(False).eval().enable_gradient_checkpointing()
    return bench.sd1_bench(net, 1)


def learn(made: bench.Bench, parameters: str) -> None:
    """Choose the weights that learn, whose masters are float32."""
    for key in select(made.backend.net, parameters, made.sets or {}):
        p = made.backend.net.get_parameter(key)
        p.data = p.data.float()


def received(net: Any, gathered: torch.dtype | None, world: int, averaging: int = 1) -> float:
    """Bytes that a process receives in a step.

    A pass gathers the network's weights three times (for the first model, forward, backward) and averages the gradients
    of those that learn in float32. Of everything a process has its own part already.

    Args:
        net: which of its weights learn is decided.
        gathered: the dtype of weights on their way; by default their own.
        world: processes.
        averaging: how often gradients are sent; 2 with gloo, which averages all of them in every process.
    """
    size = sum(p.numel() * (gathered or p.dtype).itemsize for p in net.parameters())
    averaged = 4 * sum(p.numel() for p in trainable(net).values())
    return PASSES * (3 * size + averaging * averaged) * (world - 1) / world


def table(name: str, parameters: str) -> Iterator[dict[str, Any]]:
    """A line for each number of processes."""
    made = make(name)
    learn(made, parameters)
    net = made.backend.net
    data = read_preset(resources.preset_path("sd_concept_sfron"))
    config = parse(put(data, {"train.batch_size": 1, "train.micro_batch": None, "forget.prompts": ["a cat"]}), SdConfig)
    work = Work(
        config,
        made.backend,
        find_method("sfron"),
        partial(denoising, config),
        made.make_batch(1, 1),
        (config.saliency.count, config.saliency.count),
        Precision("bf16", torch.device("cpu")),
    )
    whole, spread = (work.held(gathered=dtype)[0] for dtype in (None, torch.bfloat16))
    block = largest_block(net, torch.bfloat16)
    for world in WORLDS:
        held = {what: shared(items, world, block) for what, items in spread.items()} if world > 1 else whole
        yield {
            "model": NAMES[name],
            "parameters": parameters,
            "weights": sum(p.numel() for p in net.parameters()),
            "learn": work.learns,
            "processes": world,
            **{f"{what}_gb": round(sum(items.values()) / 1e9, 1) for what, items in held.items()},
            "received_gb": round(received(net, torch.bfloat16, world) / 1e9, 1),
        }


def on_interfaces() -> int:
    """Bytes that all network interfaces of this machine have received so far (Linux)."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()[2:]
    return sum(int(line.split(":")[1].split()[0]) for line in lines)


@contextmanager
def counted(found: list[int]) -> Iterator[None]:
    """Append the bytes that the processes of this machine sent each other in the context."""
    state = PartialState()
    state.wait_for_everyone()
    before = on_interfaces()
    yield
    state.wait_for_everyone()
    found.append(on_interfaces() - before)


def measure(blocks: int, parameters: str) -> dict[str, Any]:
    """Received bytes of a step: those of three steps less those of one, halved."""
    net = bench.large_network("sd3", torch.bfloat16, num_layers=blocks)
    bench.fill(net)
    made = bench.large_bench("sd3", net, 1, 256, checkpointing=True)
    learn(made, parameters)
    launched = launch("bf16")
    rule = received(net, None, launched.num_processes, 1 if torch.cuda.is_available() else 2)
    shard_network(net, launched, Precision("bf16", launched.device))
    first = copies(net)
    forget, remain = (bench.on_device(made.make_batch(i, launched.num_processes)) for i in (1, 2))
    found: list[int] = []
    for steps in (1, 3):
        with counted(found):
            unlearn(
                made.backend,
                sfron(
                    fast_rate=1e-6,
                    forget=forget_objective("redirect", net, "frozen", first),
                    remain=remain_objective("distill", net, 0.0, first),
                ),
                [forget],
                [remain],
                steps=steps,
                optimizer=lambda p: torch.optim.Adam(p, lr=1e-6, fused=True),
                seed=0,
                accelerator=launched,
            )
    of_each = (found[1] - found[0]) / 2 / launched.num_processes
    return {
        "processes": launched.num_processes,
        "blocks": blocks,
        "parameters": parameters,
        "received_gb": round(of_each / 1e9, 3),
        "by_the_rule_gb": round(rule / 1e9, 3),
    }


def main() -> None:
    """Print lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, metavar="N", help="in a launch: blocks of an SD3 transformer")
    parser.add_argument("--parameters", choices=["xattn", "full"], help="by default each of them")
    given = parser.parse_args()
    chosen = [given.parameters] if given.parameters else ["xattn", "full"]
    if given.measure:
        line = measure(given.measure, chosen[-1])
        if PartialState().is_main_process:
            print(json.dumps(line))
        return
    for name in NAMES:
        for parameters in chosen:
            for line in table(name, parameters):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
