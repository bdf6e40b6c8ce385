import math
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from erase.engine.loop import unlearn
from erase.engine.losses import ASCENT, DESCENT, Objective, plain
from erase.engine.method import Method
from erase.engine.saliency import Mask
from erase.engine.updates import FastSlow
from erase.methods.sfron import sfron


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))


def trajectory(method: Method, kind: Any = toys.Noisy, **changes: Any) -> tuple[toys.Weights, list[Any]]:
    net, rows = toys.mlp(), list[Any]()
    backend = kind(net)
    settings = {
        "forget": toys.drawn(toys.Noisy(net), 1),
        "remain": toys.drawn(toys.Noisy(net), 2),
        "steps": 7,
        "optimizer": adam,
        "seed": 0,
        "log": rows.append,
    }
    unlearn(backend, method, **{**settings, **changes})
    return toys.weights(net), rows


# ------------------------------------------------------------ F


@pytest.mark.parametrize("kind", [toys.Noisy, toys.Plain])  # with bins and without
def test_lambda_zero_is_gradient_ascent(kind: Any) -> None:
    zero, rows = trajectory(sfron(lambd=0, fast_rate=0.02), kind)
    ascent, _ = trajectory(Method("ga", ASCENT, DESCENT, FastSlow(0.02)), kind)
    assert toys.same(zero, ascent)
    assert {row["weight_max"] for row in rows} == {1.0}
    weighted, _ = trajectory(sfron(lambd=0.5, fast_rate=0.02), kind)
    assert not toys.same(weighted, ascent)


@pytest.mark.parametrize(("per_bin", "expected"), [(True, [0.5, 1.5]), (False, [0.5, 1.5])])
@pytest.mark.parametrize("sense", [-1, 1])
def test_what_is_forgotten_is_left_alone(sense: Any, per_bin: bool, expected: list[float]) -> None:
    """Ascended losses are large where forgotten, descended ones (`redirect`) where remembered."""
    net = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    factors = torch.tensor([9.0, 1.0] if sense == -1 else [1.0, 9.0], dtype=torch.float64)  # the first is forgotten
    grads: list[Tensor] = []

    def forget(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        losses = factors * (backend.net.weight**2).sum() / (backend.net.weight**2).sum().detach()
        losses.register_hook(grads.append)
        return losses

    method = sfron(lambd=0.5, fast_rate=0.0, slow_steps=0, per_bin=per_bin, forget=Objective(forget, sense))
    data = [{"x": torch.zeros(2, 1), "t": torch.zeros(2, dtype=torch.long), "noise": torch.zeros(2, 1)}]
    unlearn(toys.Noisy(net), method, data, data, steps=1, optimizer=adam, seed=0)
    # one bin: its mean divides both losses, and the ratio of the weights, 9^½, stays
    assert (2 * sense * grads[0]).tolist() == pytest.approx(expected)


def test_timestep_bins_take_the_timestep_out_of_the_weights() -> None:
    """Losses that differ by their bin alone get equal weights with `per_bin`, unequal ones without."""

    def by_bin(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        return backend.net(batch["x"]).square().mean() * (1.0 + 9 * batch["t"])

    maxima = {}
    for per_bin in (True, False):
        objective = Objective(by_bin, -1)
        _, rows = trajectory(sfron(lambd=0.5, fast_rate=0.0, per_bin=per_bin, forget=objective), steps=1)
        maxima[per_bin] = rows[0]["weight_max"]
    assert maxima[True] == pytest.approx(1)
    assert maxima[False] > 1.5


@pytest.mark.parametrize(("floor", "growth"), [(1e-6, 1.001), (0.1, 1.1)])  # the floor says how much it slows it
def test_a_zero_loss_does_not_stop_forgetting(floor: float, growth: float) -> None:
    """A sample fitted exactly has no gradient of its own; the others must still be forgotten."""
    net = toys.mlp()
    backend = toys.Plain(net)
    batch = toys.batches(1, count=1)[0]
    batch["y"][0] = net(batch["x"])[0].detach()
    before = backend.losses(batch, toys.gen())
    assert before[0] == 0
    method = sfron(lambd=0.5, fast_rate=0.1, fast_rule="sgd", slow_steps=0, floor=floor)
    unlearn(backend, method, [batch], [batch], steps=20, optimizer=adam, seed=0)
    assert bool(backend.losses(batch, toys.gen())[1:].mean() > growth * before[1:].mean())


# ------------------------------------------------------------ S


@pytest.mark.parametrize(
    "options",
    [{"fast_rule": "sgd"}, {"fast_rule": "normalized"}, {"fast_rule": "adam"}, {"published": True}, {"ron": False}],
)
def test_a_full_mask_is_no_mask(options: Any) -> None:
    """γ = 0 keeps every weight."""
    full = Mask({name: torch.ones_like(p, dtype=torch.bool) for name, p in toys.mlp().named_parameters()})
    masked, _ = trajectory(sfron(mask=full, fast_rate=0.02, **options))
    free, _ = trajectory(sfron(fast_rate=0.02, **options))
    assert toys.same(masked, free)
    part, _ = trajectory(sfron(mask=toys.some_mask(toys.mlp()), fast_rate=0.02, **options))
    assert not toys.same(part, free)


# ------------------------------------------------------------ R-on off, and the published loop


def test_without_ron_one_step_goes_down_remain_minus_beta_masked_forget() -> None:
    net, mask = toys.mlp(), toys.some_mask(toys.mlp())
    backend = toys.Noisy(net)
    f, r = toys.drawn(backend, 1)[0], toys.drawn(backend, 2)[0]
    params = dict(net.named_parameters())
    losses = backend.losses(f, toys.gen())
    w = losses.detach() ** -0.5
    forget = torch.autograd.grad((len(w) * w / w.sum() * losses).mean(), list(params.values()))
    remain = torch.autograd.grad(backend.losses(r, toys.gen()).mean(), list(params.values()))
    expected = {
        name: p - 0.1 * (gr - 0.3 * torch.where(mask[name], gf, 0))
        for (name, p), gf, gr in zip(toys.weights(net).items(), forget, remain, strict=True)
    }
    method = sfron(mask=mask, fast_rate=0.3, ron=False, per_bin=False)
    unlearn(backend, method, [f], [r], steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), seed=0)
    toys.close(toys.weights(net), expected)


@pytest.mark.parametrize(("every", "schedule"), [(1, None), (2, None), (1, "constant"), (1, "linear")])
@pytest.mark.parametrize("optimizer", [adam, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)])
def test_published_is_the_published_loop(optimizer: Any, every: int, schedule: Any) -> None:
    T, alpha, lambd, clip = 7, 5.0, 0.5, 0.3
    mask = toys.some_mask(toys.mlp())
    ours, rows = trajectory(
        sfron(
            mask=mask,
            lambd=lambd,
            fast_rate=alpha,
            published=True,
            schedule=schedule,
            every=every,
            clip_forget=clip,
            clip_remain=2 * clip,
            forget=Objective(plain, -1),
        ),
        optimizer=optimizer,
    )

    net = toys.mlp()
    backend = toys.Noisy(net)
    forget, remain = toys.drawn(backend, 1), toys.drawn(backend, 2)
    shared = optimizer(net.parameters())
    norms = []
    for i in range(T):
        if i % every == 0:
            batch = forget[i // every % len(forget)]
            losses = backend.losses(batch, toys.gen())
            w = losses.detach() ** -lambd
            w = len(w) * w / w.sum()
            shared.zero_grad()
            fading = {None: (1 + math.cos(math.pi * i / T)) / 2, "constant": 1.0, "linear": 1 - i / T}[schedule]
            (-alpha * fading * (w * losses).mean()).backward()
            for name, p in net.named_parameters():
                assert p.grad is not None
                p.grad *= mask[name]
            norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), clip)))
            shared.step()
        shared.zero_grad()
        backend.losses(remain[i % len(remain)], toys.gen()).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2 * clip)
        shared.step()
    toys.close(ours, toys.weights(net), rtol=1e-9)
    assert [row["forget_norm"] for row in rows if "forget_norm" in row] == pytest.approx(norms)
    assert max(norms) > clip  # the clip did bite
    start = toys.weights(toys.mlp())["0.weight"]
    assert bool((ours["0.weight"] != start).all())  # wholly masked, and yet moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"published": True, "slow_steps": 2}, "published=True fixes slow_steps at 1; got 2"),
        ({"published": True, "outer_rate": 0.5}, "published=True fixes outer_rate at 1.0; got 0.5"),
        ({"published": True, "ron": False}, "published=True fixes ron at True; got False"),
        ({"fast_rule": "shared"}, "'shared' is set by published=True"),
        ({"fast_rule": "joint"}, "'joint' is set by .* ron=False"),
        ({"ron": False, "slow_steps": 2}, "ron.*slow_steps must be 1; got 2"),
        ({"lambd": -0.5}, "lambd ≥ 0 .* got -0.5"),
        ({"floor": 0.0}, "floor > 0; got 0.5 and 0.0"),
        ({"schedule": "sine"}, "unknown schedule 'sine'"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sfron(**{"fast_rate": 1.0, **options})
