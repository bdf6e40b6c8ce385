"""What cannot be tested without a GPU, tried on one in at most 8 minutes; prints one JSON object.

    python scripts/gpu_check.py              # at full size: 24 GB are enough
    python scripts/gpu_check.py --small      # the same checks with small models, on a CPU too

- `fp16`, `bf16`: SFR-on under `Accelerator` follows float32, and under fp16 a gradient that overflows skips its phase
  alone and halves the loss scale.
- `images`: CPU generators give the same images twice, and nearly those of the CPU.
- `step …`: the SFR-on step over its floor, and the peak of memory, with random weights (see `bench.py`).
- `nudenet`: detects beside a model that occupies the GPU.

`ok` says whether all parts did what they must. What an error stops is told in `error`; parts that the time did not
suffice for are named in `left_out`, and are then not ok.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bench
import torch
from torch import Tensor

from erase import resources
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import open_model
from erase.engine.backend import drawn_from, seeded
from erase.engine.loop import unlearn
from erase.engine.losses import Objective, plain
from erase.evaluation.generate import image_generator
from erase.methods.sfron import sfron
from erase.programs.folder import versions
from erase.programs.launching import launch

Found = dict[str, Any]
SECONDS = 8 * 60
LEAST = 75
"""Seconds that must be left for a part to begin."""
STEPS = 4
SLACK = {"fp16": 0.05, "bf16": 0.15}
"""How far weights may end from float32's, as a share of the way that they went: of 11 and of 8 bits."""


class Noisy:
    """A small network, told noise by noise: a backend whose loss is that of plain denoising."""

    def __init__(self) -> None:
        with drawn_from(0):
            self.net = torch.nn.Sequential(
                torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 4, 3, padding=1)
            ).to(bench.DEVICE)

    def draw(self, batch: Found, generator: torch.Generator) -> Found:
        x = batch["x"]
        return {**batch, "noise": torch.randn(x.shape, generator=generator, device=x.device)}

    def losses(self, batch: Found, generator: torch.Generator) -> Tensor:
        out: Tensor = self.net(batch["x"] + batch["noise"])
        return (out.float() - batch["noise"]).square().flatten(1).mean(1)


def weights(net: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


def learn(precision: str, overflow: bool) -> tuple[list[tuple[str, Tensor]], list[Found]]:
    """Weights before every phase and at the end, and the rows of the log; the second remain phase may overflow."""
    backend, seen = Noisy(), list[tuple[str, Tensor]]()

    def loss(side: str, model: Any, batch: Any, generator: torch.Generator) -> Tensor:
        seen.append((side, weights(backend.net)))
        bad = overflow and side == "remain" and len(seen) == 4
        return plain(model, batch, generator) * (1e38 if bad else 1.0)  # finite; but its scaled gradient is not

    data = [[{"x": torch.randn(8, 4, 16, 16, generator=seeded("cpu", n))}] for n in (1, 2)]
    rows: list[Found] = []
    objectives = {side: Objective(partial(loss, side), -1 if side == "forget" else 1) for side in ("forget", "remain")}
    unlearn(
        backend,
        sfron(fast_rate=0.02, fast_rule="sgd", lambd=0, **objectives),
        *data,
        steps=STEPS,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
        seed=0,
        accelerator=launch(precision),
        log=rows.append,
    )
    return [*seen, ("end", weights(backend.net))], rows


def check_precision(name: str) -> Found:
    exact, (low, rows) = learn("no", False)[0], learn(name, False)
    start, end = exact[0][1], exact[-1][1]
    apart = float((low[-1][1] - end).norm() / (end - start).norm())
    found: Found = {"apart_of_way": apart, "ok": 0 < apart < SLACK[name] and all(row["remain_norm"] for row in rows)}
    if name == "fp16":
        seen, rows = learn(name, True)
        scales = [row["loss_scale"] for row in rows]
        stayed = [torch.equal(a, b) for (_, a), (_, b) in itertools.pairwise(seen)]
        found |= {"loss_scales": scales, "phases_skipped": sum(stayed), "skipped": rows[-1]["skipped_slow"]}
        halved = scales == [scales[0], *[scales[0] / 2] * (STEPS - 1)]
        found["ok"] &= halved and stayed == [n == 3 for n in range(2 * STEPS)] and found["skipped"] == 1
    return found


def check_images(steps: int) -> Found:
    if "photos-sd" not in resources.list_tiny():
        raise FileNotFoundError("the embedded model photos-sd is missing: python scripts/make_tiny_sd.py all")

    def draw(device: torch.device | str) -> Tensor:
        model = open_model(locate("photos-sd"), device)
        prompts = ["a photo of a cat", "a photo of a rocket"]
        images = model.sampler(steps=steps, guidance=3.0)(prompts, [image_generator(n, 0) for n in range(2)])
        return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])

    first, again, cpu = draw(bench.DEVICE), draw(bench.DEVICE), draw("cpu")
    apart = float((first.float() - cpu.float()).abs().mean())
    same = torch.equal(first, again)
    return {"same_twice": same, "mean_levels_from_cpu": apart, "ok": same and apart < 2}


def check_step(model: str, parameters: str, side: int, repeats: int, most: float) -> Found:
    step = bench.step_times(model, parameters, repeats, 0.1, None, side, False)
    release()
    found = {**bench.memory(model, parameters, 0.1, None, side, False), **step}
    ok = all(math.isfinite(found[key]) for key in ("step_s", "floor_s", "peak_gb"))
    return {**found, "ok": ok and found["step_over_floor"] <= most}


def check_nudenet(count: int) -> Found:
    occupied = torch.ones(2**20, device=bench.DEVICE)
    found = bench.detect_times(count)
    same = found["images_with_other_labels"] == 0 and found["largest_difference_of_a_score"] < 1e-3
    return {**found, "ok": same and float(occupied.sum()) == 2**20}


def release() -> None:
    gc.collect()
    if bench.DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def parts(small: bool) -> dict[str, Callable[[], Found]]:
    """What is checked, the most important first. A step of a small model on a CPU costs what it costs."""
    found: dict[str, Callable[[], Found]] = {name: partial(check_precision, name) for name in ("fp16", "bf16")}
    found["images"] = partial(check_images, 4 if small else 20)
    if small:
        return {
            **found,
            "step embedded xattn": partial(check_step, "embedded", "xattn", 64, 3, math.inf),
            "nudenet": partial(check_nudenet, 4),
        }
    return {
        **found,
        "step sd1 xattn": partial(check_step, "sd1", "xattn", 512, 10, 1.15),
        "step sdxl xattn": partial(check_step, "sdxl", "xattn", 1024, 5, 1.15),
        "nudenet": partial(check_nudenet, 32),
        "step sd1 full": partial(check_step, "sd1", "full", 512, 5, 1.15),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="with small models, on whatever device there is")
    args = parser.parse_args()
    if not args.small and bench.DEVICE.type != "cuda":
        parser.error("there is no GPU here: --small tries the same checks on a CPU")
    began, checked, left_out = time.perf_counter(), {}, []
    for name, check in parts(args.small).items():
        since = time.perf_counter()
        if since - began > SECONDS - LEAST:
            left_out.append(name)
            continue
        try:
            found = check()
        except Exception as error:  # one part must not cost the others
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        checked[name] = {**found, "seconds": time.perf_counter() - since}
        print(f"{name}: {'ok' if found['ok'] else 'NOT ok'}", file=sys.stderr, flush=True)
        release()
    gpu = bench.DEVICE.type == "cuda"
    report = {
        "ok": all(part["ok"] for part in checked.values()) and not left_out,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if gpu else None,
        "small": args.small,
        "precision": bench.NAME,
        "versions": versions(),
        "seconds": time.perf_counter() - began,
        "parts": checked,
        "left_out": left_out,
    }
    print(json.dumps(report, indent=2))
    sys.exit(0 if report["ok"] else 1)


if __name__ == "__main__":
    main()
