from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from erase.classification.backend import Classifier
from erase.engine.loop import unlearn
from erase.methods.bad_teacher import bad_teacher


class Taught(toys.Plain):
    """Squared distance of predictions."""

    def distances(self, batch: Any, teacher: nn.Module, generator: torch.Generator) -> Tensor:
        return (self.net(batch["x"]) - teacher(batch["x"]).detach()).square().flatten(1).mean(1)


def test_a_step_is_towards_the_bad_teacher_on_forget_data_and_the_good_one_on_remain_data() -> None:
    """θ ← θ - η (∇ remain distance + β ∇ forget distance), by hand."""
    net, other = toys.mlp(), toys.mlp()
    good, bad = toys.mlp(), toys.randomize(toys.mlp(), seed=50)
    forget, remain = toys.batches(1, count=1), toys.batches(2, count=1)
    unlearn(
        Taught(net),
        bad_teacher(fast_rate=0.7, origin_net=good, new_net=bad),
        forget,
        remain,
        steps=3,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        seed=0,
    )
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        parts = [
            Taught(other).distances(batch, teacher, toys.gen()).mean()
            for (batch,), teacher in ((forget, bad), (remain, good))
        ]
        (0.7 * parts[0] + parts[1]).backward()
        optimizer.step()
    toys.close(toys.weights(net), toys.weights(other))


class Pixels(nn.Module):
    """A classifier of 2 × 2 pixels into three classes, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.body = toys.randomize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), seed).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.double().flatten(1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_of_equal_shares_it_is_the_published_loss(reduction: Any) -> None:
    """The mean of `p (ln p - ln q)` over a mixed batch, `mean` over classes too: p of the side's teacher."""
    net, other, good, bad = Pixels(), Pixels(), Pixels(7), Pixels(50)
    g = toys.gen(1)
    sides = [
        {"x": torch.randint(256, (5, 1, 2, 2), generator=g, dtype=torch.uint8), "y": torch.zeros(5, dtype=torch.long)}
        for _ in range(2)
    ]
    method = bad_teacher(origin_net=good, new_net=bad, reduction=reduction)
    unlearn(
        Classifier(net, 3),
        method,
        sides[:1],
        sides[1:],
        steps=4,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        seed=0,
    )
    optimizer = torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.9)  # one mean of both is half of their sum
    x = torch.cat([(side["x"].float() / 255 - 0.5) / 0.5 for side in sides])
    for _ in range(4):
        p = torch.cat([bad(x[:5]), good(x[5:])]).detach().softmax(1)
        terms = p * (p.log() - other(x).log_softmax(1))
        optimizer.zero_grad()
        (terms.mean() if reduction == "mean" else terms.sum(1).mean()).backward()
        optimizer.step()
    toys.close(toys.weights(net), toys.weights(other), rtol=1e-9)


def test_a_mean_over_classes_needs_classes() -> None:
    method = bad_teacher(origin_net=toys.mlp(), new_net=toys.mlp(), reduction="mean")
    with pytest.raises(ValueError, match="reduction=mean is over classes, and Taught has none"):
        unlearn(
            Taught(toys.mlp()),
            method,
            toys.batches(1),
            toys.batches(2),
            steps=1,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            seed=0,
        )
    with pytest.raises(ValueError, match="unknown reduction 'batch'; allowed: sum, mean"):
        bad_teacher(reduction="batch")  # type: ignore[arg-type]


def test_a_backend_without_distances_has_no_teacher() -> None:
    method = bad_teacher(origin_net=toys.mlp(), new_net=toys.mlp())
    with pytest.raises(ValueError, match="Plain has no distances"):
        unlearn(
            toys.Plain(toys.mlp()),
            method,
            toys.batches(1),
            toys.batches(2),
            steps=1,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            seed=0,
        )


def test_it_forgets_towards_the_bad_teacher_and_keeps_to_the_good_one() -> None:
    net, bad = toys.mlp(), toys.randomize(toys.mlp(), seed=50)
    method = bad_teacher(origin_net=toys.mlp(), new_net=bad, slow_schedule="cosine")
    rows: list[Any] = []
    unlearn(
        Taught(net),
        method,
        toys.batches(1, count=1),
        toys.batches(2, count=1),
        steps=300,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        seed=0,
        log=rows.append,
    )
    assert rows[-1]["forget_loss"] < 0.2 * rows[0]["forget_loss"]
    assert rows[-1]["remain_loss"] < rows[0]["forget_loss"]
