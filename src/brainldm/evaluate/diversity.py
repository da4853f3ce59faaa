"""Is it diverse? Likeness of pairs of images of one set, by MS-SSIM and 4-G-R-SSIM: near 1 where brains are all alike.

MS-SSIM is Wang, Simoncelli and Bovik 2003 in three dimensions, as the field computes it for brains (7-voxel Gaussian,
sigma 1.5, stability constants 0.01 and 0.03, data range 1, no padding); 4-G-R-SSIM is in gradient_ssim.py. What belongs
to one image (its pyramid, local means and variances) is computed once for all its pairs and the Gaussian is applied
axis by axis; the values are those of MONAI's `compute_ms_ssim` (a test holds the two together), at a twentieth of its
time at 1 mm.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
from scipy import stats

from brainldm.base.progress import Progress
from brainldm.base.streams import stream
from brainldm.evaluate.estimate import CONFIDENCE, Estimate
from brainldm.evaluate.examine import read_for_judging
from brainldm.evaluate.gradient_ssim import (
    ALL_TERMS,
    C1,
    C2,
    SMALLEST_SIDE,
    STRUCTURE,
    GradientMaps,
    four_region_ssim,
    gradient_maps,
    local_mean,
)
from brainldm.evaluate.grids import JudgingGrid
from brainldm.evaluate.images import JudgedImage
from brainldm.evaluate.pool import each

KERNEL = 7
# Wang et al. 2003, table 1: what each scale contributed to human judgements of similarity, finest first.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MAX_CACHE_BYTES = 600_000_000
# Below so many voxel pairs, starting worker processes takes longer than the work.
VOXEL_PAIRS_WORTH_A_PROCESS = 200_000_000


def scale_weights(shape_XYZ: Sequence[int]) -> tuple[float, ...]:
    """The weights of the scales that an image of this shape has room for, finest first, summing to 1.

    The rule: as many of the five scales as leave at least the kernel along the shortest side after the last halving;
    the weights of the rest are divided by their sum. Empty when not even one fits.

    >>> [len(scale_weights(shape)) for shape in ((160, 224, 160), (80, 112, 80), (40, 56, 40), (6, 9, 9))]
    [5, 4, 3, 0]
    """
    scales = sum(min(shape_XYZ) // 2**scale >= KERNEL for scale in range(len(SCALE_WEIGHTS)))
    kept = SCALE_WEIGHTS[:scales]
    # The published weights sum to 1 as they stand; dividing all five would only move the last digits.
    return kept if scales == len(SCALE_WEIGHTS) else tuple(weight / sum(kept) for weight in kept)


@dataclass(frozen=True)
class Pyramid:
    """One image at every scale, each with its local mean and local variance (the Gaussian's valid part)."""

    images: tuple[np.ndarray, ...]
    means: tuple[np.ndarray, ...]
    variances: tuple[np.ndarray, ...]

    @property
    def bytes(self) -> int:
        return sum(a.nbytes for part in (self.images, self.means, self.variances) for a in part)


def pyramid(image_XYZ: np.ndarray, scales: int) -> Pyramid:
    """The image halved `scales` - 1 times, with what every comparison needs of it."""
    images, means, variances = [], [], []
    current = image_XYZ.astype(np.float32)
    for scale in range(scales):
        if scale:
            current = _halved(current)
        mean = local_mean(current, KERNEL)
        images.append(current)
        means.append(mean)
        variances.append(local_mean(current * current, KERNEL) - mean * mean)
    return Pyramid(tuple(images), tuple(means), tuple(variances))


def ms_ssim(first: Pyramid, second: Pyramid, weights: Sequence[float]) -> float:
    """Lower is more diverse, 1 is identical: product over scales of the mean contrast-structure term to the scale's
    weight, the last scale with luminance. Negative means count as 0."""
    value = 1.0
    for scale, weight in enumerate(weights):
        mean_x, mean_y = first.means[scale], second.means[scale]
        covariance = local_mean(first.images[scale] * second.images[scale], KERNEL) - mean_x * mean_y
        similarity = (2 * covariance + C2) / (first.variances[scale] + second.variances[scale] + C2)
        if scale == len(weights) - 1:
            similarity = similarity * (2 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
        value *= max(0.0, float(similarity.mean(dtype=np.float64))) ** weight
    return value


def _halved(image_XYZ: np.ndarray) -> np.ndarray:
    x, y, z = (n // 2 for n in image_XYZ.shape)
    return image_XYZ[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5))


# -------------------------------------------------------------------------------------------------------- many pairs

MS_SSIM, FOUR_G_R_SSIM, FOUR_G_SSIM = "ms_ssim", "4_g_r_ssim", "4_g_ssim"


@dataclass(frozen=True)
class Diversity:
    """Mean likeness over `pairs` different pairs of a set's images; `standard_error` is the jackknife's over images."""

    estimate: Estimate
    pairs: int
    standard_error: float


def draw_pairs(images: int, pairs: int, seed: int, side: str) -> list[tuple[int, int]]:
    """`pairs` different unordered pairs of different images, all of them when there are no more, in rising order."""
    every = images * (images - 1) // 2
    generator = stream(seed, f"evaluate/pairs/{side}")
    if pairs >= every:
        return [(i, j) for i in range(images) for j in range(i + 1, images)]
    if every <= 4_000_000:
        chosen = generator.choice(every, size=pairs, replace=False)
        first, second = np.triu_indices(images, k=1)
        return sorted(zip(first[chosen].tolist(), second[chosen].tolist()))
    drawn: set[tuple[int, int]] = set()  # far more pairs than are wanted: draw until there are enough different ones
    while len(drawn) < pairs:
        i, j = sorted(generator.integers(images, size=2).tolist())
        if i != j:
            drawn.add((i, j))
    return sorted(drawn)


def diversity(
    images: Sequence[JudgedImage],
    side: str,
    grid: JudgingGrid,
    *,
    pairs: int,
    seed: int,
    workers: int,
    progress: Progress,
) -> dict[str, Diversity]:
    """MS_SSIM, FOUR_G_R_SSIM (structure alone) and FOUR_G_SSIM (all terms) over random pairs of a side's images,
    whose `sha256` is known."""
    weights = scale_weights(grid.shape_XYZ)
    too_small = {
        MS_SSIM: not weights and f"the {KERNEL}-voxel window",
        FOUR_G_R_SSIM: min(grid.shape_XYZ) < SMALLEST_SIDE and f"the {SMALLEST_SIDE} voxels it needs",
    }
    too_small[FOUR_G_SSIM] = too_small[FOUR_G_R_SSIM]
    nothing = {
        name: _none(f"the images ({grid.describe()}) are smaller than {why}") for name, why in too_small.items() if why
    }
    if len(images) < 2:
        return dict.fromkeys(too_small, _none(f"a pair needs 2 images, there is {len(images)}", len(images)))
    if len(nothing) == len(too_small):
        return nothing
    chosen = draw_pairs(len(images), pairs, seed, side)
    # Pairs that share their first image go together, so that it is read and filtered once.
    groups = [list(group) for _, group in groupby(chosen, key=lambda pair: pair[0])]
    named = [[(images[i], images[j]) for i, j in group] for group in groups]
    score = partial(_score_group, grid=grid, weights=weights)
    heavy = len(chosen) * grid.voxels >= VOXEL_PAIRS_WORTH_A_PROCESS
    values: dict[tuple[int, int], dict[str, float]] = {}
    for position, outcome in each(
        score, named, workers=workers, progress=progress, what=f"comparing {side} pairs", heavy=heavy
    ):
        if isinstance(outcome, Exception):
            raise outcome  # every image was read a moment ago: this is no bad image
        values |= dict(zip(groups[position], outcome))
    return nothing | {
        name: mean_over_pairs([(*pair, values[pair][name]) for pair in chosen], len(images))
        for name in too_small
        if name not in nothing
    }


def _none(reason: str, n: int = 0) -> Diversity:
    return Diversity(Estimate.none(reason, n), 0, math.nan)


@dataclass(frozen=True)
class Prepared:
    """What belongs to one image in all its pairs; None where the image is too small for it."""

    pyramid: Pyramid | None
    maps: GradientMaps | None

    @classmethod
    def of(cls, image_XYZ: np.ndarray, scales: int) -> Prepared:
        return cls(
            pyramid(image_XYZ, scales) if scales else None,
            gradient_maps(image_XYZ) if min(image_XYZ.shape) >= SMALLEST_SIDE else None,
        )

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in (self.pyramid, self.maps) if part is not None)


def likeness(first: Prepared, second: Prepared, weights: Sequence[float]) -> dict[str, float]:
    """Every figure that a pair's size allows, by name."""
    found: dict[str, float] = {}
    if first.pyramid is not None and second.pyramid is not None:
        found[MS_SSIM] = ms_ssim(first.pyramid, second.pyramid, weights)
    if first.maps is not None and second.maps is not None:
        found[FOUR_G_R_SSIM], found[FOUR_G_SSIM] = four_region_ssim(first.maps, second.maps, STRUCTURE, ALL_TERMS)
    return found


_prepared: OrderedDict[tuple[str, JudgingGrid], Prepared] = OrderedDict()


def _score_group(
    group: list[tuple[JudgedImage, JudgedImage]], grid: JudgingGrid, weights: Sequence[float]
) -> list[dict[str, float]]:
    return [
        likeness(_prepared_of(first, grid, len(weights)), _prepared_of(second, grid, len(weights)), weights)
        for first, second in group
    ]


def _prepared_of(image: JudgedImage, grid: JudgingGrid, scales: int) -> Prepared:
    """The image made ready for pairs, from this process's memory of the last few where it is among them: known by what
    it holds, since another may lie at its path by the next call."""
    assert image.sha256 is not None, "it was looked at before"
    key = (image.sha256, grid)
    found = _prepared.get(key)
    if found is None:
        found = Prepared.of(read_for_judging(image, grid), scales)
        _prepared[key] = found
        while len(_prepared) > 2 and sum(kept.bytes for kept in _prepared.values()) > MAX_CACHE_BYTES:
            _prepared.popitem(last=False)
    _prepared.move_to_end(key)
    return found


def mean_over_pairs(values: Sequence[tuple[int, int, float]], images: int) -> Diversity:
    """The mean over pairs (i, j, value) with the delete-one-image jackknife's interval.

    Pairs that share an image are not independent: leaving out an image leaves out all its pairs. Where few pairs share
    one the interval is wider than need be (at most by the root of two), never narrower.
    """
    table = np.array(values, dtype=np.float64).reshape(-1, 3)
    centre = float(table[:, 2].mean())
    if images < 4:
        return Diversity(Estimate(centre, n=images, reason="an interval needs at least 4 images"), len(table), math.nan)
    total, count = table[:, 2].sum(), len(table)
    sums, counts = np.zeros(images), np.zeros(images)
    for column in (0, 1):
        members = table[:, column].astype(int)
        sums += np.bincount(members, weights=table[:, 2], minlength=images)
        counts += np.bincount(members, minlength=images)
    used = counts > 0
    n = int(used.sum())
    if n < 4 or (counts[used] >= count).any():
        return Diversity(
            Estimate(centre, n=n, reason="too few pairs without any one image for an interval"), count, math.nan
        )
    without = (total - sums[used]) / (count - counts[used])
    error = float(math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    return Diversity(Estimate(centre, centre - half, centre + half, n, "jackknife over images"), count, error)
