import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erase.engine.weighting import BinNormalizer, adaptive_weights, schedule_scale

LOSSES = st.lists(st.floats(0, 1e4), min_size=1, max_size=20)


@settings(deadline=None)
@given(LOSSES, st.floats(-2, 3), st.floats(0, 5))
def test_mean_is_scale_and_order_follows_lambda(values: list[float], lambd: float, scale: float) -> None:
    losses = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    weights = adaptive_weights(losses, lambd=lambd, scale=scale)
    assert not weights.requires_grad
    assert weights.dtype == losses.dtype
    assert float(weights.mean()) == pytest.approx(scale, rel=1e-12)
    sorted_weights = weights[losses.argsort(descending=lambd < 0)]
    assert bool((sorted_weights.diff() <= 1e-12 * (1 + scale)).all())  # fall with the loss at λ > 0, else rise


@settings(deadline=None)
@given(LOSSES)
def test_lambda_zero_is_exactly_one(values: list[float]) -> None:
    assert adaptive_weights(torch.tensor(values), lambd=0.0).tolist() == [1.0] * len(values)


def test_values_by_hand() -> None:
    weights = adaptive_weights(torch.tensor([1.0, 4.0]), lambd=0.5, scale=0.75)  # powers 1 and 1/2
    assert weights.tolist() == pytest.approx([0.75 * 2 / 1.5, 0.75 * 1 / 1.5])


@pytest.mark.parametrize(("floor", "share"), [(1e-6, 0.999), (1.0, 0.5)])
def test_a_zero_loss_leaves_the_others_a_share(floor: float, share: float) -> None:
    """Weights stay finite, and what is not forgotten still has one."""
    weights = adaptive_weights(torch.tensor([0.0, 1.0]), lambd=0.5, floor=floor)
    assert float(weights[0]) == pytest.approx(2 * share, rel=1e-3)
    assert float(weights[1]) > 1e-3


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (torch.zeros(2, 2), {}, r"shape \[B\]"),
        (torch.zeros(0), {}, r"shape \[B\]"),
        (torch.ones(2), {"floor": 0.0}, "floor must be positive; got 0.0"),
    ],
)
def test_bad_weights(losses: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaptive_weights(losses, lambd=0.5, **options)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ("constant", [1, 1, 1, 1, 1]),
    ],
)
def test_schedules(schedule: Any, expected: list[float]) -> None:
    assert [schedule_scale(schedule, step, 4) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "step", "message"), [("linear", 5, "step 5"), ("linear", -1, "step -1"), ("sine", 0, "'sine'")]
)
def test_bad_schedules(schedule: Any, step: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_scale(schedule, step, 4)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 3)), min_size=1, max_size=6), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.5, 0.9]),
)
def test_bin_normalizer_is_the_weighted_mean_of_its_history(
    history: list[list[tuple[float, int]]], momentum: float
) -> None:
    normalizer = BinNormalizer(4, momentum)
    means: dict[int, list[float]] = {}
    for batch in history:
        losses = torch.tensor([x for x, _ in batch], dtype=torch.float64)
        bins = torch.tensor([b for _, b in batch])
        normalizer.update(losses, bins)
        for b in set(bins.tolist()):
            means.setdefault(b, []).append(losses[bins == b].mean().item())
    naive = []
    for x, b in history[-1]:  # the newest mean has weight 1, the one before it momentum, …
        powers = [momentum ** (len(means[b]) - 1 - i) for i in range(len(means[b]))]
        mean = sum(p * m for p, m in zip(powers, means[b], strict=True)) / sum(powers)
        naive.append(x / max(mean, 1e-12))
    assert normalizer(losses, bins).tolist() == pytest.approx(naive, rel=1e-9)


def test_bin_normalizer_leaves_out_what_is_not_finite() -> None:
    normalizer = BinNormalizer(2)
    bad = torch.tensor([float("nan"), float("inf"), 4.0])
    bins = torch.tensor([0, 1, 1])
    normalizer.update(bad, bins)
    assert normalizer(bad, bins).isfinite().tolist() == [False, False, True]
    normalizer.update(torch.tensor([2.0]), torch.tensor([0]))
    assert normalizer(torch.tensor([3.0, 2.0]), torch.tensor([0, 1])).tolist() == [1.5, 0.5]


def test_bin_normalizer_state_and_errors() -> None:
    one, two = BinNormalizer(3), BinNormalizer(3)
    one.update(torch.tensor([2.0, 4.0]), torch.tensor([0, 2]))
    two.load_state_dict(one.state_dict())
    one.update(torch.tensor([100.0]), torch.tensor([0]))  # a state is a copy
    assert two(torch.tensor([1.0]), torch.tensor([0])).tolist() == [0.5]
    with pytest.raises(ValueError, match="no statistics"):
        two(torch.tensor([1.0]), torch.tensor([1]))
    for bad in ((0, 0.9), (3, 1.0), (3, -0.1)):
        with pytest.raises(ValueError, match="num_bins"):
            BinNormalizer(*bad)
