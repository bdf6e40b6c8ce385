import itertools
import math
from typing import Any

import pytest
import torch
import toys
from accelerate import Accelerator
from torch import Tensor

from erase.engine.loop import unlearn
from erase.engine.losses import Objective, plain
from erase.engine.precision import Precision, fast_bf16, notice, resolve
from erase.methods.sfron import sfron

CPU = torch.device("cpu")


def accelerator(name: str) -> Accelerator:
    """What `accelerate launch --mixed_precision` gives; on a CPU it leaves fp16 itself off."""
    return Accelerator(cpu=True, mixed_precision=name)


@pytest.mark.parametrize(("name", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_forward_runs_in_it_and_gradients_come_back_unscaled(name: str, dtype: torch.dtype) -> None:
    net = toys.mlp(torch.float32)
    params = list(net.parameters())
    x = torch.randn(5, 4, generator=toys.gen())
    exact = torch.autograd.grad(net(x).square().mean(), params)
    precision = Precision(name, CPU)
    assert precision.scale == (4096.0 if name == "fp16" else 1.0)
    with precision.autocast():
        out = net(x)
    assert out.dtype == dtype
    precision.backward(out.float().square().mean())
    precision.unscale(params)
    for p, g in zip(params, exact, strict=True):
        # bf16 keeps 8 bits, fp16 11; two layers
        torch.testing.assert_close(p.grad, g, rtol=0.05, atol=0.02 * g.abs().max().item())


def test_an_overflow_halves_the_scale() -> None:
    net = toys.mlp(torch.float32)
    params = list(net.parameters())
    precision = Precision("fp16", CPU)
    precision.unscale(params)  # no gradients: nothing to do
    precision.backward(net(torch.ones(1, 4)).sum() * math.inf)
    precision.unscale(params)
    assert precision.scale == 2048.0
    other = Precision("fp16", CPU)
    other.load_state_dict(precision.state_dict())
    assert other.scale == 2048.0
    assert Precision("bf16", CPU).state_dict() == {}


@pytest.mark.parametrize(
    ("flag", "name"), [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "no"), (None, "no")]
)
def test_auto_is_bf16_where_the_cpu_does_it_in_hardware(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, name: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, flag: True}, raising=False)
    assert resolve("auto", CPU) == name
    assert [resolve(other, CPU) for other in ("no", "fp16", "bf16")] == ["no", "fp16", "bf16"]
    assert notice("no", CPU) is None
    assert ("emulated" in str(notice("bf16", CPU))) == (name == "no")
    assert "loss scaling" in str(notice("fp16", CPU))


def test_auto_is_float32_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not fast_bf16(CPU)
    assert resolve("auto", torch.device("mps")) == "no"


@pytest.mark.parametrize("name", ["fp8", "float16", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown precision .*; allowed: no, fp16, bf16"):
        Precision(name, CPU)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_unlearning_follows_float32(name: str) -> None:
    runs = []
    for precision in ("no", name):
        net = toys.mlp(torch.float32)
        unlearn(
            toys.Noisy(net),
            sfron(fast_rate=0.05, fast_rule="sgd", slow_steps=2),
            toys.batches(1, dtype=torch.float32),
            toys.batches(2, dtype=torch.float32),
            steps=5,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
            seed=0,
            accelerator=None if precision == "no" else accelerator(name),
        )
        runs.append(toys.weights(net))
    start = toys.weights(toys.mlp(torch.float32))
    moved = math.sqrt(sum(float((runs[0][n] - start[n]).square().sum()) for n in start))
    apart = math.sqrt(sum(float((runs[0][n] - runs[1][n]).square().sum()) for n in start))
    assert 0 < apart < 0.02 * moved  # it did run in low precision, and to low-precision accuracy


@pytest.mark.parametrize("bad", ["forget", "remain"])
def test_an_overflow_skips_exactly_its_phase(bad: str) -> None:
    net = toys.mlp(torch.float32)
    snapshots: list[tuple[str, int, Any]] = []
    counts = {"forget": 0, "remain": 0}

    def watched(side: str) -> Any:
        def loss(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
            snapshots.append((side, counts[side], toys.weights(net)))
            losses = plain(backend, batch, generator)
            overflow = side == bad and counts[side] == 1
            counts[side] += 1
            return losses * (1e38 if overflow else 1.0)  # finite; but the scaled gradient is not

        return loss

    rows: list[Any] = []
    result = unlearn(
        toys.Plain(net),
        sfron(
            fast_rate=0.01,
            forget=Objective(watched("forget"), -1),
            remain=Objective(watched("remain"), 1),
            lambd=0,
        ),
        toys.batches(1, dtype=torch.float32),
        toys.batches(2, dtype=torch.float32),
        steps=3,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        seed=0,
        accelerator=accelerator("fp16"),
        log=rows.append,
    )
    assert (result.skipped_fast, result.skipped_slow) == ((1, 0) if bad == "forget" else (0, 1))
    assert [row[f"skipped_{'fast' if bad == 'forget' else 'slow'}"] for row in rows] == [0, 1, 1]
    assert rows[1][f"{bad}_norm"] is None
    assert [row["loss_scale"] for row in rows] == [4096, 2048, 2048]  # one history, halved once
    snapshots.append(("end", 0, toys.weights(net)))
    for (side, count, before), (_, _, after) in itertools.pairwise(snapshots):
        assert toys.same(before, after) == (side == bad and count == 1)
