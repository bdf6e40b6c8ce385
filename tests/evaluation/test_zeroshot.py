"""A zero-shot judge: what it says of images whose place is known, and when it is believed."""

from pathlib import Path

import numpy as np
import pytest

from erase.evaluation import zeroshot
from erase.evaluation.classes import score
from erase.evaluation.clip import open_clip, text_features
from erase.evaluation.zeroshot import Texts, calibrate, look

TEXTS = Texts(("a cat", "a sepia photo of a cat"), ("a dog", "a car", "something else"))


@pytest.mark.parametrize("kind", ["micro_clip", "micro_siglip"])
def test_an_image_shows_what_it_is_most_similar_to(kind: str, request: pytest.FixtureRequest) -> None:
    """Images that are where texts are: of the concept in any of its words, of an alternative, and of neither."""
    clip = open_clip(request.getfixturevalue(kind))
    shown = ["a cat", "a sepia photo of a cat", "a dog", "something else", "a boat", "a car"]
    asked = ["a dog", "a cat", "a dog", "a car", "a boat", "a cat"]
    found = look(clip, text_features(clip, shown), TEXTS, asked)
    assert found.best[:4] == shown[:4]
    assert found.best[5] == "a car"
    assert [found.shows[i] for i in (0, 1, 2, 3, 5)] == [True, True, False, False, False]
    # own prompt against all others: a prompt that is no alternative ("a boat") is told from them too
    assert found.right == [False, False, True, False, True, False]


def test_by_hand(micro_clip: Path) -> None:
    """On random images the same as text by text, over a loop."""
    clip, rng = open_clip(micro_clip), np.random.default_rng(0)
    images = rng.normal(size=(40, text_features(clip, ["x"]).shape[1]))
    asked = [["a cat", "a dog", "a boat"][i % 3] for i in range(40)]
    found = look(clip, images, TEXTS, asked)
    both = [*TEXTS.concept, *TEXTS.alternatives]
    for i, (image, prompt) in enumerate(zip(images, asked, strict=True)):
        near = {text: float(image @ text_features(clip, [text])[0]) for text in {*both, prompt}}
        concept, other = (max(near[text] for text in side) for side in (TEXTS.concept, TEXTS.alternatives))
        assert found.shows[i] is (concept > other)
        assert found.right[i] is (max(near, key=near.__getitem__) == prompt)
    assert 0 < sum(found.shows) < 40
    assert 0 < sum(found.right) < 40


@pytest.mark.parametrize("texts", [Texts((), ("a",)), Texts(("a",), ()), Texts(("a", "b"), ("b",))])
def test_a_concept_needs_words_of_its_own(micro_clip: Path, texts: Texts) -> None:
    clip = open_clip(micro_clip)
    with pytest.raises(ValueError, match="both sides"):
        look(clip, text_features(clip, ["a"]), texts, ["a"])


def of(correct: int, n: int) -> dict[str, object]:
    return score([True] * correct + [False] * (n - correct))


@pytest.mark.parametrize(
    ("recognised", "right", "mistaken", "doubts"),
    [
        ((8, 10), (8, 10), 2, ()),
        ((7, 10), (8, 10), 0, ("forget",)),  # does not recognise it
        ((10, 10), (8, 10), 3, ("forget",)),  # sees it everywhere
        ((10, 10), (7, 10), 0, ("remain",)),
        ((5, 5), (5, 5), 0, ("forget", "remain")),  # too few
        ((6, 6), (0, 0), 0, ("remain",)),
        ((0, 10), (0, 10), 10, ("forget", "remain")),
    ],
)
def test_a_judge_is_believed_on_what_it_knows(
    recognised: tuple[int, int], right: tuple[int, int], mistaken: int, doubts: tuple[str, ...]
) -> None:
    found = calibrate(of(*recognised), of(*right), mistaken)
    assert tuple(found.doubts) == doubts
    assert f"{recognised[0]} of {recognised[1]}" in str(found)
    assert (zeroshot.LEAST, zeroshot.MOST, zeroshot.FEWEST) == (0.8, 0.2, 6)
