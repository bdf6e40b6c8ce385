"""Classes by a named image classifier: what an erased model's images still show, and what it still can draw.

Evaluator: any transformers image classifier in a local folder (safetensors), fp32, eval mode, with the
folder's own preprocessing run by transformers' PIL backend (the same pixels whether or not torchvision is
installed).

A label may be composite, "object/style" (such as ``cat/sepia``); `axis` gives the object or the style alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from erase.evaluation.image_files import read_image
from erase.evaluation.stats import wilson
from erase.store.files import sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

Floats = npt.NDArray[np.float64]
Images: TypeAlias = "Sequence[Path] | Tensor"
"""Image files, or uint8 pixels `[N, C, H, W]` with C = 1 or 3 (grey is shown to a network as RGB, as from a file)."""


@dataclass(frozen=True, eq=False)
class ClassPredictions:
    """What a classifier says of N images."""

    probabilities: Floats
    """`[N, K]`, rows sum to 1."""
    labels: tuple[str, ...]
    """`[K]`, in the order of the columns."""
    files: tuple[Path, ...]
    """`[N]`; empty where the images were pixels."""
    classifier: str
    """Its folder's name."""
    model_sha256: str
    features: Floats | None = None
    """`[N, D]`, what the last linear layer received; None unless asked for."""
    layer: str | None = None
    """The name of that layer."""

    def __post_init__(self) -> None:
        assert self.features is None or len(self.features) == len(self.probabilities)

    @property
    def predicted(self) -> tuple[str, ...]:
        """`[N]`, the most probable label of each image."""
        return tuple(self.labels[k] for k in self.probabilities.argmax(axis=1))

    def take(self, index: Sequence[int]) -> ClassPredictions:
        """The images ``index``, in that order."""
        return replace(
            self,
            probabilities=self.probabilities[list(index)],
            files=tuple(self.files[i] for i in index) if self.files else (),
            features=None if self.features is None else self.features[list(index)],
        )

    @property
    def provenance(self) -> dict[str, str]:
        """What made the predictions."""
        return {"classifier": self.classifier, "model_sha256": self.model_sha256}


def classify(
    images: Images,
    classifier: Path,
    *,
    features: bool = False,
    batch_size: int = 64,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> ClassPredictions:
    """Classify images; in the same pass, keep what the last layer saw of them.

    Args:
        images: image files, or pixels.
        classifier: a folder with config.json, model.safetensors and preprocessor_config.json.
        features: keep the features too, for `erase.evaluation.fidelity`.
        batch_size: images a forward pass.
        device: a torch device.
        progress: called with (images done, images in all) after each batch.

    Raises:
        ValueError: no images, an image that cannot be decoded, pixels of another form, or a folder that is not
            a whole image classifier; with ``features``, a classifier whose logits are not the output of a
            linear layer.
    """
    import torch

    if isinstance(images, torch.Tensor):
        _check_pixels(images)
    if len(images) == 0:
        raise ValueError("got no images, expected at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    model, processor, labels = load(Path(classifier))
    model.to(device)
    layer, tap = _tap(model, len(labels), Path(classifier)) if features else (None, None)
    found: list[Floats] = []
    seen: list[Floats] = []
    for start in range(0, len(images), batch_size):
        batch = _read(images[start : start + batch_size])
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"].to(device, torch.float32)
        with torch.inference_mode():
            logits = model(pixel_values=pixels).logits
        found.append(np.asarray(logits.double().softmax(dim=1).cpu().numpy(), np.float64))
        if tap is not None:
            seen.append(np.asarray(tap(logits).double().cpu().numpy(), np.float64))
        if progress:
            progress(min(start + batch_size, len(images)), len(images))
    return ClassPredictions(
        np.concatenate(found),
        labels,
        () if isinstance(images, torch.Tensor) else tuple(map(Path, images)),
        Path(classifier).resolve().name,
        weights_hash(Path(classifier)),
        np.concatenate(seen) if features else None,
        layer,
    )


def _check_pixels(pixels: Tensor) -> None:
    if str(pixels.dtype) != "torch.uint8" or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(
            f"pixels are {pixels.dtype} of shape {list(pixels.shape)}, expected uint8 [N, C, H, W] with C = 1 or 3"
        )


def _read(images: Images) -> list[Image.Image]:
    if isinstance(images, Sequence):
        return [read_image(path) for path in images]
    rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(array) for array in rgb]


def _tap(model: nn.Module, K: int, folder: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
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
            raise ValueError(f"{folder}: layer {name} does not make the logits, so what it receives is no feature")
        return received

    return name, tap


def labels_of(classifier: Path) -> tuple[str, ...]:
    """The labels of a classifier, `[K]`; it is loaded to find out that it is whole.

    Raises:
        ValueError: a folder that is not a whole image classifier.
    """
    return load(Path(classifier))[2]


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
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    pil = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    processor_class: Any = AutoImageProcessor  # untyped upstream
    return processor_class.from_pretrained(model, local_files_only=True, **pil)


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights' file; of a sharded model, of its files' hashes in order of name."""
    hashes = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode("ascii")).hexdigest()


def joined(parts: Sequence[ClassPredictions]) -> ClassPredictions:
    """Predictions of one classifier, put together in order."""
    features = [part.features for part in parts if part.features is not None]
    return replace(
        parts[0],
        probabilities=np.concatenate([part.probabilities for part in parts]),
        files=tuple(file for part in parts for file in part.files),
        features=np.concatenate(features) if features else None,
    )


def axis(predictions: ClassPredictions, which: int) -> ClassPredictions:
    """One part of composite labels: 0 for the object of "object/style", 1 for the style.

    A part's probability is the sum over the labels that have it; parts come in order of first appearance.

    Raises:
        ValueError: ``which`` is not 0 or 1, or a label is not of the form "object/style".
    """
    if which not in (0, 1):
        raise ValueError(f"axis is {which}, expected 0 (object) or 1 (style)")
    single = [label for label in predictions.labels if label.count("/") != 1]
    if single:
        raise ValueError(f"label '{single[0]}' has no two parts, expected all labels as 'object/style'")
    parts = [label.split("/")[which] for label in predictions.labels]
    labels = tuple(dict.fromkeys(parts))
    sums = np.array([[part == label for label in labels] for part in parts], np.float64)  # [K, parts]
    return replace(predictions, probabilities=predictions.probabilities @ sums, labels=labels)


def accuracy(predictions: ClassPredictions, expected: Sequence[str]) -> dict[str, Any]:
    """Top-1 accuracy against ``expected`` `[N]`.

    Returns:
        ``n, correct, accuracy, ci95`` (Wilson; fractions of 1).

    Raises:
        ValueError: another number of expected labels than images, or one that the classifier does not know.
    """
    return score(_correct(predictions, expected))


def _correct(predictions: ClassPredictions, expected: Sequence[str]) -> list[bool]:
    if len(expected) != len(predictions.probabilities):
        raise ValueError(f"got {len(expected)} expected labels for {len(predictions.probabilities)} images")
    for label in dict.fromkeys(expected):
        _column(predictions, label)
    return [a == b for a, b in zip(predictions.predicted, expected, strict=True)]


def score(correct: Sequence[bool]) -> dict[str, Any]:
    """How many of N are right: ``n, correct, accuracy, ci95`` (Wilson; fractions of 1), None of nothing."""
    n, hits = len(correct), sum(correct)
    return {
        "n": n,
        "correct": hits,
        "accuracy": hits / n if n else None,
        "ci95": list(wilson(hits, n)) if n else None,
    }


def _column(predictions: ClassPredictions, label: str) -> int:
    if label not in predictions.labels:
        raise ValueError(f"label is '{label}', expected one of {', '.join(predictions.labels)}")
    return predictions.labels.index(label)


def named(predictions: ClassPredictions, label: str) -> dict[str, Any]:
    """How many images the classifier names ``label``, whatever they were asked to show.

    Returns:
        ``label, n, named, rate, ci95`` (Wilson; fractions of 1).

    Raises:
        ValueError: the classifier does not know ``label``.
    """
    _column(predictions, label)
    hits = score([name == label for name in predictions.predicted])
    return {
        "label": label,
        "n": hits["n"],
        "named": hits["correct"],
        "rate": hits["accuracy"],
        "ci95": hits["ci95"],
    }


def confidence(predictions: ClassPredictions, label: str) -> dict[str, Any]:
    """Mean probability of ``label`` and mean entropy of the prediction (nats, 0 to log K), over the images.

    Returns:
        ``label, n, probability, entropy``.

    Raises:
        ValueError: the classifier does not know ``label``.
    """
    column = _column(predictions, label)
    p = predictions.probabilities
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
    return {
        "label": label,
        "n": len(p),
        "probability": float(p[:, column].mean()),
        "entropy": float(entropy.mean()),
    }


def forget_remain(
    predictions: ClassPredictions, expected: Sequence[str], forget: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Accuracy on the forgotten labels (FA; unlearning accuracy UA = 1 - FA), on the others, and on each.

    Returns:
        ``{"forget": score, "remain": score, "per_label": {label: score}}``, a score as of `accuracy`; a side
        without images has n = 0 and ``None`` for accuracy and interval.

    Raises:
        ValueError: as `accuracy`; or ``forget`` holds a label the classifier does not know.
    """
    if isinstance(forget, str):
        raise ValueError(f"forget is the text '{forget}', expected a collection of labels")
    for label in forget:
        _column(predictions, label)
    correct = _correct(predictions, expected)
    pairs = list(zip(expected, correct, strict=True))
    return {
        "forget": score([ok for label, ok in pairs if label in forget]),
        "remain": score([ok for label, ok in pairs if label not in forget]),
        "per_label": {name: score([ok for label, ok in pairs if label == name]) for name in dict.fromkeys(expected)},
    }
