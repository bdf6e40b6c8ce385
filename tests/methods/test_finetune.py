from typing import Any

import pytest
import torch
import toys

from erase.engine.loop import unlearn
from erase.engine.losses import DESCENT, Objective, plain
from erase.methods.finetune import finetune


def test_is_plain_training_on_the_remain_data() -> None:
    """Against the loop that anyone would write: clipped, the rate fading linearly."""
    net, other, data = toys.mlp(), toys.mlp(), toys.batches(2)
    method, rows = finetune(slow_schedule="linear", clip_remain=0.3), list[Any]()
    unlearn(
        toys.Plain(net),
        method,
        None,
        data,
        steps=5,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        seed=0,
        log=rows.append,
    )
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    norms = []
    for t in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 * (5 - t) / 5
        optimizer.zero_grad()
        toys.Plain(other).losses(data[t % 3], toys.gen()).mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.3)))
        optimizer.step()
    toys.close(toys.weights(net), toys.weights(other))
    assert [row["remain_norm"] for row in rows] == pytest.approx(norms)
    assert max(norms) > 0.3  # the clip did bite
    assert not any(key.startswith(("forget", "fast")) for row in rows for key in row)


def test_forget_data_are_not_looked_at() -> None:
    class Closed:
        def __iter__(self) -> Any:
            raise AssertionError("looked at")

    ends = []
    for forget in (None, Closed()):
        net = toys.mlp()
        unlearn(
            toys.Noisy(net),
            finetune(),
            forget,
            toys.batches(2),
            steps=3,
            optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
            seed=0,
        )
        ends.append(toys.weights(net))
    assert toys.same(*ends)
    assert not toys.same(ends[0], toys.weights(toys.mlp()))


def test_settings() -> None:
    method = finetune()
    assert (method.forget, method.remain, method.mask) == (None, DESCENT, None)
    mine = Objective(plain, 1, "mine")
    assert finetune(remain=mine).remain is mine
