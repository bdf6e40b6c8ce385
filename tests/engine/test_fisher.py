from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from erase.diffusion.losses import Denoise
from erase.engine.fisher import Fisher, fisher_diagonal
from erase.engine.state import Checkpoint, load_state

# The result is float32: 24 bits, so a mean of squares agrees with float64 to about 1e-6.
RTOL = 2e-6


def naive(backend: Any, data: list[Any], per: str = "sample") -> dict[str, Tensor]:
    """Square, sum and divide, one `backward` at a time, in the network's own precision."""
    params = dict(backend.net.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    count = 0
    for batch in data:
        losses = backend.losses(batch, toys.gen())
        for loss in losses if per == "sample" else [losses.mean()]:
            grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
            for name, g in zip(params, grads, strict=True):
                sums[name] += g**2
            count += 1
    return {name: value / count for name, value in sums.items()}


def agree(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = RTOL) -> None:
    for name in b:
        torch.testing.assert_close(a[name].double(), b[name].double(), rtol=rtol, atol=rtol * b[name].max().item())


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("kind", [toys.Noisy, toys.Plain])
def test_per_sample_is_the_loop_over_samples(kind: Any, chunk: int | None) -> None:
    backend = kind(toys.mlp())
    data = toys.drawn(toys.Noisy(backend.net), 0, count=2, size=5)
    fisher = fisher_diagonal(backend, data, generator=toys.gen(), chunk=chunk)
    agree(fisher.named, naive(backend, data))
    assert (fisher.per, fisher.count) == ("sample", 10)
    assert {v.dtype for v in fisher.named.values()} == {torch.float32}
    assert backend.net[0].weight.grad is None


def test_per_batch_is_another_and_smaller_quantity() -> None:
    backend, data = toys.Noisy(toys.mlp()), toys.drawn(toys.Noisy(toys.mlp()), 0, count=2, size=6)
    batch = fisher_diagonal(backend, data, per="batch", generator=toys.gen())
    agree(batch.named, naive(backend, data, "batch"))
    assert (batch.per, batch.count) == ("batch", 2)
    sample = fisher_diagonal(backend, data, generator=toys.gen())
    for name, value in batch.named.items():
        assert value.mean() < 0.9 * sample.named[name].mean()


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_gradients_are_clipped_before_they_are_squared(per: Any, scale: float) -> None:
    """g ← g · min(1, c / ‖g‖), the norm over all weights: of each gradient that is squared."""
    backend = toys.Noisy(toys.mlp())
    data, params = toys.drawn(backend, 0, count=3, size=4), dict(backend.net.named_parameters())
    sums, norms = {name: torch.zeros_like(p) for name, p in params.items()}, []
    for batch in data:
        losses = backend.losses(batch, toys.gen())
        for loss in losses if per == "sample" else [losses.mean()]:
            grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
            norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
            for name, g in zip(params, grads, strict=True):
                sums[name] += (g * min(1.0, 3.0 / norms[-1])) ** 2
    assert min(norms) < 3 < max(norms)
    found = fisher_diagonal(backend, data, per=per, clip=3.0, generator=toys.gen(), scale=scale)
    agree(found.named, {name: value / len(norms) for name, value in sums.items()})
    assert (found.meta, found.count) == ({"clip": "3.0"}, len(norms))
    free = fisher_diagonal(backend, data, per=per, clip=1e9, generator=toys.gen(), scale=scale)
    agree(free.named, naive(backend, data, per))


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_forget_and_remain_see_the_same_draws(per: Any) -> None:
    seen: list[Any] = []

    class Spy(toys.Noisy):
        def draw(self, batch: Any, generator: torch.Generator) -> Any:
            fresh = super().draw(batch, generator)
            if fresh is not batch:
                seen.append(fresh)
            return fresh

    for seed in (1, 2):
        fisher_diagonal(Spy(toys.mlp()), toys.batches(seed, count=2), per=per, draws=3, generator=toys.gen(5))
    forget, remain = seen[:6], seen[6:]
    for a, b in zip(forget, remain, strict=True):
        assert torch.equal(a["t"], b["t"])
        assert torch.equal(a["noise"], b["noise"])
        assert not torch.equal(a["x"], b["x"])
    assert len({tuple(a["noise"].flatten().tolist()) for a in forget}) == 6  # every draw is new


def test_draws_are_averaged() -> None:
    backend, data = toys.Noisy(toys.mlp()), toys.batches(0, count=2)
    fisher = fisher_diagonal(backend, data, draws=3, generator=toys.gen(5))
    g = toys.gen(5)
    agree(fisher.named, naive(backend, [backend.draw(batch, g) for batch in data for _ in range(3)]))
    assert fisher.count == 24


@pytest.mark.parametrize("fails", [False, True])
def test_evaluates_in_eval_mode_and_restores_the_mode(fails: bool) -> None:
    net = nn.Sequential(toys.mlp(), nn.Dropout(0.5))
    net.train()
    net[0][1].eval()
    modes = [m.training for m in net.modules()]
    data: Any = toys.drawn(toys.Noisy(net), 0, count=1)
    if fails:
        with pytest.raises(ValueError, match="common first dimension"):
            fisher_diagonal(toys.Noisy(net), [*data, {}], generator=toys.gen())
    else:
        plain = fisher_diagonal(toys.Noisy(net[0]), data, generator=toys.gen())
        fisher = fisher_diagonal(toys.Noisy(net), data, generator=toys.gen())
        agree({name.removeprefix("0."): v for name, v in fisher.named.items()}, plain.named)
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "scale", "rtol"),
    [
        (None, 1024.0, RTOL),
        (torch.bfloat16, 1.0, 0.1),  # 8 bits a factor, a square doubles it, a few factors in a row
        (torch.float16, 4096.0, 0.02),  # 11 bits
    ],
)
def test_precision_and_scale(dtype: Any, scale: float, rtol: float, chunk: int) -> None:
    backend = toys.Noisy(toys.mlp(torch.float32))
    data = toys.drawn(backend, 0, dtype=torch.float32)
    autocast = {} if dtype is None else {"autocast": lambda: torch.autocast("cpu", dtype)}
    fisher = fisher_diagonal(backend, data, generator=toys.gen(), chunk=chunk, scale=scale, **autocast)
    agree(fisher.named, naive(backend, data), rtol)
    if dtype is not None:  # it did run in low precision
        assert any(not torch.allclose(v, naive(backend, data)[n], rtol=1e-6) for n, v in fisher.named.items())


def test_unused_and_frozen_parameters() -> None:
    net = toys.mlp()
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    net[0].bias.requires_grad_(False)
    backend, data = toys.Noisy(net), toys.batches(0)
    fishers = [fisher_diagonal(backend, data, generator=toys.gen(), chunk=chunk).named for chunk in (1, 4)]
    agree(*fishers)
    assert fishers[0].keys() == {"unused", "0.weight", "2.weight", "2.bias"}
    assert not fishers[0]["unused"].any()


def test_unet_by_layers_is_the_loop() -> None:
    backend = toys.denoiser()
    fishers = [
        fisher_diagonal(backend, [toys.latents()], draws=2, generator=toys.gen(), chunk=chunk, loss=Denoise(0.5)).named
        for chunk in (1, 2)
    ]
    agree(*fishers, rtol=1e-3)  # float32 forward and backward passes, in another order
    assert all(v.any() for v in fishers[0].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "no batches"),
        ({"draws": 0}, "draws must be at least 1; got 0"),
        ({"clip": 0.0}, r"clip must be > 0 or left out; got 0\.0"),
        ({"per": "image"}, "per must be 'sample' or 'batch'; got 'image'"),
        ({"batches": [{"x": torch.full((2, 4), float("inf")).double(), "y": torch.zeros(2, 3)}]}, "not finite"),
    ],
)
def test_bad_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(toys.Noisy(toys.mlp()), **{"batches": toys.batches(0), "generator": toys.gen(), **change})


# ------------------------------------------------------------ going on


class StopError(Exception):
    pass


@pytest.mark.parametrize("kind", [toys.Noisy, toys.Plain])
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_a_pass_that_was_killed_goes_on_to_the_same_sums(tmp_path: Path, kind: Any, per: Any) -> None:
    net = toys.mlp(torch.float32)
    batches = toys.batches(0, count=4, dtype=torch.float32)

    def go(name: str, resume: bool = False, until: int | None = None) -> Fisher:
        def progress(done: int) -> None:
            if done == until:
                raise StopError

        checkpoint = Checkpoint(tmp_path / name, 2, resume)
        return fisher_diagonal(
            kind(net), batches, per=per, draws=3, generator=toys.gen(), checkpoint=checkpoint, progress=progress
        )

    whole = go("whole")
    with pytest.raises(StopError):
        go("out", until=8)  # after 6 of 12 draws
    assert load_state(tmp_path / "out")["draws"] == 6
    calls = []
    forward = net.forward
    net.forward = lambda x: calls.append(1) or forward(x)  # type: ignore[assignment]
    resumed = go("out", resume=True)
    if per == "batch":
        assert len(calls) == 6
    assert toys.same(resumed.named, whole.named)
    assert resumed.count == whole.count
    calls.clear()
    assert toys.same(go("out", resume=True).named, whole.named)  # all is there
    assert not calls
    with pytest.raises(ValueError, match="holds sums of another Fisher diagonal"):
        fisher_diagonal(kind(net), batches, generator=toys.gen(), checkpoint=Checkpoint(tmp_path / "out", 2, True))
