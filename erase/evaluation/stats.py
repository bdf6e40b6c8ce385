"""Intervals and tests for counts: every rate in a report carries n and a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval for a binomial proportion (Wilson 1927, JASA 22:209; no continuity correction).

    Unlike the normal interval it stays within [0, 1] and has a width at 0 and at ``total`` successes.

    Args:
        successes: number of successes, 0 to ``total``.
        total: number of trials, at least 1.
        confidence: two-sided coverage, between 0 and 1.

    Returns:
        Lower and upper end, as fractions of 1.

    Raises:
        ValueError: ``total`` < 1, ``successes`` outside 0..``total``, or ``confidence`` outside (0, 1).
    """
    if total < 1:
        raise ValueError(f"total is {total}, expected at least 1: a rate of nothing has no interval")
    if not 0 <= successes <= total:
        raise ValueError(f"successes is {successes}, expected 0 to {total}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / total
    centre = rate + z * z / (2 * total)
    spread = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == total else min(1.0, (centre + spread) / scale)
    return low, high


def newcombe(before: tuple[int, int], after: tuple[int, int], confidence: float = 0.95) -> tuple[float, float]:
    """Interval for the difference of two rates, after − before (Newcombe 1998, Stat. Med. 17:873, method 10).

    It is made of the two Wilson intervals, as if the two were independent: too wide for pairs that go together.

    Args:
        before: (successes, total).
        after: the same.
        confidence: two-sided coverage, between 0 and 1.

    Returns:
        Lower and upper end, as fractions of 1; a difference whose interval holds 0 is no difference.

    Raises:
        ValueError: as `wilson`.
    """
    (low0, high0), (low1, high1) = wilson(*before, confidence), wilson(*after, confidence)
    p0, p1 = before[0] / before[1], after[0] / after[1]
    return p1 - p0 - math.hypot(p1 - low1, high0 - p0), p1 - p0 + math.hypot(high1 - p1, p0 - low0)


def mcnemar_exact(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided McNemar test on paired yes/no outcomes (a binomial test on the pairs that changed).

    With b pairs that went yes → no and c that went no → yes, the p-value is
    min(1, 2 P[X <= min(b, c)]), X ~ Binomial(b + c, 1/2); 1.0 where nothing changed.

    Args:
        before: `[N]`, one outcome a pair.
        after: `[N]`, the same pairs in the same order.

    Raises:
        ValueError: the lengths differ, or are 0.
    """
    if len(before) != len(after):
        raise ValueError(f"got {len(before)} outcomes before and {len(after)} after, expected pairs")
    if not before:
        raise ValueError("got no pairs, expected at least 1")
    lost = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    gained = sum(bool(a) and not b for b, a in zip(before, after, strict=True))
    changed = lost + gained
    # Whole numbers to the end: one rounding, in the division.
    tail = sum(math.comb(changed, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << changed))
