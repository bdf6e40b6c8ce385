"""Class-conditional DDPM UNets (diffusers `UNet2DModel`): open or make one, denoise, draw, save.

Labels are 0 … C-1; embedding row C, where the UNet has one, is the null class, for guidance and label dropout.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
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

from erase.diffusion.checkpoints.folders import Source, check, find, read_index
from erase.diffusion.denoiser import Denoiser
from erase.engine.backend import drawn_from
from erase.store import files
from erase.store.safety import check_finite

Autocast = Callable[[], AbstractContextManager[Any]]
Sampler = Literal["ddim", "ddpm", "dpm"]
SCHEDULERS: dict[str, Any] = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm": DPMSolverMultistepScheduler}
SCHEDULERS_BY_CLASS: dict[str | None, Any] = {kind.__name__: kind for kind in SCHEDULERS.values()}


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images of class labels.

    Args:
        unet: a UNet with `num_class_embeds` = C + 1; the last row is the null class. C rows make it one without.
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
        """PIL images of labels, by `draw`."""
        x = self.draw(labels, generator, num_inference_steps, guidance_scale)
        pixels = to_uint8(to_pixels(x, self.patch))
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
        null=None if pipe.null is None else torch.tensor([pipe.null], device=pipe.device),
    )


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
        )
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type=prediction, timestep_spacing="trailing")
    return ClassConditionalPipeline(unet.eval(), scheduler, dict(enumerate(labels)), guidance, patch)


def renew(unet: UNet2DModel, seed: int) -> UNet2DModel:
    """The same network with new weights."""
    with drawn_from(seed):
        fresh: Any = UNet2DModel.from_config(unet.config)
    made: UNet2DModel = fresh.to(unet.device).eval()
    return made


def locate(model: str | Path) -> Source:
    """Find a checkpoint: an embedded model's name, or a folder with a pipeline or a lone UNet.

    Raises:
        ValueError: for a path that leads nowhere, a folder that holds something else, or a weight file cut short.
    """
    folder = find(model)
    if not (folder / "model_index.json").exists() and (folder / "config.json").exists():
        config = files.read_json(folder / "config.json")
        kind = config.get("_class_name", "model of another kind") if isinstance(config, dict) else type(config).__name__
        if kind != "UNet2DModel":
            raise ValueError(f"{folder} holds a {kind}; erase run ddpm takes a UNet2DModel or a pipeline with one")
        return check(str(model), folder, (), (".",))
    unet = read_index(folder).get("unet")
    if not isinstance(unet, list) or unet[-1] != "UNet2DModel":
        kind = read_index(folder)["_class_name"]
        raise ValueError(f"{folder} holds a {kind}; erase run ddpm takes a pipeline with a UNet2DModel")
    return check(str(model), folder, ("unet", "scheduler"))


def open_pipeline(
    source: Source, device: torch.device | str = "cpu", labels: Sequence[str] = ()
) -> ClassConditionalPipeline:
    """The pipeline in float32; a folder that names no classes gets `labels`.

    Raises:
        ValueError: for weights that do not fit their configuration or are not finite, a UNet without classes, or a
            number of names that is not the number of classes.
    """
    lone = source.unet == "."
    try:
        unet = UNet2DModel.from_pretrained(
            source.folder,
            subfolder=None if lone else source.unet,
            variant=source.variant,
            dtype=torch.float32,
        )
        index = {} if lone else read_index(source.folder)
        kind = SCHEDULERS_BY_CLASS.get((index.get("scheduler") or [None])[-1], DDPMScheduler)
        if index and "beta_schedule" not in files.read_json(source.folder / "scheduler" / "scheduler_config.json"):
            raise ValueError(f"its noise schedule {index['scheduler'][-1]} has no betas: not a DDPM")
        scheduler = kind.from_pretrained(source.folder, subfolder="scheduler") if index else DDPMScheduler()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{source.folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    absent = [name for name, p in unet.named_parameters() if p.is_meta]
    if absent:
        raise ValueError(f"{source.folder}: {len(absent)} weights are missing, such as {absent[0]}: get it again")
    check_finite(dict(unet.named_parameters()), source.folder / source.unet)
    rows = unet.config.num_class_embeds
    if rows is None:
        raise ValueError(f"{source.folder} has a UNet without classes (num_class_embeds): it has no class to forget")
    named = {int(i): str(name) for i, name in (index.get("id2label") or {}).items()}
    if labels and named and list(labels) != [named[i] for i in sorted(named)]:
        raise ValueError(
            f"{source.folder} names its classes itself: leave out labels; they are {', '.join(named.values())}"
        )
    names = named or dict(enumerate(labels))
    if not names:
        raise ValueError(
            f"{source.folder} names no classes: give labels=[…], a name for each of its {rows} class embeddings but "
            "the null class"
        )
    if len(set(names.values())) < len(names):
        raise ValueError(f"{source.folder} names a class twice: {', '.join(names.values())}; names must differ")
    if len(names) not in (rows, rows - 1):
        raise ValueError(f"{source.folder} has {rows} class embeddings, null class included; got {len(names)} names")
    pipe = ClassConditionalPipeline(
        unet, scheduler, names, float(index.get("guidance", 1.0)), int(index.get("patch", 1))
    )
    unet.requires_grad_(False).eval()
    return pipe.to(device)


def sampler(
    pipe: ClassConditionalPipeline,
    *,
    name: Sampler | None = None,
    steps: int,
    guidance: float | None = None,
    autocast: Autocast,
) -> Callable[..., list[Image.Image]]:
    """A function that draws pictures of label names, as `erase.evaluation.generate` takes it.

    Raises:
        ValueError: for guidance on a model without a null class.
    """
    drawing = with_sampler(pipe, name)
    check_guidance(drawing, guidance)
    numbers = {label: i for i, label in enumerate(pipe.labels)}

    def sample(
        prompts: list[str],
        generators: list[torch.Generator],
        *,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        _default: float | None = guidance,
    ) -> list[Image.Image]:
        with torch.no_grad(), autocast():
            chosen = _default if guidance is None else guidance
            return list(drawing([numbers[p] for p in prompts], generators, steps, chosen).images)

    return sample


def with_sampler(pipe: ClassConditionalPipeline, name: Sampler | None) -> ClassConditionalPipeline:
    """The same model with another sampler; `None` keeps its own."""
    if name is None:
        return pipe
    scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    return ClassConditionalPipeline(pipe.unet, scheduler, dict(enumerate(pipe.labels)), pipe.guidance, pipe.patch)


def check_guidance(pipe: ClassConditionalPipeline, guidance: float | None) -> None:
    """Refuse guidance where there is nothing to guide away from.

    Raises:
        ValueError: for a scale other than 1 without a null class.
    """
    scale = pipe.guidance if guidance is None else guidance
    if scale != 1 and pipe.null is None:
        raise ValueError(
            f"guidance {scale} needs a null class, which this model lacks (it has {len(pipe.labels)} class embeddings "
            f"for {len(pipe.labels)} labels): set draw.guidance=1"
        )


def draw_latents(
    pipe: ClassConditionalPipeline,
    labels: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float | None,
    batch_size: int,
    autocast: Autocast,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """What the model itself draws for labels, as the UNet works on it, `[N, C p², H/p, W/p]`, on the CPU."""
    parts = []
    for start in range(0, len(labels), batch_size):
        with autocast():
            part = slice(start, start + batch_size)
            drawn = pipe.draw(labels[part], generators[part], steps, guidance)
        parts.append(drawn.float().clamp(-1, 1).cpu())
        if progress is not None:
            progress(min(start + batch_size, len(labels)))
    return torch.cat(parts)


def save_new(pipe: ClassConditionalPipeline, out: Path) -> None:
    """Write a model that came from no folder; it appears whole or not at all."""
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        pipe.save_pretrained(Path(temporary) / out.name)
        (Path(temporary) / out.name).rename(out)


def describe(source: Source) -> dict[str, Any]:
    """What the checkpoint is."""
    pipe = open_pipeline(source)
    return {
        "kind": "class-conditional DDPM pipeline",
        "unet_weights": sum(p.numel() for p in pipe.unet.parameters()),
        "image": dict(zip(("channels", "height", "width"), pipe.shape, strict=True)),
        "labels": pipe.labels,
        "null_class": pipe.null,
        "guidance": pipe.guidance,
        "prediction_type": pipe.scheduler.config.prediction_type,
    }
