import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from erase.engine.fisher import Fisher
from erase.engine.saliency import Mask, fisher_ratio_mask, load_mask, magnitude_mask, parked, save_mask
from erase.store.safetensors import write_safetensors

INF = float("inf")
SCORES = st.one_of(st.sampled_from([0.0, 1.0, 2.0, INF]), st.floats(0, 3, width=32))


def fisher(values: list[float], per: str = "sample") -> Fisher:
    return Fisher({"w": torch.tensor(values)}, per, 1)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=80)
@given(
    first=st.lists(SCORES, min_size=1, max_size=20),
    second=st.lists(SCORES, min_size=2, max_size=20),
    density=st.floats(0.01, 1),
)
def test_density_is_exact_against_a_sort(first: list[float], second: list[float], density: float) -> None:
    # one tensor 2-D with its rows apart in memory, as channels-last weights have them
    scores = {"a": torch.tensor(first), "b": torch.tensor([second, second]).t()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    want = max(1, round(density * len(flat)))
    cut = flat.sort(descending=True).values[want - 1]
    expected = {n: torch.ones_like(s, dtype=torch.bool) if want == len(flat) else s >= cut for n, s in scores.items()}
    if want < len(flat):  # never a weight without any score
        expected = {n: m & (scores[n] > 0) for n, m in expected.items()}
    kept = sum(int(m.sum()) for m in expected.values())
    if kept == 0 or (kept == len(flat) and density < 1):
        with pytest.raises(ValueError, match=r"keeps (no weights|every weight)"):
            magnitude_mask(scores, density=density)
        return
    mask = magnitude_mask(scores, density=density)
    assert all(torch.equal(mask.named[n], expected[n]) for n in scores)
    assert mask.density == kept / len(flat)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [  # ratios 4, 1, .5, 0/0, x/0, 0/x
        ({"threshold": 0.0}, [1, 1, 1, 1, 1, 1]),
        ({"threshold": 0.5}, [1, 1, 1, 0, 1, 0]),
        ({"threshold": 1.0}, [1, 1, 0, 0, 1, 0]),
        ({"threshold": 1e30}, [0, 0, 0, 0, 1, 0]),
        ({"density": 0.34}, [1, 0, 0, 0, 1, 0]),
        ({"density": 0.9}, [1, 1, 1, 0, 1, 0]),  # fewer than asked for: the rest moves no forget loss
        ({"density": 1.0}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_ratio(choice: dict[str, float], expected: list[int]) -> None:
    mask = fisher_ratio_mask(fisher([4, 1, 1, 0, 1e-30, 0]), fisher([1, 1, 2, 0, 0, 1]), **choice)
    assert mask["w"].tolist() == [bool(e) for e in expected]
    assert [mask.density, mask.per_layer()["w"]] == pytest.approx([sum(expected) / 6] * 2)
    assert mask.meta["per"] == "sample"


@pytest.mark.parametrize("choice", [{"threshold": 1.5}, {"density": 0.3}])
def test_a_parked_diagonal_takes_no_memory_and_makes_the_same_mask(choice: dict[str, float], tmp_path: Path) -> None:
    draws = [torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    draws[0] = draws[0].transpose(1, 2)  # another layout than a file's
    sides = [Fisher({"w": x, "b": x[0]}, "sample", 3) for x in (draws[0], draws[1].transpose(1, 2))]
    expected = fisher_ratio_mask(*sides, **choice)
    kept = weakref.ref(draws[0])
    remain = sides.pop()
    draws.clear()
    with parked(sides.pop(), tmp_path) as forget:
        gc.collect()
        assert kept() is None
        found = fisher_ratio_mask(forget, remain, **choice)
        assert (forget.per, forget.count) == ("sample", 3)
    assert found.meta == expected.meta
    assert all(bool((found[name] == expected[name]).all()) for name in ("w", "b"))
    assert not list(tmp_path.iterdir())


def test_a_mask_says_that_gradients_were_clipped(tmp_path: Path) -> None:
    sides = [replace(fisher(values), meta={"clip": "1.0"}) for values in ([4, 1], [1, 2])]
    save_mask(fisher_ratio_mask(*sides, threshold=1.0), tmp_path / "mask")
    assert load_mask(tmp_path / "mask").meta["clip"] == "1.0"


@pytest.mark.parametrize(
    ("forget", "remain", "choice", "message"),
    [
        (fisher([1, 2]), fisher([1, 2], "batch"), {"threshold": 1.0}, "different kinds .* 'sample'.* 'batch'"),
        (fisher([1, 2]), replace(fisher([1, 2]), meta={"clip": "1.0"}), {"threshold": 1.0}, "different kinds .*clip"),
        (fisher([1, 2]), Fisher({"v": torch.ones(2)}, "sample", 1), {"threshold": 1.0}, "different parameters: v, w"),
        (fisher([1, 2]), fisher([1, 2]), {}, "exactly one"),
        (fisher([1, 2]), fisher([1, 2]), {"threshold": 1.0, "density": 0.5}, "exactly one"),
        (fisher([1, 2]), fisher([1, 2]), {"threshold": -1.0}, "threshold must be ≥ 0; got -1.0"),
        (fisher([1, 2]), fisher([1, 2]), {"threshold": float("nan")}, "threshold must be ≥ 0; got nan"),
        (fisher([1, 2]), fisher([1, 2]), {"density": 0.0}, r"density must be in \(0, 1\]; got 0.0"),
        (fisher([1, 2]), fisher([1, 2]), {"density": 1.1}, r"density must be in \(0, 1\]; got 1.1"),
        (fisher([1, 2]), fisher([1, 2]), {"threshold": 2.0}, "no weights .*threshold 2.0"),
        (fisher([1, 0]), fisher([0, 0]), {"threshold": INF}, "no weights"),
        (fisher([1, 2]), fisher([1, 2]), {"threshold": 0.5}, "every weight .*threshold 0.5"),
        (fisher([1, 1]), fisher([1, 1]), {"density": 0.5}, "every weight .*density 0.5"),  # all tie
        (fisher([0, 0]), fisher([1, 1]), {"density": 0.5}, "no weights"),
    ],
)
def test_bad_ratio(forget: Fisher, remain: Fisher, choice: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_ratio_mask(forget, remain, **choice)


@pytest.mark.parametrize("scores", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, float("nan")])])
def test_magnitude_takes_no_negative_and_no_nan(scores: Tensor) -> None:
    with pytest.raises(ValueError, match="takes scores ≥ 0"):
        magnitude_mask({"w": scores}, density=0.5)


def test_an_unknown_parameter_is_a_key_error() -> None:
    with pytest.raises(KeyError, match=r"no entry for 'other' \(1 entries\)"):
        Mask({"w": torch.ones(2, dtype=torch.bool)})["other"]


def test_file_is_bit_packed_and_comes_back(tmp_path: Path) -> None:
    g = toys.gen()
    named = {f"layer.{i}": torch.rand(s, generator=g) < 0.3 for i, s in enumerate([(), (7,), (3, 5, 2), (200, 333)])}
    named["channels_last"] = (torch.rand(4, 3, 2, 2, generator=g) < 0.5).to(memory_format=torch.channels_last)
    mask = Mask(named, {"source": "fisher", "threshold": "1.0"})
    path = tmp_path / "new folder" / "saliency.safetensors"
    save_mask(mask, path)
    read = load_mask(path)
    assert toys.same(read.named, named)
    assert read.meta == mask.meta
    packed = sum(-(-m.numel() // 8) for m in named.values())
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == packed + header
    assert header < 200 * len(named) + 400


def test_broken_files_are_one_value_error(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        load_mask(path)
    save_mask(Mask({"w": torch.ones(1000, dtype=torch.bool)}), path)
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"mask\.safetensors is cut short or not a safetensors"):
            load_mask(path)
    write_safetensors(path, {"w": torch.ones(3)}, {"format": "other"})
    with pytest.raises(ValueError, match=r"is not a saliency mask .*'other'"):
        load_mask(path)
