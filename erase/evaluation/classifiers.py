"""Folders of image classifiers, as `transformers` stores them: open one, and find what its last layer receives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase.evaluation.axes import Axis, axes_of
from erase.store.files import sha256

if TYPE_CHECKING:
    from torch import Tensor, nn


def load(folder: Path) -> tuple[Any, Any, tuple[str, ...]]:
    """A classifier in eval mode, its preprocessing, and its labels; those that several classes have get numbers.

    Raises:
        ValueError: a folder that is not a whole image classifier.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.models.auto.modeling_auto import AutoModelForImageClassification

    from erase.store.class_names import distinct

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there, expected the folder of a transformers image classifier")
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        processor = load_processor(folder)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder}: not a transformers image classifier in safetensors ({reason})") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random weights
        raise ValueError(f"{folder}: {len(missing)} weights are missing from the classifier, such as {missing[0]}")
    labels = distinct([str(model.config.id2label[k]) for k in range(model.config.num_labels)])
    return model.eval(), processor, tuple(labels)


def load_processor(model: str | Path) -> Any:
    """The image processor of a classifier: a folder's, or of a hub id that is in the cache.

    Raises:
        OSError: if there is none.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    processor_class: Any = AutoImageProcessor  # untyped upstream
    return processor_class.from_pretrained(model, local_files_only=True, backend="pil")


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights' file; of a sharded model, of its files' hashes in order of name."""
    hashes = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode("ascii")).hexdigest()


def axes_in(model: Any, labels: Sequence[str], folder: Path) -> tuple[Axis, ...]:
    """The axes of a loaded classifier's labels.

    Raises:
        ValueError: see `erase.evaluation.axes.axes_of`.
    """
    try:
        return axes_of(labels, getattr(model.config, "several_axes", None) or ())
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def tap_features(model: nn.Module, K: int, folder: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The last linear layer with K outputs, and a function from a pass's logits to what that layer received.

    Which layer makes the logits differs by architecture, and some average two heads: so the function checks
    that the layer's output is the logits.
    """
    import torch

    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.out_features == K]
    if not heads:
        raise ValueError(f"{folder}: the classifier has no linear layer with {K} outputs, so it has no features")
    name, head = heads[-1]
    passed: list[tuple[Tensor, Tensor]] = []
    head.register_forward_hook(lambda _, args, output: passed.append((args[0], output)))

    def tap(logits: Tensor) -> Tensor:
        received, made = passed.pop() if passed else (logits, logits[:0])
        passed.clear()
        if received.ndim != 2 or not torch.equal(made.nan_to_num(), logits.nan_to_num()):
            raise ValueError(
                f"{folder}: layer {name} does not compute the logits, so its input cannot be used as features"
            )
        return received

    return name, tap
