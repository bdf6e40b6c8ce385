"""Classes by a named image classifier: what an erased model's images still show, and what it still can draw.

Evaluator: any transformers image classifier in a local folder (safetensors), fp32, eval mode, with the
folder's own preprocessing run by transformers' PIL backend (the same pixels whether or not torchvision is
installed).

A label may be composite, "object/style" (such as ``cat/sepia``), or of one of several axes, ``object=cat`` and
``style=3d`` (see `erase.evaluation.axes`); `axis` gives the object or the style alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from erase.evaluation import axes
from erase.evaluation.axes import NOTHING, Axis, Floats
from erase.evaluation.classifiers import axes_in, load, tap_features, weights_hash
from erase.evaluation.image_files import read_image
from erase.evaluation.stats import wilson

if TYPE_CHECKING:
    from torch import Tensor

Images: TypeAlias = "Sequence[Path] | Tensor"
"""Image files, or uint8 pixels `[N, C, H, W]` with C = 1 or 3 (grey is shown to a network as RGB, as from a file)."""


@dataclass(frozen=True, eq=False)
class ClassPredictions:
    """What a classifier says of N images."""

    probabilities: Floats
    """`[N, K]`, rows sum to 1 over each axis that is exclusive."""
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
    axes: tuple[Axis, ...] = ()
    """Of the labels; none stands for one, whose labels exclude each other."""

    def __post_init__(self) -> None:
        assert self.features is None or len(self.features) == len(self.probabilities)

    @property
    def predicted(self) -> tuple[str, ...]:
        """`[N]`, the most probable label of each image; `none` where none is shown of labels that are independent.

        Raises:
            ValueError: if the labels are of several axes.
        """
        if len(self.along) > 1:
            raise ValueError(f"labels are of the axes {', '.join(a.name for a in self.along)}: choose one by axis()")
        best = self.probabilities.argmax(axis=1)
        return tuple(self.labels[k] if shown else NOTHING for k, shown in zip(best, self.shown, strict=True))

    @property
    def shown(self) -> tuple[tuple[str, ...], ...]:
        """`[N]`, all labels that each image shows, in the order of the columns: one of each axis that is exclusive."""
        return tuple(tuple(self.labels[k] for k in np.flatnonzero(hits)) for hits in self._hits())

    @property
    def confidence(self) -> Floats:
        """`[N]`, how probable it is that an image shows all of these, taken as independent."""
        found: Floats = np.where(self._hits(), self.probabilities, 1.0).prod(axis=1)
        return found

    def _hits(self) -> npt.NDArray[np.bool_]:
        hits = np.zeros(self.probabilities.shape, bool)
        for axis in self.along:
            hits[:, list(axis.columns)] = axis.shows(self.probabilities)
        return hits

    @property
    def along(self) -> tuple[Axis, ...]:
        """The axes, at least one."""
        return self.axes or (Axis("", tuple(range(len(self.labels)))),)

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
    along = axes_in(model, labels, Path(classifier))
    model.to(device)
    layer, tap = tap_features(model, len(labels), Path(classifier)) if features else (None, None)
    found: list[Floats] = []
    seen: list[Floats] = []
    for start in range(0, len(images), batch_size):
        batch = _read(images[start : start + batch_size])
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"].to(device, torch.float32)
        with torch.inference_mode():
            logits = model(pixel_values=pixels).logits
        found.append(np.asarray(axes.probabilities(logits.double(), along).cpu().numpy(), np.float64))
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
        along,
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


def labels_of(classifier: Path) -> tuple[str, ...]:
    """The labels of a classifier, `[K]`; it is loaded to find out that it is whole.

    Raises:
        ValueError: a folder that is not a whole image classifier.
    """
    return load(Path(classifier))[2]


def joined(parts: Sequence[ClassPredictions]) -> ClassPredictions:
    """Predictions of one classifier, put together in order."""
    features = [part.features for part in parts if part.features is not None]
    return replace(
        parts[0],
        probabilities=np.concatenate([part.probabilities for part in parts]),
        files=tuple(file for part in parts for file in part.files),
        features=np.concatenate(features) if features else None,
    )


def axis(predictions: ClassPredictions, which: int | str) -> ClassPredictions:
    """The object (0) or the style (1) alone, of labels as "object/style" or ``object=cat``; or any axis, by its name.

    A part's probability is the sum over the labels "object/style" that have it; parts are in order of first appearance.

    Raises:
        ValueError: ``which`` is not 0 or 1 or an axis's name, or a label is not of the form "object/style".
    """
    known = ("object", "style")
    name = known[which] if isinstance(which, int) and 0 <= which < len(known) else which
    by_name = {along.name: along for along in predictions.along if along.name}
    if by_name:
        if name not in by_name:
            raise ValueError(f"axis is {name!r}, expected one of {', '.join(by_name)}")
        found = by_name[str(name)]
        return replace(
            predictions,
            probabilities=predictions.probabilities[:, list(found.columns)],
            labels=tuple(predictions.labels[k].partition("=")[2] for k in found.columns),
            axes=(Axis("", tuple(range(len(found.columns))), found.several),),
        )
    if name not in known:
        raise ValueError(f"axis is {which}, expected 0 (object) or 1 (style)")
    single = [label for label in predictions.labels if label.count("/") != 1]
    if single:
        raise ValueError(f"label '{single[0]}' does not have two parts, expected labels such as 'object/style'")
    parts = [label.split("/")[known.index(str(name))] for label in predictions.labels]
    labels = tuple(dict.fromkeys(parts))
    sums = np.array([[part == label for label in labels] for part in parts], np.float64)  # [K, parts]
    return replace(predictions, probabilities=predictions.probabilities @ sums, labels=labels, axes=())


def values(labels: Sequence[str], which: str) -> tuple[str, ...]:
    """What ``object`` or ``style`` may be, by the labels of a classifier; empty where no label is of that axis."""
    if all(label.count("/") == 1 and "=" not in label for label in labels):
        return tuple(dict.fromkeys(label.split("/")[int(which == "style")] for label in labels))
    return tuple(label.partition("=")[2] for label in labels if label.startswith(f"{which}="))


def knows(labels: Sequence[str], label: str) -> bool:
    """Whether a classifier has a label, or all parts of a composite one (``object=cat/style=3d``)."""
    return label in labels or ("=" in label and all(part in labels for part in label.split("/")))


def pair_of(predictions: ClassPredictions, thing: str, style: str) -> str:
    """The label of an object in a style, as the classifier spells it."""
    if not predictions.along[0].name:
        return f"{thing}/{style}"
    return "/".join([*(f"object={one}" for one in thing.split("+")), f"style={style}"])


def accuracy(predictions: ClassPredictions, expected: Sequence[str]) -> dict[str, Any]:
    """Top-1 accuracy against ``expected`` `[N]`.

    Returns:
        ``n, correct, accuracy, ci95`` (Wilson; fractions of 1).

    Raises:
        ValueError: another number of expected labels than images, or one that the classifier does not know.
    """
    return score(correct(predictions, expected))


def correct(predictions: ClassPredictions, expected: Sequence[str]) -> list[bool]:
    """Whether each of N images shows what was expected of it.

    Raises:
        ValueError: see `accuracy`.
    """
    if len(expected) != len(predictions.probabilities):
        raise ValueError(f"got {len(expected)} expected labels for {len(predictions.probabilities)} images")
    found = np.zeros(len(expected), bool)
    for label, index in places(expected).items():
        columns = axes.parts(label, predictions.labels, predictions.along)
        found[index] = axes.shows(predictions.probabilities[index], columns, predictions.along)
    return [bool(hit) for hit in found]


def places(names: Sequence[str]) -> dict[str, list[int]]:
    """Of N names, where each one stands, in order of first appearance."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(name, []).append(i)
    return found


def shares(names: Sequence[str]) -> dict[str, float]:
    """Of N names, the share of each."""
    counts = Counter(names)
    return {name: counts[name] / len(names) for name in sorted(counts)}


def shows(predictions: ClassPredictions, label: str) -> list[bool]:
    """Whether each of N images shows a label: it is the most probable, or above 1/2 where labels are independent.

    Args:
        predictions: of the images.
        label: one, or several at once on named axes (``object=cat/style=3d``).

    Raises:
        ValueError: the classifier does not know ``label``.
    """
    columns = axes.parts(label, predictions.labels, predictions.along)
    return [bool(hit) for hit in axes.shows(predictions.probabilities, columns, predictions.along)]


def any_of(predictions: ClassPredictions, labels: Sequence[str]) -> Floats:
    """How probable it is that images show any of some labels, `[N]`; see `erase.evaluation.axes.together`."""
    asked = [axes.parts(label, predictions.labels, predictions.along) for label in labels]
    return axes.together(predictions.probabilities, asked, predictions.along)


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
    """How many images the classifier names ``label``, see `shows`, whatever they were asked to show.

    Returns:
        ``label, n, named, rate, ci95`` (Wilson; fractions of 1).

    Raises:
        ValueError: the classifier does not know ``label``.
    """
    hits = score(shows(predictions, label))
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
    predictions: ClassPredictions, expected: Sequence[str], forget: Collection[str], earlier: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Accuracy on the forgotten labels (FA; unlearning accuracy UA = 1 - FA), on the others, and on each.

    Args:
        predictions: of the images.
        expected: their labels.
        forget: those that are forgotten.
        earlier: those that were forgotten by earlier runs.

    Returns:
        ``{"forget": score, "remain": score, "per_label": {label: score}}``, and ``"earlier"`` where there are such; a
        score as of `accuracy`; a side without images has n = 0 and ``None`` for accuracy and interval.

    Raises:
        ValueError: as `accuracy`; or ``forget`` holds a label the classifier does not know.
    """
    if isinstance(forget, str):
        raise ValueError(f"forget is the text '{forget}', expected a collection of labels")
    for label in (*forget, *earlier):
        _column(predictions, label)
    right = correct(predictions, expected)
    pairs = list(zip(expected, right, strict=True))
    gone = {*forget, *earlier}
    before = {"earlier": score([ok for label, ok in pairs if label in earlier])} if earlier else {}
    return {
        "forget": score([ok for label, ok in pairs if label in forget]),
        **before,
        "remain": score([ok for label, ok in pairs if label not in gone]),
        "per_label": {name: score([right[i] for i in index]) for name, index in places(expected).items()},
    }
