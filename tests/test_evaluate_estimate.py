"""Intervals and the reasons why there is none: against scipy, closed forms and simulated coverage."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from brainldm.base.streams import stream
from brainldm.evaluate.conditioning import TrainingRanges, agreement
from brainldm.evaluate.estimate import (
    Estimate,
    difference_of_means,
    mean,
    median,
    pearson_r,
    share,
    standard_deviation,
    straight_line,
)

X = stream(0, "test/x").normal(40, 15, 23)
Y = 3 + 0.9 * X + stream(0, "test/y").normal(0, 4, 23)


def test_correlation_is_scipys_and_its_interval_the_wider_of_scipys_and_the_jackknifes() -> None:
    expected = stats.pearsonr(X, Y)
    fisher = expected.confidence_interval(0.95)
    found = pearson_r(X, Y)
    assert found.value == pytest.approx(expected.statistic) and found.n == 23
    without = np.arctanh([stats.pearsonr(np.delete(X, i), np.delete(Y, i)).statistic for i in range(23)])
    half = stats.t.ppf(0.975, 22) * np.sqrt(22 / 23 * ((without - without.mean()) ** 2).sum())
    ends = np.tanh(np.arctanh(expected.statistic) + np.array([-half, half]))
    expected_ends = min(fisher.low, ends[0]), max(fisher.high, ends[1])
    assert (found.low, found.high) == pytest.approx(expected_ends)


def test_one_image_that_differs_from_all_others_gives_fishers_interval() -> None:
    found = pearson_r([1.0, 1, 1, 1, 5], [2.0, 2, 2, 2, 3])
    assert found.value == pytest.approx(1) and found.low is not None
    assert standard_deviation([1.0, 1, 1, 1, 5]).low < standard_deviation([1.0, 1, 1, 1, 5]).value


def test_what_was_not_measured_is_no_value() -> None:
    with pytest.raises(ValueError, match="not finite"):
        pearson_r([1.0, 2, np.nan, 4], [1.0, 2, 3, 4])


def test_line_intervals_are_those_of_the_normal_equations() -> None:
    line = straight_line(X, Y)
    design = np.stack([np.ones_like(X), X], axis=1)
    coefficients, squares, _, _ = np.linalg.lstsq(design, Y, rcond=None)
    covariance = squares[0] / 21 * np.linalg.inv(design.T @ design)
    t = stats.t.ppf(0.975, 21)
    for estimate, k in ((line.intercept, 0), (line.slope, 1)):
        assert estimate.value == pytest.approx(coefficients[k])
        assert estimate.high - estimate.value == pytest.approx(t * np.sqrt(covariance[k, k]))


def test_a_perfect_instrument_has_r_1_slope_1_error_0() -> None:
    found = agreement(list(X), list(X))
    assert found.pearson_r.value == pytest.approx(1)
    assert found.pearson_r.low > 0.999999
    assert found.slope.value == pytest.approx(1) and found.intercept.value == pytest.approx(0, abs=1e-9)
    assert found.absolute_error.value == 0 and found.bias.value == 0


def test_only_images_with_both_values_count() -> None:
    asked: list[float | None] = [1.0, 2.0, None, 4.0, 5.0]
    measured: list[float | None] = [1.0, 2.5, 3.0, None, 5.0]
    found = agreement(asked, measured)
    assert found.absolute_error.n == 3 and found.absolute_error.value == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_images_never_give_a_meaningless_number(n: int) -> None:
    found = agreement([float(v) for v in range(n)], [2.0 * v + 1 for v in range(n)])
    assert (found.pearson_r.value is None) == (n < 3)
    assert found.pearson_r.low is None and found.pearson_r.reason
    assert (found.slope.value is None) == (n < 3)
    assert (found.absolute_error.value is None) == (n == 0)
    assert (found.absolute_error.low is None) == (n < 2)
    json.dumps(asdict(found), allow_nan=False)


def test_a_constant_side_is_said_and_not_divided_by() -> None:
    found = agreement([5.0] * 8, list(X[:8]))
    assert found.pearson_r.value is None and "same value" in found.pearson_r.reason
    assert found.slope.value is None
    assert found.absolute_error.value == pytest.approx(np.abs(X[:8] - 5).mean())


def test_means_and_their_difference_are_scipys() -> None:
    expected = stats.ttest_ind(X, Y[:9], equal_var=False)
    interval = expected.confidence_interval(0.95)
    found = difference_of_means(X, Y[:9])
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    low, high = stats.t.interval(0.95, 22, X.mean(), X.std(ddof=1) / np.sqrt(23))
    assert (mean(X).low, mean(X).high) == pytest.approx((low, high))
    assert mean([0.1, 5.0, 0.2], at_least=0.0).low == 0.0


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draws = stream(1, "test/coverage")
    held = {"mean": 0, "sd": 0, "median": 0}
    for _ in range(600):
        sample = draws.normal(10, 2, 12)
        for name, estimate, truth in (
            ("mean", mean(sample), 10),
            ("sd", standard_deviation(sample), 2),
            ("median", median(sample), 10),
        ):
            held[name] += estimate.low <= truth <= estimate.high
    for name, count in held.items():
        assert 0.92 <= count / 600 <= 0.985, name


def test_intervals_of_skewed_values_hold_the_truth_too() -> None:
    """Volumes of ventricles are about log-normal: there Fisher's interval and the chi-square one hold it 90 and 83 % of
    the time."""
    draws, sigma = stream(2, "test/skewed"), 0.35
    spread = np.sqrt((np.exp(sigma**2) - 1) * np.exp(sigma**2))
    held = {"sd": 0, "r": 0}
    for _ in range(400):
        asked = np.exp(draws.normal(0, sigma, 100))
        shown = asked + draws.normal(0, 0.3 * spread, 100)
        for name, estimate, truth in (
            ("sd", standard_deviation(asked), spread),
            ("r", pearson_r(asked, shown), 1 / np.sqrt(1.09)),
        ):
            held[name] += estimate.low <= truth <= estimate.high
    assert held["sd"] >= 0.9 * 400 and held["r"] >= 0.92 * 400


def test_median_needs_six_and_share_is_wilson() -> None:
    assert median([3.0, 1, 2, 5, 4]).low is None and median([3.0, 1, 2, 5, 4]).value == 3
    six = median([6.0, 1, 2, 5, 4, 3])
    assert (six.low, six.high) == (1, 6)
    assert share(3, 10).low == pytest.approx(0.1078, abs=1e-4)
    assert share(0, 0).value is None


def test_training_ranges_forgive_rounding_only() -> None:
    ranges = TrainingRanges.of([{"ventricles_mm3": 6995.684}, {"ventricles_mm3": 90000.0, "age_years": 50.0}])
    assert ranges.outside({"ventricles_mm3": 6995.68, "brain_mm3": 1.0}) == ()
    assert ranges.outside({"ventricles_mm3": 6990.0, "age_years": 50.5}) == ("ventricles_mm3", "age_years")


def test_an_estimate_survives_json() -> None:
    found = pearson_r(X, Y)
    assert Estimate.from_json(json.loads(json.dumps(asdict(found)))) == found


def test_a_line_through_equal_values_has_no_interval() -> None:
    line = straight_line([1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0])
    assert line.slope.value == 0 and line.slope.low is None and "measures the same" in line.slope.reason
    assert line.intercept.value == 5
