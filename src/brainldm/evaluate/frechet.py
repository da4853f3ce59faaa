"""Is the set like the real one, in a feature space? The Frechet distance (FID) and its unbiased companion (KID).

The Frechet distance stands beside the same distance between two parts of the real set (parts.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import linalg, stats

from brainldm.base.streams import stream
from brainldm.evaluate.estimate import CONFIDENCE, Estimate
from brainldm.evaluate.parts import DRAWS, FEWEST, Parts, in_parts, over_draws, two_parts

MAX_PART = 1000  # images of a part: what the field uses
MAX_KERNEL = 2000  # images of a side in the kernel distance, whose work grows with the square


@dataclass(frozen=True)
class SetDistance:
    """`all` of synthetic to real with every image, `parts` from sets of one size. `kernel` is the unbiased kernel
    distance and `kernel_real` the same between two parts of the real set."""

    all: Estimate
    parts: Parts
    kernel: Estimate
    kernel_real: Estimate


def frechet_distance(first_NF: np.ndarray, second_MF: np.ndarray) -> float:
    """Lower is better, 0 is equal means and covariances: |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), in squared
    units of the features, covariances with n - 1 (Heusel et al. 2017).

    Exact, also where there are fewer images than features: with A = X'X and B = Y'Y the trace of the root is the sum of
    the singular values of X Y'. At least 2 rows each; ValueError otherwise.
    """
    x, y = np.asarray(first_NF, dtype=np.float64), np.asarray(second_MF, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"features of shapes {x.shape} and {y.shape}: two sets of 2 or more rows, equally wide, are needed"
        )
    between_means = x.mean(axis=0) - y.mean(axis=0)
    x, y = (part - part.mean(axis=0) for part in (x, y))
    x, y = (part / math.sqrt(len(part) - 1) for part in (x, y))
    traces = float((x**2).sum() + (y**2).sum())
    x, y = (_smaller_root(part) for part in (x, y))
    root = float(linalg.svdvals(x @ y.T, check_finite=True).sum())
    return max(0.0, float(between_means @ between_means) + traces - 2 * root)


def _smaller_root(x_NF: np.ndarray) -> np.ndarray:
    """R with R'R = X'X and no more rows than features."""
    if x_NF.shape[0] <= x_NF.shape[1]:
        return x_NF
    return np.asarray(np.linalg.qr(x_NF, mode="r"))  # scipy's has as many rows as there are images


def kernel_distance(first_NF: np.ndarray, second_MF: np.ndarray) -> Estimate:
    """Lower is better, 0 on average for equal distributions, negative by chance: the unbiased squared maximum mean
    discrepancy with the kernel (x'y / F + 1)^3 (Binkowski et al. 2018), and its jackknife's interval over images."""
    x, y = np.asarray(first_NF, dtype=np.float64), np.asarray(second_MF, dtype=np.float64)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return Estimate.none(f"a distance between sets needs at least 2 images on each side, one has {min(n, m)}")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        cube: np.ndarray = (a @ b.T / a.shape[1] + 1) ** 3
        return cube

    own_x, own_y, across = kernel(x, x), kernel(y, y), kernel(x, y)
    np.fill_diagonal(own_x, 0)
    np.fill_diagonal(own_y, 0)
    value = own_x.sum() / (n * (n - 1)) + own_y.sum() / (m * (m - 1)) - 2 * across.mean()
    if min(n, m) < 4:
        return Estimate(float(value), n=min(n, m), reason="an interval needs at least 4 images on each side")
    variance = 0.0
    for own, other, between in ((own_x, own_y, across), (own_y, own_x, across.T)):
        count, rest = len(own), len(other)
        without = (own.sum() - 2 * own.sum(axis=1)) / ((count - 1) * (count - 2))
        without += other.sum() / (rest * (rest - 1))
        without -= 2 * (between.sum() - between.sum(axis=1)) / ((count - 1) * rest)
        variance += (count - 1) / count * float(((without - without.mean()) ** 2).sum())
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt(variance)
    return Estimate(float(value), float(value - half), float(value + half), min(n, m), "jackknife over images")


def set_distance(synthetic_MF: np.ndarray, real_NF: np.ndarray, seed: int) -> SetDistance:
    """All distances of the synthetic to the real features; nulls with reasons where there are too few."""
    m, n = len(synthetic_MF), len(real_NF)
    if min(m, n) < FEWEST:
        reason = f"a distance between sets needs at least {FEWEST} images on each side, one has {min(m, n)}"
        none = Estimate.none(reason, min(m, n))
        return SetDistance(none, Parts.none(reason, min(m, n)), none, none)
    generator = stream(seed, "evaluate/frechet")
    features = real_NF.shape[1]
    note = (
        f"fewer images than the {features} features: compare only with sets of this size"
        if min(m, n) <= features
        else ""
    )
    everything = Estimate(frechet_distance(synthetic_MF, real_NF), n=min(m, n), reason=note)
    few = min(MAX_KERNEL, m), min(MAX_KERNEL, n)
    kernel = kernel_distance(
        *(side[generator.choice(len(side), k, replace=False)] for side, k in zip((synthetic_MF, real_NF), few))
    )
    parts = in_parts(synthetic_MF, real_NF, frechet_distance, generator, most=MAX_PART)
    if parts.real.value is None:
        return SetDistance(everything, parts, kernel, parts.real)
    size = parts.real.n
    own = [kernel_distance(*two_parts(real_NF, size, generator)).value for _ in range(DRAWS)]
    return SetDistance(everything, parts, kernel, over_draws(np.array(own), size))
