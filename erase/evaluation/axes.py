"""Classifiers of several axes at once: labels as ``object=cat`` and ``style=3d``, one probability each.

On an axis an image has one label (softmax over the axis), or any number of them (a sigmoid each): a classifier's
`config.json` names the latter under ``several_axes``. Labels without "=" are on one unnamed axis of the former kind.
A label may ask for several at once: ``object=cat/style=3d``, or ``object=cat/object=pizza`` for two objects; on the
axis of objects alone that is ``cat+pizza``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]
NOTHING = "none"
"""What an image shows, of an axis with any number of labels, where none is more probable than 1/2."""


@dataclass(frozen=True)
class Axis:
    """Some of a classifier's labels."""

    name: str
    """Before the "="; empty for labels without one."""
    columns: tuple[int, ...]
    """Their numbers among all labels."""
    several: bool = False
    """Whether an image may have any number of them."""

    def shows(self, probabilities: Floats) -> npt.NDArray[np.bool_]:
        """Which of the axis's labels images show, `[N, K']`, by the probabilities of all labels, `[N, K]`."""
        own = probabilities[:, list(self.columns)]
        return own > 0.5 if self.several else np.arange(len(self.columns)) == own.argmax(axis=1)[:, None]


def axes_of(labels: Sequence[str], several: Collection[str] = ()) -> tuple[Axis, ...]:
    """The axes of a classifier, in order of first appearance.

    Args:
        labels: of all classes.
        several: names of axes of which an image may have any number of labels.

    Raises:
        ValueError: for labels of which some name their axis and some do not, ``several`` that no label is of, or an
            exclusive axis with a single label.
    """
    if isinstance(several, str) or not all(isinstance(name, str) for name in several):
        raise ValueError(f"several_axes is {several!r}, expected a list of names of axes")
    names = [label.partition("=")[0] if "=" in label else "" for label in labels]
    if "" in names and any(names):
        raise ValueError(
            f"label '{labels[names.index('')]}' has no axis, and others have one: write it as in 'object=cat', or "
            "remove all axes"
        )
    if strange := [name for name in several if name not in names]:
        raise ValueError(f"several_axes has '{strange[0]}', expected some of {', '.join(dict.fromkeys(names))}")
    found = [
        Axis(name, tuple(k for k, other in enumerate(names) if other == name), name in several)
        for name in dict.fromkeys(names)
    ]
    if short := [axis.name for axis in found if axis.name and not axis.several and len(axis.columns) == 1]:
        raise ValueError(f"axis '{short[0]}' has one label: give it another, or name it in several_axes")
    return tuple(found)


def probabilities(logits: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Logits `[N, K]` to probabilities: softmax over each axis, or a sigmoid where it may have several labels."""
    if len(axes) == 1 and not axes[0].several:
        return logits.softmax(dim=1)
    found = logits.sigmoid()
    for axis in axes:
        if not axis.several:
            found[:, list(axis.columns)] = logits[:, list(axis.columns)].softmax(dim=1)
    return found


def parts(label: str, labels: Sequence[str], axes: Sequence[Axis]) -> list[int]:
    """The numbers of the labels that a label asks for together; labels that exclude each other are whole, as they are.

    Raises:
        ValueError: if a part is none of ``labels``.
    """
    asked = label.split("/") if axes[0].name else label.split("+") if axes[0].several else [label]
    if strange := [part for part in asked if part not in labels]:
        raise ValueError(f"label is '{strange[0]}', expected one of {', '.join(labels)}")
    return [labels.index(part) for part in asked]


def shows(predicted: Floats, columns: Sequence[int], axes: Sequence[Axis]) -> npt.NDArray[np.bool_]:
    """Whether images show all of some labels, `[N]`: each the most probable of its axis, or above 1/2."""
    found = np.ones(len(predicted), bool)
    for axis in axes:
        if own := [axis.columns.index(k) for k in columns if k in axis.columns]:
            found &= axis.shows(predicted)[:, own].all(axis=1)
    return found


def together(predicted: Floats, asked: Sequence[Sequence[int]], axes: Sequence[Axis]) -> Floats:
    """How probable it is that images show any of some labels, `[N]`.

    Probabilities of labels that exclude each other add up; all else is taken as independent.

    Args:
        predicted: `[N, K]`.
        asked: the numbers of each label's parts (see `parts`).
        axes: of the classifier.
    """
    absent = np.ones(len(predicted))
    exclusive = {k: i for i, axis in enumerate(axes) if not axis.several for k in axis.columns}
    sums: dict[int, Floats] = {}
    for columns in asked:
        if len(columns) == 1 and columns[0] in exclusive:
            where = exclusive[columns[0]]
            sums[where] = sums.get(where, np.zeros(len(predicted))) + predicted[:, columns[0]]
        else:
            absent = absent * (1 - predicted[:, list(columns)].prod(axis=1))
    if len(sums) == 1 and not any(len(columns) > 1 or columns[0] not in exclusive for columns in asked):
        return next(iter(sums.values()))
    for total in sums.values():
        absent = absent * (1 - total)
    return 1 - absent
