"""Make the embedded DDPM `pipelines/tiny/fashion-ddpm` and its judge `pipelines/tiny/fashion-classifier`.

A class-conditional `UNet2DModel` of Fashion-MNIST's 60,000 images (Debian's `dataset-fashion-mnist`), the same
trained without one class (the gold standard of forgetting it), and a classifier of the ten classes.

    python scripts/make_tiny_ddpm.py all --work runs/tiny-ddpm

Stages, each resumable: `classifier`, `model` and `retrained` (`erase run ddpm ddpm_fashion_train`), `export`.
Takes hours on two cores that do bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import open_model
from erase.evaluation import classes
from erase.store.labelled import read_labelled, scaled

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = "trouser"
"""The class that the retrained model never saw."""
INPUT = 56
"""The judge looks at images twice their size, so that its stem, which divides by 4, leaves something."""


def train_classifier(work: Path, steps: int, batch_size: int = 128) -> None:
    """A small `transformers` ResNet, with shifts, flips, label smoothing and averaged weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(3)
    data, test = read_labelled("fashion-mnist", "train"), read_labelled("fashion-mnist", "test")
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 96, 128],
            depths=[1, 2, 2, 1],
            layer_type="basic",
            num_labels=len(data.names),
            id2label=dict(enumerate(data.names)),
            label2id={n: i for i, n in enumerate(data.names)},
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 200) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    path, first = work / "classifier.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    for step in range(first, steps):
        model.train()
        g = torch.Generator().manual_seed(step)
        index = torch.randint(0, len(data), (batch_size,), generator=g)
        x, y = prepared(data.pixels[index], g), data.labels[index]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x).logits
        F.cross_entropy(logits.float(), y, label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            right = accuracy(model, test.pixels[:2000], test.labels[:2000])
            print(f"classifier {step + 1}/{steps}: {right:.4f} of 2000 test images", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "schedule": schedule.state_dict()}, path)
    folder = work / "fashion-classifier"
    model.eval().half().save_pretrained(folder)
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": INPUT},
        "crop_pct": 1.0,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    judge(folder)


def prepared(pixels: torch.Tensor, g: torch.Generator | None = None) -> torch.Tensor:
    """The classifier's input; with a generator, shifted by up to 2 pixels and half of them mirrored."""
    x = scaled(pixels)
    if g is not None:
        dx, dy = (int(torch.randint(0, 5, (1,), generator=g)) for _ in range(2))
        x = F.pad(x, (2, 2, 2, 2), value=-1.0)[:, :, dy : dy + 28, dx : dx + 28]
        flip = torch.rand(len(x), generator=g) < 0.5
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    return F.interpolate(x, size=INPUT, mode="bilinear").expand(-1, 3, -1, -1)


@torch.no_grad()
def accuracy(model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Of images, in eval mode."""
    model.eval()
    right = 0
    for x, y in zip(pixels.split(250), labels.split(250), strict=True):
        right += int((model(prepared(x)).logits.argmax(1) == y).sum())
    return right / len(labels)


def judge(folder: Path) -> None:
    """Print the accuracy on all test images, as the evaluation reads them."""
    test = read_labelled("fashion-mnist", "test")
    guess = classes.classify(test.pixels, folder)
    right = np.array(guess.probabilities.argmax(1) == test.labels.numpy())
    each = {name: float(right[test.labels.numpy() == i].mean()) for i, name in enumerate(test.names)}
    print(
        f"classifier on 10,000 test images: {right.mean():.4f}; " + ", ".join(f"{k} {v:.3f}" for k, v in each.items())
    )


def train_model(work: Path, name: str, *settings: str) -> None:
    """`erase run ddpm ddpm_fashion_train`, gone on with where it was stopped."""
    command = [sys.executable, "-m", "erase", "run", "ddpm", "ddpm_fashion_train", *settings]
    resume = ["--resume"] if (work / name / "run.json").exists() else []
    subprocess.run([*command, "--out", str(work / name), *resume], check=True)


def export(work: Path, out: Path) -> None:
    """The folders as they ship, weights in fp16."""
    import shutil

    for name, target in (("model", "fashion-ddpm"), ("retrained", f"fashion-ddpm-without-{WITHOUT}")):
        folder = work / name / "model"
        if folder.exists():
            pipe = open_model(locate(folder, "label")).pipe
            pipe.unet.half()
            pipe.save_pretrained(out / target)
    if (work / "fashion-classifier").exists():
        shutil.copytree(work / "fashion-classifier", out / "fashion-classifier", dirs_exist_ok=True)
    size = sum(f.stat().st_size for folder in out.glob("fashion-*") for f in folder.rglob("*") if f.is_file())
    print(f"{size / 1e6:.1f} MB in {out}")


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", "classifier", "model", "retrained", "export"])
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-ddpm"))
    parser.add_argument("--out", type=Path, default=ROOT / "pipelines" / "tiny")
    parser.add_argument("--classifier-steps", type=int, default=6000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in ["classifier", "model", "retrained", "export"] if args.stage == "all" else [args.stage]:
        if stage == "classifier":
            train_classifier(args.work, args.classifier_steps)
        elif stage == "model":
            train_model(args.work, "model")
        elif stage == "retrained":
            train_model(args.work, "retrained", f"forget.labels=[{WITHOUT}]")
        else:
            export(args.work, args.out)


if __name__ == "__main__":
    main()
