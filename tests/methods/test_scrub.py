from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from erase.engine.loop import unlearn
from erase.methods.scrub import scrub


class Taught(toys.Plain):
    """Squared distance of predictions."""

    def distances(self, batch: Any, teacher: nn.Module, generator: torch.Generator) -> Tensor:
        return (self.net(batch["x"]) - teacher(batch["x"]).detach()).square().flatten(1).mean(1)


def run(net: nn.Module, steps: int = 4, **settings: Any) -> list[Any]:
    rows: list[Any] = []
    unlearn(
        Taught(net),
        scrub(origin_net=toys.randomize(toys.mlp(), seed=50), **settings),
        toys.batches(1, count=1),
        toys.batches(2, count=1),
        steps=steps,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        seed=0,
        log=rows.append,
    )
    return rows


def test_max_and_min_steps_alternate_with_one_optimizer() -> None:
    """By hand: up the distance on forget data, then twice down loss + α distance on remain data; momentum is shared."""
    net, other, teacher = toys.mlp(), toys.mlp(), toys.randomize(toys.mlp(), seed=50)
    run(net, fast_rate=0.3, slow_steps=2, alpha=0.5)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    backend = Taught(other)
    (forget,), (remain,) = toys.batches(1, count=1), toys.batches(2, count=1)
    for t in range(4):
        for phase in range(3):
            optimizer.zero_grad()
            if phase == 0:
                loss = -0.3 * (1 - t / 4) * backend.distances(forget, teacher, toys.gen()).mean()
            else:
                apart = backend.distances(remain, teacher, toys.gen())
                loss = (backend.losses(remain, toys.gen()) + 0.5 * apart).mean()
            loss.backward()
            optimizer.step()
    toys.close(toys.weights(net), toys.weights(other))


def test_max_steps_fade_out() -> None:
    rates = [row["fast_rate"] for row in run(toys.mlp(), fast_rate=0.4)]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_max_steps_leave_the_teacher() -> None:
    rows = run(toys.mlp(), steps=20, fast_rate=1e-2, fast_rule="sgd", slow_steps=0, schedule="constant")
    assert rows[-1]["forget_loss"] > rows[0]["forget_loss"]


def test_a_negative_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha must be ≥ 0; got -1"):
        scrub(alpha=-1)
