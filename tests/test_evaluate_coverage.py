"""Precision, recall, density and coverage: as their papers define them, and known cases."""

from __future__ import annotations

import numpy as np
import pytest

from brainldm.base.streams import stream
from brainldm.evaluate.coverage import manifolds


def normal(n: int, seed: int, shift: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return shift + spread * stream(seed, "test/coverage").standard_normal((n, 6))


def transcribed(made: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """The definitions, point by point."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    made_radii = [radius(made, i) for i in range(len(made))]
    real_radii = [radius(real, i) for i in range(len(real))]
    inside_real = [[distance(s, r) <= real_radii[i] for i, r in enumerate(real)] for s in made]
    inside_made = [[distance(s, r) <= made_radii[j] for j, s in enumerate(made)] for r in real]
    return (
        sum(any(row) for row in inside_real) / len(made),
        sum(any(row) for row in inside_made) / len(real),
        sum(sum(row) for row in inside_real) / (k * len(made)),
        sum(any(row[i] for row in inside_real) for i in range(len(real))) / len(real),
    )


@pytest.mark.parametrize(("m", "n", "k", "shift"), [(17, 23, 3, 0.5), (30, 12, 5, 0.0), (7, 8, 5, 1.0)])
def test_as_the_papers_define_them(m: int, n: int, k: int, shift: float) -> None:
    made, real = normal(m, 0, shift), normal(n, 1)
    found, _ = manifolds(made, real, 0, k=k)
    expected = transcribed(made, real, k)
    got = (found.precision.value, found.recall.value, found.density.value, found.coverage.value)
    assert got == pytest.approx(expected)


def test_a_perfect_generator_is_what_chance_gives() -> None:
    found, chance = manifolds(normal(150, 0), normal(120, 1), 0)
    for name in ("precision", "recall", "density", "coverage"):
        expected = getattr(chance, name)
        assert expected.low <= getattr(found, name).value <= expected.high
    assert chance.density.value == pytest.approx(1, abs=0.05)
    # Naeem et al. 2020, lemma 2, for N real and M synthetic images of one distribution.
    n, m, k = 120, 150, 5
    expected = 1 - np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    assert chance.coverage.value == pytest.approx(expected, abs=0.01)


def test_what_goes_wrong_is_told_apart() -> None:
    real = normal(120, 1)
    collapsed, chance = manifolds(normal(120, 0, spread=0.05), real, 0)
    assert collapsed.recall.value == 0 and collapsed.precision.value == 1  # all in one place, and that a good one
    assert collapsed.coverage.value < chance.coverage.low
    elsewhere, _ = manifolds(normal(120, 0, shift=9.0), real, 0)
    assert elsewhere.precision.value == elsewhere.density.value == elsewhere.coverage.value == 0
    copies, _ = manifolds(real.copy(), real, 0)
    assert copies.precision.value == copies.recall.value == copies.coverage.value == 1


@pytest.mark.parametrize("few", [1, 2, 5])
def test_too_few_or_broken_features_give_a_reason(few: int) -> None:
    found, chance = manifolds(normal(few, 0), normal(50, 1), 0)
    assert found.precision.value is None and "more than 5 images" in found.precision.reason
    assert chance.coverage.value is None
    broken = normal(20, 0)
    broken[0, 0] = np.nan
    assert "not finite" in manifolds(broken, normal(20, 1), 0)[0].density.reason


def test_the_same_seed_gives_the_same_chance() -> None:
    made, real = normal(20, 0), normal(20, 1)
    assert manifolds(made, real, 3) == manifolds(made, real, 3) != manifolds(made, real, 4)
