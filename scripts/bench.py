"""What a step, a Fisher diagonal and detecting cost over what they must or used to, each measured in one process.

    python scripts/bench.py step                       # embedded Stable Diffusion, xattn and full
    python scripts/bench.py step --model sd1 --parameters xattn
    python scripts/bench.py step --model sdxl --parameters xattn --side 512
    python scripts/bench.py memory --model sdxl --parameters kv --side 1024 --checkpointing
    python scripts/bench.py step --model fashion       # embedded DDPM
    python scripts/bench.py step --model cifar10
    python scripts/bench.py step --model resnet18      # a classifier; resnet: the small one of Fashion-MNIST
    python scripts/bench.py fisher --model fashion     # per-sample Fisher diagonal against a loop over samples
    OMP_NUM_THREADS=2 python scripts/bench.py detect   # NudeNet, two images at once, against its own loop
    python scripts/bench.py compare OLD NEW            # two files of such lines: new figures over old ones

Runs on the GPU where there is one, else on the CPU, and prints a line of JSON for each measurement.

Of `step`: the SFR-on step (own Adam on the masked fast step, one slow Adam step) against its floor: the bare forward
and backward passes it must do and the slow optimizer's own step, on batches that lie ready, in bf16 where the device
does that in hardware, else in float32. Both are timed in turn, step by step, and compared pair by pair. Peak memory
(RSS, or what is allocated on the GPU) is that of a process of its own that makes the mask and takes two steps.

- `sd1`: the full-size Stable Diffusion 1.x UNet (859.5 M random weights, 64×64 latents, batch 1); a step that
  encodes its images and prompts each time, as published scripts do (in float32; `_bf16`: if they did so in bf16), is
  timed too.
- `sdxl`, `sd3`, `flux`: the full-size SDXL UNet (2.57 B), the SD3-medium transformer (2.03 B), and Flux.1 at full width
  with 2 of 19 double and 4 of 38 single blocks; random weights, frozen ones in bf16 where the CPU has it, for images
  of `--side` pixels.
- `cifar10`: a class-conditional UNet of 128 channels (35.8 M random weights, 32×32, batch 32); the published loop
  (one optimizer, float32) is timed too.

Of `detect`: seconds for crops of scikit-image's photographs, as files of 512 pixels, by `erase.evaluation.nudity` and
by NudeNet's `detect` one at a time as it comes (its network on all cores of the process), in turn in parts; and how
far the detections differ.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from erase import resources
from erase.classification import models
from erase.classification.backend import Classifier, logits, without_statistics
from erase.diffusion import class_conditional
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.released import UNET_XL
from erase.diffusion.denoiser import Denoiser, mse
from erase.diffusion.families import family
from erase.diffusion.losses import Denoise, forget_objective
from erase.diffusion.model import Model, open_model
from erase.diffusion.parameters import select
from erase.diffusion.process import Discrete, Flow
from erase.engine import memory as dry
from erase.engine.backend import map_batch, seeded, trainable
from erase.engine.fisher import Fisher, fisher_diagonal
from erase.engine.loop import unlearn
from erase.engine.losses import DESCENT, Objective
from erase.engine.precision import Precision, resolve
from erase.engine.saliency import Mask, fisher_ratio_mask, parked
from erase.engine.sharding import is_sharded
from erase.evaluation import detector
from erase.methods.sfron import sfron
from erase.programs.launching import launch, shard_network

Batch = dict[str, Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAME = resolve("auto", DEVICE)
"""The precision of steps and bare passes."""
SETTINGS = (
    "what", "model", "parameters", "batch", "side", "checkpointing", "precision", "mask_density", "samples", "images"
)  # fmt: skip
"""What tells measurements apart."""
PART = 32
"""Images detected in a go, one way and then the other."""
CLASSIFIERS: dict[str, tuple[list[int], list[int], int, tuple[int, int, int]]] = {
    "resnet": ([16, 32, 64], [1, 1, 1], 2, (1, 28, 28)),
    "resnet18": ([64, 128, 256, 512], [2, 2, 2, 2], 1, (3, 32, 32)),
}
"""Channels, depths, stride of the stem and images: the presets' for Fashion-MNIST and CIFAR-10. In float32."""


LARGE: dict[str, dict[str, Any]] = {
    "sdxl": UNET_XL,
    "sd3": {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    "flux": {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
}
"""Configurations of networks as they are published, but for Flux.1's depth."""
PARTS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "text_encoder": {"hidden_size": 768, "max_position_embeddings": 77},
        "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280, "max_position_embeddings": 77},
        "vae": {"block_out_channels": [128, 256, 512, 512]},
    },
    "sd3": {"text_encoder": {"max_position_embeddings": 77}, "text_encoder_3": {"d_model": 4096}},
    "flux": {"vae": {"block_out_channels": [128, 256, 512, 512], "sample_size": 1024}},
}
"""What else `Family.example` reads."""


@dataclass(frozen=True)
class Bench:
    """A model, and how its batches look."""

    backend: Any
    """A `Denoiser` or a `Classifier`."""
    batch: int
    shape: tuple[int, ...]
    condition: dict[str, Tensor]
    """Of a sample, leaves `[1, …]`; empty for a classifier."""
    loss: str = "redirect"
    sets: dict[str, str] | None = None
    """The family's sets of parameters."""

    def make_batch(self, seed: int, batch: int | None = None) -> Batch:
        """Random data."""
        g, size = seeded("cpu", seed), batch or self.batch
        if isinstance(self.backend, Classifier):
            pixels = torch.randint(256, (size, *self.shape), generator=g, dtype=torch.uint8)
            return {"x": pixels, "y": torch.randint(10, (size,), generator=g)}
        made: Batch = {"mean": torch.randn(size, *self.shape, generator=g)}
        for name in ("cond", "anchor"):
            made[name] = {
                key: torch.randn((size, *x.shape[1:]), generator=g)
                if x.is_floating_point()
                else torch.randint(0, 10, (size, *x.shape[1:]), generator=g)
                for key, x in self.condition.items()
            }
        return made


def diffusion_bench(model: Model, batch: int) -> Bench:
    latents, asked = model.family.example(model.configs)
    loss = "redirect" if model.family.CONDITION == "text" else "ascent"
    shape, sets = tuple(latents.shape[1:]), dict(model.family.PARAMETERS)
    model.pipe.to(DEVICE)
    return Bench(model.denoiser(model.null()), batch, shape, asked, loss, sets)


def large_network(name: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A full-size network without data; `changes` of its configuration."""
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    kinds: dict[str, Any] = {"sdxl": UNet2DConditionModel, "sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}
    with init_empty_weights():
        net: Any = kinds[name].from_config({**LARGE[name], **changes})
    return net.to(dtype).requires_grad_(False).eval()


def fill(net: Any) -> None:
    """Random weights in place of none."""
    net.to_empty(device=DEVICE)
    for key, p in net.named_parameters():
        p.fill_(1.0) if "norm" in key and p.ndim == 1 else p.normal_(std=0.02)
    for buffer in net.buffers():
        buffer.normal_(std=0.02)


def large_bench(name: str, net: Any, batch: int, side: int, checkpointing: bool) -> Bench:
    """A network of `large_network`, with or without data."""
    if checkpointing:
        net.enable_gradient_checkpointing()
    known = family(name)
    configs = {**PARTS[name], known.TRAINED: {**LARGE[name], **dict(net.config), "sample_size": side // 8}}
    latents, asked = known.example(configs)
    process = Flow(3.0) if name != "sdxl" else Discrete(torch.linspace(0.999, 0.005, 1000))
    backend = Denoiser(net, known.call, process, on_device(asked))
    shape = (latents.shape[1], side // 8, side // 8)
    return Bench(backend, batch, shape, asked, "redirect", dict(known.PARAMETERS))


def make_bench(model: str, batch: int | None, side: int = 512, checkpointing: bool = False) -> Bench:
    """The model and its usual batch."""
    if model in LARGE:
        net = large_network(model, torch.bfloat16 if NAME == "bf16" else torch.float32)
        fill(net)
        return large_bench(model, net, batch or 1, side, checkpointing)
    if model == "embedded":
        return diffusion_bench(open_model(locate("photos-sd")), batch or 16)
    if model == "fashion":
        return diffusion_bench(open_model(locate("fashion-ddpm")), batch or 64)
    if model == "cifar10":
        kind = "epsilon"
        plain = {"layers": 2, "patch": 1, "groups": 32, "head": 256, "prediction": kind, "schedule": "linear"}
        chosen: dict[str, Any] = {"channels": (128, 256, 256, 256), "attention": (False, True, False, False), **plain}
        big = class_conditional.new([str(i) for i in range(10)], (3, 32, 32), **chosen, guidance=1.0, seed=0)
        return diffusion_bench(Model(family("ddpm"), big), batch or 32)
    if model in CLASSIFIERS:
        channels, depths, stride, shape = CLASSIFIERS[model]
        resnet = {"model_type": "resnet", "layer_type": "basic", "embedding_size": channels[0], "depths": depths}
        stem = {"kernel": 3, "stride": stride}
        made = models.new(
            {**resnet, "hidden_sizes": channels, "stem": stem}, [str(i) for i in range(10)], shape, seed=0
        )
        return Bench(Classifier(made.net.train().to(DEVICE), 10, made.prepare), batch or 128, shape, {}, "ascent")
    return sd1_bench(sd1_network().eval().to(DEVICE), batch or 1)


def sd1_network() -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sd1_bench(net: Any, batch: int) -> Bench:
    """A network of `sd1_network`, with or without data."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    null = {"text": torch.zeros(1, 77, 768)}
    backend = Denoiser(net, family("sd").call, Discrete(schedule.alphas_cumprod.float()), on_device(null))
    return Bench(backend, batch, (4, 64, 64), null, "redirect", dict(family("sd").PARAMETERS))


def random_mask(backend: Any, density: float) -> Mask:
    params = {n: p for n, p in backend.net.named_parameters() if p.requires_grad}
    return Mask({n: torch.rand(p.shape, device=p.device) < density for n, p in params.items()})


def on_device(batch: Batch) -> Batch:
    moved: Batch = map_batch(lambda x: x.to(DEVICE), batch)
    return moved


def wait() -> None:
    """Until the GPU has done what it was told."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def high() -> int:
    """Bytes at the peak so far: allocated on the GPU, or of this process."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def chosen(bench: Bench, parameters: str) -> Precision:
    """Which weights learn, and the precision: all and float32 for classifiers. Masters are float32."""
    backend = bench.backend
    if not isinstance(backend, Classifier):
        for name in select(backend.net, parameters, bench.sets or {"full": ".*"}):
            p = backend.net.get_parameter(name)
            p.data = p.data.float()
    return Precision("no" if isinstance(backend, Classifier) else NAME, DEVICE)


def remain_objective(backend: Any, dropout: float = 0.1) -> Objective:
    return DESCENT if isinstance(backend, Classifier) else Objective(Denoise(dropout), 1, "denoise")


def encoders() -> Callable[[bool], float]:
    """Seconds of one step's encoding in the published scripts: three images of 512 px, three prompts; SD 1.x sizes.

    They encode in float32; what bf16 would make of it can be asked for.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    vae, text = vae.to(DEVICE), text.to(DEVICE)
    pixels = torch.randn(1, 3, 512, 512, device=DEVICE)
    ids = torch.randint(0, 1000, (1, 77), device=DEVICE)

    @torch.no_grad()
    def encode(bf16: bool) -> float:
        began = time.perf_counter()
        for _ in range(3):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                vae.encode(pixels).latent_dist.mean.float()
                text(ids)
        wait()
        return time.perf_counter() - began

    return encode


def step_times(
    model: str, parameters: str, repeats: int, density: float, batch: int | None, side: int, checkpointing: bool
) -> dict[str, Any]:
    bench = make_bench(model, batch, side, checkpointing)
    backend = bench.backend
    precision = chosen(bench, parameters)
    forget, remain = bench.make_batch(1), bench.make_batch(2)
    ready = [backend.draw(on_device(b), seeded(DEVICE, 3)) for b in (forget, remain)]
    params = [p for p in backend.net.parameters() if p.requires_grad]
    slow: list[torch.optim.Optimizer] = []
    redirect = bench.loss == "redirect"

    def make_slow(chosen: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        slow.append(torch.optim.Adam(chosen, lr=1e-6, fused=True))
        return slow[0]

    def passes(batch: Batch) -> Tensor:
        if isinstance(backend, Classifier):
            return F.cross_entropy(logits(backend.net, batch["x"]), batch["y"])
        target = batch["noise"]
        with precision.autocast():
            noisy = backend.noisy(batch)
            out = backend.predict(noisy, batch["t"], batch["cond"])
            if "anchor" in batch and redirect and batch is ready[0]:
                with torch.no_grad():
                    target = backend.predict(noisy, batch["t"], batch["anchor"])
        return mse(out, target).mean()

    def floor() -> None:
        for batch in ready:
            passes(batch).backward()
            if batch is ready[1]:
                slow[0].step()
            for p in params:
                p.grad = None

    ours: list[float] = []
    bare: list[float] = []

    def log(row: dict[str, Any]) -> None:
        began = time.perf_counter()
        wait()
        ours.append(row["seconds"] + time.perf_counter() - began)
        began = time.perf_counter()
        floor()
        wait()
        bare.append(time.perf_counter() - began)

    method = sfron(
        mask=random_mask(backend, density),
        fast_rate=1e-6,
        forget=forget_objective(bench.loss, backend.net),
        remain=remain_objective(backend),
    )
    if isinstance(backend, Classifier):
        method = without_statistics(method)
    unlearn(
        backend, method, [forget], [remain], steps=repeats + 1, optimizer=make_slow, seed=0,
        accelerator=launch(precision.name), log=log,
    )  # fmt: skip
    ours, bare = ours[1:], bare[1:]  # the first of each warms up
    result: dict[str, Any] = {
        "model": model,
        "weights": sum(p.numel() for p in backend.net.parameters()),
        "parameters": parameters,
        "batch": bench.batch,
        "precision": NAME,
        "mask_density": density,
        "repeats": repeats,
        "step_s": statistics.median(ours),
        "floor_s": statistics.median(bare),
        "step_over_floor": statistics.median(a / b for a, b in zip(ours, bare, strict=True)),
    }
    if model == "cifar10":
        seconds: list[float] = []
        published = sfron(
            mask=method.mask, fast_rate=10.0, published=True, clip_forget=1.0, clip_remain=1.0, remain=method.remain
        )
        unlearn(
            backend, published, [forget], [remain], steps=2, optimizer=make_slow, seed=0,
            log=lambda row: seconds.append(row["seconds"]),
        )  # fmt: skip
        result["published_float32_s"] = seconds[-1]
        result["step_over_published"] = result["step_s"] / seconds[-1]
    if model == "sd1":
        encode = encoders()
        for name, bf16 in (("", False), ("_bf16", True)):
            encode(bf16)  # warms up
            extra = result[f"encode_3_s{name}"] = encode(bf16)
            result[f"step_over_encoding_step{name}"] = statistics.median(
                a / (b + extra) for a, b in zip(ours, bare, strict=True)
            )
    return result


def fisher_times(model: str, count: int) -> dict[str, Any]:
    """The per-sample Fisher diagonal, as many samples at once as by default, and by a loop over single samples."""
    bench = make_bench(model, count)
    precision = chosen(bench, "xattn" if "text" in bench.condition else "full")
    batch = on_device(bench.make_batch(1))

    def seconds(chunk: int | None) -> float:
        began = time.perf_counter()
        fisher_diagonal(bench.backend, [batch], generator=seeded(DEVICE, 1), chunk=chunk, autocast=precision.autocast)
        wait()
        return time.perf_counter() - began

    seconds(None)  # warm
    pairs = [(seconds(None), seconds(1)) for _ in range(3)]
    return {
        "model": model,
        "precision": NAME,
        "samples": count,
        "fisher_s": statistics.median(ours for ours, _ in pairs),
        "loop_s": statistics.median(loop for _, loop in pairs),
        "loop_over_fisher": statistics.median(loop / ours for ours, loop in pairs),
    }


def photographs(folder: Path, count: int) -> list[Path]:
    """Harmless crops of scikit-image's bundled photographs, 512 pixels wide, the same ones at any time."""
    import numpy as np
    import skimage.data
    from PIL import Image

    draw = np.random.default_rng(0)
    found = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    paths = []
    for number in range(count):
        photo = found[number % len(found)].convert("RGB")
        side = int(draw.integers(min(photo.size) // 3, min(photo.size)))
        left, top = (int(draw.integers(0, length - side + 1)) for length in photo.size)
        paths.append(folder / f"{number:05d}.png")
        photo.crop((left, top, left + side, top + side)).resize((512, 512)).save(paths[-1])
    return paths


def detect_times(count: int) -> dict[str, Any]:
    """Detecting, as NudeNet does it and as `erase.evaluation.nudity` does, part by part in turn."""
    import nudenet

    stock = nudenet.NudeDetector()
    seconds: dict[str, float] = {"stock": 0.0, "ours": 0.0}
    ratios: list[float] = []
    missed, scores, corners = 0, [0.0], [0]
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder), count)
        stock.detect(str(paths[0]))  # warms up
        for start in range(0, count, PART):
            part = paths[start : start + PART]
            began = time.perf_counter()
            theirs = [stock.detect(str(path)) for path in part]
            middle = time.perf_counter()
            found = detector.detect(part, channels="as_shipped").images
            ended = time.perf_counter()
            seconds["stock"] += middle - began
            seconds["ours"] += ended - middle
            ratios.append((middle - began) / (ended - middle))
            for image, expected in zip(found, theirs, strict=True):
                if [d.label for d in image.detections] != [d["class"] for d in expected]:
                    missed += 1
                    continue
                for ours, other in zip(image.detections, expected, strict=True):
                    scores.append(abs(ours.score - other["score"]))
                    corners += [abs(a - b) for a, b in zip(ours.box, other["box"], strict=True)]
    return {
        "images": count,
        "threads": detector.cores(),
        "detections": len(scores) - 1,
        "stock_s": seconds["stock"],
        "ours_s": seconds["ours"],
        "stock_over_ours": seconds["stock"] / seconds["ours"],
        "median_of_parts": statistics.median(ratios),
        "images_with_other_labels": missed,
        "largest_difference_of_a_score": max(scores),
        "largest_difference_of_a_corner_px": max(corners),
    }


def estimated(bench: Bench, always: dict[str, int], density: float, precision: Precision) -> float:
    """What `erase run --dry-run` says of the same, GB."""
    sample = bench.make_batch(1, 1)
    with dry.hollow(bench.backend) as model:
        losses = [forget_objective(bench.loss, model.net).loss, remain_objective(model).loss]
        n = sum(p.numel() for p in trainable(model.net).values())
        one = max(dry.passes(model, loss, sample, 1, precision.autocast, "squares") for loss in losses)
        height = max(dry.passes(model, loss, sample, bench.batch, precision.autocast) for loss in losses)
    step = dry.in_step(n, sfron(fast_rate=1e-6), "adam", density, 0, height)
    return (sum(always.values()) + max(8 * n + one, sum(step.values()))) / 1e9


def memory(
    model: str, parameters: str, density: float, batch: int | None, side: int, checkpointing: bool
) -> dict[str, Any]:
    """Make the mask from one sample a side and take two steps: peak RSS of this process, GB (1e9 bytes)."""
    bench = make_bench(model, batch, side, checkpointing)
    backend = bench.backend
    precision = chosen(bench, parameters)
    shard_network(backend.net, launch(precision.name), precision)
    forget, remain = on_device(bench.make_batch(1)), on_device(bench.make_batch(2))
    objective = forget_objective(bench.loss, backend.net)
    always = dry.held(backend, 0)
    start = high()

    def diagonal(some: Batch, loss: Any) -> Fisher:
        return fisher_diagonal(
            backend, [some], generator=seeded(DEVICE, 1), loss=loss, chunk=1, autocast=precision.autocast
        )

    with tempfile.TemporaryDirectory() as folder, parked(diagonal(forget, objective.loss), Path(folder)) as first:
        second = diagonal(remain, remain_objective(backend, 0.0).loss)
        mask = fisher_ratio_mask(first, second, density=density)
    del first, second  # the mask is held at one bit a weight
    saliency = high()
    unlearn(
        backend,
        sfron(mask=mask, fast_rate=1e-6, forget=objective, remain=remain_objective(backend)),
        [forget],
        [remain],
        steps=2,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-6, fused=True),
        seed=0,
        accelerator=launch(precision.name),
    )
    classifier = isinstance(backend, Classifier)
    return {
        "peak_gb": high() / 1e9,
        "dry_run_gb": None if classifier or is_sharded(backend.net) else estimated(bench, always, density, precision),
        "after_saliency_gb": saliency / 1e9,
        "loaded_gb": start / 1e9,
    }


def compare(old: Path, new: Path) -> list[dict[str, Any]]:
    """New figures over old ones, of each measurement that both files hold; others are named.

    Raises:
        ValueError: for a line that is not JSON.
    """
    sides = []
    for path in (old, new):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        sides.append({tuple((key, row[key]) for key in SETTINGS if key in row): row for row in rows})
    lines: list[dict[str, Any]] = []
    for key in {**sides[0], **sides[1]}:
        there = [side[key] for side in sides if key in side]
        if len(there) == 1:
            lines.append({**dict(key), "only_in": str(old if key in sides[0] else new)})
            continue
        before, after = there
        figures = [name for name, value in before.items() if name not in SETTINGS and isinstance(value, float)]
        ratios = {name: after[name] / before[name] for name in figures if before[name] and after.get(name) is not None}
        lines.append({**dict(key), "new_over_old": ratios})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "memory", "fisher", "detect", "compare"])
    parser.add_argument("files", nargs="*", type=Path, help="of compare: OLD and NEW")
    parser.add_argument(
        "--model", choices=["embedded", "sd1", "fashion", "cifar10", *LARGE, *CLASSIFIERS], default="embedded"
    )
    parser.add_argument("--parameters", help="a set of the family; default: xattn and full, for Stable Diffusion")
    parser.add_argument("--repeats", type=int, default=None, help="timed pairs (small models 20, large ones 3)")
    parser.add_argument("--density", type=float, default=0.1, help="of the mask")
    parser.add_argument("--batch", type=int, help="samples of a batch; images of detect")
    parser.add_argument("--side", type=int, default=512, help="pixels of an image, for sdxl, sd3 and flux")
    parser.add_argument("--blocks", type=int, help="of sd3, instead of its 24")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for the same")
    args = parser.parse_args()
    if len(args.files) != (2 if args.what == "compare" else 0):
        parser.error("compare takes two files, OLD and NEW; the others take none")
    if args.what == "compare":
        for line in compare(*args.files):
            print(json.dumps(line))
        return
    if args.what == "detect":
        print(json.dumps({"what": "detect", **detect_times(args.batch or 256)}))
        return
    if args.blocks:
        LARGE["sd3"]["num_layers"] = args.blocks
    dry.give_back()  # as runs do
    needed = {"embedded": "photos-sd", "fashion": "fashion-ddpm"}.get(args.model)
    if needed is not None and needed not in resources.list_tiny():
        parser.error(f"the embedded model {needed} is missing: python scripts/make_tiny_*.py all")
    if args.what == "fisher":
        print(json.dumps({"what": "fisher", **fisher_times(args.model, args.batch or 192)}))
        return
    both = ["xattn", "full"] if args.model in ("embedded", "sd1") else ["xattn"] if args.model in LARGE else ["full"]
    large = (args.side, args.checkpointing)
    sized = {"side": args.side, "checkpointing": args.checkpointing} if args.model in LARGE else {}
    for parameters in [args.parameters] if args.parameters else both:
        if args.what == "memory":
            found = memory(args.model, parameters, args.density, args.batch, *large)
            given = {"model": args.model, "parameters": parameters, "mask_density": args.density, **sized}
            print(json.dumps({"what": "memory", **given, **found}), flush=True)
            continue
        own = ["memory", "--model", args.model, "--parameters", parameters, "--density", str(args.density)]
        own += ["--batch", str(args.batch)] if args.batch else []
        own += ["--blocks", str(args.blocks)] if args.blocks else []
        own += ["--side", str(args.side), *(["--checkpointing"] if args.checkpointing else [])]
        child = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=True)
        repeats = args.repeats or (3 if args.model in ("sd1", "cifar10", *LARGE) else 20)
        result = step_times(args.model, parameters, repeats, args.density, args.batch, *large)
        print(json.dumps({**json.loads(child.stdout), "what": "step", **sized, **result}), flush=True)


if __name__ == "__main__":
    main()
