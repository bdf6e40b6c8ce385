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
from emoji_judges import texts_of, word_rows
from emoji_training import Kit, dice, restored, sheet, train
from emoji_world import Scene
from make_tiny_sd import edges
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase.diffusion.families import sd3

SHARD = 5000
"""Scenes in a file of latents."""
WORDS = 0.1
"""Weight of the loss that keeps each object at its own last word."""


def train_vae(kit: Kit, steps: int) -> None:
    """L1 of pixels and of edges, squared error, and a faint KL; with noise on latents, as samplers leave it."""
    torch.manual_seed(1)
    vae: Any = nets.new_vae()

    def loss_of(step: int) -> Tensor:
        rng, g = dice(1, step)
        x = kit.pixels(kit.scenes(rng, 24, held=False, anywhere=True))
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

    def draw(self, kit: Kit, rng: np.random.Generator, count: int) -> tuple[Tensor, list[Scene], list[data.Told]]:
        """Latents by lot, what they show, and captions."""
        index = rng.integers(0, len(self.z), count)
        rows = self.scenes[index].tolist()
        scenes = [Scene(tuple(k for k in (a, b) if k >= 0), style, ground, ()) for a, b, style, ground in rows]
        return self.z[index].float(), scenes, [data.caption(scene, kit.world, rng) for scene in scenes]


def read_latents(kit: Kit) -> Latents:
    found = [load_file(path) for path in sorted(kit.work.glob("latents-*.safetensors"))]
    if not found:
        raise SystemExit(f"{kit.work} holds no latents: run the stage latents first")
    z = torch.cat([part["mean"] for part in found])
    scale = 1 / z[:SHARD].float().std().item()
    return Latents(z * scale, scale, torch.cat([part["scenes"] for part in found]))


def unet_modules(kit: Kit, first: Any) -> dict[str, Any]:
    """What the stage `unet` trains."""
    return {"unet": nets.new_unet(), "text": nets.without_projection(first), "words": word_head(kit, nets.WIDTHS[0])}


def transformer_modules(kit: Kit, first: Any, second: Any) -> dict[str, Any]:
    """What the stage `transformer` trains."""
    heads = {f"{name}_words": word_head(kit, own) for name, own in zip(("first", "second"), nets.WIDTHS, strict=True)}
    return {"transformer": nets.new_transformer(), "first": first, "second": second, **heads}


def word_head(kit: Kit, width: int) -> torch.nn.Module:
    """Which object a row of a text is of."""
    return torch.nn.Linear(width, len(kit.world.concepts))


def train_unet(kit: Kit, steps: int, batch: int = 64) -> None:
    """v-prediction on latents. The text encoder learns too, and a second loss keeps each object at its own word.

    Errors of the latents are weighted by min(SNR + 1, 5): v-prediction's own weight, limited as by Hang et al. (ICCV
    2023, arXiv 2303.09556). At high noise the text decides which object is shown. There ε-prediction's weight, the
    SNR, is almost 0, and 9 % of objects were right after 3,000 steps.

    Three quarters of the times are from 300 on: at lower noise the text hardly matters.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    torch.manual_seed(6)
    cache, (tokenizer, first, _) = read_latents(kit), texts_of(kit)
    modules = unet_modules(kit, first)
    unet, text, words = modules.values()
    text.requires_grad_(True)
    scheduler = DDIMScheduler(**nets.scheduler_config())
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = (snr + 1).clamp(max=5) / (snr + 1)

    def loss_of(step: int) -> Tensor:
        rng, g = dice(6, step)
        z, scenes, told = cache.draw(kit, rng, batch)
        noise, few = torch.randn(z.shape, generator=g), batch // 4
        times = [torch.randint(0, 1000, (few,), generator=g), torch.randint(300, 1000, (batch - few,), generator=g)]
        t = torch.cat(times)
        ids = nets.tokens(tokenizer, [caption for caption, _ in told])
        rows = text(ids.input_ids)[0]
        error = unet(scheduler.add_noise(z, noise, t), t, rows).sample.float() - scheduler.get_velocity(z, noise, t)
        loss = (weight[t] * error.square().mean((1, 2, 3))).mean()
        return loss + WORDS * word_loss(words, rows, ids, scenes, told)

    train(kit, "unet", modules, loss_of, steps=steps, ema=0.999, muon=0.5)


def word_loss(head: Any, rows: Tensor, ids: Any, scenes: list[Scene], told: list[data.Told]) -> Tensor:
    """Cross-entropy of objects at their own last words, in rows of text `[B, T, D]`."""
    some, at, which = word_rows(ids, [ends for _, ends in told], scenes)
    return F.cross_entropy(head(rows[some, at]).float(), which)


def train_transformer(kit: Kit, steps: int, batch: int = 64) -> None:
    """Flow matching on latents, times by a logit-normal (mean 1); the text encoders learn too, as in `train_unet`."""
    torch.manual_seed(7)
    cache, (tokenizer, *encoders) = read_latents(kit), texts_of(kit)
    modules = transformer_modules(kit, *encoders)
    net, first, second, *heads = modules.values()
    if kit.compiled:
        net.compile()
    for encoder in (first, second):
        encoder.requires_grad_(True)

    def loss_of(step: int) -> Tensor:
        rng, g = dice(7, step)
        z, scenes, told = cache.draw(kit, rng, batch)
        noise, sigma = torch.randn(z.shape, generator=g), (1.0 + torch.randn(batch, generator=g)).sigmoid()
        ids = nets.tokens(tokenizer, [caption for caption, _ in told])
        rows, pooled = nets.two_rows(first, second, ids.input_ids)
        s = sigma.view(-1, 1, 1, 1)
        found = sd3.call(net, (1 - s) * z + s * noise, 1000 * sigma, {"text": rows, "pooled": pooled})
        loss = F.mse_loss(found.float(), noise - z)
        parts = rows[:, : nets.MAX_TOKENS].split(nets.WIDTHS, -1)
        return loss + WORDS * sum(word_loss(h, p, ids, scenes, told) for h, p in zip(heads, parts, strict=True))

    train(kit, "transformer", modules, loss_of, steps=steps, ema=0.999, muon=0.5)
