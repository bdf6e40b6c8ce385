import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erase.classification import splits
from erase.store.labelled import LabelledImages

N = 60


def data(brightness: int = 0, count: int = N) -> LabelledImages:
    pixels = (torch.arange(count) + brightness).to(torch.uint8).view(-1, 1, 1, 1)
    return LabelledImages(pixels, torch.arange(count) % 3, ("ant", "bee", "cow"))


def make(**settings: Any) -> splits.Split:
    return splits.make(data(), **{"validation": 0.1, "seed": 0, **settings})


@pytest.mark.parametrize("how", [{"fraction": 0.5}, {"labels": [1]}, {"ids": [3, 0, 59]}], ids=str)
def test_every_image_is_in_one_part(how: dict[str, Any]) -> None:
    split = make(**how)
    parts = [split.forget.tolist(), split.validation.tolist(), split.remain.tolist()]
    assert sorted(i for part in parts for i in part) == list(range(N))
    assert all(part == sorted(part) and part for part in parts)
    assert len(split.validation) == 6
    assert sorted(split.forget.tolist() + split.remain.tolist()) == split.train.tolist()


def test_what_is_forgotten() -> None:
    assert len(make(fraction=0.5).forget) == 27
    labels = data().labels
    assert not bool((labels[make(labels=[0, 2]).remain] != 1).any())
    for seed in range(20):  # what is named is never held out
        assert make(ids=[3, 0, 59], seed=seed).forget.tolist() == [0, 3, 59]
        assert make(labels=[1], seed=seed).forget.tolist() == (labels == 1).nonzero().flatten().tolist()
    assert len(make(labels=[1], validation=0.6).validation) == 36
    nothing = make()
    assert (len(nothing.forget), len(nothing.remain), nothing.how) == (0, 54, {})


def test_a_split_is_of_its_seed() -> None:
    a, b, c = (make(fraction=0.1, seed=seed) for seed in (0, 0, 1))
    assert a.digest == b.digest != c.digest
    assert a.forget.tolist() != c.forget.tolist()
    assert a.validation.tolist() != c.validation.tolist()


def test_splits_of_a_seed_share_what_is_held_out() -> None:
    small, large, named = make(fraction=0.1), make(fraction=0.5), make(labels=[2])
    assert small.validation.tolist() == large.validation.tolist()
    there = [i for i in small.validation.tolist() if i % 3 != 2]
    assert 0 < len(there) < 6
    assert {*there} < {*named.validation.tolist()}
    assert set(small.forget.tolist()) < set(large.forget.tolist())


def test_a_file_gives_the_split_again(tmp_path: Path) -> None:
    for how in ({"fraction": 0.3}, {"labels": [0]}, {"ids": [7]}):
        split = make(**how)
        splits.write(split, tmp_path / "split.json")
        again = splits.read(tmp_path / "split.json", data())
        assert again.digest == split.digest
        assert torch.equal(again.remain, split.remain)
        found = json.loads((tmp_path / "split.json").read_text())
        assert (found["seed"], found["sha256"]) == (0, split.digest)


def test_a_split_that_holds_out_what_it_forgets_is_refused(tmp_path: Path) -> None:
    """As splits of classes did before."""
    split = make(labels=[1])
    splits.write(replace(split, forget=split.forget[2:], validation=split.forget[:2]), tmp_path / "split.json")
    with pytest.raises(ValueError, match=r"split\.json.+forget\.labels"):
        splits.read(tmp_path / "split.json", data())


def test_a_split_of_other_data_is_refused(tmp_path: Path) -> None:
    splits.write(make(fraction=0.3), tmp_path / "split.json")
    for other in (data(brightness=1), data(count=59)):
        with pytest.raises(
            ValueError, match=rf"split\.json is a split of another data set \(60 images, .*{len(other)}"
        ):
            splits.read(tmp_path / "split.json", other)


def test_a_split_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    splits.write(make(fraction=0.3), path)
    found = json.loads(path.read_text())
    for key, value in (("forget", found["forget"][1:]), ("seed", 1), ("sha256", "0")):
        path.write_text(json.dumps({**found, key: value}))
        with pytest.raises(ValueError, match="was changed after it was written"):
            splits.read(path, data())
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not a split file"):
        splits.read(path, data())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fraction": 0.0}, "forget.fraction must be above 0 and below 1; got 0.0"),
        ({"fraction": 1.0}, "forget.fraction must be above 0 and below 1; got 1.0"),
        ({"fraction": 0.001}, r'the forget set is empty \(\{"fraction": 0.001\} of 60 training images\)'),
        ({"fraction": 0.999}, r"the forget set \(.+\) has all of the 60 training images"),
        ({"labels": [0, 1, 2]}, r"the forget set \(.+\) has all of the 60 training images"),
        ({"labels": [3]}, "no class 3"),
        ({"ids": range(N), "validation": 0.0}, r"the forget set \(.+\) has all of the 60 training images"),
        ({"ids": [60]}, "no image 60; the 60 training images are numbered 0–59"),
        ({"ids": [-1]}, "no image -1"),
        ({"fraction": 0.5, "validation": 1.0}, "data.validation must be at least 0 and below 1"),
    ],
    ids=str,
)
def test_splits_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**settings)
