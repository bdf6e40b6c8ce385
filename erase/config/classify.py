"""Settings of `erase run classify`: image classifiers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from erase.config.kinds import STRICT, Positive, Precision, Saliency, Seed, Settings, Tracker
from erase.config.labels import Labels


@dataclass(frozen=True)
class TrainClassifier:
    """The loop of a classifier's unlearning: T steps and the slow optimizer. All weights learn."""

    __pydantic_config__ = STRICT
    steps: Positive
    """T, the number of steps."""
    batch_size: Positive = 128
    """Total batch size across all processes."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate of the slow optimizer, which takes all steps but those of size `method.fast_rate`."""
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    """The slow optimizer."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the slow optimizer."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of `sgd`. The Adam optimizers have betas 0.9 and 0.999."""
    micro_batch: None = None
    """Always null: batch normalisation needs whole batches."""


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained, and retrained without what is forgotten."""

    __pydantic_config__ = STRICT
    epochs: Positive
    """Number of passes over the training images."""
    batch_size: Positive = 128
    """Total batch size across all processes."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """The initial learning rate."""
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    """Optimizer of training."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of training."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of `sgd`."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Schedule of the learning rate."""
    seed: Seed | None = None
    """Seed of the initial weights, order and augmentation; by default the run's."""


@dataclass(frozen=True)
class ClassifyData:
    """Labelled images (`erase.store.labelled.read_labelled`), some of them held out, and how they are varied."""

    __pydantic_config__ = STRICT
    source: str
    """A folder with a subfolder for each class, a folder of IDX files, `fashion-mnist` or `datasets:NAME`."""
    names: list[str] = field(default_factory=list)
    """Class names in the order of their numbers; by default those of the source. They are matched with the model's by
    name."""
    size: Positive | None = None
    """The size in pixels to which the shorter side of each image is resized, before the centre is cropped. Images that
    are not grey become RGB, transparent ones on white. By default images are used as they are, and must have one
    size."""
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """For a source without a test part: the share of every class's images that is chosen at random for testing."""
    seed: Seed = 0
    """Seed of the choice for `data.test`."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training images that is held out, to choose settings by."""
    shift: Annotated[int, Field(ge=0)] = 0
    """Largest random shift of training images, in pixels."""
    flip: bool = False
    """Whether training images are mirrored with probability 1/2."""


@dataclass(frozen=True)
class ForgetImages:
    """Which training images to forget: one of `fraction`, `labels`, `ids` and `split`."""

    __pydantic_config__ = STRICT
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A random share of the training images."""
    labels: Labels = field(default_factory=list)
    """Whole classes, by name or number: all of their training images."""
    ids: list[Annotated[int, Field(ge=0)]] = field(default_factory=list)
    """Numbers of images. As with `labels`, none is held out for validation."""
    split: Path | None = None
    """`split.json` of an earlier run: the same images are forgotten and held out."""
    seed: Seed | None = None
    """Seed of the split; by default the run's."""
    relabel: Literal["other", "any"] = "other"
    """The labels that a method fits instead of the true ones: a random other one (`other`), or a random one of all
    classes (`any`)."""
    statistics: Literal["batch", "running", "update"] = "batch"
    """The mean and variance that batch normalisation uses in passes over forget data: those of the batch (`batch`), or
    the running ones, as in inference (`running`). `update` uses those of the batch and updates the running ones."""


@dataclass(frozen=True)
class RemainImages:
    """Which data of what must stay are used."""

    __pydantic_config__ = STRICT
    count: Positive | Literal["all"] | None = None
    """Number of images; by default as many as are forgotten."""


@dataclass(frozen=True)
class EvalClassifier:
    """What the unlearned model is compared with."""

    __pydantic_config__ = STRICT
    retrained: bool | str = True
    """`true` trains a model by the recipe without the forgotten images, to compare with; a folder names such a model;
    `false` skips the comparison."""
    batch_size: Positive = 500
    """Images that are classified at once."""
    svc: bool = True
    """Whether membership inference is also measured as SalUn does (`MIA_SVC`): up to 20 s for each model with 10,000
    test images."""


@dataclass(frozen=True)
class ClassifyConfig:
    """`erase run classify`."""

    __pydantic_config__ = STRICT
    pipeline: Literal["classify"]
    """The command that the preset is for, such as `erase run sd`."""
    model: str
    """A name from `erase ls models`, a folder, or `new`: a model that the recipe trains."""
    data: ClassifyData
    method: Settings
    """The method's `name` and its settings: see `erase settings NAME`."""
    train: TrainClassifier | None = None
    """The loop of unlearning. Training and retraining follow the recipe."""
    recipe: Recipe | None = None
    forget: ForgetImages = field(default_factory=ForgetImages)
    architecture: dict[str, Any] | None = None
    """For `model: new`: `model_type` and other keys of a `transformers` configuration; `resnet` also takes `stem`."""
    remain: RemainImages = field(default_factory=RemainImages)
    eval: EvalClassifier = field(default_factory=EvalClassifier)
    saliency: Saliency = field(default_factory=Saliency)
    cache: Path = Path("runs/trained")
    """The folder of trained and retrained models, each under a hash of everything that it depends on."""
    seed: Seed = 0
    """Seed of unlearning, and of training and split where they have none of their own."""
    precision: Precision = "no"
    """Precision of the forward passes. `auto` is bf16 where the device computes it in hardware, else `no`."""
    checkpoint_every: Positive = 500
    """Number of steps between two saved run states."""
    tracker: Tracker = "jsonl"
    """Where metrics go besides `metrics.jsonl`, which is always written."""
    note: str = ""
    """What the preset is for, and where its values come from."""
