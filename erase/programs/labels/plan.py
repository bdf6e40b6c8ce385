"""What a run on a class-conditional model asks for: classes, the model, data, and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from erase import resources
from erase.config import DdpmConfig
from erase.diffusion import class_conditional
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.families import family
from erase.diffusion.model import Model, open_model
from erase.engine.method import Method
from erase.evaluation import classes, generate
from erase.evaluation.prompt_files import PromptRow
from erase.methods import find_method
from erase.store.class_names import class_names, class_number, short
from erase.store.labelled import LabelledImages, read_labelled

LEAST = 6
"""Images of a label: coverage looks at five neighbours, and no outcome of five pairs is beyond chance."""


@dataclass(frozen=True)
class Plan:
    """A run's classes, resolved before anything is computed."""

    labels: list[str]
    """Names of all classes, by number."""
    forget: list[int]
    anchors: list[int]
    """One per forgotten class; empty without a redirect."""
    data: LabelledImages | None
    earlier: list[int] = field(default_factory=list)
    """Classes that were forgotten before: they do not come back."""
    among: list[int] = field(default_factory=list)
    """Classes that are drawn by lot in the place of forgotten ones, where the settings name them."""
    shown: list[int] = field(default_factory=list)
    """Classes that are judged beside the forgotten ones, where the settings name them."""

    @property
    def gone(self) -> list[str]:
        """Names of the classes that are not to be shown, those of this run first."""
        return [self.labels[i] for i in (*self.forget, *self.earlier)]

    @property
    def remain(self) -> list[int]:
        """The classes that stay."""
        return [i for i, name in enumerate(self.labels) if name not in self.gone]

    @property
    def rows(self) -> list[PromptRow]:
        """What is drawn and counted, forgotten classes first: every class, or those that the settings name."""
        kept = [i for i in self.remain if not self.shown or i in self.shown]
        order = (*self.forget, *self.earlier, *kept)
        return [PromptRow(self.labels[i], seed=i, object=self.labels[i]) for i in order]


def read_data(config: DdpmConfig, source: folders.Source | None, say: Callable[[str], None]) -> LabelledImages | None:
    """The training images, if the run has any.

    Raises:
        ValueError: for data that cannot be read, or a new model without.
    """
    if config.data is None:
        if source is None:
            raise ValueError("model=new needs data.source: labelled images to train on")
        return None
    return read_labelled(config.data.source, "train", names=names_given(config), size=config.data.size, say=say)


def names_given(config: DdpmConfig) -> list[str] | None:
    """Class names that the settings give for the data."""
    own = [] if config.data is None else config.data.names
    return own or (config.labels if isinstance(config.labels, list) else []) or None


def find(config: DdpmConfig, model: str) -> folders.Source:
    """A checkpoint of the run."""
    named = config.labels
    found = locate(model, "label", labels=class_names(named) if named else ())
    assert isinstance(found, folders.Source)
    return found


def open_base(
    config: DdpmConfig,
    source: folders.Source | None,
    data: LabelledImages | None,
    device: torch.device,
    hollow: bool = False,
) -> Model:
    """The model of the run.

    Raises:
        ValueError: for an architecture where there is none to choose, or a missing one.
    """
    if source is not None:
        if config.architecture is not None:
            raise ValueError(
                f"architecture is for model=new, and {config.model} has its own: unset architecture, or set model=new"
            )
        return open_model(source, device, config.precision, hollow=hollow)
    if config.architecture is None:
        raise ValueError("model=new needs an architecture: give architecture.channels=[64,128] and so on")
    assert data is not None
    depth, height, width = data.pixels.shape[1:]
    pipe = class_conditional.new(data.names, (depth, height, width), **asdict(config.architecture), seed=config.seed)
    return Model(family("ddpm"), pipe.to(device))


def make_plan(
    config: DdpmConfig,
    diffuser: Model,
    data: LabelledImages | None,
    fresh: bool,
    forgotten: Sequence[str] = (),
) -> Plan:
    """Resolve labels, and check that model and data fit.

    Args:
        config: the settings.
        diffuser: the model.
        data: the training images.
        fresh: whether the weights are new.
        forgotten: names of the classes that the model's weight file says were forgotten.

    Raises:
        ValueError: for a label that is no class, labels twice or all of them, anchors that do not match, or data of
            other classes or another shape than the model's.
    """
    labels = diffuser.labels
    data = None if data is None else fitting(data, diffuser)
    numbers = partial(numbers_of, labels, config.model)
    forget = numbers(config.forget.labels, "forget.labels")
    if len(set(forget)) != len(forget):
        raise ValueError(f"forget.labels names a class twice: {config.forget.labels}")
    before = dict.fromkeys(numbers([*config.forget.earlier, *([] if fresh else forgotten)], "forget.earlier"))
    earlier = [i for i in before if i not in forget]
    if len({*forget, *earlier}) == len(labels):
        raise ValueError("every class is in forget.labels or was forgotten earlier: leave a class that stays")
    if config.forget.pictures != "own" and config.forget.loss != "redirect":
        raise ValueError(
            f"forget.pictures={config.forget.pictures} is for forget.loss=redirect: set forget.pictures=own"
        )
    anchors: list[int] = []
    if config.forget.loss == "redirect" and not fresh:
        anchors = numbers(config.forget.anchors, "forget.anchors")
        anchors = anchors * len(forget) if len(anchors) == 1 else anchors
        if anchors and len(anchors) != len(forget):
            raise ValueError(
                f"forget.anchors has {len(anchors)} labels for {len(forget)}: give one for each, or one for all"
            )
        if set(anchors) & {*forget, *earlier}:
            raise ValueError("a forgotten class cannot be an anchor: choose one that stays")
    among = [] if isinstance(config.forget.among, str) else numbers(config.forget.among, "forget.among")
    if set(among) & {*forget, *earlier}:
        raise ValueError("forget.among names a forgotten class: choose classes that stay")
    if config.forget.among != "all" and (config.forget.loss != "redirect" or anchors):
        raise ValueError("forget.among is for forget.loss=redirect without forget.anchors: unset one of them")
    shown = numbers(config.eval.labels, "eval.labels")
    if shown and not {*shown} - {*forget, *earlier}:
        raise ValueError("eval.labels has only forgotten classes: add classes that stay")
    return Plan(labels, forget, anchors, data, earlier, among, shown)


def fitting(data: LabelledImages, diffuser: Model) -> LabelledImages:
    """The same images, their classes numbered as the model's.

    Raises:
        ValueError: for data of other classes or another shape than the model's.
    """
    ordered = data.ordered(diffuser.labels)
    if ordered is None:
        raise ValueError(
            f"the data's classes are {short(data.names)}, the model's are {short(diffuser.labels)}: set data.names "
            "(or labels, for a model without class names) so that both are the same, or data=null"
        )
    if tuple(data.pixels.shape[1:]) != diffuser.shape:
        raise ValueError(
            f"the data's images are {list(data.pixels.shape[1:])} (channels, height, width), the model takes "
            f"{list(diffuser.shape)}: give data.size={diffuser.shape[1]}, or convert the files first"
        )
    return ordered


def numbers_of(labels: Sequence[str], model: str, given: Sequence[str | int], key: str) -> list[int]:
    """Numbers of the classes that a setting names.

    Raises:
        ValueError: for what is no class of the model.
    """
    try:
        return [class_number(label, labels, model) for label in given]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def check(config: DdpmConfig, plan: Plan, diffuser: Model, method: Method) -> None:
    """Find out now, not after the training, what cannot work; `method` is built of plain settings alone.

    Raises:
        ValueError: for dropout or guidance without a null class, a classifier that cannot be loaded or has other
            labels, or a retrained model that is not there.
    """
    for name, dropout in (("train.dropout", config.train.dropout), ("forget.dropout", config.forget.dropout)):
        if dropout and not diffuser.has_null:
            raise ValueError(f"{name}={dropout} needs a null class, which {config.model} lacks: set it to 0")
    drawing = bool(config.eval.images) or plan.data is None
    if drawing:
        class_conditional.check_guidance(diffuser, config.draw.guidance)
    entry = find_method(method.name)
    if entry.fresh and plan.data is None:
        raise ValueError("training needs data.source: labelled images")
    if entry.fresh and config.train.parameters != "full":
        raise ValueError(f"{method.name} starts from new weights, all of which must learn: set train.parameters=full")
    asked = "forget" in entry.needs  # others bring their own target
    if asked and method.forget is not None and method.forget.sense > 0 and config.forget.loss == "ascent":
        raise ValueError(
            f"method {method.name} does not take forget.loss=ascent: set redirect (another label) or surrogate (noise)"
        )
    if not config.eval.images:
        return
    for folder in (config.eval.base, config.eval.retrained_base):
        if folder is not None:
            generate.check_reuse(folder)
    if config.eval.retrained_base is not None and config.eval.retrained is None:
        raise ValueError("eval.retrained_base holds images of a retrained model: set eval.retrained to that model")
    if config.eval.classifier is not None and config.eval.images < LEAST:
        raise ValueError(
            f"eval.images must be at least {LEAST} (per label) to be judged, or 0; got {config.eval.images}"
        )
    if config.eval.classifier is not None:
        known = classes.labels_of(resources.tiny_path(config.eval.classifier))
        if set(known) != set(plan.labels):
            raise ValueError(
                f"eval.classifier {config.eval.classifier} knows {short(known)}; the model's classes are "
                f"{short(plan.labels)}: name a classifier of these classes, or set eval.classifier=null"
            )
    if config.eval.retrained is not None:
        open_retrained(config.eval.retrained, config, plan, "cpu")


def open_retrained(model: str, config: DdpmConfig, plan: Plan, device: torch.device | str) -> Model:
    """The model that was trained without the forgotten classes.

    Raises:
        ValueError: if it cannot be loaded, or does not fit the run.
    """
    found = open_model(find(config, model), device, config.precision)
    if found.labels != plan.labels:
        raise ValueError(f"{model} has other classes ({short(found.labels)}) than {config.model}")
    class_conditional.check_guidance(found, config.draw.guidance)
    return found
