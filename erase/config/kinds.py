"""Kinds of values, and the settings that every pipeline has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

NEW = "new"
"""The name of a model that a run makes."""
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _method(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"name a method by method.name={value}, its settings by method.fast_rate=… and so on")
    return value


Settings = Annotated[dict[str, Any], BeforeValidator(_method)]


def listed(value: Any) -> Any:
    """A lone text as a list of one."""
    return [value] if isinstance(value, str) else value


def _off(value: Any) -> Any:
    """YAML 1.1 reads a bare `no` as false."""
    return "no" if value is False else value


Precision = Annotated[Literal["no", "fp16", "bf16", "auto"], BeforeValidator(_off)]
"""`auto`: bf16 where the device does it in hardware, else no."""
Tracker = Literal["jsonl", "tensorboard", "wandb"]
RemainLoss = Literal["denoise", "distill"]
"""`denoise`: the training loss; `distill`: to the predictions of the model that the run starts from."""
Prompts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(listed)]


@dataclass(frozen=True)
class Train:
    """The loop: T steps, the slow optimizer, and which parameters learn."""

    __pydantic_config__ = STRICT
    steps: Positive
    """T, the number of steps."""
    batch_size: Positive = 8
    """Over all processes."""
    micro_batch: Positive | None = None
    """Most samples that a process takes through the network at once; by default all of its share."""
    checkpointing: bool = False
    """Gradient checkpointing: activations are computed again in the backward pass instead of kept."""
    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Learning rate of the slow optimizer."""
    optimizer: Literal["adam", "adamw", "sgd", "adam8bit"] = "adam"
    """Of the slow steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the slow optimizer."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of `sgd`; the Adams have betas 0.9 and 0.999. `adam8bit` needs bitsandbytes, and its 0.50 on a CPU."""
    parameters: str = "xattn"
    """The weights that learn: `full`, `xattn`, `kv`, `noxattn`, `esd_u`, as far as the model has them, or an expression
    that is searched in their names."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = 0.1
    """Condition dropout of the remain loss; null: 0.1 where the model has an empty condition, else 0."""
    network_dropout: bool = False
    """Whether the network's own dropout is active in the steps, as far as its architecture has any."""
    times: Literal["stratified", "uniform", "antithetic"] = "stratified"
    """How the timesteps of a batch are drawn, of the mask too: one in each of equal parts of the schedule,
    independently, or in pairs t and T-1-t."""
    reduction: Literal["mean", "sum"] = "mean"
    """Of squared errors over channels and pixels: by `sum` losses are that many times as large, for `method.clip_*` and
    `saliency.clip` too."""


@dataclass(frozen=True)
class Saliency:
    """S: how the mask is made. `kind: none` switches it off."""

    __pydantic_config__ = STRICT
    kind: Literal["fisher", "magnitude", "none"] = "fisher"
    """`fisher`: forget over remain; `magnitude`: the largest gradients of the loss on forget data (SalUn)."""
    loss: Literal["plain", "objective"] = "plain"
    """On forget data: the training loss on true labels or noise, as on remain data; or what the method does there (a
    redirect, other labels), whose gradients are of another scale than those of the remain data."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """Standard scale of guided predictions that the training loss is then of, in diffusion; null asks the network once.
    Published masks have `(1 + w) ε(c) - w ε(∅)`, w 7.5 (Stable Diffusion) and 2 (DDPM), which are scales 8.5 and 3."""
    per: Literal["sample", "batch", "image"] = "sample"
    """Whose gradients are squared: each sample's, or those of a batch's mean (SFR-on's scripts). By `image`, for the
    pull of `selective_amnesia`, the sum of an image's gradients at all timesteps, as in its authors' script."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Of `fisher`: the norm that a gradient is clipped to before it is squared; samples are then taken one by one. The
    published DDPM script clips batch gradients to 1."""
    threshold: Annotated[float, Field(ge=0)] | None = None
    """The mask keeps weights whose ratio of Fisher diagonals is above it."""
    density: Share | None = None
    """The mask keeps this share of the weights, those of the largest ratios or gradients."""
    count: Positive = 64
    """Samples of each side."""
    draws: Positive = 2
    """Timestep and noise draws per sample; by `per: image` of noise at all timesteps."""
    batch_size: Positive = 16
    """Samples that pass through the network at once; by `per: image` timesteps of one image."""
    augment: bool = False
    """For `classify`: of images as they are varied in training, as in the published scripts; else as they are."""
    chunk: Positive | None = None
    """Samples whose gradients are held at once; by default what fits in 256 MB."""
