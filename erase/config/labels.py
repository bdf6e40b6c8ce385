"""Settings of `erase run ddpm`: class-conditional models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from erase.config.kinds import STRICT, Positive, Precision, RemainLoss, Saliency, Settings, Tracker, Train


def _listed(value: Any) -> Any:
    """A lone label as a list of one; null as none."""
    return [] if value is None else [value] if isinstance(value, str | int) else value


def _no_data(value: Any) -> Any:
    """`data.source=none` says that there are none."""
    source = value.get("source", "") if isinstance(value, dict) else value
    return None if source in (None, "none") else value


Labels = Annotated[list[str | int], BeforeValidator(_listed)]


@dataclass(frozen=True)
class Architecture:
    """A new class-conditional `UNet2DModel`, for `model: new`."""

    __pydantic_config__ = STRICT
    channels: Annotated[list[Positive], Field(min_length=1)]
    """Of each resolution, the finest first."""
    layers: Positive = 2
    """Residual blocks per resolution."""
    attention: list[bool] = field(default_factory=list)
    """For each resolution; none by default."""
    patch: Positive = 1
    """Space-to-depth factor of the input: half the resolution and four times the channels at 2."""
    groups: Positive = 32
    """Of the group normalisation; divides every number of channels."""
    head: Positive = 8
    """Channels of an attention head."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the network predicts."""
    schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Of the noise: betas."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """The standard guidance scale that the model is saved with; 1 is none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of features within residual blocks; active where `train.network_dropout` is."""


@dataclass(frozen=True)
class Data:
    """Labelled images: see `erase.store.labelled.read_labelled`."""

    __pydantic_config__ = STRICT
    source: str
    """A folder with a subfolder a class, a folder of IDX files, `fashion-mnist` or `datasets:NAME`."""
    names: list[str] = field(default_factory=list)
    """Class names by number; by default what the source says, else the model. They are matched with the model's by
    name."""
    size: Positive | None = None
    """Pixels that the shorter side of each image is resized to, before the centre is cropped; images that are not grey
    become RGB, transparent ones on white. By default images are taken as they are, all of one size."""
    flip: bool = False
    """Whether each image is mirrored with probability 1/2, once and for the whole run (as the scripts published with
    arXiv 2409.19732 do)."""


@dataclass(frozen=True)
class ForgetLabels:
    """Which classes to forget."""

    __pydantic_config__ = STRICT
    labels: Labels
    """Names or numbers."""
    anchors: Labels = field(default_factory=list)
    """One for each label, or one for all; for `redirect`. None: another class by lot for each image (RL, SalUn)."""
    among: Literal["all", "far"] | Labels = "all"
    """Without anchors, the classes of the lot: all that stay, the half of them whose predictions differ most from the
    forgotten class's, or some by name. What lies between near classes can look like it."""
    earlier: Labels = field(default_factory=list)
    """Classes that were forgotten before, and are to stay so; those that the model's weight file names are added."""
    count: Positive = 500
    """Images per label, from the data or drawn."""
    pictures: Literal["own", "anchor", "both"] = "own"
    """What a redirect is learned on: pictures of the forgotten classes, of their anchors (without anchors: of all
    classes that stay, each with its own label as the anchor), or both."""
    loss: Literal["ascent", "redirect", "surrogate"] = "ascent"
    """`surrogate` fits uniform noise in the place of the forgotten images (SA)."""
    target: Literal["online", "frozen"] = "online"
    """A redirect leads to what the network itself predicts for the anchor: as it is while it learns (`online`), or as
    the run found it (`frozen`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Condition dropout of the forget loss; the published DDPM script has 0.1."""


@dataclass(frozen=True)
class RemainLabels:
    """How much is kept at hand of what must stay."""

    __pydantic_config__ = STRICT
    count: Positive | None = None
    """Images per label; by default as many in all as forget images (all there are, for training)."""
    share: Literal["even", "near"] = "even"
    """`near`: of a class the more, the nearer its predictions are to a forgotten one's, as many in all. It is the near
    ones that forgetting harms."""
    loss: RemainLoss = "denoise"
    """`denoise` is the training loss; `distill` keeps to the predictions of the model that the run starts from."""


@dataclass(frozen=True)
class DrawLabels:
    """How the model draws."""

    __pydantic_config__ = STRICT
    sampler: Literal["ddim", "ddpm", "dpm"] | None = None
    """By default the model's own."""
    steps: Positive = 25
    """Sampler steps of every generated image."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """Standard scale, 1 is none; by default the model's own."""
    batch_size: Positive = 100
    """Images that are generated at once."""
    cache: Path | None = None
    """A folder that keeps the data that the model generates to learn from, for other runs that need the same. The runs
    of a comparison have one."""


@dataclass(frozen=True)
class EvalLabels:
    """What is drawn and counted before and after."""

    __pydantic_config__ = STRICT
    images: Annotated[int, Field(ge=0)] = 100
    """Per label; 0 skips the evaluation."""
    labels: Labels = field(default_factory=list)
    """Classes whose images are generated and judged beside the forgotten ones; by default (`[]`, null) all."""
    classifier: str | None = None
    """A `transformers` image classifier's folder, or an embedded one's name; its labels are the model's."""
    base: Path | None = None
    """Base pictures that an earlier run with the same model and settings drew: copied, not drawn again."""
    retrained: str | None = None
    """A model that was trained without the forgotten classes: drawn and judged as the third."""
    retrained_base: Path | None = None
    """Its pictures from an earlier run, as `base`."""
    blur: bool = True
    """Hide exposed body parts that NudeNet finds in grids and reports; off only where all pictures are harmless. Images
    of what no word says may be a person are not looked at."""


@dataclass(frozen=True)
class DdpmConfig:
    """`erase run ddpm`."""

    __pydantic_config__ = STRICT
    pipeline: Literal["ddpm"]
    """The command that the preset is for: `erase run` and this word."""
    model: str
    """An embedded model's name, a folder, or `new`."""
    method: Settings
    """Its `name` and its settings: see `erase settings NAME`."""
    train: Train
    forget: ForgetLabels
    labels: list[str] | Positive = field(default_factory=list)
    """For a model folder that names no classes: names by number, or how many classes it has (they are then called by
    their numbers). One class embedding more than classes makes the last one the null class."""
    architecture: Architecture | None = None
    data: Annotated[Data | None, BeforeValidator(_no_data)] = None
    """Without it the model draws its own data; training needs it."""
    remain: RemainLabels = field(default_factory=RemainLabels)
    eval: EvalLabels = field(default_factory=EvalLabels)
    saliency: Saliency = field(default_factory=Saliency)
    draw: DrawLabels = field(default_factory=DrawLabels)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the whole run: data, noise, timesteps, batches and generated images."""
    precision: Precision = "no"
    """Of forward passes. `auto` is bf16 where the device does it in hardware, else no."""
    checkpoint_every: Positive = 50
    """Steps, or draws of a Fisher diagonal, between saved run states."""
    tracker: Tracker = "jsonl"
    """`metrics.jsonl` is written in any case."""
    note: str = ""
    """What the preset is and where its values come from."""
