"""A number, the interval it lies in and how many images stand behind it; or the reason why there is no number.

Intervals are 95 % and in closed form, so that they need no seed and stay honestly wide when there are few images. A
figure that its data cannot carry is null with a reason, never a meaningless number: two points always have r = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """`value` with the interval `low`..`high` made by the method `interval`, from `n` images.

    `value` is None where the data cannot carry it and `low`, `high` are None where they cannot carry an interval;
    `reason` says why.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    interval: str = ""
    reason: str = ""

    @classmethod
    def none(cls, reason: str, n: int = 0) -> Estimate:
        return cls(None, n=n, reason=reason)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Estimate:
        return cls(**content)


@dataclass(frozen=True)
class Line:
    """A straight line through points."""

    slope: Estimate
    intercept: Estimate


def _paired(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"two equally long lists are needed, not shapes {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a value is not finite: leave out what was not measured")
    return first, second


def _is_constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= 1e-9 * max(1e-30, float(np.abs(values).max())))


def pearson_r(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Higher is better, 1 is perfect: Pearson's correlation with the wider of two intervals of artanh r: Fisher's,
    +- 1.96 / sqrt(n - 3), which is right for normal values, and the jackknife's, which is for skewed ones (volumes of
    ventricles are: Fisher's holds 90 % of the time there).

    From three points on; the interval from four on.
    """
    first, second = _paired(x, y)
    n = len(first)
    if n < 3:
        return Estimate.none(f"a correlation needs at least 3 images, there are {n}", n)
    if _is_constant(first) or _is_constant(second):
        return Estimate.none("one side has the same value everywhere, so there is nothing to correlate", n)
    r = float(np.clip(np.corrcoef(first, second)[0, 1], -1, 1))
    if n < 4:
        return Estimate(r, n=n, reason="an interval needs at least 4 images")
    # At |r| = 1 the transform is infinite; one rounding step below keeps the interval finite and as narrow.
    z = math.atanh(min(max(r, -1 + 1e-15), 1 - 1e-15))
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) / math.sqrt(n - 3)
    squares = _products_without(first, first) * _products_without(second, second)
    with np.errstate(divide="ignore", invalid="ignore"):
        r_without = np.clip(_products_without(first, second) / np.sqrt(squares), -1 + 1e-15, 1 - 1e-15)
    half = max(half, _jackknife_half(np.arctanh(r_without)))
    return Estimate(r, math.tanh(z - half), math.tanh(z + half), n, "Fisher z or jackknife, the wider")


def straight_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Perfect is slope 1 and intercept 0: the least-squares line of y on x with t intervals (n - 2 degrees)."""
    first, second = _paired(x, y)
    n = len(first)
    reason = ""
    if n < 3:
        reason = f"a line needs at least 3 images, there are {n}"
    elif _is_constant(first):
        reason = "every image has the same asked value, so there is no slope"
    if reason:
        return Line(Estimate.none(reason, n), Estimate.none(reason, n))
    fit = stats.linregress(first, second)
    t = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 2))

    def around(value: float, standard_error: float) -> Estimate:
        if not math.isfinite(standard_error):
            return Estimate(value, n=n, reason="every image measures the same, so there is no interval")
        return Estimate(value, value - t * standard_error, value + t * standard_error, n, "t of the regression")

    return Line(
        around(float(fit.slope), float(fit.stderr)),
        around(float(fit.intercept), float(fit.intercept_stderr)),
    )


def mean(values: Sequence[float], *, at_least: float | None = None) -> Estimate:
    """The mean with its t interval; `at_least` is a bound that the quantity cannot pass (0 for an absolute error)."""
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    if n == 0:
        return Estimate.none("there are no values")
    centre = float(data.mean())
    if n == 1:
        return Estimate(centre, n=1, reason="an interval needs at least 2 images")
    if _is_constant(data):
        return Estimate(centre, n=n, reason="every image has the same value")
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * data.std(ddof=1) / math.sqrt(n))
    low = centre - half if at_least is None else max(at_least, centre - half)
    return Estimate(centre, low, centre + half, n, "t of the mean")


def standard_deviation(values: Sequence[float]) -> Estimate:
    """The standard deviation (n - 1) with what covers two intervals: the chi-square one of normally distributed values,
    and the jackknife's of its logarithm, which is for skewed ones."""
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    if n < 2:
        return Estimate.none(f"a spread needs at least 2 images, there are {n}", n)
    sd = float(data.std(ddof=1))
    if n < 4:
        return Estimate(sd, n=n, reason="an interval needs at least 4 images")
    if _is_constant(data):
        return Estimate(0.0, n=n, reason="every image has the same value")
    tail = (1 - CONFIDENCE) / 2
    low, high = (sd * math.sqrt((n - 1) / float(stats.chi2.ppf(p, n - 1))) for p in (1 - tail, tail))
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = math.exp(_jackknife_half(np.log(_products_without(data, data)) / 2))
    return Estimate(sd, min(low, sd / factor), max(high, sd * factor), n, "chi-square or jackknife, the wider")


def _products_without(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,): the sum of products of deviations from the means of all values but one, for each one left out."""
    n, products = len(first), (first - first.mean()) * (second - second.mean())
    return products.sum() - n / (n - 1) * products


def _jackknife_half(without_N: np.ndarray) -> float:
    """Half of the t interval by the jackknife, from the figure without each image; 0 where one is not finite (all but
    one image alike)."""
    n = len(without_N)
    if not np.isfinite(without_N).all():
        return 0.0
    standard_error = math.sqrt((n - 1) / n * float(((without_N - without_N.mean()) ** 2).sum()))
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * standard_error


def difference_of_means(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """0 is no difference: mean(first) - mean(second) with Welch's t interval; n is the smaller of the two."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    n = min(len(a), len(b))
    if n == 0:
        return Estimate.none("one side has no values")
    value = float(a.mean() - b.mean())
    if n < 2:
        return Estimate(value, n=n, reason="an interval needs at least 2 images on each side")
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    return _welch(value, parts, (len(a) - 1, len(b) - 1), n, "Welch's t")


def difference(first: Estimate, second: Estimate, standard_errors: tuple[float, float]) -> Estimate:
    """0 is no difference: first - second for two independent estimates with their standard errors (Welch's t)."""
    if first.value is None or second.value is None:
        return Estimate.none("one side has no value", min(first.n, second.n))
    value, n = first.value - second.value, min(first.n, second.n)
    if not all(math.isfinite(error) for error in standard_errors):
        return Estimate(value, n=n, reason="one side has no interval")
    parts = standard_errors[0] ** 2, standard_errors[1] ** 2
    return _welch(value, parts, (first.n - 1, second.n - 1), n, "jackknife, Welch's t")


def _welch(value: float, parts: tuple[float, float], degrees: tuple[int, int], n: int, how: str) -> Estimate:
    variance = sum(parts)
    if variance == 0:
        return Estimate(value, value, value, n, how)
    freedom = variance**2 / sum(part**2 / d for part, d in zip(parts, degrees))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(variance)
    return Estimate(value, value - half, value + half, n, how)


def median(values: ArrayLike) -> Estimate:
    """The median with the interval between order statistics that the binomial distribution gives (n from 6 on)."""
    data = np.sort(np.asarray(values, dtype=np.float64))
    n = len(data)
    if n == 0:
        return Estimate.none("there are no values")
    centre = float(np.median(data))
    # The largest rank k (from 0) for which the k lowest and k highest values can be left out.
    k = int(stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))
    if k < 1:
        return Estimate(centre, n=n, reason="an interval of the median needs at least 6 images")
    return Estimate(centre, float(data[k - 1]), float(data[n - k]), n, "order statistics")


def area_under_curve(scores_of_0: Sequence[float], scores_of_1: Sequence[float]) -> Estimate:
    """Higher is better, 1 is perfect, 0.5 is chance: how often a member of class 1 scores above one of class 0 (ties
    half), with the interval of Hanley and McNeil 1982."""
    zeros, ones = np.asarray(scores_of_0, dtype=np.float64), np.asarray(scores_of_1, dtype=np.float64)
    n0, n1 = len(zeros), len(ones)
    if min(n0, n1) == 0:
        return Estimate.none("only one of the two classes was asked for", n0 + n1)
    area = float(stats.mannwhitneyu(ones, zeros).statistic) / (n0 * n1)
    if min(n0, n1) < 2:
        return Estimate(area, n=n0 + n1, reason="an interval needs at least 2 images of each class")
    two_ones, two_zeros = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (n1 - 1) * (two_ones - area**2) + (n0 - 1) * (two_zeros - area**2)
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt(max(0.0, spread) / (n0 * n1))
    if half == 0:  # no errors among so few: Wilson's bound on the share of pairs ordered rightly
        low = float(stats.binomtest(min(n0, n1), min(n0, n1)).proportion_ci(CONFIDENCE, method="wilson").low)
        return Estimate(area, low if area > 0.5 else 0.0, 1.0 if area > 0.5 else 1 - low, n0 + n1, "Wilson, no errors")
    return Estimate(area, max(0.0, area - half), min(1.0, area + half), n0 + n1, "Hanley-McNeil")


def share(count: int, n: int) -> Estimate:
    """count / n with Wilson's score interval."""
    if n == 0:
        return Estimate.none("there are no images")
    interval = stats.binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(count / n, float(interval.low), float(interval.high), n, "Wilson")
