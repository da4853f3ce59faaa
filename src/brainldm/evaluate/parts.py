"""How far two sets lie apart, read against how far parts of one set do.

A distance between finite sets is never 0, and shrinks as they grow, so a bare value says little. Here sets of one size
are compared: random synthetic images with random real ones, and such parts of either set with each other. The range
over such draws is an interval too: as half of a sample varies about the whole, so the whole varies about its population
(the jackknife that leaves out half, Shao and Wu 1989). So half of the real people must be left out of every draw, also
of two parts that are compared with each other: a part is a quarter of them at most. The range then holds the
population's value about as often as it says or more often, since a mean over draws varies less than a draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from brainldm.evaluate.estimate import CONFIDENCE, Estimate

DRAWS = 50
FEWEST = 4  # images of a set: the covariance of fewer is no figure of a population
FEWEST_REAL = 4 * FEWEST

Distance = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Parts:
    """Lower is better. `across` of a part of the synthetic to a part of the real, `real` between two parts of the real,
    and `beyond`: `across` less the mean of `real` and the same of the synthetic, which is 0 on average for two sets of
    one population, of whatever size. Means over draws, with the range that holds 95 % of them."""

    across: Estimate
    real: Estimate
    beyond: Estimate

    @classmethod
    def none(cls, reason: str, n: int) -> Parts:
        return cls(*(Estimate.none(reason, n) for _ in range(3)))


def in_parts(
    synthetic_MF: np.ndarray, real_NF: np.ndarray, distance: Distance, generator: np.random.Generator, *, most: int
) -> Parts:
    """`distance` between parts of at most `most` rows, half of the synthetic and a quarter of the real; nulls with a
    reason where a side has too few."""
    m, n = len(synthetic_MF), len(real_NF)
    size = min(m // 2, n // 4, most)
    if size < FEWEST:
        few = f"needs at least {2 * FEWEST} synthetic and {FEWEST_REAL} real images, there are {m} and {n}"
        return Parts.none(f"a distance of equal sizes {few}", min(m, n))
    across, real, beyond = np.empty(DRAWS), np.empty(DRAWS), np.empty(DRAWS)
    for draw in range(DRAWS):
        made, made_too = two_parts(synthetic_MF, size, generator)
        person, person_too = two_parts(real_NF, size, generator)
        across[draw], real[draw] = distance(made, person), distance(person, person_too)
        beyond[draw] = across[draw] - (real[draw] + distance(made, made_too)) / 2
    return Parts(*(over_draws(values, size) for values in (across, real, beyond)))


def over_draws(values: np.ndarray, size: int) -> Estimate:
    """The mean over draws of `size` images a set, with the range that holds 95 % of the draws."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return Estimate(float(values.mean()), low, high, size, f"{len(values)} draws, {size} images a set")


def two_parts(rows: np.ndarray, size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of so many rows that have none in common."""
    order = generator.permutation(len(rows))
    return rows[order[:size]], rows[order[size : 2 * size]]
