"""Intervals and tests: every rate in a report carries n and a 95 % interval, every comparison says what it shows."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np


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


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other one beats: one that is at least as good in all numbers, and better in one; more is better.

    Args:
        points: `[N, K]`, K numbers each.

    Raises:
        ValueError: points of different lengths.
    """

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        both = list(zip(a, b, strict=True))
        return all(x >= y for x, y in both) and any(x > y for x, y in both)

    return [not any(beats(other, point) for other in points) for point in points]


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


MOST_WHOLE = 20_000
"""Pairs that changed, above which the exact test is summed in floats: whole numbers of n bits cost n² in time."""


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
    if changed > MOST_WHOLE:
        return min(1.0, 2 * _binomial_tail(min(lost, gained), changed))
    # Whole numbers to the end: one rounding, in the division. Each binomial coefficient is made of the one before.
    tail = term = 1
    for i in range(min(lost, gained)):
        term = term * (changed - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << changed))


def _binomial_tail(most: int, n: int) -> float:
    """P[X <= most], X ~ Binomial(n, 1/2), for most <= n / 2: from its largest term down, until terms add nothing."""
    term = math.exp(math.lgamma(n + 1) - math.lgamma(most + 1) - math.lgamma(n - most + 1) - n * math.log(2))
    tail = 0.0
    for i in range(most, -1, -1):
        tail += term
        term *= i / (n - i + 1)
        if term < tail * 1e-17:
            break
    return tail


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, after - before, with its interval."""

    before: float
    after: float
    difference: float
    ci95: tuple[float, float]
    pairs: int
    groups: int
    """What was drawn with replacement: prompts, or pairs where there are no groups."""

    @property
    def shown(self) -> bool:
        """Whether 0 lies outside the interval."""
        return not self.ci95[0] <= 0 <= self.ci95[1]

    def __str__(self) -> str:
        low, high = self.ci95
        says = "a difference" if self.shown else "no difference shown: 0 is inside the interval"
        return (
            f"{self.before:.4g} → {self.after:.4g}, {self.difference:+.4g} "
            f"(95 % interval {low:+.4g} to {high:+.4g}): {says}"
        )


MIN_GROUPS = 5
"""Fewer are no sample of prompts: their bootstrap interval would be far too narrow."""


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Percentile bootstrap interval (95 %; Efron 1979) of the mean of paired differences, whole groups at a time.

    Images of one prompt are no independent sample of prompts, so prompts are what is drawn with replacement. Every
    pair counts once: a prompt with more images weighs more.

    Args:
        before: `[N]`, a score a pair.
        after: `[N]`, the same pairs in the same order.
        groups: `[N]`, each pair's prompt; None where each pair is one of its own.
        draws: resamples.
        seed: of the resamples.

    Raises:
        ValueError: the lengths differ, a score is not finite, or there are fewer than `MIN_GROUPS` groups.
    """
    names = list(range(len(before))) if groups is None else list(groups)
    if not len(before) == len(after) == len(names):
        raise ValueError(f"got {len(before)} scores before, {len(after)} after and {len(names)} groups, expected pairs")
    a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a score is not finite, so the mean has no interval")
    place = {name: k for k, name in enumerate(dict.fromkeys(names))}
    if len(place) < MIN_GROUPS:
        raise ValueError(f"got {len(place)} prompts, expected at least {MIN_GROUPS} for an interval over prompts")
    index = np.array([place[name] for name in names])
    counts = np.bincount(index).astype(np.float64)
    sums = np.bincount(index, b - a)
    generator = np.random.default_rng(seed)
    means = []
    at_once = max(1, 1_000_000 // len(place))
    for start in range(0, draws, at_once):
        some = generator.integers(0, len(place), (min(at_once, draws - start), len(place)))
        means.append(sums[some].sum(axis=1) / counts[some].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Difference(
        float(a.mean()), float(b.mean()), float((b - a).mean()), (float(low), float(high)), len(a), len(place)
    )


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval for a mean over few runs, such as seeds of an erasure (normal, of unknown variance).

    Of 3 seeds it is wide, 4.3 standard errors each way: that is what 3 seeds tell.

    Raises:
        ValueError: fewer than 2 values, or ``confidence`` outside (0, 1).
    """
    if len(values) < 2:
        raise ValueError(f"got {len(values)} values, expected at least 2: one run has no spread")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1, such as 0.95")
    low, high = 0.0, 1.0
    while student_within(high, len(values) - 1) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_within(middle, len(values) - 1) < confidence else (low, middle)
    error = stdev(values) / math.sqrt(len(values))
    return fmean(values) - high * error, fmean(values) + high * error


def student_within(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's distribution with whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2 == 0:
        term = total = 1.0
        for k in range(2, freedom, 2):
            term *= square * (k - 1) / k
            total += term
        return sine * total
    term = total = math.cos(angle) if freedom > 1 else 0.0
    for k in range(3, freedom, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total)
