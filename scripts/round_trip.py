"""Formats at full size, on random weights: `scripts/round_trip.py --out DIR [--version 1|2] [--ckpt] [--pictures]`.

Makes a single file of Stable Diffusion 1.x or 2.x in fp16 (2.1 or 2.6 GB), `.safetensors` or `.ckpt`, turns it into a
folder and back into a `.safetensors`, and makes deltas of it; compares all tensors bit for bit, and says what each step
takes. Needs five times the file's size on disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from erase.diffusion.checkpoints import convert, folders, ldm, networks, single_file
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.families import family
from erase.diffusion.model import Model, open_model
from erase.diffusion.parameters import select
from erase.store import delta
from erase.store.safetensors import Lazy, digest, open_safetensors, write_safetensors

LEFTOVERS = {
    1: ("alphas_cumprod", "model_ema.decay", "cond_stage_model.transformer.text_model.embeddings.position_ids"),
    2: ("alphas_cumprod", "cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"),
}
PROMPTS = ["a photo of a cat"]
AGAIN = "again.safetensors"
"""The folder as a file."""


def base_of(work: Path, version: int) -> SingleFile:
    """The file that all begins with; a `.ckpt` of 2.x does not say what it predicts."""
    (path,) = work.glob("base.*")
    source = locate(path, prediction="v_prediction" if version == 2 else None)
    assert isinstance(source, SingleFile)
    return source


def make(work: Path, version: int, suffix: str) -> None:
    """The base: what the released files hold, of random values."""
    width = 768 if version == 1 else 1024
    hint = {"modelspec.prediction_type": "v"} if version == 2 else {}
    seen = {
        single_file.WIDTH: torch.empty(1, width, device="meta"),
        single_file.FIRST: torch.empty(1, 4, device="meta"),
    }
    texts = single_file.released(work, seen, hint, None)
    shapes = networks.shapes(texts)
    where = ldm.places(shapes, {part: json.loads(texts[f"{part}/config.json"]) for part in ldm.PARTS})

    def get(name: str) -> Tensor:
        g = torch.Generator().manual_seed(hash_of(name))
        if name.endswith(".text_projection"):  # diffusers reads the width from its shape
            return torch.randn(width, width, generator=g)
        if name not in where:
            return torch.randn(7, generator=g)
        place = where[name]
        size = shapes[place.part][place.names[0]]
        values = [(torch.randn(size, generator=g) * 0.02).half() for _ in place.names]
        return place.to_ldm(values)

    tensors = Lazy([*where, *LEFTOVERS[version]], get)
    if suffix == ".ckpt":
        torch.save({"state_dict": dict(tensors), "global_step": 1}, work / "base.ckpt")
    else:
        write_safetensors(work / "base.safetensors", tensors, {"format": "pt", **hint})


def hash_of(name: str) -> int:
    """A seed."""
    return sum(ord(c) * 31**i for i, c in enumerate(name[-40:])) % 2**31


def unpack(work: Path, version: int) -> None:
    """File to folder."""
    convert.to_folder(base_of(work, version), work / "folder")


def pack(work: Path, version: int) -> None:
    """Folder to file."""
    source = locate(work / "folder")
    assert isinstance(source, folders.Source)
    convert.to_file(source, work / AGAIN)


def compare(work: Path, version: int) -> dict[str, Any]:
    """All tensors of both files."""
    tensors = base_of(work, version).open()[0]
    return {"identical": digest(tensors) == digest(open_safetensors(work / AGAIN)[0]), "tensors": len(tensors)}


def change(work: Path, version: int, which: str) -> dict[str, Any]:
    """A model all of whose `which` weights moved, as a delta; and both ways back."""
    source = base_of(work, version)
    base = folders.tensors(source)
    with torch.device("meta"):
        net = networks.network("unet", source.config("unet"))
    trained = set(select(net, which, family("sd").PARAMETERS))
    erased = Lazy(base, lambda name: base[name] * 1.01 + 1e-3 if name in trained else base[name])
    path = work / f"{which}.delta.safetensors"
    delta.write_delta(base, erased, path, {})
    there = delta.apply(delta.open_delta(path), base)
    whole = Lazy(base, lambda name: there[name] if name in there else base[name])
    back = delta.apply(delta.open_delta(path), whole, undo=True)
    again = Lazy(base, lambda name: back[name] if name in back else base[name])
    size, full = path.stat().st_size, source.path.stat().st_size
    return {
        "megabytes": size / 1e6,
        "of_the_checkpoint": size / full,
        "changed": delta.open_delta(path).header["changed"],
        "erased": digest(whole) == digest(erased),
        "undone": digest(again) == digest(base),
    }


def draw(work: Path, version: int, model: str) -> dict[str, Any]:
    """One picture of a model, as a hash; `diffusers` is its own reader of our file."""
    if model == "diffusers":
        pipe = StableDiffusionPipeline.from_single_file(
            str(work / AGAIN),
            config=str(work / "folder"),
            dtype=torch.float32,
            local_files_only=True,
            safety_checker=None,
        )
        pipe.set_progress_bar_config(disable=True)
        diffuser = Model(family("sd"), pipe)
    else:
        diffuser = open_model(base_of(work, version) if model == "base" else locate(work / model))
    sample = diffuser.sampler(steps=1, guidance=2.0)
    (image,) = sample(PROMPTS, [torch.Generator().manual_seed(0)], width=256, height=256)
    state = {f"{p}.{n}": t for p in ldm.PARTS for n, t in getattr(diffuser.pipe, p).state_dict().items()}
    return {
        "picture": hashlib.sha256(image.tobytes()).hexdigest(),
        "spread": float(torch.tensor(list(image.tobytes())).float().std()),
        "weights": digest(state),
    }


def measured(work: Path, version: int, *step: str) -> dict[str, Any]:
    """Run a step in a process of its own; seconds, and peak memory in MB: all, and without pages of files."""
    command = [sys.executable, __file__, "--out", str(work), "--version", str(version), "--step", *step]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{' '.join(step):24}", json.dumps(found), flush=True)
    return found


def child(work: Path, version: int, step: list[str]) -> None:
    """One step; its result and cost as JSON."""
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) // 1000)

    threading.Thread(target=watch, daemon=True).start()
    name, *rest = step
    began = time.perf_counter()
    steps: dict[str, Any] = {f.__name__: f for f in (make, unpack, pack, compare, change, draw)}
    result = steps[name](work, version, *rest)
    seconds = time.perf_counter() - began
    over.set()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    print(json.dumps({"seconds": round(seconds, 1), "rss_mb": whole, "anonymous_mb": peak, **(result or {})}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--version", type=int, choices=(1, 2), default=1)
    parser.add_argument("--ckpt", action="store_true", help="a .ckpt as people have them: a pickle, in a state_dict")
    parser.add_argument(
        "--pictures", action="store_true", help="draw one with each form, and with diffusers' own reader"
    )
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        child(args.out, args.version, args.step)
        return
    args.out.mkdir(parents=True)
    run = partial(measured, args.out, args.version)
    run("make", ".ckpt" if args.ckpt else ".safetensors")
    for step in ("unpack", "pack", "compare"):
        run(step)
    for which in ("xattn", "full"):
        run("change", which)
    for model in ("base", "folder", AGAIN, "diffusers") if args.pictures else ():
        run("draw", model)


if __name__ == "__main__":
    main()
