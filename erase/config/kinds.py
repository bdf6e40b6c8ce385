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
        raise ValueError(
            f"method={value} is not a group of settings: give method.name={value}, method.fast_rate=… and so on"
        )
    return value


Settings = Annotated[dict[str, Any], BeforeValidator(_method)]


def listed(value: Any) -> Any:
    """A single text as a list of one."""
    return [value] if isinstance(value, str) else value


def _off(value: Any) -> Any:
    """YAML 1.1 reads a bare `no` as false."""
    return "no" if value is False else value


Precision = Annotated[Literal["no", "fp16", "bf16", "auto"], BeforeValidator(_off)]
"""`auto` is bf16 where the device computes it in hardware, else `no`."""
Tracker = Literal["jsonl", "tensorboard", "wandb"]
RemainLoss = Literal["denoise", "distill"]
"""`denoise` is the training loss; `distill` holds to the predictions of the model that the run starts from."""
Prompts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(listed)]


@dataclass(frozen=True)
class Train:
    """The loop: T steps, the slow optimizer, and which parameters learn."""

    __pydantic_config__ = STRICT
    steps: Positive
    """T, the number of steps."""
    batch_size: Positive = 8
    """Total batch size across all processes."""
    micro_batch: Positive | None = None
    """The most samples that a process passes through the network at once; by default its share of the batch."""
    checkpointing: bool = False
    """Gradient checkpointing: activations are recomputed in the backward pass instead of stored."""
    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Learning rate of the slow optimizer, which takes all steps but those of size `method.fast_rate`."""
    optimizer: Literal["adam", "adamw", "sgd", "adam8bit"] = "adam"
    """The slow optimizer. `adam8bit` needs bitsandbytes, version 0.50 or later on a CPU."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the slow optimizer."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of `sgd`. The Adam optimizers have betas 0.9 and 0.999."""
    parameters: str = "xattn"
    """The weights that learn: `full` (all), `xattn` (cross-attention), `kv` (its keys and values), `noxattn` (the
    others) or `esd_u` (ESD's), where the model has them, or a regular expression that is searched in names."""
    form: Literal["dense", "lora"] = "dense"
    """What learns: the weights (`dense`), or a LoRA of rank `lora.rank` beside them (`lora`), which needs peft, and
    less memory. A mask then covers only the LoRA's matrix B; A, which has no gradient at first, is not masked."""
    lora_safe: bool = False
    """Whether to train only weights that a LoRA can change: no biases, no norms."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = 0.1
    """Condition dropout of the remain loss. Null is 0.1 where the model has an empty condition, else 0."""
    network_dropout: bool = False
    """Whether the network's own dropout layers, if it has any, are active in training."""
    times: Literal["stratified", "uniform", "antithetic"] = "stratified"
    """How a batch's timesteps are drawn, also for the mask: one from each of equal parts of the schedule
    (`stratified`), independently (`uniform`), or in pairs mirrored about its middle (`antithetic`)."""
    reduction: Literal["mean", "sum"] = "mean"
    """How squared errors are reduced over channels and pixels. `sum` gives larger losses and gradients, which
    `method.clip_*` and `saliency.clip` then limit."""


@dataclass(frozen=True)
class Saliency:
    """S: how the mask is made. `kind: none` switches it off."""

    __pydantic_config__ = STRICT
    kind: Literal["fisher", "magnitude", "none"] = "fisher"
    """How the mask, the weights that forget steps may change, is chosen: by the ratio of forget to remain Fisher
    diagonals (`fisher`), or by the gradients on forget data (`magnitude`, SalUn); `none`: no mask."""
    loss: Literal["plain", "objective"] = "plain"
    """The loss on forget data: `plain` is the training loss on true labels or noise, as on remain data; `objective` is
    the method's own loss (a redirect, other labels), whose gradients have another scale."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """For diffusion models: guidance scale of the predictions in the training loss. Null uses the conditional
    prediction alone. Published masks use `(1 + w) ε(c) - w ε(∅)` with w = 7.5 (Stable Diffusion) and 2 (DDPM): set 8.5
    and 3."""
    per: Literal["sample", "batch", "image"] = "sample"
    """Which gradients are squared: those of each `sample`, or of the mean loss of a `batch` (as in SFR-on's scripts).
    `image` is only for `selective_amnesia`: the sum of an image's gradients at all timesteps, as in its script."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """For `kind: fisher`, the norm to which a gradient is clipped before it is squared; samples are then processed one
    by one. The published DDPM script clips batch gradients to 1."""
    threshold: Annotated[float, Field(ge=0)] | None = None
    """The mask has the weights whose ratio of Fisher diagonals is at least this."""
    density: Share | None = None
    """The mask has this share of the weights: those with the largest ratios or gradients."""
    count: Positive = 64
    """Number of forget samples, and of remain samples."""
    draws: Positive = 2
    """How often each sample is noised, at a random timestep; with `per: image`, at every timestep."""
    batch_size: Positive = 16
    """Samples that pass through the network at once; with `per: image`, timesteps of one image."""
    augment: bool = False
    """For `classify`: whether images are augmented as in training, as in the published scripts."""
    chunk: Positive | None = None
    """Samples whose gradients are in memory at once; by default as many as fit in 256 MB."""
