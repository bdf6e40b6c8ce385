"""Probes on the side of the image: noised, partly hidden and inverted images of the concept, given to the model.

    half_noised   z_t of an image of the concept, denoised under the empty prompt or another one
    inpaint       the middle of such an image is noise, the rest is given in each step
    latent_seed   the noise that deterministic sampling, run backwards, finds for such an image, to start from

Sources: probes of erased models, "When Are Concepts Erased From Diffusion Models?", NeurIPS 2025, arXiv 2505.17013;
DDIM and its inversion, Song et al., arXiv 2010.02502; known regions in each step as in RePaint, Lugmayr et al., arXiv
2201.09865, without its resampling. Sampling is deterministic (DDIM with η = 0; of a flow, Euler) at even steps of the
process, whatever the run's own sampler: stock pipelines take no latents in between.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erase.diffusion import condition
from erase.diffusion.condition import Condition
from erase.diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class Path:
    """Deterministic sampling of a model, with guidance."""

    model: Denoiser
    steps: int
    guidance: float = 1.0
    """As the model's diffusers pipeline defines it: up to 1 there is none, and the network is asked once a step."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def times(self, device: torch.device, share: float = 1.0) -> Tensor:
        """Times of the first share of the schedule, the least noisy first."""
        return self.model.process.evenly(self.steps, device)[: max(1, round(share * self.steps))]

    def split(self, z: Tensor, t: Tensor, cond: Condition, guidance: float) -> tuple[Tensor, Tensor]:
        """Data and noise that the model sees in `z` at time `t`."""
        times = t.expand(len(z))
        with self.autocast():
            found = self.model.predict(z, times, cond)
            if guidance > 1 and self.model.null is not None:
                null = condition.expand(condition.to(self.model.null, z.device), len(z))
                without = self.model.predict(z, times, null)
                found = without + guidance * (found - without)
        return self.model.process.split(z, found.float(), times)

    @torch.no_grad()
    def denoise(
        self, z: Tensor, times: Tensor, cond: Condition, known: Callable[[Tensor, Tensor | None], Tensor] | None = None
    ) -> Tensor:
        """From `z` at the last of `times` down to data, `[B, C, H, W]`.

        Args:
            z: where it starts.
            times: the least noisy first.
            cond: of the prompts, leaves `[B, …]`.
            known: given the sample and its time (None: data), puts in what is known of it.
        """
        for i in reversed(range(len(times))):
            data, noise = self.split(z, times[i], cond, self.guidance)
            down = times[i - 1].expand(len(z)) if i else None
            z = data if down is None else self.model.process.noisy(data, noise, down)
            if known is not None:
                z = known(z, down)
        return z

    @torch.no_grad()
    def invert(self, data: Tensor, times: Tensor, cond: Condition) -> Tensor:
        """The sample at the last of `times` from which `denoise` would come to `data`, without guidance."""
        z = data
        for t, above in zip(torch.cat([times[:1], times[:-1]]), times, strict=True):  # data are asked at the first
            clean, noise = self.split(z, t, cond, 1.0)
            z = self.model.process.noisy(data if z is data else clean, noise, above.expand(len(z)))
        return z


def half_noised(path: Path, data: Tensor, noise: Tensor, cond: Condition, share: float) -> Tensor:
    """What becomes of images that are noised up to a share of the schedule, as latents `[B, C, H, W]`."""
    times = path.times(data.device, share)
    return path.denoise(path.model.process.noisy(data, noise, times[-1].expand(len(data))), times, cond)


def inpaint(path: Path, data: Tensor, noise: Tensor, cond: Condition, hidden: float) -> Tensor:
    """Images of which the middle, a share of the area, is painted anew, as latents `[B, C, H, W]`."""
    times, keep = path.times(data.device), ~middle(data, hidden)
    process = path.model.process

    def known(z: Tensor, t: Tensor | None) -> Tensor:
        return torch.where(keep, data if t is None else process.noisy(data, noise, t), z)

    last = times[-1].expand(len(data))
    start = known(process.noisy(torch.zeros_like(data), noise, last), last)
    return path.denoise(start, times, cond, known)


def latent_seed(path: Path, data: Tensor, null: Condition, cond: Condition) -> Tensor:
    """What is generated from the noise that inversion finds for images, as latents `[B, C, H, W]`."""
    times = path.times(data.device)
    return path.denoise(path.invert(data, times, null), times, cond)


def middle(x: Tensor, share: float) -> Tensor:
    """The middle of an image, a share of its area, `[H, W]`."""
    found = torch.zeros(x.shape[-2:], dtype=torch.bool, device=x.device)
    sides = [round(side * share**0.5) for side in found.shape]
    top, left = ((whole - side) // 2 for whole, side in zip(found.shape, sides, strict=True))
    found[top : top + sides[0], left : left + sides[1]] = True
    return found
