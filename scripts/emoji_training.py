"""What all stages of `scripts/make_emoji.py` share: scenes as tensors, resumable training, restored modules."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emoji_world as data
import numpy as np
import torch
from emoji_world import Scene, World
from make_tiny_sd import Training, as_input, load_averages
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from erase.engine.precision import Precision, resolve

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Kit:
    """What every stage needs."""

    work: Path
    out: Path
    world: World
    sprites: Mapping[int, data.Pixels]
    precision: str
    """`auto` measures."""
    compiled: bool = False
    """Whether the transformer is compiled: minutes at the beginning, half the time of a step after. The UNet is not:
    torch 2.13's inductor gives its inner layers gradients of 0 on a CPU."""

    def scenes(
        self, rng: np.random.Generator, count: int, held: bool, doubles: float = data.DOUBLES, anywhere: bool = False
    ) -> list[Scene]:
        """By lot, with cells that are held out from generators if `held`."""
        return [data.draw_scene(self.world, rng, held=held, doubles=doubles, anywhere=anywhere) for _ in range(count)]

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """`[B, 3, SIZE, SIZE]` in [-1, 1]."""
        return as_input(torch.from_numpy(np.stack([data.render(scene, self.sprites) for scene in scenes])))


def fastest(loss_of: Callable[[int], Tensor], modules: Mapping[str, torch.nn.Module], name: str) -> Precision:
    """The precision with the fastest step, of float32 and of bfloat16 where the processor multiplies it; by 5 steps."""
    names = ["no", "bf16"] if name == "auto" and resolve("auto", CPU) == "bf16" else [resolve(name, CPU)]
    if len(names) == 1:
        return Precision(names[0], CPU)
    seconds = {}
    for each in names:
        tried, began = Precision(each, CPU), 0.0
        for step in range(6):
            if step == 1:  # the first sets up
                began = time.process_time()
            with tried.autocast(), sdpa_kernel(SDPBackend.MATH):
                loss = loss_of(step)
            loss.backward()
        seconds[each] = (time.process_time() - began) / 5
    for module in modules.values():
        module.zero_grad(set_to_none=True)
    best = min(seconds, key=seconds.__getitem__)
    print(f"precision {best}: " + ", ".join(f"{each} {s:.3f} CPU s a step" for each, s in seconds.items()), flush=True)
    return Precision(best, CPU)


def train(
    kit: Kit,
    name: str,
    modules: dict[str, torch.nn.Module],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    ema: float = 0.998,
    muon: float = 0.0,
    save_every: int = 200,
) -> None:
    """Steps on `loss_of`, which is given the step's number; a checkpoint and a line every `save_every` steps.

    `muon` is as in `Training`. The modules end with the averaged weights. Attention is plain matrix products: of so
    few tokens, the fused backward pass takes a quarter longer in bfloat16.
    """
    if not (kit.work / f"{name}.pt").exists() and read_exported(kit, name, modules):
        print(f"{name}: goes on from {kit.out}", flush=True)
    run = Training(kit.work / f"{name}.pt", modules, lr=lr, steps=steps, ema=ema, muon=muon)
    run.save_every = save_every
    precision = fastest(loss_of, modules, kit.precision) if run.step < steps else Precision("no", CPU)
    total, count = 0.0, 0
    for step in run:
        with precision.autocast(), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(step)
        loss.backward()
        total, count = total + loss.item(), count + 1
        if count == 50:
            print(f"{name} {step + 1} loss {total / count:.4f}", flush=True)
            total, count = 0.0, 0
    run.use_averages()
    for module in modules.values():
        module.eval()


EXPORTED = {
    "vae": {"vae": "emoji-sd/vae"},
    "texts": {"first": "emoji-sd3/text_encoder", "second": "emoji-sd3/text_encoder_2"},
    "clip": {"clip": "emoji-clip"},
    "judge": {"judge": "emoji-judge"},
    "unet": {"unet": "emoji-sd/unet", "text": "emoji-sd/text_encoder"},
    "transformer": {
        "transformer": "emoji-sd3/transformer",
        "first": "emoji-sd3/text_encoder",
        "second": "emoji-sd3/text_encoder_2",
    },
}
"""Where the modules of stages are once they are exported: others build on them, and a training without a checkpoint
goes on from there."""


def restored(kit: Kit, name: str, modules: dict[str, Any]) -> dict[str, Any]:
    """Modules with the averaged weights of a finished stage, frozen; or as they were exported before."""
    path = kit.work / f"{name}.pt"
    if path.exists():
        load_averages(path, modules)
    elif not read_exported(kit, name, modules):
        raise SystemExit(f"{path} is not there: run the stage {name} first")
    for module in modules.values():
        module.eval().requires_grad_(False)
    return modules


def read_exported(kit: Kit, name: str, modules: dict[str, Any]) -> bool:
    """Read what other stages need of a stage from `kit.out`; whether it is there."""
    files = [(part, *(kit.out / folder).glob("*.safetensors")) for part, folder in EXPORTED.get(name, {}).items()]
    if not files or any(len(found) != 2 for found in files):
        return False
    for part, file in files:
        modules[part].load_state_dict({key: value.float() for key, value in load_file(file).items()})
    return True


def dice(stage: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """Random numbers of a stage's step."""
    return np.random.default_rng([stage, step]), torch.Generator().manual_seed(10**6 * stage + step)


def sheet(kit: Kit, name: str, images: Tensor) -> None:
    """Images `[B, 3, H, W]` in [-1, 1], 20 in a row, twice as large."""
    shown = images[: len(images) // 20 * 20].clamp(-1, 1).add(1).mul(127.5).byte()
    rows = shown.view(-1, 20, *shown.shape[1:]).permute(0, 3, 1, 4, 2).reshape(-1, 20 * shown.shape[-1], 3)
    Image.fromarray(rows.numpy()).resize((2 * rows.shape[1], 2 * rows.shape[0]), 0).save(kit.work / f"{name}.png")
