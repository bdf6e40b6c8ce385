"""Formats at full size, on random weights: `scripts/round_trip.py --out DIR [--version 1|2|xl] [--ckpt] [--images]`.

Makes a single file of Stable Diffusion 1.x, 2.x or XL in fp16 (2.1, 2.6 or 6.9 GB), `.safetensors` or `.ckpt`, turns
it into a folder and back into a `.safetensors`, and makes deltas of it; compares all tensors bit for bit, and says what
each step takes. Needs five times the file's size on disk.
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

import diffusers
import torch
from torch import Tensor

from erase.diffusion.checkpoints import convert, folders, networks
from erase.diffusion.checkpoints.layout import Layout
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.released import FIRST, WIDTH
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.families import family, layout_of
from erase.diffusion.model import Model, open_model
from erase.diffusion.parameters import select
from erase.store import delta
from erase.store.safetensors import Lazy, digest, open_safetensors, write_safetensors

LEFTOVERS = {
    "1": ("alphas_cumprod", "model_ema.decay", "cond_stage_model.transformer.text_model.embeddings.position_ids"),
    "2": ("alphas_cumprod", "cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"),
    "xl": ("conditioner.embedders.1.model.logit_scale", "denoiser.sigmas"),
}
PROMPTS = ["a photo of a cat"]
AGAIN = "again.safetensors"
"""The folder as a file."""


def base_of(work: Path, version: str) -> SingleFile:
    """The file that all begins with; a `.ckpt` of 2.x does not say what it predicts."""
    (path,) = work.glob("base.*")
    source = locate(path, prediction="v_prediction" if version == "2" else None)
    assert isinstance(source, SingleFile)
    return source


def make(work: Path, version: str, suffix: str) -> None:
    """The base: what the released files hold, of random values."""
    width = 1024 if version == "2" else 768
    hint = {"modelspec.prediction_type": "v"} if version == "2" else {}
    seen = {WIDTH: torch.empty(1, width, device="meta"), FIRST: torch.empty(1, 4, device="meta")}
    layout = layout_for(version)
    texts = layout.released(work, seen, hint, None)
    shapes = networks.shapes(texts, layout.parts)
    where = layout.places(shapes, {part: networks.config_of(texts, part) for part in layout.parts})

    values = torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0))

    def get(name: str) -> Tensor:
        shift = hash_of(name)
        if name.endswith(".text_projection") and name not in where:  # diffusers reads the width from its shape
            return values[: width**2].reshape(width, width)
        if name not in where:
            return values[shift % 1000 :][:7].clone()
        size = torch.Size(where[name].size(shapes))
        whole = (values * 0.02).half().roll(shift % len(values))
        return whole.repeat(size.numel() // len(values) + 1)[: size.numel()].reshape(size)

    def sketch(name: str) -> Tensor:
        if name not in where:
            return get(name).to("meta")
        return torch.empty(where[name].size(shapes), dtype=torch.float16, device="meta")

    tensors = Lazy([*where, *LEFTOVERS[version]], get, sketch)
    if suffix == ".ckpt":
        torch.save({"state_dict": dict(tensors), "global_step": 1}, work / "base.ckpt")
    else:
        write_safetensors(work / "base.safetensors", tensors, {"format": "pt", **hint})


def layout_for(version: str) -> Layout:
    """Of the version's family."""
    return layout_of(name_of(version))


def name_of(version: str) -> str:
    """The version's family."""
    return "sdxl" if version == "xl" else "sd"


def hash_of(name: str) -> int:
    """A seed."""
    return sum(ord(c) * 31**i for i, c in enumerate(name[-40:])) % 2**31


def unpack(work: Path, version: str) -> None:
    """File to folder."""
    convert.to_folder(base_of(work, version), work / "folder")


def pack(work: Path, version: str) -> None:
    """Folder to file."""
    source = locate(work / "folder")
    assert isinstance(source, folders.Source)
    convert.to_file(source, work / AGAIN)


def compare(work: Path, version: str) -> dict[str, Any]:
    """All tensors of both files."""
    tensors = base_of(work, version).open()[0]
    return {"identical": digest(tensors) == digest(open_safetensors(work / AGAIN)[0]), "tensors": len(tensors)}


def change(work: Path, version: str, which: str) -> dict[str, Any]:
    """A model all of whose `which` weights moved, as a delta; and both ways back."""
    source = base_of(work, version)
    base = folders.tensors(source)
    with torch.device("meta"):
        net = networks.network(networks.kind_of(source.held["unet"]), source.config("unet"))
    trained = set(select(net, which, family(source.family).PARAMETERS))
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


def generate(work: Path, version: str, model: str) -> dict[str, Any]:
    """One image of a model, as a hash; `diffusers` is its own reader of our file."""
    if model == "diffusers":
        kind = json.loads((work / "folder/model_index.json").read_text())["_class_name"]
        hidden = {"safety_checker": None} if version != "xl" else {"add_watermarker": False}
        pipe = getattr(diffusers, kind).from_single_file(
            str(work / AGAIN),
            config=str(work / "folder"),
            dtype=torch.float32,
            local_files_only=True,
            **hidden,
        )
        pipe.set_progress_bar_config(disable=True)
        diffuser = Model(family(name_of(version)), pipe)
    else:
        diffuser = open_model(base_of(work, version) if model == "base" else locate(work / model))
    sample = diffuser.sampler(steps=1, guidance=2.0)
    (image,) = sample(PROMPTS, [torch.Generator().manual_seed(0)], width=256, height=256)
    state = {
        f"{p}.{n}": t for p in layout_for(version).parts for n, t in getattr(diffuser.pipe, p).state_dict().items()
    }
    return {
        "image": hashlib.sha256(image.tobytes()).hexdigest(),
        "spread": float(torch.tensor(list(image.tobytes())).float().std()),
        "weights": digest(state),
    }


def measured(work: Path, version: str, *step: str) -> dict[str, Any]:
    """Run a step in a process of its own; seconds, and peak memory in MB: all, and without pages of files."""
    command = [sys.executable, __file__, "--out", str(work), "--version", version, "--step", *step]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{' '.join(step):24}", json.dumps(found), flush=True)
    return found


def child(work: Path, version: str, step: list[str]) -> None:
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
    steps: dict[str, Any] = {f.__name__: f for f in (make, unpack, pack, compare, change, generate)}
    result = steps[name](work, version, *rest)
    seconds = time.perf_counter() - began
    over.set()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    print(json.dumps({"seconds": round(seconds, 1), "rss_mb": whole, "anonymous_mb": peak, **(result or {})}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--version", choices=tuple(LEFTOVERS), default="1")
    parser.add_argument("--ckpt", action="store_true", help="a .ckpt as people have them: a pickle, in a state_dict")
    parser.add_argument(
        "--images", action="store_true", help="generate one with each form, and with diffusers' own reader"
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
    for model in ("base", "folder", AGAIN, "diffusers") if args.images else ():
        run("generate", model)


if __name__ == "__main__":
    main()
