import itertools
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from erase.engine.loop import unlearn
from erase.engine.losses import ASCENT, Objective, plain
from erase.methods.gradient_ascent import gradient_ascent


class Closed:
    def __iter__(self) -> Any:
        raise AssertionError("looked at")


def go(backend: Any, method: Any, **changes: Any) -> list[dict[str, Any]]:
    rows: list[Any] = []
    settings = {"forget": toys.batches(1), "remain": None, "steps": 4, "seed": 0, "log": rows.append}
    # a slow optimizer whose weight decay would show
    slow = lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5)  # noqa: E731
    unlearn(backend, method, optimizer=slow, **{**settings, **changes})
    return rows


@pytest.mark.parametrize("rule", ["sgd", "normalized", "adam"])
def test_steps_up_the_forget_loss_and_does_nothing_else(rule: Any) -> None:
    """Against plain loops: the slow optimizer has no part in it, and remain data are not looked at."""
    net, other, data = toys.mlp(), toys.mlp(), toys.batches(1)
    rows = go(toys.Plain(net), gradient_ascent(fast_rate=0.05, fast_rule=rule), remain=Closed())
    adam = torch.optim.Adam(other.parameters(), lr=0.05)
    for t in range(4):
        adam.zero_grad()
        (-toys.Plain(other).losses(data[t % 3], toys.gen()).mean()).backward()
        if rule == "adam":
            adam.step()
            continue
        grads = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None])
        scale = 1.0 if rule == "sgd" else 1 / float(grads.square().mean().sqrt())
        with torch.no_grad():
            for p in other.parameters():
                assert p.grad is not None
                p.sub_(0.05 * scale * p.grad)
    toys.close(toys.weights(net), toys.weights(other))
    assert [row["fast_rate"] for row in rows] == [0.05] * 4  # constant by default
    assert not any(key.startswith("remain") for row in rows for key in row)


def test_forgets() -> None:
    net, data = toys.mlp(), toys.batches(1, count=1)
    rows = go(toys.Plain(net), gradient_ascent(fast_rate=0.02), forget=data, steps=20)
    losses = [row["forget_loss"] for row in rows]
    assert losses == sorted(losses)
    assert losses[-1] > 1.5 * losses[0]


def test_clips_and_fades() -> None:
    net, places = toys.mlp(), [toys.weights(toys.mlp())]
    method = gradient_ascent(fast_rate=1.0, fast_rule="sgd", schedule="linear", clip_forget=1e-3)
    rows: list[Any] = []

    def log(row: Any) -> None:
        rows.append(row)
        places.append(toys.weights(net))

    go(toys.Plain(net), method, steps=2, log=log)
    assert rows[0]["forget_norm"] > 0.1
    assert [row["fast_rate"] for row in rows] == [1.0, 0.5]
    moved = [
        float(torch.cat([(after[name] - before[name]).flatten() for name in after]).norm())
        for before, after in itertools.pairwise(places)
    ]
    assert moved == pytest.approx([1e-3, 5e-4], rel=1e-4)  # torch's clip divides by the norm + 1e-6


def test_another_objective_is_descended_where_it_says_so() -> None:
    """With a redirect it fits the anchors."""

    def away(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        return backend.net(batch["x"]).square().flatten(1).mean(1)

    net = toys.mlp()
    rows = go(toys.Plain(net), gradient_ascent(fast_rate=0.02, forget=Objective(away, 1, "redirect")), steps=20)
    assert rows[-1]["forget_loss"] < 0.5 * rows[0]["forget_loss"]


def test_settings() -> None:
    method = gradient_ascent(fast_rate=0.1)
    assert (method.forget, method.remain, method.mask, method.weights) == (ASCENT, None, None, None)
    with pytest.raises(ValueError, match="fast_rate must be finite and ≥ 0; got -1"):
        gradient_ascent(fast_rate=-1)
    assert gradient_ascent(fast_rate=0.1, forget=Objective(plain, -1, "mine")).forget.name == "mine"  # type: ignore[union-attr]
