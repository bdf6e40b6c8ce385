"""One run, by as many processes as the environment says: `two_processes.py OUT`; see test_loop.py."""

import sys
from pathlib import Path
from typing import Any

import torch
import toys
from accelerate import Accelerator
from torch import Tensor

from erase.engine.fisher import fisher_diagonal
from erase.engine.loop import unlearn
from erase.engine.saliency import fisher_ratio_mask
from erase.methods.sfron import sfron
from erase.store.safetensors import write_safetensors


def run(accelerator: Accelerator) -> dict[str, Tensor]:
    """Fisher, mask and unlearned weights, each process with its part of the same data."""
    rank, world = accelerator.process_index, accelerator.num_processes

    def total(x: Tensor) -> Tensor:
        summed: Any = accelerator.reduce(x, reduction="sum")
        return summed

    net = toys.mlp()
    backend = toys.Noisy(net)
    fishers = []
    for seed in (0, 1):  # drawn already: each sample's noise is then the same however the data are dealt out
        batches = toys.drawn(backend, seed, count=4)
        fishers.append(fisher_diagonal(backend, batches, generator=toys.gen(), share=(rank, world), total=total))
    mask = fisher_ratio_mask(*fishers, density=0.5)

    class Shares(toys.Noisy):
        def losses(self, batch: Any, generator: torch.Generator) -> Tensor:
            assert len(batch["x"]) == 4 // world  # of the global batch
            return super().losses(batch, generator)

    result = unlearn(
        Shares(net),
        sfron(mask=mask, fast_rate=0.02, slow_steps=2, outer_rate=0.7, clip_forget=0.5, clip_remain=0.5, every=2),
        toys.batches(0),
        toys.batches(1),
        steps=6,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        seed=5,
        accelerator=accelerator,
    )
    assert result.skipped_fast == result.skipped_slow == 0
    out = {f"fisher.{n}": v for n, v in fishers[0].named.items()}
    out |= {f"mask.{n}": v for n, v in mask.named.items()}
    return out | toys.weights(net)


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    tensors = run(accelerator)
    tensors["world"] = torch.tensor(accelerator.num_processes)
    write_safetensors(Path(sys.argv[1]) / f"{accelerator.process_index}.safetensors", tensors, {})
    accelerator.end_training()
