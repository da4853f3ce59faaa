"""Distances between sets of features: against their definitions, known values, and what too few images give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import linalg

from brainldm.base.streams import stream
from brainldm.evaluate.frechet import frechet_distance, kernel_distance, set_distance


def normal(n: int, seed: int, *, shift: float = 0.0, spread: float = 1.0, features: int = 12) -> np.ndarray:
    return shift + spread * stream(seed, "test/frechet").standard_normal((n, features))


def transcribed(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, with a matrix square root."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    apart = x.mean(axis=0) - y.mean(axis=0)
    return float(apart @ apart + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real))


@pytest.mark.parametrize(("n", "m"), [(60, 40), (200, 13), (500, 300)])
def test_frechet_is_its_definition(n: int, m: int) -> None:
    x, y = normal(n, 1), normal(m, 2, shift=0.3, spread=1.5) @ np.linalg.qr(normal(12, 3))[0]
    assert frechet_distance(x, y) == pytest.approx(transcribed(x, y), rel=1e-9)


def test_frechet_where_there_are_fewer_images_than_features() -> None:
    # Half a rotation swaps two features of different spread: tr(A + B - 2 (AB)^(1/2)) is then known.
    x = np.array([[3.0, 0, 0, 0], [-3.0, 0, 0, 0], [0, 1.0, 0, 0], [0, -1.0, 0, 0]])[:, [0, 1, 2, 3]]
    a, b = np.diag([6.0, 2 / 3, 0, 0]), np.diag([2 / 3, 6.0, 0, 0])
    expected = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.diag(a) * np.diag(b)).sum()
    assert frechet_distance(x, x[:, [1, 0, 2, 3]]) == pytest.approx(expected)
    wide = normal(9, 5, features=40)
    assert frechet_distance(wide, wide) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(wide, wide + 2) == pytest.approx(40 * 4)


def test_frechet_agrees_with_monai() -> None:
    torch = pytest.importorskip("torch")
    from monai.metrics.fid import get_fid_score

    x, y = normal(90, 1), normal(80, 2, shift=0.2, spread=1.3)
    theirs = float(get_fid_score(torch.from_numpy(x), torch.from_numpy(y)))
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-4)


def test_the_root_is_taken_of_no_more_than_images_by_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand images of 2048 features take seconds; by covariances, minutes."""
    shapes, whole = [], linalg.svdvals

    def svdvals(matrix: np.ndarray, **options: Any) -> np.ndarray:
        shapes.append(matrix.shape)
        return whole(matrix, **options)

    monkeypatch.setattr("brainldm.evaluate.frechet.linalg.svdvals", svdvals)
    assert frechet_distance(normal(60, 1, features=300), normal(50, 2, features=300)) > 0
    assert frechet_distance(normal(60, 1, features=20), normal(50, 2, features=20)) > 0
    assert shapes == [(60, 50), (20, 20)]


def test_one_row_is_no_set() -> None:
    with pytest.raises(ValueError, match="2 or more rows"):
        frechet_distance(normal(1, 1), normal(9, 2))


def kernel_transcribed(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    own = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own + other - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_its_definition_and_its_interval_the_jackknife() -> None:
    x, y = normal(9, 1), normal(7, 2, shift=0.4)
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(kernel_transcribed(x, y))
    variance = 0.0
    for side, count in ((0, 9), (1, 7)):
        without = np.array(
            [
                kernel_transcribed(*(np.delete(part, i, 0) if k == side else part for k, part in enumerate((x, y))))
                for i in range(count)
            ]
        )
        variance += (count - 1) / count * ((without - without.mean()) ** 2).sum()
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * np.sqrt(variance))


def test_the_kernel_interval_holds_zero_as_often_as_it_says() -> None:
    held = sum(
        found.low <= 0 <= found.high
        for seed in range(100)
        if (found := kernel_distance(normal(40, 2 * seed), normal(40, 2 * seed + 1)))
    )
    assert held >= 88


def test_sets_of_one_population_are_as_far_apart_as_parts_of_the_real() -> None:
    same = set_distance(normal(60, 1), normal(90, 2), 0)
    assert same.parts.beyond.low < 0 < same.parts.beyond.high
    assert same.parts.across.n == same.parts.real.n == 22
    other = set_distance(normal(60, 1, spread=0.4), normal(90, 2), 0)  # less varied, same mean
    assert other.parts.beyond.low > max(0, same.parts.beyond.value)
    assert other.kernel.low > 0 > same.kernel.low


def test_few_images_and_identical_ones() -> None:
    alone = set_distance(normal(1, 1), normal(9, 2), 0)
    assert all(e.value is None and "4 images" in e.reason for e in (alone.all, alone.parts.across, alone.kernel))
    five = set_distance(normal(5, 1), normal(5, 2), 0)
    assert five.all.value is not None and "fewer images" in five.all.reason
    assert five.parts.across.value is None and "8 synthetic and 16 real" in five.parts.across.reason
    alike = set_distance(normal(9, 1), np.ones((16, 12)), 0)
    assert alike.parts.real.value == 0 and alike.parts.beyond.value > 0


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_range_of_parts_holds_the_populations_value(shift: float) -> None:
    """Of every figure at that size, as often as it says, also where people differ in how far from the mean they lie and
    where there are no more real than synthetic images."""

    def people(n: int, seed: int, shift: float) -> np.ndarray:
        return normal(n, seed, shift=shift) * np.exp(stream(seed, "test/differing").normal(0, 0.25, (n, 1)))

    many = [set_distance(people(64, 2 * seed, shift), people(64, 2 * seed + 1, 0), 0).parts for seed in range(60)]
    figures = ("across", "real", "beyond")
    truth = [np.mean([getattr(parts, name).value for parts in many]) for name in figures]
    held = np.zeros(3)
    for parts in many:
        found = (getattr(parts, name) for name in figures)
        held += [e.low <= value <= e.high for e, value in zip(found, truth)]
    assert (held >= 0.9 * len(many)).all()
