"""Formats at full size, on random weights: `python scripts/round_trip.py --out DIR [--version 1|2] [--pictures]`.

Makes a single file of Stable Diffusion 1.x or 2.x in fp16 (2.1 or 2.6 GB), turns it into a folder and back, and makes
deltas of it; compares all tensors bit for bit, and says what each step takes. Needs five times the file's size on disk.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase import delta
from erase.checkpoint import Lazy, digest, open_safetensors, write_safetensors
from erase.diffusion import convert, folders, ldm, single_file
from erase.diffusion import stable_diffusion as sd
from erase.diffusion.parameters import select

LEFTOVERS = {
    1: ("alphas_cumprod", "model_ema.decay", "cond_stage_model.transformer.text_model.embeddings.position_ids"),
    2: ("alphas_cumprod", "cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"),
}
PROMPTS = ["a photo of a cat"]


def make(work: Path, version: int) -> None:
    """`base.safetensors`: what the released files hold, of random values."""
    width = 768 if version == 1 else 1024
    hint = {"modelspec.prediction_type": "v"} if version == 2 else {}
    seen = {
        single_file.WIDTH: torch.empty(1, width, device="meta"),
        single_file.FIRST: torch.empty(1, 4, device="meta"),
    }
    texts = single_file.released(work, seen, hint, None)
    shapes = sd.shapes(texts)
    where = ldm.places(shapes, {part: json.loads(texts[f"{part}/config.json"]) for part in ldm.PARTS})

    def get(name: str) -> Tensor:
        g = torch.Generator().manual_seed(hash_of(name))
        if name not in where:
            return torch.randn(7, generator=g)
        place = where[name]
        size = shapes[place.part][place.names[0]]
        values = [(torch.randn(size, generator=g) * 0.02).half() for _ in place.names]
        return place.to_ldm(values)

    write_safetensors(work / "base.safetensors", Lazy([*where, *LEFTOVERS[version]], get), {"format": "pt", **hint})


def hash_of(name: str) -> int:
    """A seed."""
    return sum(ord(c) * 31**i for i, c in enumerate(name[-40:])) % 2**31


def unpack(work: Path) -> None:
    """File to folder."""
    convert.to_folder(sd.locate(work / "base.safetensors"), work / "folder")


def pack(work: Path) -> None:
    """Folder to file."""
    source = sd.locate(work / "folder")
    assert isinstance(source, folders.Source)
    convert.to_file(source, work / "again.safetensors")


def compare(work: Path) -> dict[str, Any]:
    """All tensors of both files."""
    sums = [digest(open_safetensors(work / name)[0]) for name in ("base.safetensors", "again.safetensors")]
    return {"identical": sums[0] == sums[1], "tensors": len(open_safetensors(work / "base.safetensors")[0])}


def change(work: Path, which: str) -> dict[str, Any]:
    """A model all of whose `which` weights moved, as a delta; and both ways back."""
    source = sd.locate(work / "base.safetensors")
    base = folders.unet_tensors(source)
    with torch.device("meta"):
        net = sd.network("unet", source.config("unet"))
    trained = set(select(net, which))
    erased = Lazy(base, lambda name: base[name] * 1.01 + 1e-3 if name in trained else base[name])
    path = work / f"{which}.delta.safetensors"
    delta.write_delta(base, erased, path, {})
    there = delta.apply(delta.open_delta(path), base)
    whole = Lazy(base, lambda name: there[name] if name in there else base[name])
    back = delta.apply(delta.open_delta(path), whole, undo=True)
    again = Lazy(base, lambda name: back[name] if name in back else base[name])
    size, full = path.stat().st_size, (work / "base.safetensors").stat().st_size
    return {
        "megabytes": size / 1e6,
        "of_the_checkpoint": size / full,
        "changed": delta.open_delta(path).header["changed"],
        "erased": digest(whole) == digest(erased),
        "undone": digest(again) == digest(base),
    }


def draw(work: Path, model: str) -> dict[str, Any]:
    """One picture of a model, as a hash; `diffusers` is its own reader of our file."""
    if model == "diffusers":
        pipe = sd.StableDiffusionPipeline.from_single_file(
            str(work / "again.safetensors"),
            config=str(work / "folder"),
            dtype=torch.float32,
            local_files_only=True,
            safety_checker=None,
        )
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe = sd.open_pipeline(sd.locate(work / model))
    sample = sd.sampler(pipe, steps=1, guidance=2.0)
    (image,) = sample(PROMPTS, [torch.Generator().manual_seed(0)], width=256, height=256)
    state = {f"{p}.{n}": t for p in ldm.PARTS for n, t in getattr(pipe, p).state_dict().items()}
    return {
        "picture": hashlib.sha256(image.tobytes()).hexdigest(),
        "spread": float(torch.tensor(list(image.tobytes())).float().std()),
        "weights": digest(state),
    }


def measured(work: Path, *step: str) -> dict[str, Any]:
    """Run a step in a process of its own; seconds, and peak memory in MB: all, and without pages of files."""
    done = subprocess.run(
        [sys.executable, __file__, "--out", str(work), "--step", *step], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{' '.join(step):24}", json.dumps(found), flush=True)
    return found


def child(work: Path, step: list[str]) -> None:
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
    steps: dict[str, Any] = {"unpack": unpack, "pack": pack, "compare": compare, "change": change, "draw": draw}
    result = make(work, int(rest[0])) if name == "make" else steps[name](work, *rest)
    seconds = time.perf_counter() - began
    over.set()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    print(json.dumps({"seconds": round(seconds, 1), "rss_mb": whole, "anonymous_mb": peak, **(result or {})}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--version", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--pictures", action="store_true", help="draw one with each form, and with diffusers' own reader"
    )
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        child(args.out, args.step)
        return
    args.out.mkdir(parents=True)
    measured(args.out, "make", str(args.version))
    for step in ("unpack", "pack", "compare"):
        measured(args.out, step)
    for which in ("xattn", "full"):
        measured(args.out, "change", which)
    for model in ("base.safetensors", "folder", "again.safetensors", "diffusers") if args.pictures else ():
        measured(args.out, "draw", model)


if __name__ == "__main__":
    main()
