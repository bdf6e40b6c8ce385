"""A diffusion model in use: a pipeline, and the family that knows how to use it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from erase.diffusion import condition
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.condition import Condition
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.families import Family, family

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Model:
    """A pipeline and its family."""

    family: Family
    pipe: Any

    @property
    def net(self) -> nn.Module:
        """The component that learns."""
        found: nn.Module = getattr(self.pipe, self.family.TRAINED)
        return found

    @property
    def device(self) -> torch.device:
        """Where its networks are."""
        found: torch.device = self.pipe.device
        return found

    @property
    def resolution(self) -> int:
        """The side of an image that it was trained at, in pixels."""
        return self.family.resolution(self.pipe)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """Configurations of its components, by name, and the pipeline's class as in `model_index.json`."""
        found: dict[str, Mapping[str, Any]] = {"model_index": {"_class_name": type(self.pipe).__name__}}
        for name, part in self.pipe.components.items():
            config = getattr(part, "config", None)
            if config is not None:
                found[name] = config if isinstance(config, Mapping) else config.to_dict()
        return found

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], batch_size: int = 32) -> dict[str, Tensor]:
        """Conditions of prompts, leaves `[P, …]`, float32, on the CPU."""
        parts = []
        for start in range(0, len(prompts), batch_size):
            found = self.family.embed(self.pipe, prompts[start : start + batch_size])
            parts.append({name: x.float() if x.is_floating_point() else x for name, x in found.items()})
        return condition.to(condition.cat(parts), "cpu")

    def null(self) -> dict[str, Tensor] | None:
        """The empty condition, leaves `[1, …]`, on the model's device; `None` where there is none."""
        return condition.to(self.embed([""]), self.device) if self.has_null else None

    @property
    def has_null(self) -> bool:
        """Whether there is an empty condition."""
        return self.family.has_null(self.pipe)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latent mean and standard deviation of images `[B, 3, H, W]` in [-1, 1], float32, on the CPU."""
        mean, std = self.family.encode(self.pipe, pixels.to(self.device))
        return mean.float().cpu(), None if std is None else std.float().cpu()

    def denoiser(self, null: Condition | None = None) -> Denoiser:
        """The network as a backend; `null` is the empty condition, leaves `[1, …]`."""
        return Denoiser(
            net=self.net,
            call=self.family.call,
            process=self.family.process(self.pipe),
            null=None if null is None else dict(null),
        )

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        net: Any = self.net
        net.enable_gradient_checkpointing()

    def free(self, *names: str) -> None:
        """Give up components that are needed no more."""
        for name in names:
            if getattr(self.pipe, name, None) is not None:
                setattr(self.pipe, name, None)
        gc.collect()

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float | None,
        size: tuple[int, int] | None = None,
        latents: bool = False,
        autocast: Autocast = nullcontext,
    ) -> Any:
        """One sample for each prompt: PIL images, or latents `[B, C, H, W]`. Arguments as those of `Family.draw`."""
        with autocast():
            asked = self.family.embed(self.pipe, list(prompts))
            null = self.family.embed(self.pipe, [""] * len(prompts)) if self.has_null else None
            return self.family.draw(
                self.pipe, asked, null, generators, steps=steps, guidance=guidance, size=size, latents=latents
            )

    def draw_latents(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float | None,
        batch_size: int = 16,
        autocast: Autocast = nullcontext,
    ) -> Tensor:
        """What the model itself generates, as latents `[N, C, H, W]` on the CPU: nothing is decoded and encoded."""
        parts = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            drawn = self.draw(
                prompts[part], generators[part], steps=steps, guidance=guidance, latents=True, autocast=autocast
            )
            parts.append(drawn.float().cpu())
        return torch.cat(parts)

    def sampler(
        self, *, steps: int, guidance: float | None, autocast: Autocast = nullcontext
    ) -> Callable[..., list[Image.Image]]:
        """A function that generates images, as `erase.evaluation.generate` takes it."""
        side = self.resolution

        def sample(
            prompts: list[str],
            generators: list[torch.Generator],
            *,
            guidance: float | None = None,
            width: int | None = None,
            height: int | None = None,
            _default: float | None = guidance,
        ) -> list[Image.Image]:
            images: list[Image.Image] = self.draw(
                prompts,
                generators,
                steps=steps,
                guidance=_default if guidance is None else guidance,
                # a pipeline would drop one that is given alone
                size=(height or side, width or side) if width or height else None,
                autocast=autocast,
            )
            return images

        return sample


def open_model(source: Source | SingleFile, device: torch.device | str = "cpu") -> Model:
    """Load a checkpoint.

    Raises:
        ValueError: for weights that are missing, do not fit their configuration, or are not finite.
    """
    known = family(source.family)
    return Model(known, known.open(source, device))
