"""What a step costs over what it must cost, measured in one process.

    python scripts/bench.py step                       # embedded model, xattn and full
    python scripts/bench.py step --model sd1 --parameters xattn
    python scripts/bench.py step --model sd1 --parameters full --repeats 2

Prints, as JSON: the SFR-on step (redirect, own Adam on the masked fast step, one slow Adam step) against its floor:
the bare forward and backward passes it must do and the slow optimizer's own step, on batches that lie ready. Both are
timed in turn, step by step, and compared pair by pair. `sd1` is the full-size Stable Diffusion 1.x UNet (859.5 M
random weights, 64×64 latents, batch 1, bf16); there a step that encodes its pictures and prompts each time, as
published scripts do (in float32; `_bf16`: if they did so in bf16), is timed too. Peak memory (RSS) is that of a
process of its own that makes the mask and takes two steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from erase import resources
from erase.backend import seeded
from erase.diffusion import stable_diffusion as sd
from erase.diffusion.denoiser import Denoiser, mse
from erase.diffusion.losses import Denoise, forget_objective
from erase.diffusion.parameters import select
from erase.fisher import fisher_diagonal
from erase.loop import unlearn
from erase.losses import Objective
from erase.methods.sfron import sfron
from erase.precision import Precision
from erase.saliency import Mask, fisher_ratio_mask

Batch = dict[str, Tensor]


def make_backend(model: str) -> tuple[Denoiser, int, tuple[int, ...], tuple[int, int]]:
    """The model, its batch size, latent shape and text shape."""
    if model == "embedded":
        pipe = sd.open_pipeline(sd.locate("photos-sd"))
        config = pipe.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        text = (pipe.tokenizer.model_max_length, config.cross_attention_dim)
        return sd.denoiser(pipe, torch.zeros(1, *text)), 16, shape, text
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    net = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    backend = Denoiser(net, sd._predict, schedule.alphas_cumprod.float(), null=torch.zeros(1, 77, 768))
    return backend, 1, (4, 64, 64), (77, 768)


def make_batch(size: int, shape: tuple[int, ...], text: tuple[int, int], seed: int) -> Batch:
    g = seeded("cpu", seed)
    return {
        "mean": torch.randn(size, *shape, generator=g),
        "cond": torch.randn(size, *text, generator=g),
        "anchor": torch.randn(size, *text, generator=g),
    }


def random_mask(backend: Denoiser, density: float) -> Mask:
    params = {n: p for n, p in backend.net.named_parameters() if p.requires_grad}
    return Mask({n: torch.rand(p.shape) < density for n, p in params.items()})


def encoders() -> Callable[[bool], float]:
    """Seconds of one step's encoding in the published scripts: three pictures of 512 px, three prompts; SD 1.x sizes.

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
    pixels, ids = torch.randn(1, 3, 512, 512), torch.randint(0, 1000, (1, 77))

    @torch.no_grad()
    def encode(bf16: bool) -> float:
        began = time.perf_counter()
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                vae.encode(pixels).latent_dist.mean.float()
                text(ids)
        return time.perf_counter() - began

    return encode


def step_times(model: str, parameters: str, repeats: int, density: float) -> dict[str, Any]:
    backend, size, shape, text = make_backend(model)
    select(backend.net, parameters)
    precision = Precision("bf16", torch.device("cpu"))
    forget, remain = make_batch(size, shape, text, 1), make_batch(size, shape, text, 2)
    ready = [backend.draw(b, seeded("cpu", 3)) for b in (forget, remain)]
    params = [p for p in backend.net.parameters() if p.requires_grad]
    slow: list[torch.optim.Optimizer] = []

    def make_slow(chosen: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        slow.append(torch.optim.Adam(chosen, lr=1e-6, fused=True))
        return slow[0]

    def floor() -> None:
        with precision.autocast():
            noisy = backend.noisy(ready[0])
            out = backend.predict(noisy, ready[0]["t"], ready[0]["cond"])
            with torch.no_grad():
                target = backend.predict(noisy, ready[0]["t"], ready[0]["anchor"])
        mse(out, target).mean().backward()
        for p in params:
            p.grad = None
        with precision.autocast():
            out = backend.predict(backend.noisy(ready[1]), ready[1]["t"], ready[1]["cond"])
        mse(out, ready[1]["noise"]).mean().backward()
        slow[0].step()
        for p in params:
            p.grad = None

    ours: list[float] = []
    bare: list[float] = []

    def log(row: dict[str, Any]) -> None:
        ours.append(row["seconds"])
        began = time.perf_counter()
        floor()
        bare.append(time.perf_counter() - began)

    accelerator = _accelerator()
    method = sfron(
        mask=random_mask(backend, density),
        fast_rate=1e-6,
        forget=forget_objective("redirect", backend.net),
        remain=Objective(Denoise(0.1), 1, "denoise"),
    )
    unlearn(
        backend, method, [forget], [remain], steps=repeats + 1, optimizer=make_slow, seed=0,
        accelerator=accelerator, log=log,
    )  # fmt: skip
    ours, bare = ours[1:], bare[1:]  # the first of each warms up
    result: dict[str, Any] = {
        "model": model,
        "parameters": parameters,
        "batch": size,
        "mask_density": density,
        "repeats": repeats,
        "step_s": statistics.median(ours),
        "floor_s": statistics.median(bare),
        "step_over_floor": statistics.median(a / b for a, b in zip(ours, bare, strict=True)),
    }
    if model == "sd1":
        encode = encoders()
        for name, bf16 in (("", False), ("_bf16", True)):
            encode(bf16)  # warms up
            extra = result[f"encode_3_s{name}"] = encode(bf16)
            result[f"step_over_encoding_step{name}"] = statistics.median(
                a / (b + extra) for a, b in zip(ours, bare, strict=True)
            )
    return result


def _accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(mixed_precision="bf16", cpu=True)


def memory(model: str, parameters: str, density: float) -> dict[str, Any]:
    """Make the mask from one sample a side and take two steps: peak RSS of this process, GB (1e9 bytes)."""
    backend, size, shape, text = make_backend(model)
    select(backend.net, parameters)
    precision = Precision("bf16", torch.device("cpu"))
    forget, remain = make_batch(size, shape, text, 1), make_batch(size, shape, text, 2)
    objective = forget_objective("redirect", backend.net)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    diagonals = [
        fisher_diagonal(backend, [batch], generator=seeded("cpu", 1), loss=loss, chunk=1, autocast=precision.autocast)
        for batch, loss in ((forget, objective.loss), (remain, Denoise(0.0)))
    ]
    mask = fisher_ratio_mask(diagonals[0], diagonals[1], density=density)
    diagonals.clear()
    saliency = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unlearn(
        backend,
        sfron(mask=mask, fast_rate=1e-6, forget=objective, remain=Objective(Denoise(0.1), 1, "denoise")),
        [forget],
        [remain],
        steps=2,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-6, fused=True),
        seed=0,
        accelerator=_accelerator(),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_gb": peak * 1024 / 1e9, "after_saliency_gb": saliency * 1024 / 1e9, "loaded_gb": start * 1024 / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "memory"])
    parser.add_argument("--model", choices=["embedded", "sd1"], default="embedded")
    parser.add_argument("--parameters", choices=["xattn", "full"], help="default: both")
    parser.add_argument("--repeats", type=int, default=None, help="timed pairs (embedded 20, sd1 3)")
    parser.add_argument("--density", type=float, default=0.1, help="of the mask")
    args = parser.parse_args()
    if args.model == "embedded" and "photos-sd" not in resources.list_tiny():
        parser.error("the embedded model is missing: python scripts/make_tiny_sd.py all")
    for parameters in [args.parameters] if args.parameters else ["xattn", "full"]:
        if args.what == "memory":
            print(json.dumps(memory(args.model, parameters, args.density)), flush=True)
            continue
        own = ["memory", "--model", args.model, "--parameters", parameters, "--density", str(args.density)]
        child = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=True)
        result = step_times(
            args.model, parameters, args.repeats or (20 if args.model == "embedded" else 3), args.density
        )
        print(json.dumps({**result, **json.loads(child.stdout)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
