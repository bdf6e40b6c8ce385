"""Class-conditional DDPM UNets (diffusers `UNet2DModel`): open or make one, denoise, generate, save.

Labels are 0 … C-1; embedding row C, where the UNet has one, is the null class, for guidance and label dropout. What is
not of one pipeline (`label_condition`, `renew`, `check_guidance`) serves every family of labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from erase.engine.backend import drawn_from
from erase.store.class_names import class_number

Net = TypeVar("Net", bound=nn.Module)
Pipe = TypeVar("Pipe")
Autocast = Callable[[], AbstractContextManager[Any]]
SCHEDULERS: dict[str, Any] = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm": DPMSolverMultistepScheduler}
SCHEDULERS_BY_CLASS: dict[str | None, Any] = {kind.__name__: kind for kind in SCHEDULERS.values()}


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images of class labels.

    Args:
        unet: a UNet with `num_class_embeds` = C + 1; the last row is the null class. C rows make it one without.
        scheduler: the noise schedule it was trained on; also how it generates.
        id2label: names of the C classes.
        guidance: standard guidance scale, `null + s (class - null)`; 1 generates without guidance.
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
    def guidance(self) -> float:
        """The model's standard guidance scale."""
        return float(self._setting("guidance"))

    @property
    def patch(self) -> int:
        """The space-to-depth factor."""
        return int(self._setting("patch"))

    @property
    def null(self) -> int | None:
        """The number of the null class, if there is one."""
        rows = int(self.unet.config.num_class_embeds)
        return rows - 1 if rows == len(self.labels) + 1 else None

    @property
    def has_null(self) -> bool:
        """Whether there is a null class."""
        return self.null is not None

    @property
    def labels(self) -> list[str]:
        """Names of the classes, by number."""
        names: dict[str, str] = self._setting("id2label")
        return [names[str(i)] for i in range(len(names))]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        (channels, height, width), p = self._size, self.patch
        return channels // p**2, height * p, width * p

    @property
    def _size(self) -> tuple[int, int, int]:
        """Channels, height and width of what the UNet sees."""
        config = self.unet.config
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.in_channels, height, width

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int],
        generator: Sequence[torch.Generator],
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
    ) -> ImagePipelineOutput:
        """PIL images of labels, by `generate`."""
        x = self.generate(labels, generator, num_inference_steps, guidance_scale)
        pixels = to_uint8(to_pixels(x, self.patch))
        images = [Image.fromarray(p.squeeze(-1).numpy()) for p in pixels.permute(0, 2, 3, 1)]
        return ImagePipelineOutput(images)

    @torch.no_grad()
    def generate(
        self,
        labels: Sequence[int],
        generator: Sequence[torch.Generator],
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """What the UNet makes for labels, `[B, C p², H/p, W/p]`: nothing is turned into images and back.

        Image i depends on label i and generator i alone.
        """
        check_guidance(self, guidance_scale)
        unet, scheduler, scale = self.unet, self.scheduler, guidance_scale
        scale = self.guidance if scale is None else scale
        device = self.device
        x = torch.cat([torch.randn(1, *self._size, generator=g) for g in generator]).to(device)
        classes = torch.tensor(list(labels), device=device)
        null = torch.full_like(classes, unet.config.num_class_embeds - 1)
        scheduler.set_timesteps(num_inference_steps)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t)
            if scale == 1:
                out = unet(given, t, class_labels=classes, return_dict=False)[0].float()
            else:
                both = unet(given.repeat(2, 1, 1, 1), t, class_labels=torch.cat([null, classes]), return_dict=False)[0]
                without, within = both.float().chunk(2)
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


def new(
    labels: Sequence[str],
    shape: tuple[int, int, int],
    *,
    channels: Sequence[int],
    layers: int,
    attention: Sequence[bool],
    patch: int,
    groups: int,
    head: int,
    prediction: str,
    schedule: str,
    guidance: float,
    seed: int,
    dropout: float = 0.0,
) -> ClassConditionalPipeline:
    """A model with new weights, for images of `shape` (C, H, W), and a null class.

    Raises:
        ValueError: for numbers that do not fit each other.
    """
    depth, height, width = shape
    factor = patch * 2 ** (len(channels) - 1)
    if height % factor or width % factor:
        raise ValueError(f"images of {height}×{width} cannot be halved to {len(channels)} resolutions at patch {patch}")
    if any(c % groups for c in channels):
        raise ValueError(f"architecture.groups {groups} must divide every number of channels; got {list(channels)}")
    here = list(attention) or [False] * len(channels)
    if len(here) != len(channels):
        raise ValueError(f"architecture.attention has {len(here)} values for {len(channels)} resolutions")
    narrow = min(c for c, attends in zip(channels, (*here[:-1], True), strict=True) if attends)
    if narrow % head:
        raise ValueError(f"architecture.head {head} must divide the channels where there is attention; got {narrow}")
    with drawn_from(seed):
        unet = UNet2DModel(
            sample_size=(height // patch, width // patch),
            in_channels=depth * patch**2,
            out_channels=depth * patch**2,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in here),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(here)),
            attention_head_dim=head,
            norm_num_groups=groups,
            num_class_embeds=len(labels) + 1,
            dropout=dropout,
        )
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type=prediction, timestep_spacing="trailing")
    return ClassConditionalPipeline(unet.eval(), scheduler, dict(enumerate(labels)), guidance, patch)


def renew(net: Net, seed: int) -> Net:
    """The same network of diffusers with new weights, as its class initialises them."""
    old: Any = net
    with drawn_from(seed):
        fresh: Any = type(old).from_config(old.config)
    made: Net = fresh.to(old.device).eval()
    return made


class Guided(Protocol):
    """A pipeline or a model that generates images of labels."""

    @property
    def labels(self) -> list[str]:
        """Names of the classes, by number."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, in pixels."""

    @property
    def guidance(self) -> float:
        """The guidance scale that it is used with by default."""

    @property
    def has_null(self) -> bool:
        """Whether there is a null class."""


def check_guidance(model: Guided, guidance: float | None) -> None:
    """Refuse guidance where there is nothing to guide away from.

    Raises:
        ValueError: for a scale other than 1 without a null class.
    """
    scale = model.guidance if guidance is None else guidance
    if scale != 1 and not model.has_null:
        raise ValueError(
            f"guidance {scale} needs a null class, which this model lacks (it has {len(model.labels)} class embeddings "
            f"for {len(model.labels)} labels): set draw.guidance=1"
        )


def check_row(model: Guided, prompt: str, width: int | None, height: int | None, where: str) -> None:
    """Refuse a prompt that names no class, and a size that is not the model's own; None is the own one.

    Raises:
        ValueError: for these; `where` is where they stand.
    """
    try:
        class_number(prompt, model.labels)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _, high, wide = model.shape
    if (width or wide, height or high) != (wide, high):
        raise ValueError(
            f"{where}: its size is {width or wide}×{height or high}, but this model only generates images of "
            f"{wide}×{high}: leave out width and height"
        )


def label_condition(
    prompts: Sequence[str], labels: Sequence[str], null: int | None, device: torch.device
) -> dict[str, Tensor]:
    """`label` `[P]`, long: the numbers of classes that prompts name; of the empty prompt the null class.

    Raises:
        ValueError: for a prompt that names no class, and the empty one without a null class.
    """
    known = {prompt: class_number(prompt, labels) for prompt in {*prompts} - {""}}
    if null is not None:
        known[""] = null
    elif "" in prompts:
        raise ValueError("the empty prompt needs a null class, which this model lacks")
    return {"label": torch.tensor([known[prompt] for prompt in prompts], device=device)}


def save_new(pipe: ClassConditionalPipeline, out: Path) -> None:
    """Write a model that came from no folder; it appears whole or not at all."""
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        pipe.save_pretrained(Path(temporary) / out.name)
        (Path(temporary) / out.name).rename(out)
