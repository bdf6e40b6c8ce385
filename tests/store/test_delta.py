"""Deltas: exact both ways whatever the dtype, sparse, and of one base only."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import gen, same

from erase.store import delta
from erase.store.safetensors import digest, open_safetensors

META = {"erase": "0", "erase_base": "toy", "erase_method": "sfron"}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def model(dtype: torch.dtype) -> dict[str, Tensor]:
    made = {n: torch.randn(size, generator=gen(i)).to(dtype) for i, (n, size) in enumerate(SIZES.items())}
    made["odd"][0] = float("nan")
    made["odd"][1] = -0.0
    return made


SIZES = {"some": (7, 3), "all": (4, 4), "none": (5,), "odd": (11,), "one": ()}


def changed(base: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {n: t.clone() for n, t in base.items()}
    new["some"][2, 1:] += 1
    new["all"] = -new["all"]
    new["odd"][:3] = torch.tensor([float("inf"), 0.0, 5e-8]).to(new["odd"])
    new["one"] += 1
    return new


def whole(path: Path, base: dict[str, Tensor], undo: bool = False) -> dict[str, Tensor]:
    return {**base, **delta.apply(delta.open_delta(path), base, undo=undo)}


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.reshape(-1).view(torch.uint8) for n, t in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base = model(dtype)
    erased = changed(base)
    delta.write_delta(base, erased, tmp_path / "d", META)
    there = whole(tmp_path / "d", base)
    assert same(bits(there), bits(erased))  # NaN and signed zeros too
    assert same(bits(whole(tmp_path / "d", there, undo=True)), bits(base))
    assert all(there[n].shape == base[n].shape and there[n].dtype == dtype for n in base)


def test_only_what_changed_is_stored(tmp_path: Path) -> None:
    base = model(torch.float16)
    delta.write_delta(base, changed(base), tmp_path / "d", META)
    found = load_file(tmp_path / "d")
    assert {n: len(t) for n, t in found.items() if n.startswith("xor/")} == {
        "xor/some": 2,
        "xor/all": 16,
        "xor/odd": 3,
        "xor/one": 1,
    }
    assert {n: len(t) for n, t in found.items() if n.startswith("at/")} == {"at/some": 3, "at/odd": 2}
    header = open_safetensors(tmp_path / "d")[1]
    assert header["changed"] == "22 of 54"
    assert header["base_sha256"] == digest(base)
    opened = delta.open_delta(tmp_path / "d")
    assert (opened.meta, opened.base_meta) == (META, {})
    delta.write_delta(base, base, tmp_path / "d", META, {"erase": "before"})
    again = delta.open_delta(tmp_path / "d")
    assert (again.meta, again.base_meta) == (META, {"erase": "before"})
    assert opened.names == ["all", "odd", "one", "some"]


def test_nothing_changed(tmp_path: Path) -> None:
    base = model(torch.float32)
    delta.write_delta(base, base, tmp_path / "d", META)
    assert same(bits(whole(tmp_path / "d", base)), bits(base))


def test_another_model_is_refused(tmp_path: Path) -> None:
    base = model(torch.float16)
    erased = changed(base)
    delta.write_delta(base, erased, tmp_path / "d", META)
    other = {**base, "none": base["none"] + 1}
    for stored, undo, said in (
        (other, False, "takes the weights of its base, toy; their SHA-256 is [0-9a-f]{16}…, expected"),
        ({n: t.float() for n, t in base.items()}, False, "their SHA-256 is"),
        ({n: t for n, t in base.items() if n != "none"}, False, "their SHA-256 is"),
        (erased, False, "they are erased already"),
        (base, True, "takes the weights of the model that it erased; they are its base's, toy"),
        (other, True, "their SHA-256 is"),
    ):
        with pytest.raises(ValueError, match=said):
            delta.apply(delta.open_delta(tmp_path / "d"), stored, undo=undo)


def test_a_damaged_delta_is_refused(tmp_path: Path) -> None:
    base = model(torch.float16)
    delta.write_delta(base, changed(base), tmp_path / "d", META)
    tensors, header = load_file(tmp_path / "d"), open_safetensors(tmp_path / "d")[1]
    flipped = tensors["xor/all"].clone()
    flipped[3] ^= 1
    damages: list[tuple[dict[str, Tensor], str]] = [
        ({**tensors, "xor/all": flipped}, "its result has another SHA-256 than it says"),
        ({n: t for n, t in tensors.items() if n != "xor/all"}, "its result has another SHA-256"),
        ({**tensors, "xor/some": tensors["xor/some"][:1]}, "some changes in 2 places by 1 values"),
        ({**tensors, "xor/all": tensors["xor/all"][:1]}, "all has 16 elements, its change 1"),
        ({**tensors, "xor/some": tensors["xor/some"].int()}, "some is of F16, its change of I32"),
        ({**tensors, "at/some": tensors["at/some"][:2]}, "the bits of some do not fit its 21 elements"),
        ({**tensors, "xor/new": tensors["xor/some"].clone()}, "changes new, which the model does not have"),
    ]
    for damaged, said in damages:
        save_file(damaged, tmp_path / "x", metadata=header)
        with pytest.raises(ValueError, match=said) as caught:
            delta.apply(delta.open_delta(tmp_path / "x"), base)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, struct.pack("<Q", 2 * 1024**3) + b"{}" * 40, None])
def test_what_is_no_delta_is_refused(tmp_path: Path, data: Any) -> None:
    if data is None:
        save_file({"w": torch.zeros(2)}, tmp_path / "x")
    else:
        (tmp_path / "x").write_bytes(data)
    with pytest.raises(
        ValueError, match="is not a delta of erase" if data is None else "cut short or not a safetensors"
    ):
        delta.open_delta(tmp_path / "x")
    with pytest.raises(ValueError, match="no such file"):
        delta.open_delta(tmp_path / "none")
