import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase.engine.loop import Checkpoint, NonFiniteError, unlearn
from erase.engine.losses import Objective, plain
from erase.engine.state import load_state, save_state
from erase.methods.sfron import sfron
from erase.store.safetensors import KINDS, Lazy, digest, read_safetensors, write_safetensors


def test_state_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "a": [1, 2.5, None, True, "text", float("inf")],
        "b": {0: {"step": torch.tensor(3.0), "x.y": shared[:4]}, "0": shared[3:]},
        "half": torch.ones(2, dtype=torch.bfloat16),
        "layout": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": {},
    }
    save_state(tmp_path / "new" / "state", state)
    read = load_state(tmp_path / "new" / "state")
    assert read["a"] == state["a"]
    assert list(read["b"]) == [0, "0"]
    assert torch.equal(read["b"][0]["x.y"], shared[:4])
    assert torch.equal(read["b"]["0"], shared[3:])
    assert read["b"][0]["step"].shape == ()
    assert read["half"].dtype == torch.bfloat16
    assert torch.equal(read["layout"], state["layout"])
    assert read["empty"] == {}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["state"]
    save_state(tmp_path / "plain", {"n": 1})
    assert load_state(tmp_path / "plain") == {"n": 1}
    with pytest.raises(TypeError, match=r"state\.x: object cannot be stored"):
        save_state(tmp_path / "bad", {"x": object()})
    assert not (tmp_path / "bad").exists()


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(ValueError, match="no such file"):
        load_state(path)
    write_safetensors(path, {"x": torch.ones(3)}, {"format": "other"})
    assert torch.equal(read_safetensors(path)[0]["x"], torch.ones(3))
    with pytest.raises(ValueError, match=r"is not a run state .*'other'"):
        load_state(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        load_state(path)


ODD = {f"key {i}": str(i) for i in range(12)} | {
    "format": "pt",
    "": "empty",
    "é→日本": "😀 \u2028 \x7f \x1b \x00",
    'quote "': 'a\nb\tc\r\b\f \\ / "',
    "nested": json.dumps({"a": ["→", 1.5, None]}),
}


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    """Whatever the order it comes in; and nothing of the metadata is lost by putting it in order."""
    tensors = {name: torch.full((n,), float(n)) for n, name in enumerate("cab", 1)}
    tensors["half"] = torch.ones(3, dtype=torch.float16)
    files = []
    for number in range(4):
        path, turn = tmp_path / str(number), (lambda x, n=number: dict(sorted(x.items(), reverse=n % 2 == 1)))
        write_safetensors(path, turn(tensors), turn(ODD))
        files.append(path.read_bytes())
    assert len(set(files)) == 1
    found, meta = read_safetensors(path)
    assert meta == ODD
    assert toys.same(found, tensors)
    size = int.from_bytes(files[0][:8], "little")
    header = json.loads(files[0][8 : 8 + size])
    assert list(header["__metadata__"]) == sorted(ODD)
    assert size % 8 == 0  # tensors stay aligned
    ODD_AND_MORE = {**ODD, "one": "more"}
    write_safetensors(tmp_path / "other", tensors, ODD_AND_MORE)
    assert (tmp_path / "other").read_bytes() != files[0]


def test_files_without_tensors_or_metadata_come_back(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "bare", {"x": torch.ones(2)}, {})
    assert read_safetensors(tmp_path / "bare")[1] == {}
    write_safetensors(tmp_path / "empty", {}, {"b": "1", "a": "2"})
    assert read_safetensors(tmp_path / "empty") == ({}, {"b": "1", "a": "2"})


@pytest.mark.slow
def test_equal_content_is_equal_bytes_in_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of this process and of one that orders sets another way."""
    code = """
import sys
from pathlib import Path
import torch
from erase.engine.state import save_state
from erase.store.safetensors import write_safetensors
from erase.engine.saliency import Mask, save_mask
out = Path(sys.argv[1])
names = {f"key-{i}" for i in range(20)}  # a set: its order is the hash seed's
write_safetensors(out / "weights", {n: torch.ones(3) for n in names}, {n: n for n in names})
save_mask(Mask({"w": torch.ones(9, dtype=torch.bool)}, {n: n for n in sorted(names)}), out / "mask")
save_state(out / "state", {"a": {"b": torch.ones(2)}, "c": [1, None]})
print(*names)
"""
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "here")])
    exec(code, {})
    theirs, mine = done.stdout.split(), capsys.readouterr().out.split()
    assert mine != theirs
    assert sorted(mine) == sorted(theirs)
    for name in ("weights", "mask", "state"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


def train(path: Path | None = None, net: Any = None, **changes: Any) -> toys.Weights:
    """A run with everything that has state; `steps` is the run's length, `until` where it is interrupted."""
    settings: dict[str, Any] = {"seed": 0, "rate": 0.01, "rule": "adam", "resume": True, "until": None, "steps": 6}
    settings |= {"average": 0.9, **changes}
    net = net or toys.conv()
    rows: list[Any] = []

    def log(row: Any) -> None:
        rows.append(row)
        if row["step"] + 1 == settings["until"]:
            raise KeyboardInterrupt

    method = sfron(
        mask=toys.some_mask(net),
        fast_rate=settings["rate"],
        fast_rule=settings["rule"],
        outer_rate=0.6,
        slow_steps=2,
        every=2,
        slow_schedule="cosine",
    )
    method = replace(method, average=settings["average"])
    sides = {side: toys.batches(seed, count=4, shape=(2, 2)) for seed, side in enumerate(("forget", "remain"))}
    unlearn(
        toys.Noisy(net),
        method,
        **sides,
        steps=settings["steps"],
        # fused: it walks memory, so its moments must lie in the weights' own layout after a resume
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
        seed=settings["seed"],
        checkpoint=None if path is None else Checkpoint(path, 1, resume=settings["resume"]),
        log=log,
    )
    train.rows = rows  # type: ignore[attr-defined]
    return toys.weights(net)


@pytest.mark.parametrize(("at", "average"), [(2, 0.9), (3, 0.9), (3, 0.0)])
def test_resumed_run_is_bit_identical(tmp_path: Path, at: int, average: float) -> None:
    whole = train(average=average)
    with pytest.raises(KeyboardInterrupt):  # the checkpoint of step `at + 1` is not written any more
        train(tmp_path / "state", until=at + 1, average=average)
    assert toys.same(train(tmp_path / "state", average=average), whole)
    assert [row["step"] for row in train.rows] == list(range(at, 6))  # type: ignore[attr-defined]


def test_resuming_at_the_end_gives_the_mean_and_not_the_last_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "state")
    assert not toys.same(whole, train(average=0.0))
    assert toys.same(train(tmp_path / "state"), whole)
    assert train.rows == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "saved with seed 0; this run has 1"),
        ({"steps": 7}, "saved with steps 6; this run has 7"),
        ({"rate": 0.02}, "saved with settings .*fast_rate=0.01.*; this run has .*fast_rate=0.02"),
        ({"rule": "sgd"}, "saved with settings"),
        ({"average": 0.0}, r"saved with settings .*average=0\.9.; this run has .*average=0\.0"),
        ({"net": toys.mlp()[:1]}, "other trainable parameters"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "state", until=2)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "state", **change)
    assert toys.same(train(tmp_path / "state", resume=False), train())


def test_checkpoint_every_at_least_one_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint_every.*0"):
        Checkpoint(tmp_path, 0)


def test_a_run_that_breaks_names_its_last_good_state(tmp_path: Path) -> None:
    net, calls = toys.mlp(), 0

    def breaks(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        return plain(backend, batch, generator) * (float("nan") if calls > 3 else 1)

    path = tmp_path / "state"
    method = sfron(fast_rate=0.1, forget=Objective(breaks, -1))
    with pytest.raises(NonFiniteError, match=rf"2 forget phases in a row .*the last good state is {path}"):
        unlearn(
            toys.Plain(net),
            method,
            toys.batches(1),
            toys.batches(2),
            steps=9,
            optimizer=torch.optim.Adam,
            seed=0,
            checkpoint=Checkpoint(path, 1),
            max_skips=2,
        )
    assert load_state(path)["done"] == 3


# --- lazy tensors, and the writer -----------------------------------------------------------------


def test_lazy_tensors_are_made_when_they_are_asked_for() -> None:
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        return torch.zeros(2)

    lazy = Lazy(["a", "b"], make)
    assert "a" in lazy
    assert "c" not in lazy
    assert (list(lazy), len(lazy), lazy.keys() & {"b", "c"}) == (["a", "b"], 2, {"b"})
    assert made == []
    assert torch.equal(lazy["a"], torch.zeros(2))
    assert made == ["a"]
    with pytest.raises(KeyError):
        lazy["c"]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_writer_and_the_library_read_each_other(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": (torch.arange(6).view(2, 3) % 2).to(dtype),
        "turned": torch.arange(6).view(2, 3).T.to(dtype),
        "one": torch.ones((), dtype=dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
        "näme/…": torch.ones(3, dtype=dtype),
    }
    done: list[int] = []
    write_safetensors(tmp_path / "ours", tensors, {"b": "1", "a": "ü"}, done.append)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs")
    assert sum(done) == len(tensors)
    for found in (load_file(tmp_path / "ours"), dict(read_safetensors(tmp_path / "theirs")[0])):
        assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
        assert digest(found) == digest(tensors)
    assert read_safetensors(tmp_path / "ours")[1] == {"a": "ü", "b": "1"}


def test_a_digest_tells_names_shapes_dtypes_and_values_apart() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(4), "b": torch.tensor([1.0, 1.0000001])},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0]), "b": torch.ones(2)},
        {"a": torch.zeros(4)},
    ]
    assert digest(base) == digest(dict(reversed(base.items())))
    assert len({digest(x) for x in (base, *others)}) == 1 + len(others)
