from typing import Any

import pytest
import torch
import toys

from erase.engine.loop import unlearn
from erase.engine.losses import DESCENT, Objective, Pull, plain
from erase.engine.method import Method
from erase.methods.random_label import random_label
from erase.methods.selective_amnesia import selective_amnesia


def importance(net: Any, seed: int = 7) -> toys.Weights:
    g = toys.gen(seed)
    return {name: torch.rand(p.shape, generator=g, dtype=p.dtype) for name, p in net.named_parameters()}


def go(net: Any, method: Method, **changes: Any) -> toys.Weights:
    settings = {"forget": toys.batches(1), "remain": toys.batches(2), "steps": 4, "seed": 0}
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    unlearn(toys.Plain(net), method, **{"optimizer": sgd, **settings, **changes})
    return toys.weights(net)


# ------------------------------------------------------------ the pull


def test_the_pull_is_quadratic_and_its_gradient_is_lambda_f_times_the_way_gone() -> None:
    net = toys.mlp()
    origin, fisher, batch = toys.weights(net), importance(net), toys.batches(1)[0]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=toys.gen(5), dtype=p.dtype))
    backend, params = toys.Plain(net), dict(net.named_parameters())
    losses, bare = Pull(plain, fisher, origin, 3.0)(backend, batch, toys.gen()), backend.losses(batch, toys.gen())
    value = sum(1.5 * float((fisher[n] * (p - origin[n]).detach() ** 2).sum()) for n, p in params.items())
    assert losses.shape == (4,)
    torch.testing.assert_close(losses, bare + value)  # each sample's, so that their mean has it once
    pulled = torch.autograd.grad(losses.mean(), list(params.values()))
    free = torch.autograd.grad(bare.mean(), list(params.values()))
    for (name, p), a, b in zip(params.items(), pulled, free, strict=True):
        torch.testing.assert_close(a - b, 3.0 * fisher[name] * (p.detach() - origin[name]), rtol=1e-9, atol=1e-12)
        assert bool((a != b).all())


def test_where_it_began_there_is_no_pull() -> None:
    net = toys.mlp()
    origin, batch = toys.weights(net), toys.batches(1)[0]
    pull = Pull(plain, importance(net), origin, 1e6)
    backend, params = toys.Plain(net), list(net.parameters())
    losses, bare = (loss(backend, batch, toys.gen()) for loss in (pull, plain))
    assert torch.equal(losses, bare)
    grads = [torch.autograd.grad(x.mean(), params) for x in (losses, bare)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_pull_is_on_trained_weights_alone() -> None:
    net = toys.mlp()
    net[0].requires_grad_(False)
    last = {name: p for name, p in toys.weights(net).items() if name.startswith("2.")}
    pull = Pull(plain, {name: torch.ones_like(p) for name, p in last.items()}, last, 1.0)
    assert bool(pull(toys.Plain(net), toys.batches(1)[0], toys.gen()).isfinite().all())


def test_the_loss_under_the_pull_gets_batch_and_generator() -> None:
    net, seen = toys.mlp(), list[Any]()

    def watched(backend: Any, batch: Any, generator: torch.Generator) -> Any:
        seen.append((backend, batch, generator))
        return backend.losses(batch, generator)

    backend, batch, g = toys.Noisy(net), toys.batches(1)[0], toys.gen()
    Pull(watched, importance(net), toys.weights(net), 1.0)(backend, batch, g)
    assert [x is y for x, y in zip(seen[0], (backend, batch, g), strict=True)] == [True] * 3


# ------------------------------------------------------------ the method


@pytest.mark.parametrize(("pull", "factor"), [("paper", 0.5), ("script", 1.0)])
def test_is_surrogate_plus_replay_plus_pull_by_hand(pull: Any, factor: float) -> None:
    """θ ← θ - η (β ∇ surrogate + ∇ replay + ∇ (λ/2 or λ) F (θ - θ0)²)."""
    net, other = toys.mlp(), toys.mlp()
    forget, remain, fisher, origin = toys.batches(1), toys.batches(2), importance(net), toys.weights(net)
    method = selective_amnesia(strength=2.0, pull=pull, fast_rate=0.7, fisher=fisher, origin=origin)
    ours = go(net, method)
    backend, params = toys.Plain(other), dict(other.named_parameters())
    for t in range(4):
        f, r = (
            torch.autograd.grad(backend.losses(side[t % 3], toys.gen()).mean(), list(params.values()))
            for side in (forget, remain)
        )
        with torch.no_grad():
            for (name, p), a, b in zip(params.items(), f, r, strict=True):
                p.sub_(0.1 * (0.7 * a + b + 2 * factor * 2.0 * fisher[name] * (p - origin[name])))
    toys.close(ours, toys.weights(other))


@pytest.mark.parametrize("given", [{"strength": 0.0}, {"fisher": None}, {"origin": None}])
def test_without_strength_or_fisher_it_is_random_labels(given: dict[str, Any]) -> None:
    net = toys.mlp()
    settings = {"fisher": importance(net), "origin": toys.weights(net), "fast_rate": 0.5, **given}
    method = selective_amnesia(**settings)
    assert method.remain is DESCENT
    assert toys.same(go(net, method), go(toys.mlp(), random_label(fast_rate=0.5)))


def test_more_strength_keeps_important_weights_nearer() -> None:
    """And what is unimportant moves freely."""
    start = toys.weights(toys.mlp())
    fisher = {name: torch.zeros_like(p) for name, p in start.items()}
    fisher["2.weight"] += 1.0
    moved = {}
    for strength in (0.0, 1.0, 5.0):
        end = go(toys.mlp(), selective_amnesia(strength=strength, fisher=fisher, origin=start), steps=60)
        moved[strength] = {name: float((end[name] - start[name]).norm()) for name in start}
    assert moved[5.0]["2.weight"] < 0.5 * moved[1.0]["2.weight"] < 0.5 * moved[0.0]["2.weight"]
    assert moved[5.0]["0.weight"] > 0.5 * moved[0.0]["0.weight"]


def test_settings() -> None:
    net = toys.mlp()
    mine = Objective(plain, 1, "mine")
    method = selective_amnesia(fisher=importance(net), origin=toys.weights(net), forget=mine, remain=mine)
    assert (method.name, method.mask, method.weights, method.forget) == ("selective_amnesia", None, None, mine)
    assert isinstance(method.remain.loss, Pull)  # type: ignore[union-attr]
    assert (method.remain.loss.loss, method.remain.loss.strength) == (plain, 1000.0)  # type: ignore[union-attr]
    assert (method.remain.name, method.remain.sense) == ("mine", 1)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"strength must be ≥ 0; got -1"):
        selective_amnesia(strength=-1)
    with pytest.raises(ValueError, match=r"unknown pull 'half'; allowed: paper, script"):
        selective_amnesia(pull="half")  # type: ignore[arg-type]
