import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from erase.evaluation.stats import mcnemar_exact, newcombe, wilson


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
