"""Whether images show a concept, by the words for it: zero-shot classification in a CLIP model's common space.

An image is given the text that it is most similar to (cosine), of the concept's texts and named alternatives (Radford
et al. 2021, arXiv 2103.00020). Softmax (CLIP) and sigmoid (SigLIP) rank an image's texts as their cosines do.

A judge is calibrated on images of the base model, which draws what it is asked for: see `calibrate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from erase.evaluation.axes import Floats
from erase.evaluation.classes import score
from erase.evaluation.clip import Clip, beside, cosines, numbered, text_features

OTHER = "something else"
"""An alternative in any case, unless alternatives are named."""
LEAST = 0.8
"""Of the base's images, the least share that a judge must be right on, as a fraction of 1."""
AT_ONCE = 4_000_000
"""Similarities in memory at a time."""
MOST = 0.2
"""Of the base's other images, the largest share that a judge may mistake for the concept."""
FEWEST = 6
"""Images, on fewer of which no judge is calibrated; nor does a paired test of fewer show anything."""


@dataclass(frozen=True)
class Texts:
    """What an image may be of."""

    concept: tuple[str, ...]
    """What is forgotten, in all the words that it is asked for by."""
    alternatives: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """What zero-shot classification makes of N images."""

    best: list[str]
    """The most similar text, of concept and alternatives."""
    shows: list[bool]
    """Whether one of the concept's texts is more similar than every alternative that names something. `OTHER` does not
    count here: a damaged image of the concept is unlike all the words that there are, and still shows it."""
    right: list[bool]
    """Whether the image's own prompt is more similar than every text of concept and alternatives but itself."""
    own: Floats
    """Cosine of each image and its own prompt."""


def look(clip: Clip, images: Iterable[Floats], texts: Texts, prompts: Sequence[str]) -> Seen:
    """Classify images.

    Args:
        clip: the model.
        images: blocks `[n, D]` of `feature_blocks`, N images in all.
        texts: what they may be of.
        prompts: `[N]`, what they were asked to show.

    Raises:
        ValueError: without a text on either side, or with one that is on both; another number of prompts than images.
    """
    if not texts.concept or not texts.alternatives or set(texts.concept) & set(texts.alternatives):
        raise ValueError(
            f"a concept needs texts and other texts to be distinguished from: got {list(texts.concept)} and "
            f"{list(texts.alternatives)}, expected at least one text each, and none on both sides"
        )
    known = list(dict.fromkeys([*texts.concept, *texts.alternatives]))
    distinct, index = numbered([*known, *prompts])
    features = text_features(clip, distinct)  # the known ones first
    concept = np.arange(len(known)) < len(set(texts.concept))
    naming = np.array([text != OTHER or texts.alternatives == (OTHER,) for text in known])
    seen, owns = Seen([], [], [], np.empty(0)), []
    for block, asked in beside(images, index[len(known) :]):
        owns.append(cosines(block, features[asked]))
        at_once = max(1, AT_ONCE // len(known))
        for start in range(0, len(block), at_once):
            some = slice(start, start + at_once)
            near = block[some] @ features[: len(known)].T  # [at_once, T]
            seen.best.extend(known[i] for i in near.argmax(axis=1))
            seen.shows.extend(concept[np.where(naming, near, -np.inf).argmax(axis=1)].tolist())
            rival = asked[some] < len(known)  # an image's own prompt is not its rival
            near[np.flatnonzero(rival), asked[some][rival]] = -np.inf
            seen.right.extend((owns[-1][some] > near.max(axis=1)).tolist())
    return replace(seen, own=np.concatenate(owns))


def joined(parts: Sequence[Seen]) -> Seen:
    """What was made of some images after the other, in order."""
    best, shows, right = ([v for part in parts for v in getattr(part, name)] for name in ("best", "shows", "right"))
    return Seen(best, shows, right, np.concatenate([part.own for part in parts]))


@dataclass(frozen=True)
class Calibration:
    """How well a judge knows what the base model draws; scores as of `erase.evaluation.classes.score`."""

    recognised: dict[str, Any]
    """Of images of the concept, those said to show it."""
    right: dict[str, Any]
    """Of the others, those whose own prompt wins."""
    mistaken: dict[str, Any]
    """Of the others, those said to show the concept: `correct` is how many."""
    doubts: dict[str, str] = field(default_factory=dict)
    """Why the judge has no say on a side, `forget` or `remain`; a side that is not here it knows."""

    def __str__(self) -> str:
        parts = [f"the concept recognised in {_of(self.recognised)} of the base's images"]
        if self.right["n"]:
            parts.append(f"{_of(self.right)} of the others right, {_of(self.mistaken)} mistaken for it")
        return ", ".join(parts)


def _of(found: dict[str, Any]) -> str:
    share = "" if found["accuracy"] is None else f" ({100 * found['accuracy']:.0f} %)"
    return f"{found['correct']} of {found['n']}{share}"


def calibrate(recognised: dict[str, Any], right: dict[str, Any], mistaken: int) -> Calibration:
    """Whether a judge is to be believed, from what it says of the base's images.

    On the forget side it is, if it recognises the concept in at least `LEAST` of the concept's images and mistakes at
    most `MOST` of the others for it; on the remain side, if it is right on at least `LEAST` of the others; and of each
    side's images there are at least `FEWEST`.

    Args:
        recognised: how many images of the concept are said to show it, as of `erase.evaluation.classes.score`.
        right: of how many other images the own prompt wins, likewise.
        mistaken: how many other images are said to show the concept.
    """
    doubts: dict[str, str] = {}
    wrong = score([True] * mistaken + [False] * (right["n"] - mistaken))
    unknown = "the judge does not know the concept: it sees it in"
    if recognised["n"] < FEWEST:
        doubts["forget"] = f"{recognised['n']} images of the base are too few to calibrate on, below {FEWEST}"
    elif recognised["accuracy"] < LEAST:
        doubts["forget"] = f"{unknown} {_of(recognised)} of the base's images of it, below {100 * LEAST:.0f} %"
    elif wrong["n"] and wrong["accuracy"] > MOST:
        doubts["forget"] = f"{unknown} {_of(wrong)} of the base's other images, above {100 * MOST:.0f} %"
    if right["n"] < FEWEST:
        doubts["remain"] = f"{right['n']} other images of the base are too few to calibrate on, below {FEWEST}"
    elif right["accuracy"] < LEAST:
        doubts["remain"] = (
            f"the judge does not know the other prompts: it is right on {_of(right)} of the base's images of them, "
            f"below {100 * LEAST:.0f} %"
        )
    return Calibration(recognised, right, wrong, doubts)
