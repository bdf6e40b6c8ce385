"""Losses of a network in training mode."""

from typing import Any

import pytest
import torch
import toys
from torch import nn

from erase.engine.loop import unlearn
from erase.engine.losses import Objective, Training, plain
from erase.methods.sfron import sfron


def noisy() -> nn.Module:
    net = nn.Sequential(toys.mlp(), nn.Dropout(0.5))
    net.eval()
    net[0][1].train()
    return net


def test_dropout_is_active_and_of_the_losss_generator() -> None:
    net = noisy()
    backend, batch = toys.Plain(net), toys.batches(1)[0]
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    one, two, other = (Training(plain)(backend, batch, toys.gen(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one, plain(backend, batch, toys.gen()))
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):  # by hand
        torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=toys.gen())))
        assert torch.equal(plain(toys.Plain(net.train()), batch, toys.gen()), one)


def test_only_dropout_layers_learn_to_drop() -> None:
    """An embedding of labels drops some in training mode, which the setting for features must not switch on."""
    net, seen = noisy(), []
    net[1].register_forward_hook(lambda module, *_: seen.append((net.training, module.training)))
    Training(plain)(toys.Plain(net), toys.batches(1)[0], toys.gen())
    assert seen == [(False, True)]


def test_dropout_is_refused_where_passes_are_made_again() -> None:
    net = noisy()
    net.is_gradient_checkpointing = True
    with pytest.raises(ValueError, match="network_dropout=false"):
        Training(plain)(toys.Plain(net), toys.batches(1)[0], toys.gen())


def test_modes_are_put_back_after_an_error() -> None:
    net = noisy()
    modes = [m.training for m in net.modules()]
    with pytest.raises(KeyError):
        Training(plain)(toys.Plain(net), {}, toys.gen())
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_samples_are_weighted_by_the_losses_whose_gradients_are_taken(micro_batch: int) -> None:
    """With micro-batches the weights come of a pass of their own, which sees the same dropout."""
    seen: list[Any] = []

    def watched(backend: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        losses = plain(backend, batch, generator)
        seen.append(losses.detach())
        return losses

    method = sfron(fast_rate=0.1, slow_steps=0, forget=Objective(Training(watched), -1))
    unlearn(
        toys.Plain(noisy()),
        method,
        toys.batches(1),
        toys.batches(2),
        steps=1,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        seed=0,
        micro_batch=micro_batch,
    )
    half = len(seen) // 2
    assert half == (4 if micro_batch == 1 else 0)
    assert half == 0 or torch.equal(torch.cat(seen[:half]), torch.cat(seen[half:]))
