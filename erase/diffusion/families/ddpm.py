"""Class-conditional DDPMs: a diffusers `UNet2DModel` on pixels, told the number of a class."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from erase.diffusion import loading
from erase.diffusion.checkpoints.folders import Source, read_index, read_weights
from erase.diffusion.class_conditional import (
    SCHEDULERS_BY_CLASS,
    ClassConditionalPipeline,
    from_pixels,
    label_condition,
)
from erase.diffusion.condition import Condition
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.process import Discrete, discrete
from erase.store import files
from erase.store.safety import check_finite

NAME = "class-conditional DDPM"
CONDITION: Literal["text", "label"] = "label"
TRAINED = "unet"
PARTS: tuple[str, ...] = ("unet", "scheduler")
ENCODERS: tuple[str, ...] = ()
PARAMETERS: Mapping[str, str] = {"full": r".*"}
TEXT_KV: str | None = None
LORA: LoraLayout | None = None
CFG = True
STRIDE = 1


def open(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    hollow: Collection[str] = (),
) -> ClassConditionalPipeline:
    """The pipeline, always whole and in float32; a folder that names no classes gets the source's labels.

    Raises:
        ValueError: for weights that do not fit their configuration or are not finite, a UNet without classes, or a
            number of names that is not the number of classes.
    """
    lone = source.trained == "."
    try:
        unet = UNet2DModel.from_pretrained(
            source.folder,
            subfolder=None if lone else source.trained,
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
    _check_names(unet, source)
    check_finite(dict(unet.named_parameters()), source.folder / source.trained)
    rows = class_rows(unet, source.folder)
    named = {int(i): str(name) for i, name in (index.get("id2label") or {}).items()}
    labels = source.labels
    if labels and named and list(labels) != [named[i] for i in sorted(named)]:
        raise ValueError(
            f"{source.folder} names its classes itself: leave out labels; they are {', '.join(named.values())}"
        )
    names = named or dict(enumerate(labels))
    if not names:
        raise ValueError(
            f"{source.folder} names no classes and has {rows} class embeddings: give labels={rows} if each is a class, "
            f"labels={rows - 1} if the last is the null class, or their names, labels=[…]"
        )
    if len(set(names.values())) < len(names):
        raise ValueError(f"{source.folder} names a class twice: {', '.join(names.values())}; names must differ")
    if len(names) not in (rows, rows - 1):
        raise ValueError(f"{source.folder} has {rows} class embeddings, null class included; got {len(names)} names")
    pipe = ClassConditionalPipeline(
        unet, scheduler, names, float(index.get("guidance", 1.0)), int(index.get("patch", 1))
    )
    check(pipe, source.folder)
    unet.requires_grad_(False).eval()
    return pipe.to(device)


def _check_names(unet: nn.Module, source: Source) -> None:
    """Refuse a file whose attention weights have their names of before diffusers 0.14, which loading renames.

    What was trained could not be put in the place of what the file holds.

    Raises:
        ValueError: for such a file.
    """
    stored = read_weights(source.weights)
    if any(name not in stored for name in unet.state_dict()):
        raise ValueError(
            f"{source.folder / source.trained} names its attention weights as old versions of diffusers did (query, "
            "key, value): save it again with UNet2DModel.from_pretrained(FOLDER).save_pretrained(NEW)"
        )


def class_rows(unet: Any, where: object) -> int:
    """How many class embeddings a UNet has, the null class's included.

    Raises:
        ValueError: for a UNet without classes.
    """
    rows: int | None = unet.config.num_class_embeds
    if rows is None:
        raise ValueError(f"{where} has a UNet without classes (num_class_embeds): it has no class to forget")
    return rows


def check(pipe: Any, where: object) -> None:
    """Refuse networks that take something else than this family's, and say `where` they are.

    Raises:
        ValueError: for these.
    """
    class_rows(pipe.unet, where)
    channels = pipe.unet.config
    if channels.out_channels != channels.in_channels:
        raise ValueError(
            f"{where} has a UNet of {channels.in_channels} input and {channels.out_channels} output channels: networks "
            "that predict variances are not supported"
        )
    loading.check_betas(pipe, where)


def labels(pipe: Any) -> list[str]:
    """As the pipeline names them."""
    names: list[str] = pipe.labels
    return names


def shape(pipe: Any) -> tuple[int, int, int]:
    """Channels, height and width of an image, in pixels."""
    found: tuple[int, int, int] = pipe.shape
    return found


def guidance(pipe: Any) -> float:
    """The scale that the pipeline is saved with."""
    return float(pipe.guidance)


def process(pipe: Any) -> Discrete:
    """The schedule that the UNet was trained on."""
    return discrete(pipe.scheduler.config)


def embed(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`label` `[P]`, long: numbers of class names; of the empty prompt the null class."""
    return label_condition(prompts, pipe.labels, pipe.null, pipe.device)


def has_null(pipe: Any) -> bool:
    """If it has one embedding more than classes."""
    return pipe.null is not None


def encode(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pixels themselves, space to depth."""
    return from_pixels(pixels, pipe.patch), None


def call(net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The UNet's prediction, `[B, C, H, W]`."""
    out: Tensor = net(x, t, class_labels=condition["label"], return_dict=False)[0]
    return out


def generate(
    pipe: Any,
    condition: Condition,
    null: Condition | None,
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float | None,
    size: tuple[int, int] | None = None,
    latents: bool = False,
) -> Any:
    """By the pipeline's sampler."""
    numbers = condition["label"].tolist()
    if latents:
        return pipe.generate(numbers, generators, steps, guidance).float().clamp(-1, 1)
    return pipe(numbers, generators, steps, guidance).images


def resolution(pipe: Any) -> int:
    """The side of its images, pixels."""
    return int(pipe.shape[1])


def example(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros."""
    unet = configs["unet"]
    side = unet["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return torch.zeros(1, unet["in_channels"], height, width), {"label": torch.zeros(1, dtype=torch.long)}


def tokenizer(pipe: Any) -> tuple[Any, int]:
    """None: its prompts are names of classes."""
    raise ValueError(f"{NAME} reads no text")
