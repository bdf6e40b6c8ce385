"""The engine against the plain loop, in float64: everything that the engine adds to it must not show."""

from typing import Any

import pytest
import torch
import toys

from erase import reference
from erase.engine.fisher import fisher_diagonal
from erase.engine.loop import unlearn
from erase.engine.saliency import Mask, fisher_ratio_mask
from erase.methods.sfron import sfron

THRESHOLD = 2.0


def losses(net: Any, batches: Any) -> Any:
    return torch.cat([toys.Plain(net).losses(batch, toys.gen()) for batch in batches])


def masks(forget: Any, remain: Any) -> tuple[list[torch.Tensor], Mask]:
    """Of the reference, and of the engine."""
    net = toys.mlp()
    plain = reference.saliency_mask(losses(net, forget), losses(net, remain), net, THRESHOLD)
    diagonals = [fisher_diagonal(toys.Plain(net), side, generator=toys.gen()) for side in (forget, remain)]
    return plain, fisher_ratio_mask(*diagonals, threshold=THRESHOLD)


def test_the_mask_is_the_references() -> None:
    """Weight for weight: the engine's diagonals are rounded to float32, and no ratio here is that near to γ."""
    plain, mask = masks(toys.batches(1), toys.batches(2))
    assert 0.2 < mask.density < 0.8
    for m, (name, keep) in zip(plain, mask.named.items(), strict=True):
        assert torch.equal(m, keep), name


@pytest.mark.parametrize("masked", [True, False], ids=["S", "-"])
@pytest.mark.parametrize("lambd", [0.5, 0.0], ids=["F", "-"])
@pytest.mark.parametrize(
    ("ron", "slow_steps", "outer_rate"),
    [(False, 1, 1.0), *((True, steps, rate) for steps in (1, 3) for rate in (1.0, 0.5, 0.0))],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_engine_is_the_reference(
    masked: bool, lambd: float, ron: bool, slow_steps: int, outer_rate: float, schedule: Any
) -> None:
    T, beta, eta = 5, 0.05, 0.1
    forget, remain = toys.batches(1), toys.batches(2)  # three batches each, which the steps go round
    plain, mask = masks(forget, remain) if masked else (None, None)
    ours, theirs = toys.mlp(), toys.mlp()
    start = toys.weights(ours)
    unlearn(
        toys.Plain(ours),
        sfron(
            mask=mask,
            lambd=lambd,
            fast_rate=beta,
            fast_rule="sgd",
            slow_steps=slow_steps,
            outer_rate=outer_rate,
            schedule=schedule,
            ron=ron,
        ),
        forget,
        remain,
        steps=T,
        optimizer=lambda params: torch.optim.SGD(params, lr=eta),
        seed=0,
    )
    backend = toys.Plain(theirs)
    reference.sfron(
        theirs,
        lambda t: backend.losses(forget[t % 3], toys.gen()),
        lambda t, k: backend.losses(remain[(t * slow_steps + k) % 3], toys.gen()),
        plain,
        steps=T,
        fast_rate=beta,
        slow_rate=eta,
        slow_steps=slow_steps,
        outer_rate=outer_rate,
        lambd=lambd,
        schedule=schedule,
        ron=ron,
    )
    # float64: the same operations, in another order (powers by logarithms, the mean of parts), over at most 20 phases
    toys.close(toys.weights(ours), toys.weights(theirs), rtol=1e-11, atol=1e-13)
    assert toys.same(toys.weights(ours), start) == (outer_rate == 0)


def test_weights_fall_with_the_loss_and_have_mean_1() -> None:
    w = reference.adaptive_weights(torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64), 0.5)
    assert w.mean().item() == pytest.approx(1)
    assert (w / w[1]).tolist() == pytest.approx([2**0.5, 1, 0.5])
