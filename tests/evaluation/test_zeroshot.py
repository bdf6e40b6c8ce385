"""A zero-shot judge: what it says of images whose place is known, and when it is believed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erase import resources
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import open_model
from erase.evaluation import classes, zeroshot
from erase.evaluation.classes import score
from erase.evaluation.clip import image_features, open_clip, text_features
from erase.evaluation.generate import generate
from erase.evaluation.prompt_files import read_prompts
from erase.evaluation.zeroshot import Texts, calibrate, look

TEXTS = Texts(("a cat", "a sepia photo of a cat"), ("a dog", "a car", "something else"))


@pytest.mark.parametrize("kind", ["micro_clip", "micro_siglip"])
def test_an_image_shows_what_it_is_most_similar_to(kind: str, request: pytest.FixtureRequest) -> None:
    """Images that are where texts are: of the concept in any of its words, of an alternative, and of neither."""
    clip = open_clip(request.getfixturevalue(kind))
    shown = ["a cat", "a sepia photo of a cat", "a dog", "something else", "a boat", "a car"]
    asked = ["a dog", "a cat", "a dog", "a car", "a boat", "a cat"]
    found = look(clip, [text_features(clip, shown)], TEXTS, asked)
    assert found.best[:4] == shown[:4]
    assert found.best[5] == "a car"
    assert [found.shows[i] for i in (0, 1, 2, 5)] == [True, True, False, False]
    # own prompt against all others: a prompt that is no alternative ("a boat") is told from them too
    assert found.right == [False, False, True, False, True, False]


def test_by_hand(micro_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On random images the same as text by text, over a loop; and in whatever blocks."""
    clip, rng = open_clip(micro_clip), np.random.default_rng(0)
    images = rng.normal(size=(40, text_features(clip, ["x"]).shape[1]))
    asked = [["a cat", "a dog", "a boat"][i % 3] for i in range(40)]
    found = look(clip, [images], TEXTS, asked)
    both = [*TEXTS.concept, *TEXTS.alternatives]
    for i, (image, prompt) in enumerate(zip(images, asked, strict=True)):
        near = {text: float(image @ text_features(clip, [text])[0]) for text in {*both, prompt}}
        concept, other = (max(near[text] for text in side) for side in (TEXTS.concept, ("a dog", "a car")))
        assert found.shows[i] is (concept > other)  # "something else" does not take an image from the concept
        assert found.right[i] is (max(near, key=near.__getitem__) == prompt)
        assert found.own[i] == pytest.approx(near[prompt], abs=1e-5)  # float32, other batches of texts
    assert 0 < sum(found.shows) < 40
    assert 0 < sum(found.right) < 40
    monkeypatch.setattr(zeroshot, "AT_ONCE", 15)
    parts = zeroshot.joined([look(clip, [x[:4], x[4:]], TEXTS, y) for x, y in halves(images, asked)])
    assert (parts.best, parts.shows, parts.right) == (found.best, found.shows, found.right)
    assert parts.own == pytest.approx(found.own, abs=1e-6)


def halves(*of: Any) -> Any:
    return zip(*((x[:17], x[17:]) for x in of), strict=True)


def test_something_else_is_an_alternative_where_there_is_no_other(micro_clip: Path) -> None:
    clip = open_clip(micro_clip)
    shown = ["a cat", zeroshot.OTHER]
    assert look(clip, [text_features(clip, shown)], Texts(("a cat",), (zeroshot.OTHER,)), shown).shows == [True, False]


@pytest.mark.parametrize("texts", [Texts((), ("a",)), Texts(("a",), ()), Texts(("a", "b"), ("b",))])
def test_a_concept_needs_words_of_its_own(micro_clip: Path, texts: Texts) -> None:
    clip = open_clip(micro_clip)
    with pytest.raises(ValueError, match="both sides"):
        look(clip, [text_features(clip, ["a"])], texts, ["a"])


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


@pytest.mark.slow
def test_the_embedded_judges_agree(tmp_path: Path) -> None:
    """On images of the embedded model, whichever object is the concept, and told what they show by words alone."""
    rows = read_prompts(resources.prompt_path("photos-plain"))
    model = open_model(locate("photos-sd", "text"))
    generate(model.sampler(steps=8, guidance=3.0), rows, tmp_path, per_prompt=2, batch_size=22)
    asked = [row for row in rows for _ in range(2)]
    paths = sorted(tmp_path.glob("*.png"))
    assert len(paths) == len(asked) == 22
    seen = classes.axis(classes.classify(paths, resources.tiny_path("photos-classifier")), 0).predicted
    clip = open_clip("photos-clip")
    images = image_features(clip, paths)
    alike = []
    for gone in rows:
        others = [row.prompt for row in rows if row is not gone]
        found = look(clip, [images], Texts((gone.prompt,), (*others, zeroshot.OTHER)), [row.prompt for row in asked])
        alike += [shows is (name == gone.object) for shows, name in zip(found.shows, seen, strict=True)]
        alike += [right is (name == row.object) for right, name, row in zip(found.right, seen, asked, strict=True)]
    assert sum(alike) / len(alike) >= 0.95


@pytest.mark.slow
def test_the_emoji_clip_knows_what_is_drawn(tmp_path: Path) -> None:
    """Images of the transformer, among the concepts of the prompt set: mostly what the emoji judge says too."""
    rows = read_prompts(resources.prompt_path("emoji-far"))
    model = open_model(locate("emoji-sd3", "text"))
    generate(model.sampler(steps=12, guidance=2.0), rows, tmp_path, per_prompt=1, batch_size=32)
    paths = sorted(tmp_path.glob("*.png"))
    shown = classes.axis(classes.classify(paths, resources.tiny_path("emoji-judge")), "object").shown
    things = list(dict.fromkeys(row.object for row in rows))
    clip = open_clip("emoji-clip")
    among = Texts((f"a {things[0]}",), tuple(f"a {thing}" for thing in things[1:]))
    found = look(clip, [image_features(clip, paths)], among, [f"a {row.object}" for row in rows])
    alike = [best in {f"a {thing}" for thing in seen} for best, seen in zip(found.best, shown, strict=True)]
    assert len(alike) > 40
    assert sum(alike) / len(alike) >= 0.8
    assert sum(found.right) / len(alike) >= 0.8
