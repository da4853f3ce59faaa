"""How far two sets lie apart, read against how far halves of one set do.

A distance between finite sets is never 0, and shrinks as they grow, so a bare value says little. Here sets of one size
are compared: a random half of the synthetic images with a random half of the real ones, and the halves of either with
each other. The range over such draws is an interval too: as half of a sample varies about the whole, so the whole
varies about its population (the jackknife that leaves out half, Shao and Wu 1989). It holds the population's value at
least as often as it says, since a mean over draws varies less than a draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from brainldm.evaluate.estimate import CONFIDENCE, Estimate

DRAWS = 50
FEWEST = 4  # images of a set: the covariance of fewer is no figure of a population

Distance = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Halves:
    """Lower is better. `across` of a half of the synthetic to a half of the real, `real` between halves of the real,
    and `beyond`: `across` less the mean of `real` and the same of the synthetic, which is 0 on average for two sets of
    one population, of whatever size. Means over draws, with the range that holds 95 % of them."""

    across: Estimate
    real: Estimate
    beyond: Estimate

    @classmethod
    def none(cls, reason: str, n: int) -> Halves:
        return cls(*(Estimate.none(reason, n) for _ in range(3)))


def in_halves(
    synthetic_MF: np.ndarray, real_NF: np.ndarray, distance: Distance, generator: np.random.Generator, *, most: int
) -> Halves:
    """`distance` between halves of at most `most` rows; nulls with a reason where a side has fewer than 2 x FEWEST."""
    m, n = len(synthetic_MF), len(real_NF)
    size = min(m // 2, n // 2, most)
    if size < FEWEST:
        return Halves.none(f"halves need at least {2 * FEWEST} images on each side, there are {m} and {n}", min(m, n))
    across, real, beyond = np.empty(DRAWS), np.empty(DRAWS), np.empty(DRAWS)
    for draw in range(DRAWS):
        made, made_too = two_halves(synthetic_MF, size, generator)
        half, other = two_halves(real_NF, size, generator)
        across[draw], real[draw] = distance(made, half), distance(half, other)
        beyond[draw] = across[draw] - (real[draw] + distance(made, made_too)) / 2
    return Halves(*(over_halves(values, size) for values in (across, real, beyond)))


def over_halves(values: np.ndarray, size: int) -> Estimate:
    """The mean over draws of halves of `size` images, with the range that holds 95 % of the draws."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return Estimate(float(values.mean()), low, high, size, f"{len(values)} draws of halves, {size} images each")


def two_halves(rows: np.ndarray, size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of so many rows that have none in common."""
    order = generator.permutation(len(rows))
    return rows[order[:size]], rows[order[size : 2 * size]]
