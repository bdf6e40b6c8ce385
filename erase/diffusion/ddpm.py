"""Class-conditional DDPM UNets (diffusers `UNet2DModel`): a pipeline, and the denoiser the engine works on.

Labels are 0 … C-1; embedding row C is the null class, for guidance and label dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from erase.diffusion.denoiser import Denoiser

Autocast = Callable[[], AbstractContextManager[Any]]
Sampler = Literal["ddim", "ddpm", "dpm"]
SCHEDULERS: dict[str, Any] = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm": DPMSolverMultistepScheduler}


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images of class labels.

    Args:
        unet: a UNet with `num_class_embeds` = C + 1; the last row is the null class.
        scheduler: the noise schedule it was trained on; also how it draws.
        id2label: names of the C classes.
        guidance: standard guidance scale, `null + s (class - null)`; 1 draws without guidance.
        patch: space-to-depth factor: the UNet sees `[B, C p², H/p, W/p]`.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: Any,
        id2label: dict[int, str] | None = None,
        guidance: float = 1.0,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)  # type: ignore[no-untyped-call]
        names = {str(i): name for i, name in (id2label or {}).items()}
        self.register_to_config(id2label=names, guidance=guidance, patch=patch)  # type: ignore[no-untyped-call]

    def _setting(self, name: str) -> Any:
        return dict(self.config)[name]

    @property
    def labels(self) -> list[str]:
        """Names of the classes, by number."""
        names: dict[str, str] = self._setting("id2label")
        return [names[str(i)] for i in range(len(names))]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        config, p = self.unet.config, int(self._setting("patch"))
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.in_channels // p**2, height * p, width * p

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int],
        generator: Sequence[torch.Generator],
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
    ) -> ImagePipelineOutput:
        """PIL images of labels, by `draw`."""
        x = self.draw(labels, generator, num_inference_steps, guidance_scale)
        pixels = to_uint8(to_pixels(x, int(self._setting("patch"))))
        images = [Image.fromarray(p.squeeze(-1).numpy()) for p in pixels.permute(0, 2, 3, 1)]
        return ImagePipelineOutput(images)

    @torch.no_grad()
    def draw(
        self,
        labels: Sequence[int],
        generator: Sequence[torch.Generator],
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """What the UNet makes for labels, `[B, C p², H/p, W/p]`: nothing is turned into images and back.

        Image i depends on label i and generator i alone.
        """
        unet, scheduler, scale = self.unet, self.scheduler, guidance_scale
        scale = float(self._setting("guidance")) if scale is None else scale
        device = self.device
        config = unet.config
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        size = (1, config.in_channels, height, width)
        x = torch.cat([torch.randn(size, generator=g) for g in generator]).to(device)
        classes = torch.tensor(list(labels), device=device)
        null = torch.full_like(classes, config.num_class_embeds - 1)
        scheduler.set_timesteps(num_inference_steps)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t)
            if scale == 1:
                out = unet(given, t, class_labels=classes, return_dict=False)[0].float()
            else:
                both = unet(torch.cat([given, given]), t, class_labels=torch.cat([null, classes]), return_dict=False)[
                    0
                ].float()
                without, within = both.chunk(2)
                out = without + scale * (within - without)
            x = scheduler.step(out, t, x, generator=list(generator), return_dict=False)[0]
        drawn: Tensor = x
        return drawn


def to_uint8(x: Tensor) -> Tensor:
    """`[-1, 1]` to bytes, on the CPU."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def to_pixels(x: Tensor, patch: int) -> Tensor:
    """Depth to space: `[B, C p², H/p, W/p]` to `[B, C, H, W]`."""
    return x if patch == 1 else pixel_shuffle(x, patch)


def from_pixels(x: Tensor, patch: int) -> Tensor:
    """Space to depth: what `to_pixels` undoes."""
    return x if patch == 1 else pixel_unshuffle(x, patch)


def _predict(net: nn.Module, noisy: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    out: Tensor = net(noisy, t, class_labels=cond, return_dict=False)[0]
    return out


def denoiser(pipe: ClassConditionalPipeline) -> Denoiser:
    """The UNet as a backend; conditions are labels `[B]`, long."""
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    return Denoiser(
        net=pipe.unet,
        predict_fn=_predict,
        alphas_cumprod=schedule.alphas_cumprod.float(),
        prediction=schedule.config.prediction_type,
        null=torch.tensor([pipe.unet.config.num_class_embeds - 1], device=pipe.device),
    )
