"""MS-SSIM against MONAI and against the formula written out; pairs; the interval over images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from brainldm.base.streams import stream
from brainldm.evaluate.diversity import (
    FOUR_G_R_SSIM,
    FOUR_G_SSIM,
    Prepared,
    draw_pairs,
    likeness,
    mean_over_pairs,
    ms_ssim,
    pyramid,
    scale_weights,
)


def images(shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = stream(seed, "test/images")
    smooth = np.add.outer(np.add.outer(*(np.linspace(0, 0.3, n) for n in shape[:2])), np.linspace(0, 0.3, shape[2]))
    return tuple(np.clip(smooth + 0.25 * draws.random(shape), 0, 1).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(("shape", "scales"), [((28, 37, 30), 3), ((15, 21, 17), 2), ((8, 9, 11), 1)])
def test_values_are_those_of_monai(shape: tuple[int, int, int], scales: int) -> None:
    torch = pytest.importorskip("torch")
    from monai.metrics.regression import compute_ms_ssim

    x, y = images(shape)
    weights = scale_weights(shape)
    assert len(weights) == scales
    expected = compute_ms_ssim(
        torch.from_numpy(x)[None, None], torch.from_numpy(y)[None, None], 3, kernel_size=7, weights=weights
    )
    assert ms_ssim(pyramid(x, scales), pyramid(y, scales), weights) == pytest.approx(float(expected), abs=2e-5)


def test_one_scale_is_the_formula_written_out() -> None:
    x, y = (image.astype(np.float64) for image in images((8, 9, 10), seed=3))
    bell = np.exp(-(((np.arange(7) - 3) / 1.5) ** 2) / 2)
    window = np.multiply.outer(np.multiply.outer(bell, bell), bell)
    window /= window.sum()
    values = []
    for i, j, k in itertools.product(range(2), range(3), range(4)):
        a, b = x[i : i + 7, j : j + 7, k : k + 7], y[i : i + 7, j : j + 7, k : k + 7]
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        values.append(luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4))
    assert ms_ssim(pyramid(x, 1), pyramid(y, 1), (1.0,)) == pytest.approx(np.mean(values), abs=1e-5)


def test_identical_images_give_1_and_order_does_not_matter() -> None:
    x, y = images((28, 30, 29))
    weights = scale_weights(x.shape)
    assert ms_ssim(pyramid(x, 3), pyramid(x, 3), weights) == pytest.approx(1, abs=1e-6)
    assert ms_ssim(pyramid(x, 3), pyramid(y, 3), weights) == ms_ssim(pyramid(y, 3), pyramid(x, 3), weights)
    assert ms_ssim(pyramid(x, 3), pyramid(y, 3), weights) < 0.99


def test_a_change_of_gain_is_no_difference_of_structure_but_of_luminance_and_contrast() -> None:
    image, _ = images((16, 17, 18))
    found = likeness(Prepared.of(image, 1), Prepared.of(0.8 * image, 1), (1.0,))
    assert found[FOUR_G_R_SSIM] > 0.999 and found[FOUR_G_SSIM] < 0.97


def test_scales_follow_the_stated_rule() -> None:
    for shape, scales in (((160, 224, 160), 5), ((80, 112, 80), 4), ((40, 56, 40), 3), ((6, 99, 99), 0)):
        weights = scale_weights(shape)
        assert len(weights) == scales
        assert sum(weights) == pytest.approx(1 if scales else 0, abs=2e-4)


@pytest.mark.parametrize(("count", "pairs"), [(5, 10), (5, 1000), (12, 20), (4000, 300)])
def test_pairs_are_distinct_and_repeatable(count: int, pairs: int) -> None:
    drawn = draw_pairs(count, pairs, 0, "synthetic")
    assert len(drawn) == len(set(drawn)) == min(pairs, count * (count - 1) // 2)
    assert all(0 <= i < j < count for i, j in drawn)
    assert drawn == draw_pairs(count, pairs, 0, "synthetic")
    if pairs < count * (count - 1) // 2:
        assert drawn != draw_pairs(count, pairs, 1, "synthetic")
        assert drawn != draw_pairs(count, pairs, 0, "real")


def test_jackknife_of_a_sum_is_exact() -> None:
    # Where a pair's value is a_i + a_j, the mean over all pairs is twice the mean of a.
    a = stream(2, "test/a").normal(size=9)
    found = mean_over_pairs([(i, j, a[i] + a[j]) for i, j in itertools.combinations(range(9), 2)], 9)
    assert found.estimate.value == pytest.approx(2 * a.mean())
    assert found.standard_error == pytest.approx(2 * a.std(ddof=1) / 3)


def test_the_interval_over_images_holds_the_truth() -> None:
    draws, held = stream(3, "test/coverage"), 0
    for _ in range(300):
        a, noise = draws.normal(0, 1, 10), draws.normal(0, 0.5, (10, 10))
        found = mean_over_pairs([(i, j, a[i] + a[j] + noise[i, j]) for i, j in draw_pairs(10, 25, 0, "x")], 10).estimate
        held += found.low <= 0 <= found.high
    assert held / 300 >= 0.93


@pytest.mark.parametrize("count", [2, 3])
def test_few_images_have_a_value_and_no_interval(count: int) -> None:
    found = mean_over_pairs([(i, j, 0.5) for i, j in itertools.combinations(range(count), 2)], count)
    assert found.estimate.value == 0.5 and found.estimate.low is None and found.estimate.reason
