"""Settings of `erase run ddpm`: class-conditional models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from erase.config.kinds import STRICT, Positive, Precision, RemainLoss, Saliency, Settings, Tracker, Train


def _listed(value: Any) -> Any:
    """A single label as a list of one; null as an empty list."""
    return [] if value is None else [value] if isinstance(value, str | int) else value


def _no_data(value: Any) -> Any:
    """`data.source=none` means that there are no data."""
    source = value.get("source", "") if isinstance(value, dict) else value
    return None if source in (None, "none") else value


Labels = Annotated[list[str | int], BeforeValidator(_listed)]


@dataclass(frozen=True)
class Architecture:
    """A new class-conditional `UNet2DModel`, for `model: new`."""

    __pydantic_config__ = STRICT
    channels: Annotated[list[Positive], Field(min_length=1)]
    """For `model: new`: number of channels at each resolution, the finest first."""
    layers: Positive = 2
    """Number of residual blocks at each resolution."""
    attention: list[bool] = field(default_factory=list)
    """Whether each resolution has attention; none by default."""
    patch: Positive = 1
    """Space-to-depth factor of the input: 2 halves the resolution and quadruples the channels."""
    groups: Positive = 32
    """Groups of the group normalisation; must divide every number of channels."""
    head: Positive = 8
    """Number of channels of an attention head."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the network predicts."""
    schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule (betas)."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """The guidance scale that the model is saved with; 1 is no guidance."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of features within residual blocks; active with `train.network_dropout`."""


@dataclass(frozen=True)
class Data:
    """Labelled images: see `erase.store.labelled.read_labelled`."""

    __pydantic_config__ = STRICT
    source: str
    """A folder with a subfolder for each class, a folder of IDX files, `fashion-mnist` or `datasets:NAME`."""
    names: list[str] = field(default_factory=list)
    """Class names in the order of their numbers; by default those of the source, else of the model. They are matched
    with the model's by name."""
    size: Positive | None = None
    """The size in pixels to which the shorter side of each image is resized, before the centre is cropped. Images that
    are not grey become RGB, transparent ones on white. By default images are used as they are, and must have one
    size."""
    flip: bool = False
    """Whether each image is mirrored with probability 1/2, once and for the whole run (as the scripts published with
    arXiv 2409.19732 do)."""


@dataclass(frozen=True)
class ForgetLabels:
    """Which classes to forget."""

    __pydantic_config__ = STRICT
    labels: Labels
    """The classes to forget, by name or number."""
    anchors: Labels = field(default_factory=list)
    """For `redirect`, what the classes become: one anchor for each, or one for all. Without anchors a random other
    class is chosen for each image (RL, SalUn)."""
    among: Literal["all", "far"] | Labels = "all"
    """Without anchors, the classes to choose from: `all` that stay, the half whose predictions differ most from the
    forgotten class's (`far`), or some by name. A mixture of near classes can look like the forgotten one."""
    earlier: Labels = field(default_factory=list)
    """Classes that were forgotten in an earlier run and must stay forgotten. Those that erase recorded in the model's
    weight file are added."""
    count: Positive = 500
    """Number of images for each label, from the data or generated."""
    pictures: Literal["own", "anchor", "both"] = "own"
    """The images that a redirect is learned on: of the forgotten classes (`own`), of their anchors (`anchor`; without
    anchors, of all classes that stay, each with its own label as the anchor), or both."""
    loss: Literal["ascent", "redirect", "surrogate"] = "ascent"
    """The forget loss. `ascent`: increase the training loss. `redirect`: predict for the class what is predicted for
    its anchor. `surrogate`: learn uniform noise as images of the class (SA)."""
    target: Literal["online", "frozen"] = "online"
    """Which network predicts for a redirect's anchor: the one that learns (`online`), or the one before the run
    (`frozen`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Condition dropout of the forget loss. The published DDPM script has 0.1."""


@dataclass(frozen=True)
class RemainLabels:
    """Which data of what must stay are used."""

    __pydantic_config__ = STRICT
    count: Positive | None = None
    """Images for each label; by default as many in total as forget images, and all for `retrain`."""
    share: Literal["even", "near"] = "even"
    """`near` uses more images of classes whose predictions are near a forgotten one's, with the same total: forgetting
    harms near classes most."""
    loss: RemainLoss = "denoise"
    """`denoise` is the training loss; `distill` trains the model to predict as the base model does."""


@dataclass(frozen=True)
class DrawLabels:
    """How the model generates: sampler, its number of steps, guidance, batch size."""

    __pydantic_config__ = STRICT
    sampler: Literal["ddim", "ddpm", "dpm"] | None = None
    """The sampler; by default the model's own."""
    steps: Positive = 25
    """Number of sampler steps for each generated image."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """Guidance scale, 1 is no guidance; by default the model's own."""
    batch_size: Positive = 100
    """Images that are generated at once."""
    cache: Path | None = None
    """A folder for the data that the model generates to learn from, where other runs that need the same find them. The
    runs of a comparison share one."""


@dataclass(frozen=True)
class EvalLabels:
    """What is generated and counted before and after."""

    __pydantic_config__ = STRICT
    images: Annotated[int, Field(ge=0)] = 100
    """Number of images for each label; 0 skips the evaluation."""
    labels: Labels = field(default_factory=list)
    """Classes whose images are generated and judged besides the forgotten ones; by default (`[]`, null) all."""
    classifier: str | None = None
    """A judge: the folder of a `transformers` image classifier, or a name from `erase ls models`. Its labels must be
    the model's classes."""
    base: Path | None = None
    """A folder of the base model's images from an earlier run with the same model and settings: copied instead of
    generated again."""
    retrained: str | None = None
    """A model that was trained without the forgotten classes, to compare with."""
    retrained_base: Path | None = None
    """A folder of the retrained model's images from an earlier run, as `base`."""
    blur: bool = True
    """Whether exposed body parts that NudeNet finds are hidden in grids and reports. Switch it off only where all
    images are harmless. Images whose prompts or labels do not suggest a person are not examined."""


@dataclass(frozen=True)
class DdpmConfig:
    """`erase run ddpm`."""

    __pydantic_config__ = STRICT
    pipeline: Literal["ddpm"]
    """The command that the preset is for, such as `erase run sd`."""
    model: str
    """A name from `erase ls models`, a folder, a hub id, or `new`."""
    method: Settings
    """The method's `name` and its settings: see `erase settings NAME`."""
    train: Train
    forget: ForgetLabels
    labels: list[str] | Positive = field(default_factory=list)
    """For a model that does not name its classes: the names in order, or how many classes it has; they are then called
    by their numbers. If it has one class embedding more than classes, the last one is the null class."""
    architecture: Architecture | None = None
    data: Annotated[Data | None, BeforeValidator(_no_data)] = None
    """Labelled images (`source`, `names`, `size`, `flip`); by default generated by the model. Training needs them."""
    remain: RemainLabels = field(default_factory=RemainLabels)
    eval: EvalLabels = field(default_factory=EvalLabels)
    saliency: Saliency = field(default_factory=Saliency)
    draw: DrawLabels = field(default_factory=DrawLabels)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of the whole run: data, noise, timesteps, batches and generated images."""
    precision: Precision = "no"
    """Precision of the forward passes. `auto` is bf16 where the device computes it in hardware, else `no`."""
    checkpoint_every: Positive = 50
    """Number of steps, or of batches of a Fisher diagonal, between two saved run states."""
    tracker: Tracker = "jsonl"
    """Where metrics go besides `metrics.jsonl`, which is always written."""
    note: str = ""
    """What the preset is for, and where its values come from."""
