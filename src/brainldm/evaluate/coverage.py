"""Are single images good, and is every kind of brain made? Precision, recall, density and coverage.

A set's manifold is the union of balls around its images, each as wide as the distance to its k-th neighbour in the set.
Precision is the share of synthetic images in the real manifold, recall the share of real ones in the synthetic manifold
(Kynkaanniemi et al. 2019); density counts in how many balls a synthetic image lies, and coverage how many real balls
hold one (Naeem et al. 2020), which outliers cannot spoil.

None of them is 1 for a perfect generator (density is, on average): each is shown beside what random divisions of all
images into sets of these sizes give.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy.spatial.distance import cdist

from brainldm.base.streams import stream
from brainldm.evaluate.estimate import CONFIDENCE, Estimate

K = 5
DIVISIONS = 200


@dataclass(frozen=True)
class Manifolds:
    """The four figures as observed, or as chance gives them."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate

    @classmethod
    def none(cls, reason: str, n: int) -> Manifolds:
        return cls(*(Estimate.none(reason, n) for _ in fields(cls)))


def manifolds(synthetic_MF: np.ndarray, real_NF: np.ndarray, seed: int, *, k: int = K) -> tuple[Manifolds, Manifolds]:
    """The figures of the synthetic against the real features, and what chance gives: means over random divisions of all
    rows, with the range that holds 95 % of them. Distances are Euclidean; (n + m)^2 of them are held."""
    m, n = len(synthetic_MF), len(real_NF)
    if min(m, n) <= k:
        none = Manifolds.none(
            f"neighbourhoods of {k} need more than {k} images on each side, one has {min(m, n)}", min(m, n)
        )
        return none, none
    everyone = np.concatenate([synthetic_MF, real_NF]).astype(np.float64)
    if not np.isfinite(everyone).all():
        none = Manifolds.none("some features are not finite", min(m, n))
        return none, none
    apart = cdist(everyone, everyone)
    observed = _figures(apart, np.arange(m), np.arange(m, m + n), k)
    generator = stream(seed, "evaluate/manifolds")
    chance = np.empty((DIVISIONS, len(observed)))
    for row in chance:
        order = generator.permutation(m + n)
        row[:] = _figures(apart, order[:m], order[m:], k)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(chance, [tail, 1 - tail], axis=0)
    found = Manifolds(*(Estimate(float(v), n=m, reason="compare with what chance gives") for v in observed))
    by_chance = Manifolds(
        *(
            Estimate(float(mean), float(a), float(b), n, f"{DIVISIONS} random divisions")
            for mean, a, b in zip(chance.mean(axis=0), low, high)
        )
    )
    return found, by_chance


def _figures(apart: np.ndarray, made: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage of the rows `made` against the rows `real` of a distance matrix."""
    radius_M, radius_N = _radius(apart, made, k), _radius(apart, real, k)
    between_MN = apart[np.ix_(made, real)]
    in_real_MN, in_made_MN = between_MN <= radius_N[None, :], between_MN <= radius_M[:, None]
    return (
        float(in_real_MN.any(axis=1).mean()),
        float(in_made_MN.any(axis=0).mean()),
        float(in_real_MN.sum() / (k * len(made))),
        float(in_real_MN.any(axis=0).mean()),
    )


def _radius(apart: np.ndarray, members: np.ndarray, k: int) -> np.ndarray:
    """Distance of each member to its k-th neighbour among the members, itself not counted."""
    return np.partition(apart[np.ix_(members, members)], k, axis=1)[:, k]
