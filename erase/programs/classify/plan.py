"""What a run on a classifier forgets: the data, split; the model to start from; and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from erase.classification import folders, models, splits
from erase.classification.models import Model
from erase.classification.splits import Split
from erase.config import NEW, ClassifyConfig
from erase.engine import distributed
from erase.store.class_names import class_number, short
from erase.store.labelled import LabelledImages, NoSplitError, read_labelled


@dataclass(frozen=True)
class Plan:
    """A run's data, resolved before anything is computed."""

    data: LabelledImages
    """The training images, all of them."""
    test: LabelledImages
    """Without the classes that are forgotten whole."""
    split: Split

    @property
    def labels(self) -> list[str]:
        """Names of the classes that are forgotten whole."""
        return [self.data.names[i] for i in self.split.how.get("labels", [])]

    @property
    def target(self) -> str:
        """What is forgotten, in words."""
        how, n = self.split.how, len(self.split.forget)
        share = [f"{100 * how['fraction']:g} %"] if "fraction" in how else []
        return ", ".join([*(self.labels or share), f"{n} training images"] if n else [])


def read_data(
    config: ClassifyConfig, known: Sequence[str] | None, say: Callable[[str], None]
) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images; their classes are numbered as those of a model that is there, found by name.

    Raises:
        ValueError: for data that cannot be read.
    """
    wanted = config.data
    data = read_labelled(wanted.source, "train", names=wanted.names or None, size=wanted.size, say=say)
    shape = (int(data.pixels.shape[1]), int(data.pixels.shape[2]), int(data.pixels.shape[3]))
    try:
        test = read_labelled(wanted.source, "test", names=data.names, shape=shape, size=wanted.size, say=say)
    except NoSplitError:
        data, test = data.parted(wanted.test, wanted.seed)
        say(
            f"{wanted.source} has no test part: {len(test)} of its {len(data) + len(test)} images become it, "
            f"data.test={wanted.test:g} of every class by data.seed={wanted.seed}"
        )
    found = [part if known is None else part.ordered(known) or part for part in (data, test)]
    return found[0], found[1]


def make_plan(
    config: ClassifyConfig,
    fresh: bool,
    model: Model | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Read the data and split them.

    Args:
        config: the settings.
        fresh: whether the weights are new.
        model: the one to start from, if it is there.
        say: where lines on the data go.

    Raises:
        ValueError: for data that cannot be read, or that the model does not fit, and unless exactly one way to choose
            the forgotten images is given (for training none may be).
    """
    data, test = read_data(config, None if model is None else model.labels, say)
    if model is not None:
        fits(config.model, model, data, config.data.source)
    wanted = config.forget
    ways = {"fraction": wanted.fraction, "labels": wanted.labels, "ids": wanted.ids, "split": wanted.split}
    given = [name for name, value in ways.items() if value not in (None, [])]
    if len(given) > 1:
        raise ValueError(f"forget.{given[0]} and forget.{given[1]} both choose what to forget: give only one of them")
    if not given and not fresh:
        raise ValueError(
            "the forget set is empty: name what to forget, such as forget.fraction=0.1 or forget.labels=[trouser]"
        )
    if wanted.split is not None:
        split = splits.read(wanted.split, data)
    else:
        labels = [class_number(label, data.names, f"data.source={config.data.source}") for label in wanted.labels]
        seed = config.seed if wanted.seed is None else wanted.seed
        split = splits.make(
            data,
            validation=config.data.validation,
            seed=seed,
            fraction=wanted.fraction,
            labels=labels,
            ids=wanted.ids,
        )
    return Plan(data, test.without(split.how.get("labels", [])), split)


def open_model(config: ClassifyConfig, device: torch.device) -> Model | None:
    """The model to start from; None for one that the recipe makes.

    Raises:
        ValueError: for an architecture where there is none to choose, or a folder that is no classifier.
    """
    if config.model == NEW:
        return None
    if config.architecture is not None:
        raise ValueError(
            f"architecture is for model=new, and {config.model} has its own: unset architecture, or set model=new"
        )
    return models.open_model(folders.locate(config.model).folder, device)


def new_model(config: ClassifyConfig, plan: Plan, device: torch.device) -> Model:
    """A new model, as the recipe starts from it.

    Raises:
        ValueError: for a missing architecture.
    """
    if config.architecture is None:
        raise ValueError("model=new needs an architecture: give architecture.model_type=resnet and so on")
    depth, height, width = plan.data.pixels.shape[1:]
    return models.new(config.architecture, plan.data.names, (depth, height, width), training_seed(config), device)


def check(config: ClassifyConfig, plan: Plan, model: Model, fresh: bool) -> None:
    """Find out now, not after the training, what cannot work.

    Raises:
        ValueError: for a missing recipe or train, a recipe's batch that does not divide over the processes, or a
            retrained model that does not fit the data.
    """
    own = [key for key in config.method if key != "name"]
    if fresh and own:
        raise ValueError(f"training follows recipe.*: leave out method.{own[0]}, and set recipe.* instead")
    if config.train is None and not fresh:
        raise ValueError("the setting train.steps is missing: give train.steps=…")
    wanted = config.eval.retrained
    trains = config.model == NEW or fresh or wanted is True
    if config.recipe is None and trains:
        raise ValueError(
            "training and retraining need a recipe: give recipe.epochs=… and so on, or eval.retrained=false with a "
            "trained model"
        )
    size = 0 if config.recipe is None else config.recipe.batch_size
    if trains and size % distributed.world():
        raise ValueError(f"recipe.batch_size {size} does not divide over {distributed.world()} processes")
    if isinstance(wanted, str):
        fits(wanted, models.open_model(folders.locate(wanted).folder), plan.data, config.data.source)


def fits(name: str, model: Model, data: LabelledImages, source: str) -> None:
    """Find out whether a model knows the data's classes and takes its images.

    Raises:
        ValueError: otherwise.
    """
    own, K = model.labels, len(model.labels)
    unnamed = own == tuple(f"LABEL_{k}" for k in range(K))
    if len(data.names) != K:
        named = "" if unnamed else f" ({short(own)})"
        raise ValueError(
            f"{name} has {K} classes{named}, data.source={source} has {len(data.names)}: set data.source to the images "
            "that the model was trained on, with a subfolder for each class"
        )
    if not unnamed and own != data.names:
        raise ValueError(
            f"the classes of data.source={source} are {short(data.names)}, those of {name} are {short(own)}: set "
            "data.source to the model's own images, rename the class folders, or give data.names (of other sources)"
        )
    depth = data.pixels.shape[1]
    if depth not in (1, model.channels):
        raise ValueError(f"the data's images have {depth} channels, {name} takes {model.channels}")


def training_seed(config: ClassifyConfig) -> int:
    """Of first weights, order and augmentation."""
    own = None if config.recipe is None else config.recipe.seed
    return config.seed if own is None else own


def num_remain(config: ClassifyConfig, plan: Plan) -> int:
    """How many of the images that stay are trained on."""
    there, wanted = len(plan.split.remain), config.remain.count
    return there if wanted == "all" else min(len(plan.split.forget) if wanted is None else wanted, there)
