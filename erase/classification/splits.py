"""Which training images are forgotten, which are held out for validation, which remain: a file, drawn once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.engine.backend import seeded
from erase.store import files
from erase.store.labelled import LabelledImages

KIND = "erase split"


@dataclass(frozen=True)
class Split:
    """Numbers of training images, each in one part only."""

    forget: Tensor
    """`[N_f]`, long, ascending."""
    validation: Tensor
    """`[N_v]`: neither trained on nor counted; settings are chosen on it."""
    count: int
    """N, of all training images."""
    seed: int
    how: dict[str, Any]
    """What was asked for: `fraction`, `labels` or `ids`."""
    data: str
    """The digest of the data set."""

    @property
    def remain(self) -> Tensor:
        """`[N_r]`: neither forgotten nor held out."""
        return self._without(self.forget, self.validation)

    @property
    def train(self) -> Tensor:
        """`[N_f + N_r]`: what the model is trained on."""
        return self._without(self.validation)

    def _without(self, *parts: Tensor) -> Tensor:
        left = torch.ones(self.count, dtype=torch.bool)
        for part in parts:
            left[part] = False
        return left.nonzero().flatten()

    @property
    def digest(self) -> str:
        """A hash of all that the split is."""
        return _digest(_plain(self))


def make(
    data: LabelledImages,
    *,
    validation: float,
    seed: int,
    fraction: float | None = None,
    labels: Sequence[int] = (),
    ids: Sequence[int] = (),
) -> Split:
    """Draw a split: validation images by lot, of those that `labels` and `ids` do not name.

    Images that are named, alone or as a class, are forgotten without exception. Of one seed, all fractions have the
    same validation images, and a larger one holds a smaller one. Without fraction, labels and ids nothing is
    forgotten: for training with everything.

    Args:
        data: the training images.
        validation: the share of images that is held out.
        seed: of both draws.
        fraction: the share of the other images that is forgotten, by lot.
        labels: classes that are forgotten whole.
        ids: numbers of images to forget.

    Raises:
        ValueError: for a fraction outside (0, 1), a class or image that is not there, and a split that forgets
            nothing or everything.
    """
    N = len(data)
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"forget.fraction must be above 0 and below 1; got {fraction}")
    if not 0 <= validation < 1:
        raise ValueError(f"data.validation must be at least 0 and below 1; got {validation}")
    wrong = [i for i in ids if not 0 <= i < N]
    if wrong:
        raise ValueError(f"forget.ids: no image {wrong[0]}; the {N} training images are numbered 0–{N - 1}")
    data.of(labels)  # says what is wrong with a number
    chosen = torch.isin(data.labels, torch.tensor(list(labels), dtype=torch.long))
    chosen[list(ids)] = True
    order = torch.randperm(N, generator=seeded("cpu", seed))
    others = order[~chosen[order]]
    held = others[: round(validation * N)]
    how: dict[str, Any]
    if fraction is not None:
        rest = others[len(held) :]
        forget, how = rest[: round(fraction * len(rest))], {"fraction": fraction}
    else:
        forget = chosen.nonzero().flatten()
        how = {"labels": list(labels)} if len(labels) else {"ids": len(ids)} if len(ids) else {}
    split = Split(forget.sort().values, held.sort().values, N, seed, how, data.digest)
    return check(split) if how else split


def check(split: Split) -> Split:
    """The split, if it forgets something and leaves something.

    Raises:
        ValueError: otherwise.
    """
    if not len(split.forget):
        raise ValueError(f"the forget set is empty ({json.dumps(split.how)} of {split.count} training images)")
    if not len(split.remain):
        raise ValueError(
            f"the forget set ({json.dumps(split.how)}) has all of the {split.count} training images that are not held "
            "out: forget fewer, so that some remain"
        )
    return split


def write(split: Split, path: Path) -> None:
    """Write a split as JSON."""
    files.write_text(path, json.dumps({**_plain(split), "sha256": split.digest}) + "\n")


def read(path: Path, data: LabelledImages) -> Split:
    """Read a split of `data`.

    Raises:
        ValueError: for a file that is no split, was changed by hand, or is of another data set.
    """
    found = _stored(path)
    if (found["count"], found["data"]) != (len(data), data.digest):
        raise ValueError(
            f"{path} is a split of another data set ({found['count']} images, sha256 {found['data'][:12]}…) than this "
            f"one ({len(data)} images, {data.digest[:12]}…)"
        )
    split = _split(found)
    classes = torch.tensor(split.how.get("labels", []), dtype=torch.long)
    if bool(torch.isin(data.labels[split.validation], classes).any()):
        raise ValueError(f"{path} holds out images of a class that it forgets: make a new split with forget.labels")
    return check(split)


def describe(path: Path) -> dict[str, Any]:
    """What a split file says, as numbers of images.

    Raises:
        ValueError: for a file that is no split, or was changed by hand.
    """
    split = _split(_stored(path))
    parts = {"forget": split.forget, "validation": split.validation, "remain": split.remain}
    counts = {name: len(part) for name, part in parts.items()}
    return {"images": split.count, **counts, "how": split.how, "seed": split.seed, "data_sha256": split.data}


def _stored(path: Path) -> dict[str, Any]:
    """A split file, if it is as it was written."""
    found = files.read_json(path)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError(f"{path} is not a split file: give the split.json of a run")
    if _digest({k: v for k, v in found.items() if k != "sha256"}) != found.get("sha256"):
        raise ValueError(f"{path} was changed after it was written (its hash does not fit): make a new split instead")
    return found


def _split(found: Mapping[str, Any]) -> Split:
    forget, held = (torch.tensor(found[name], dtype=torch.long) for name in ("forget", "validation"))
    return Split(forget, held, found["count"], found["seed"], found["how"], found["data"])


def _plain(split: Split) -> dict[str, Any]:
    return {
        "kind": KIND,
        "data": split.data,
        "count": split.count,
        "seed": split.seed,
        "how": split.how,
        "validation": split.validation.tolist(),
        "forget": split.forget.tolist(),
    }


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
