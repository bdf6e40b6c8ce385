"""Digests of short runs, digit for digit: a change that should alter no number is checked against the commit before it.

    python scripts/golden.py record golden.json    # on the old commit, on this machine
    python scripts/golden.py check golden.json     # on the new one

Each case is an `erase run` of a few steps on an embedded model, in float32 on one thread. Compared are the losses and
gradient norms of every step, the mask, the saved weights and the pixels of every generated image. Digests of one
machine say nothing on another: kernels differ.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

SD = ["train.steps=3", "eval.images=1", "eval.classifier=null", "eval.nudity=null", "forget.count=6", "remain.count=1"]
SD += ["saliency.count=8", "draw.steps=4"]
DDPM = ["train.steps=3", "eval.images=6", "forget.count=30", "saliency.count=16", "saliency.batch_size=8"]
DDPM += ["saliency.draws=2", "data.source=fashion-mnist"]
RESNET = ["model=fashion-classifier", "eval.retrained=false", "train.steps=5", "saliency.count=200"]
RESNET += ["remain.count=2000"]
CASES = {
    "sd-sfron": ["sd", "sd_photos_sfron", *SD, "forget.target=online"],
    "sd-sfron-frozen": ["sd", "sd_photos_sfron", *SD, "forget.target=frozen", "remain.loss=distill", "train.dropout=0"],
    "sd-salun": ["sd", "sd_photos_salun", *SD],
    "sd-esd-x": ["sd", "sd_photos_esd_x", *SD],
    "sd-uce": ["sd", "sd_photos_uce", *(word for word in SD if not word.startswith(("train", "saliency")))],
    "ddpm-sfron": ["ddpm", "ddpm_fashion_sfron", *DDPM, "remain.count=30"],
    "ddpm-salun": ["ddpm", "ddpm_fashion_salun", *DDPM, "remain.count=1000"],
    "ddpm-selective-amnesia": ["ddpm", "ddpm_fashion_selective_amnesia", *DDPM, "remain.count=1000"],
    "ddpm-own-data": ["ddpm", "ddpm_fashion_sfron", *DDPM, "data=null", "remain.count=6", "eval.classifier=null"],
    "classify-sfron": ["classify", "classify_fashion_sfron", *RESNET],
    "classify-salun": ["classify", "classify_fashion_salun", *RESNET],
    "classify-scrub": ["classify", "classify_fashion_scrub", *RESNET],
}
NUMBERS = ("forget_loss", "remain_loss", "forget_norm", "remain_norm", "edit_norm", "weight_max")


def run(name: str, top: Path) -> dict[str, str]:
    """The digests of one case."""
    out = top / name
    command = [sys.executable, "-m", "erase", "run", *CASES[name], "precision=no", "--out", str(out)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = [[row.get(key) for key in NUMBERS] for row in rows]
    found = {"losses": digest(json.dumps(numbers).encode())}
    for path in sorted(out.rglob("*.safetensors")):
        hashed = hashlib.sha256()
        for key, tensor in sorted(load_file(path).items()):
            hashed.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[path.relative_to(out).as_posix()] = hashed.hexdigest()
    for folder in sorted((out / "images").glob("*/")):
        pixels = [Image.open(path).convert("RGB").tobytes() for path in sorted(folder.rglob("*.png"))]
        found[f"images/{folder.name}"] = digest(b"".join(pixels))
    return found


def digest(data: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Record, or check and print what differs."""
    what, path = sys.argv[1], Path(sys.argv[2])
    names = [name for name in CASES if not sys.argv[3:] or name in sys.argv[3:]]
    with tempfile.TemporaryDirectory() as top, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(names, pool.map(lambda name: run(name, Path(top)), names), strict=True))
    if what == "record":
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} cases in {path}")
        return
    old = {name: value for name, value in json.loads(path.read_text()).items() if name in names}
    bad = [f"{name}: {key}" for name in old for key in old[name] if found[name].get(key) != old[name][key]]
    bad += [f"{name}: {key} is new" for name in old for key in found[name].keys() - old[name].keys()]
    print("\n".join(bad) or f"all {len(old)} cases are equal, digit for digit")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
