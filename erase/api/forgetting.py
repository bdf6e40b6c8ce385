"""`erase.forget`: one name for every kind of model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from erase.api import classifiers, labels, networks, text
from erase.api.result import Result
from erase.api.settings import Call
from erase.diffusion.families import family, supported
from erase.diffusion.live import family_name


def forget(
    model: Any,
    what: Any = None,
    *,
    anchor: str | int | Sequence[str | int] | None = None,
    remain: Any = None,
    images: Any = None,
    label: str | int | Sequence[str | int] | None = None,
    names: int | Sequence[str] | None = None,
    data: str | Path | None = None,
    scheduler: Any = None,
    processor: Any = None,
    losses: Callable[[nn.Module, Any], Any] | None = None,
    steps: int | None = None,
    seed: int = 0,
    preset: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: Callable[[dict[str, Any]], object] | None = None,
    keep_base: bool = True,
) -> Result:
    """Erase something from a model in memory, in place, by SFR-on (arXiv 2409.19732) or a method of `settings`.

    After an error or an interruption the model is as it was. Its scheduler, safety checker, dtypes, modes and
    `requires_grad` are never changed, nor is the global state of random numbers. A second call does not bring back what
    the first one erased.

    Args:
        model: a diffusers pipeline (text-to-image, DiT, or any around a `UNet2DModel` with classes), such a
            `UNet2DModel`, an image classifier of transformers, any `nn.Module` with `losses`, or a backend
            (`erase.engine.backend.Backend`).
        what: what to forget. For text-to-image models: prompts. For class-conditional models: classes, by name or
            number. For classifiers: images with labels, as pairs, as rows with `image` and `label`, or as a folder with
            a subfolder for each class. For networks: batches, such as a DataLoader.
        anchor: what prompts or classes turn into: one for each, or one for all. Default: the empty prompt.
        remain: what must stay: prompts or names of prompt sets (default: the preset's), images with labels, or batches.
        images: for text-to-image models, a folder of images of what is forgotten, or PIL images. Default: the model
            generates them.
        label: for class-conditional models, the same as `what`.
        names: for class-conditional models that do not name their classes: how many there are, or a name for each.
            Default: as many as there are embeddings.
        data: for class-conditional models, labelled training images (`erase.store.labelled.read_labelled`). Default:
            the model generates them.
        scheduler: for a lone `UNet2DModel`, the noise schedule that it was trained on.
        processor: for a classifier, its image processor. Default: the one from where the model was loaded.
        losses: for a network, `(network, batch) -> [B]`: one loss for each sample, 0 or more; less, such as a
            log-likelihood's, needs the setting `method.lambd=0`.
        steps: number of fast steps, each followed by its slow steps. Default: the preset's.
        seed: the seed of everything random.
        preset: the name or file of a preset, instead of the family's own (`erase.api.settings.PRESETS`).
        settings: further settings by their names in `erase run`, such as `{"train.lr": 1e-5}` or
            `["train.lr=1e-5"]`; a single one may be a string.
        progress: a function that is called with a row, instead of progress bars: `phase`, `done`, `total`, and the
            numbers of a step.
        keep_base: whether the result keeps the first values of what learns, on the CPU. `show`, `count`, `undo` and
            deltas need them.

    Raises:
        TypeError: for an unsupported model, and for an option that is for another kind of model.
        ValueError: for values that cannot be used.
        NonFiniteError: where losses stay infinite or NaN (`erase.engine.loop`).
    """
    given = {
        "anchor": anchor,
        "remain": remain,
        "images": images,
        "label": label,
        "names": names,
        "data": data,
        "scheduler": scheduler,
        "processor": processor,
        "losses": losses,
    }
    function = _function_of(model, losses)
    options = {name: value for name, value in given.items() if value is not None}
    taken = [name for name in inspect.signature(function).parameters if name in given]
    for name in options:
        if name not in taken:
            kind = type(model).__name__
            raise TypeError(f"{name} is not for a {kind}; its options: {', '.join(taken)}")
    return function(model, what, Call(steps, seed, preset, settings, progress, keep_base), **options)


def _function_of(model: Any, losses: object) -> Callable[..., Result]:
    if isinstance(model, UNet2DModel) and losses is None:
        return labels.forget_labels
    if isinstance(model, DiffusionPipeline):
        name = family_name(model)
        return labels.forget_labels if name and family(name).CONDITION == "label" else text.forget_prompts
    classifies = isinstance(model, PreTrainedModel) and type(model).__name__.endswith("ForImageClassification")
    if classifies and losses is None:
        return classifiers.forget_images
    backend = isinstance(getattr(model, "net", None), nn.Module) and callable(getattr(model, "losses", None))
    if isinstance(model, nn.Module) or backend:
        return networks.forget_batches
    raise TypeError(
        f"expected a pipeline ({', '.join(supported())}, or one around a UNet2DModel with classes), an image "
        f"classifier of transformers, or an nn.Module with losses; got a {type(model).__name__}"
    )
