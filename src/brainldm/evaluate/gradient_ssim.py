"""4-G-R-SSIM: likeness of two brains in four kinds of region, by gradients and their structure alone.

Four regions after Li and Bovik 2010, gradients after Chen et al. 2006, the structure term alone after Rouse and Hemami
2008, in three dimensions as the paper's first authors compute it (paper.md 4). Which variant the paper printed is not
known for certain: structure alone with its stability constant fits best, and is the default; luminance x contrast x
structure is `exponents=(1, 1, 1)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

KERNEL = 11
SIGMA_VOXELS = 1.5
C1, C2 = 0.01**2, 0.03**2  # (0.01 L)^2 and (0.03 L)^2 at data range L = 1
C3 = C2 / 2
STRUCTURE, ALL_TERMS = (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)
EDGE, SMOOTH = 0.12, 0.06  # of the reference's largest gradient
REGIONS = 4
SMALLEST_SIDE = KERNEL + 2 + 1
_STEADY = 1e-5  # keeps a standard deviation away from 0 where the gradient is, as the authors' code does


@dataclass(frozen=True)
class GradientMaps:
    """What every comparison needs of one image: its local mean, and of its gradient the map, local mean, variance."""

    mean: np.ndarray
    gradient: np.ndarray
    gradient_mean: np.ndarray
    deviation: np.ndarray  # the steadied standard deviation
    variance: np.ndarray

    @property
    def bytes(self) -> int:
        return sum(a.nbytes for a in (self.mean, self.gradient, self.gradient_mean, self.deviation, self.variance))


def gradient_maps(image_XYZ: np.ndarray) -> GradientMaps:
    """Of an image in 0..1 with sides of at least SMALLEST_SIDE voxels; ValueError for a smaller one."""
    if min(image_XYZ.shape) < SMALLEST_SIDE:
        raise ValueError(f"an image of {image_XYZ.shape} voxels: every side must have {SMALLEST_SIDE}")
    image = image_XYZ.astype(np.float32)
    gradient = _gradient(image)
    mean, square = local_mean(gradient, KERNEL), local_mean(gradient * gradient, KERNEL)
    variance = np.maximum(square - mean * mean, 0)
    deviation = np.sqrt(variance + _STEADY * (square + mean * mean) / 2)
    return GradientMaps(_cropped(local_mean(image, KERNEL), 1), gradient, mean, deviation, variance)


def four_region_ssim(
    reference: GradientMaps, other: GradientMaps, *exponents: tuple[float, float, float]
) -> tuple[float, ...]:
    """A value for each of the `exponents` of luminance, contrast and structure; lower is more diverse, 1 is identical.

    The mean over each region that is not empty, averaged with equal weights, negative values as 0. The thresholds of
    the regions come from the first image, so the two orders of a pair differ slightly.
    """
    both = reference.deviation * other.deviation
    covariance = local_mean(reference.gradient * other.gradient, KERNEL) - reference.gradient_mean * other.gradient_mean
    structure = (covariance + C3) / (both + C3)
    flat, other_flat = reference.variance <= 0, other.variance <= 0
    structure = np.where(flat & other_flat, 1.0, np.where(flat ^ other_flat, 0.0, structure))
    terms: list[np.ndarray | None] = [None, None, structure]
    if any(alpha for alpha, _, _ in exponents):
        x, y = reference.mean, other.mean
        terms[0] = (2 * x * y + C1) / (x * x + y * y + C1)
    if any(beta for _, beta, _ in exponents):
        terms[1] = (2 * both + C2) / (reference.deviation**2 + other.deviation**2 + C2)
    region = _regions(reference.gradient, other.gradient)
    counts = np.bincount(region.ravel(), minlength=REGIONS)
    values = []
    for powers in exponents:
        product = np.ones_like(structure)
        for term, power in zip(terms, powers):
            if power:
                assert term is not None
                product = product * (term if power == 1 else np.sign(term) * np.abs(term) ** power)
        sums = np.bincount(region.ravel(), weights=product.ravel().astype(np.float64), minlength=REGIONS)
        means = sums[counts > 0] / counts[counts > 0]
        values.append(max(0.0, float(means.mean())))
    return tuple(values)


def _regions(reference_gradient: np.ndarray, other_gradient: np.ndarray) -> np.ndarray:
    """0 preserved edge, 1 changed edge, 2 smooth, 3 texture: at each voxel where the local figures are valid."""
    edge = KERNEL // 2
    x, y = _cropped(reference_gradient, edge), _cropped(other_gradient, edge)
    largest = float(reference_gradient.max())
    in_x, in_y = x > EDGE * largest, y > EDGE * largest
    region = np.full(x.shape, 3, dtype=np.uint8)
    region[(x < SMOOTH * largest) & ~in_y] = 2
    region[in_x ^ in_y] = 1
    region[in_x & in_y] = 0
    return region


def _gradient(image_XYZ: np.ndarray) -> np.ndarray:
    """Sum over axes of the absolute derivative, smoothed across by [[1,1,1],[1,2,1],[1,1,1]] / 20; valid part.

    That plane is a 3 x 3 box and one more centre, which is how it is computed.
    """
    total = np.zeros_like(image_XYZ)
    for axis in range(3):
        derivative = ndimage.correlate1d(image_XYZ, [-1.0, 0.0, 1.0], axis=axis, mode="constant")
        box = derivative
        for across in range(3):
            if across != axis:
                box = ndimage.correlate1d(box, [1.0, 1.0, 1.0], axis=across, mode="constant")
        total += np.abs(box + derivative) / 20
    return _cropped(total, 1)


def local_mean(image_XYZ: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` voxels around each voxel in every direction, weighed by a Gaussian; valid part."""
    edge = width // 2
    return _cropped(ndimage.gaussian_filter(image_XYZ, SIGMA_VOXELS, mode="constant", radius=edge), edge)


def _cropped(image_XYZ: np.ndarray, edge: int) -> np.ndarray:
    inner = slice(edge, -edge)
    return image_XYZ[inner, inner, inner]
