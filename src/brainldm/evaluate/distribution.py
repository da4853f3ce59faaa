"""Is it real? How far the set of synthetic images lies from the set of real ones, with what chance alone would give.

Both distances here are between means of the two sets; they are cheap and mean what they say, and neither tells whether
a single image is a good one. A distance between two finite sets is never 0, so each is shown beside what sets of these
sizes show by chance when their means are equal: each set's mean is taken from its images, and each is drawn anew from
its own, with replacement, again and again, so that each keeps the spread that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from brainldm.base.streams import stream
from brainldm.evaluate.estimate import CONFIDENCE, Estimate
from brainldm.evaluate.examine import Sketch

RESAMPLINGS = 400


@dataclass(frozen=True)
class Distance:
    """`observed` between synthetic and real images; `by_chance` its mean over resamplings of images without a
    difference, with the range that holds 95 % of them."""

    observed: Estimate
    by_chance: Estimate


def intensity_distance(synthetic: Sequence[Sketch], real: Sequence[Sketch], seed: int) -> Distance:
    """Lower is better, `by_chance` is perfect: Wasserstein-1 distance between the mean intensity histograms of the two
    sets, background included, in units of the intensity range."""

    def between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        # In one dimension the Wasserstein distance is the area between the two cumulative histograms.
        return np.abs(np.cumsum(first - second, axis=-1)).mean(axis=-1)

    return _distance([look.histogram for look in synthetic], [look.histogram for look in real], between, seed, "hist")


def mean_image_distance(synthetic: Sequence[Sketch], real: Sequence[Sketch], seed: int) -> Distance:
    """Lower is better, `by_chance` is perfect: root-mean-square difference of the two sets' mean images over the voxels
    of the brain, at about 4 mm, in units of the intensity range."""
    mask = brain_mask(real)

    def between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.sqrt(((first - second) ** 2).mean(axis=-1))

    return _distance(
        [look.coarse_XYZ[mask] for look in synthetic], [look.coarse_XYZ[mask] for look in real], between, seed, "mean"
    )


def brain_mask(real: Sequence[Sketch]) -> np.ndarray:
    """The voxels of the coarse grid that show a head in the mean real image: above a tenth of its 99th percentile."""
    mean_XYZ = np.mean([look.coarse_XYZ for look in real], axis=0)
    return mean_XYZ > 0.1 * np.percentile(mean_XYZ, 99)


def _distance(
    synthetic: Sequence[np.ndarray],
    real: Sequence[np.ndarray],
    between: Callable[[np.ndarray, np.ndarray], np.ndarray],
    seed: int,
    purpose: str,
) -> Distance:
    few = min(len(synthetic), len(real))
    if few < 2:
        none = Estimate.none(f"a distance between sets needs at least 2 images on each side, one has {few}", few)
        return Distance(none, none)
    sides = [np.stack(side).astype(np.float64) for side in (synthetic, real)]
    observed = float(between(*(rows.mean(axis=0) for rows in sides)))
    generator = stream(seed, f"evaluate/resampling/{purpose}")
    one, other = (_resampled_means(rows, generator) for rows in sides)
    chance = between(one, other)
    low, high = np.quantile(chance, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return Distance(
        Estimate(observed, n=len(synthetic), reason="compare with what chance gives"),
        Estimate(float(chance.mean()), low, high, len(real), f"{RESAMPLINGS} resamplings of either set"),
    )


def _resampled_means(rows_NF: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(RESAMPLINGS, F): means of as many rows as there are, drawn with replacement, less the mean of all."""
    n = len(rows_NF)
    weights = generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLINGS) / n
    # A sample spreads less about its own mean than about its population's.
    return (weights @ (rows_NF - rows_NF.mean(axis=0))) * np.sqrt(n / (n - 1))
