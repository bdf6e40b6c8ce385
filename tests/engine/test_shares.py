"""The shares of the forget loss that samples bring with them: `weight` `[B]` of a batch."""

from typing import Any

import pytest
import torch
import toys

from erase.engine.backend import seeded
from erase.engine.loop import unlearn
from erase.engine.weighting import adaptive_weights
from erase.methods.gradient_ascent import gradient_ascent
from erase.methods.salun import salun
from erase.methods.sfron import sfron

SHARES = torch.tensor([2.0, 0.5, 1.0, 0.5], dtype=torch.float64)


def go(net: Any, method: Any, forget: Any, **changes: Any) -> None:
    settings = {"steps": 1, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "seed": 0}
    unlearn(toys.Noisy(net), method, forget, toys.batches(2), **{**settings, **changes})


def by_hand(net: Any, batch: Any, weights: Any, sign: float, rate: float) -> None:
    """θ ← θ + sign · rate · ∇ mean(w ℓ)."""
    backend = toys.Noisy(net)
    losses = backend.losses(backend.draw(batch, seeded("cpu", 0, 0, 0, 0)), toys.gen())
    params = list(net.parameters())
    grads = torch.autograd.grad((weights(losses.detach()) * losses).mean(), params)
    for p, g in zip(params, grads, strict=True):
        p.data += sign * rate * g


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_a_share_scales_a_samples_loss(micro_batch: int | None) -> None:
    net, other = toys.mlp(), toys.mlp()
    (batch,) = toys.batches(1, count=1)
    method = gradient_ascent(fast_rate=0.3, fast_rule="sgd")
    go(net, method, [{**batch, "weight": SHARES}], micro_batch=micro_batch)
    by_hand(other, batch, lambda losses: SHARES, 1, 0.3)
    toys.close(toys.weights(net), toys.weights(other))


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_the_adaptive_weights_are_of_the_losses_alone(micro_batch: int | None) -> None:
    net, other = toys.mlp(), toys.mlp()
    (batch,) = toys.batches(1, count=1)
    method = sfron(fast_rate=0.3, fast_rule="sgd", slow_steps=0, lambd=0.5, per_bin=False)
    go(net, method, [{**batch, "weight": SHARES}], micro_batch=micro_batch)
    by_hand(other, batch, lambda losses: SHARES * adaptive_weights(losses, lambd=0.5), 1, 0.3)
    toys.close(toys.weights(net), toys.weights(other))


def test_equal_shares_are_none_and_remain_data_have_none() -> None:
    for method in (salun(), sfron(fast_rate=0.1)):
        ends = []
        for share in (None, 1.0):
            net, data = toys.mlp(), [toys.batches(k) for k in (1, 2)]
            if share is not None:
                data[0] = [{**batch, "weight": torch.full((4,), share)} for batch in data[0]]
                data[1] = [{**batch, "weight": torch.full((4,), 7.0)} for batch in data[1]]
            optimizer = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
            unlearn(toys.Noisy(net), method, *data, steps=3, optimizer=optimizer, seed=0)
            ends.append(toys.weights(net))
        toys.close(ends[0], ends[1])
