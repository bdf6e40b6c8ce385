"""The emoji world's generators: VAE, its latents, UNet and transformer (stages of `scripts/make_emoji.py`)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import emoji_models as nets
import emoji_world as data
import numpy as np
import torch
import torch.nn.functional as F
from emoji_judges import texts_of
from emoji_training import Kit, dice, restored, sheet, train
from emoji_world import Scene
from make_tiny_sd import edges
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD = 5000
"""Scenes in a file of latents."""


def train_vae(kit: Kit, steps: int) -> None:
    """L1 of pixels and of edges, squared error, and a faint KL; with noise on latents, as samplers leave it."""
    torch.manual_seed(1)
    vae: Any = nets.new_vae()

    def loss_of(step: int) -> Tensor:
        rng, g = dice(1, step)
        x = kit.pixels(kit.scenes(rng, 24, held=False))
        posterior = vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=g)
        z = mean + (0.5 * logvar).exp() * noise
        z = z + 0.1 * mean.detach().std() * torch.rand(len(z), 1, 1, 1, generator=g) * noise.flip(0)
        y = vae.decode(z).sample.float()
        sharp = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(y, x) + 0.5 * sharp + 0.5 * F.mse_loss(y, x) + 1e-4 * kl

    train(kit, "vae", {"vae": vae}, loss_of, steps=steps, ema=0.995)
    with torch.no_grad():
        x = kit.pixels(kit.scenes(np.random.default_rng(2), 200, held=True))
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
    sheet(kit, "vae", torch.stack([x, y], 1).flatten(0, 1))
    print(f"vae: mean absolute error {127.5 * F.l1_loss(y, x).item():.2f} of 255")


@torch.no_grad()
def save_latents(kit: Kit, shards: int) -> None:
    """Latents of scenes of training cells, with what they show: a file a shard, each by its own seed."""
    vae: Any = restored(kit, "vae", {"vae": nets.new_vae()})["vae"]
    for shard in range(shards):
        path = kit.work / f"latents-{shard:03d}.safetensors"
        if path.exists():
            continue
        began, rng = time.time(), np.random.default_rng([3, shard])
        scenes = kit.scenes(rng, SHARD, held=False)
        parts = [scenes[i : i + 250] for i in range(0, SHARD, 250)]
        means = torch.cat([vae.encode(kit.pixels(part)).latent_dist.mean for part in parts])
        told = torch.tensor([[s.objects[0], *(s.objects[1:] or (-1,)), s.style, s.background] for s in scenes])
        save_file({"mean": means.half().contiguous(), "scenes": told.short()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        print(f"latents {shard + 1}/{shards} {time.time() - began:.1f} s", flush=True)


@dataclass(frozen=True, eq=False)
class Latents:
    """N scenes as generators learn them."""

    z: Tensor
    """`[N, C, H, W]`, scaled to unit variance."""
    scale: float
    scenes: Tensor
    """`[N, 4]`: two objects, or one and -1; style and background."""

    def draw(self, kit: Kit, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        """Latents by lot, and captions."""
        index = rng.integers(0, len(self.z), count)
        rows = self.scenes[index].tolist()
        scenes = [Scene(tuple(k for k in (a, b) if k >= 0), style, ground, ()) for a, b, style, ground in rows]
        return self.z[index].float(), [data.caption(scene, kit.world, rng) for scene in scenes]


def read_latents(kit: Kit) -> Latents:
    found = [load_file(path) for path in sorted(kit.work.glob("latents-*.safetensors"))]
    if not found:
        raise SystemExit(f"{kit.work} holds no latents: run the stage latents first")
    z = torch.cat([part["mean"] for part in found])
    scale = 1 / z[:SHARD].float().std().item()
    return Latents(z * scale, scale, torch.cat([part["scenes"] for part in found]))


def train_unet(kit: Kit, steps: int, batch: int = 64) -> None:
    """ε-prediction on latents; the text encoder is frozen.

    Losses are weighted by min(SNR, 5) / SNR (Hang et al., ICCV 2023, arXiv 2303.09556): where there is hardly any
    noise, an error in ε is hardly any in the image.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    torch.manual_seed(6)
    cache, (tokenizer, first, _) = read_latents(kit), texts_of(kit)
    text, unet, scheduler = nets.without_projection(first), nets.new_unet(), DDIMScheduler(**nets.scheduler_config())
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = snr.clamp(max=5) / snr

    def loss_of(step: int) -> Tensor:
        rng, g = dice(6, step)
        z, told = cache.draw(kit, rng, batch)
        t, noise = torch.randint(0, 1000, (batch,), generator=g), torch.randn(z.shape, generator=g)
        with torch.no_grad():
            rows = text(nets.tokens(tokenizer, told).input_ids)[0]  # type: ignore[operator]
        error = unet(scheduler.add_noise(z, noise, t), t, rows).sample.float() - noise
        return (weight[t] * error.square().mean((1, 2, 3))).mean()

    train(kit, "unet", {"unet": unet}, loss_of, steps=steps, ema=0.999)


def train_transformer(kit: Kit, steps: int, batch: int = 64) -> None:
    """Flow matching on latents, times by a logit-normal; the text encoders are frozen."""
    torch.manual_seed(7)
    cache, (tokenizer, first, second) = read_latents(kit), texts_of(kit)
    net = nets.new_transformer()

    def loss_of(step: int) -> Tensor:
        rng, g = dice(7, step)
        z, told = cache.draw(kit, rng, batch)
        noise, sigma = torch.randn(z.shape, generator=g), torch.randn(batch, generator=g).sigmoid()
        with torch.no_grad():
            rows, pooled = nets.two_rows(first, second, nets.tokens(tokenizer, told).input_ids)
        s = sigma.view(-1, 1, 1, 1)
        found = net((1 - s) * z + s * noise, rows, pooled, 1000 * sigma).sample
        return F.mse_loss(found.float(), noise - z)

    train(kit, "transformer", {"transformer": net}, loss_of, steps=steps, ema=0.999)
