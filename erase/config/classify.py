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
    """Over all processes."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate of the slow optimizer."""
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    """Of the slow steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the slow optimizer."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of `sgd`; the Adams have betas 0.9 and 0.999."""
    micro_batch: None = None
    """Batch normalisation sees whole batches."""


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained, and retrained without what is forgotten."""

    __pydantic_config__ = STRICT
    epochs: Positive
    """Passes over the training images."""
    batch_size: Positive = 128
    """Over all processes."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """The first learning rate."""
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    """Of training."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Of training."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of `sgd`."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Of the learning rate."""
    seed: Seed | None = None
    """Of the first weights, order and augmentation; by default the run's."""


@dataclass(frozen=True)
class ClassifyData:
    """Labelled images (`erase.store.labelled.read_labelled`), some of them held out, and how they are varied."""

    __pydantic_config__ = STRICT
    source: str
    """A folder with a subfolder a class, a folder of IDX files, `fashion-mnist` or `datasets:NAME`."""
    names: list[str] = field(default_factory=list)
    """Class names by number; by default what the source says. Classes of a model that is there are found by name."""
    size: Positive | None = None
    """Pixels that the shorter side of each image is resized to, before the centre is cropped; images that are not grey
    become RGB, transparent ones on white. By default images are taken as they are, all of one size."""
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Of a source without a test part, the share of every class's images that becomes it, by lot."""
    seed: Seed = 0
    """Of that lot."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training images that is never trained on: settings are chosen on it."""
    shift: Annotated[int, Field(ge=0)] = 0
    """Pixels by which training images are shifted at random."""
    flip: bool = False
    """Whether every second training image is mirrored."""


@dataclass(frozen=True)
class ForgetImages:
    """Which training images to forget: one of `fraction`, `labels`, `ids` and `split`."""

    __pydantic_config__ = STRICT
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """This share of them, by lot."""
    labels: Labels = field(default_factory=list)
    """Whole classes, by name or number: all of their training images."""
    ids: list[Annotated[int, Field(ge=0)]] = field(default_factory=list)
    """Images by number; as of classes, none of them is held out for validation."""
    split: Path | None = None
    """A file that an earlier run wrote; its validation images are taken too."""
    seed: Seed | None = None
    """Of the split; by default the run's."""
    relabel: Literal["other", "any"] = "other"
    """Labels that a method fits in the place of the true ones: never the true one, or by lot from all classes."""
    statistics: Literal["batch", "running", "update"] = "batch"
    """What batch normalisation goes by in passes over forget data: the batch's own mean and variance, or the running
    ones, as in use. Images of one class have others than those of all. None but `update` (the batch's own) moves the
    running ones."""


@dataclass(frozen=True)
class RemainImages:
    """How much is kept at hand of what must stay."""

    __pydantic_config__ = STRICT
    count: Positive | Literal["all"] | None = None
    """Images; by default as many as are forgotten."""


@dataclass(frozen=True)
class EvalClassifier:
    """What the unlearned model is compared with."""

    __pydantic_config__ = STRICT
    retrained: bool | str = True
    """`true`: a model that the recipe trains without the forgotten images; a folder of one; `false`: nothing."""
    batch_size: Positive = 500
    """Images that are classified at once."""
    svc: bool = True
    """Whether membership inference is done SalUn's way too (`MIA_SVC`): up to 20 s a model with 10,000 test images."""


@dataclass(frozen=True)
class ClassifyConfig:
    """`erase run classify`."""

    __pydantic_config__ = STRICT
    pipeline: Literal["classify"]
    """The command that the preset is for: `erase run` and this word."""
    model: str
    """An embedded model's name, a folder, or `new`: trained by the recipe."""
    data: ClassifyData
    method: Settings
    """Its `name` and its settings: see `erase settings NAME`."""
    train: TrainClassifier | None = None
    """Of unlearning; training and retraining go by the recipe."""
    recipe: Recipe | None = None
    forget: ForgetImages = field(default_factory=ForgetImages)
    architecture: dict[str, Any] | None = None
    """For `model: new`: `model_type` and other keys of a `transformers` configuration; for `resnet` also `stem`."""
    remain: RemainImages = field(default_factory=RemainImages)
    eval: EvalClassifier = field(default_factory=EvalClassifier)
    saliency: Saliency = field(default_factory=Saliency)
    cache: Path = Path("runs/trained")
    """Where trained and retrained models are kept, by a hash of all that they are made of."""
    seed: Seed = 0
    """Of unlearning; of training and split too, where they have none of their own."""
    precision: Precision = "no"
    """Of forward passes. `auto` is bf16 where the device does it in hardware, else no."""
    checkpoint_every: Positive = 500
    """Steps between saved run states."""
    tracker: Tracker = "jsonl"
    """`metrics.jsonl` is written in any case."""
    note: str = ""
    """What the preset is and where its values come from."""
