import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, t

from erase.evaluation.stats import (
    Difference,
    mcnemar_exact,
    newcombe,
    paired_bootstrap,
    pareto_front,
    student_within,
    t_interval,
    wilson,
)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_is_scipys(counts: tuple[int, int], confidence: float) -> None:
    successes, total = counts
    expected = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    # both are a few float64 operations on numbers below 1
    assert wilson(successes, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_by_hand() -> None:
    # Newcombe 1998 (Stat Med 17:857), table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_wilson_ends_are_exact() -> None:
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0), "total is 0"), ((5, 4), "successes is 5, expected 0 to 4"), ((-1, 4), "-1"), ((1, 4, 95), "95")],
)
def test_wilson_refuses(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson(*arguments)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_is_a_binomial_test_on_the_changed(pairs: list[tuple[bool, bool]]) -> None:
    lost = sum(b and not a for b, a in pairs)
    gained = sum(a and not b for b, a in pairs)
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar_exact([b for b, _ in pairs], [a for _, a in pairs]) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand_and_large() -> None:
    assert mcnemar_exact([True] * 5, [False] * 5) == 2 / 2**5
    assert mcnemar_exact([True] * 4703, [False] * 4703) == 0.0  # below the least float64, and no overflow
    assert mcnemar_exact([True, False], [False, True]) == 1.0
    assert mcnemar_exact([True] * 7 + [False] * 2, [False] * 7 + [True] * 2) == 2 * (1 + 9 + 36) / 2**9


def test_mcnemar_refuses_what_is_not_pairs() -> None:
    with pytest.raises(ValueError, match="2 outcomes before and 1 after"):
        mcnemar_exact([True, False], [True])
    with pytest.raises(ValueError, match="no pairs"):
        mcnemar_exact([], [])


def test_wilson_covers() -> None:
    # the theorem: exact coverage of the 95 % interval, averaged over rates, is about 95 %
    from math import comb

    covered = []
    for rate, n in itertools.product([k / 20 for k in range(1, 20)], [30]):
        inside = [s for s in range(n + 1) if wilson(s, n)[0] <= rate <= wilson(s, n)[1]]
        covered.append(sum(comb(n, s) * rate**s * (1 - rate) ** (n - s) for s in inside))
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.015)  # discreteness at n = 30


def test_the_pareto_front_by_hand() -> None:
    """Equal points share it; one that is worse in a single number is off it."""
    points = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.5, 0.4), (0.5, 0.5), (1.0, -0.1)]
    assert pareto_front(points) == [True, True, True, False, True, False]
    assert pareto_front([]) == []


# --- paired scores --------------------------------------------------------------------------------


def test_paired_bootstrap_is_scipys() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=60)
    after = before + rng.exponential(size=60) - 0.5
    found = paired_bootstrap(before.tolist(), after.tolist())
    difference = after - before
    expected = bootstrap((difference,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert found.difference == pytest.approx(difference.mean())
    assert (found.before, found.after) == pytest.approx((before.mean(), after.mean()))
    # 10,000 resamples: a quantile is known to about 0.003 standard deviations of the mean's 0.12, times 5
    assert found.ci95 == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found == paired_bootstrap(before.tolist(), after.tolist())


def test_prompts_are_drawn_whole() -> None:
    """20 images of each of 10 prompts that differ by prompt alone are 10 observations, not 200."""
    rng = np.random.default_rng(0)
    shift = rng.normal(size=10)
    groups = np.repeat(np.arange(10), 20)
    whole = paired_bootstrap([0.0] * 200, shift[groups].tolist(), groups.tolist())
    each = paired_bootstrap([0.0] * 10, shift.tolist())
    naive = paired_bootstrap([0.0] * 200, shift[groups].tolist())
    assert whole.ci95 == pytest.approx(each.ci95, abs=1e-12)  # the same draws
    assert (whole.pairs, whole.groups) == (200, 10)
    width = [found.ci95[1] - found.ci95[0] for found in (whole, naive)]
    assert width[0] > 3 * width[1]  # about √20


def test_a_difference_inside_its_interval_is_called_so() -> None:
    noise = [0.3, -0.2, 0.1, -0.3, 0.2, -0.1, 0.05]
    inside = paired_bootstrap([0.0] * 7, noise)
    assert not inside.shown
    assert "no difference shown: 0 is inside the interval" in str(inside)
    assert "-0.1" in str(inside)
    outside = paired_bootstrap([0.0] * 7, [5 + x for x in noise])
    assert outside.shown
    assert str(outside).endswith(": a difference")
    assert not Difference(1.0, 1.0, 0.0, (0.0, 0.0), 7, 7).shown


def test_paired_bootstrap_refuses() -> None:
    with pytest.raises(ValueError, match="2 scores before, 1 after and 2 groups"):
        paired_bootstrap([0.0, 1], [1.0])
    with pytest.raises(ValueError, match="not finite"):
        paired_bootstrap([0.0] * 6, [float("nan")] * 6)
    with pytest.raises(ValueError, match="got 2 prompts, expected at least 5"):
        paired_bootstrap([0.0] * 6, [1.0] * 6, ["a"] * 3 + ["b"] * 3)


# --- few runs -------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.floats(0.01, 50))
def test_student_is_scipys(freedom: int, x: float) -> None:
    assert student_within(x, freedom) == pytest.approx(1 - 2 * t.sf(x, freedom), abs=1e-12)


def test_t_interval_by_hand() -> None:
    # t of 2 degrees of freedom at 95 %: 4.3027 (any table); standard error 1/√3
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="got 1 values, expected at least 2"):
        t_interval([1.0])
    with pytest.raises(ValueError, match="confidence is 95"):
        t_interval([1.0, 2.0], 95)


def test_newcombe_by_hand() -> None:
    """Newcombe 1998 (Stat Med 17:873), table II, method 10."""
    for before, after, low, high in (
        ((48, 80), (56, 70), 0.0524, 0.3339),
        ((3, 10), (9, 10), 0.1705, 0.8090),
        ((0, 29), (5, 56), -0.0381, 0.1926),
        ((0, 20), (10, 10), 0.6791, 1.0),
    ):
        assert newcombe(before, after) == pytest.approx((low, high), abs=5e-5)
        assert newcombe(after, before) == pytest.approx((-high, -low), abs=5e-5)
