"""What a T1-weighted scanner makes of an anatomy: tissue brightness, lesions, shading, blur and noise.

Everything random is drawn in mm, not in voxels, so that a person has the same lesions and shading on every grid. Only
the noise belongs to a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi

from brainldm.base.streams import stream
from brainldm.base.volume import GRIDS, Grid
from brainldm.cohort.flow import smooth_field

_DRAWN_ON = GRIDS["4mm"]  # smooth fields are drawn here and interpolated


@dataclass(frozen=True)
class Appearance:
    """How T1-weighted images look, relative to white matter = 1; spreads are s.d. between people."""

    # From the nilearn template: grey 0.74 of white, CSF 0.2-0.35 of it. Contrast falls with age (Salat et al. 2009).
    grey: float = 0.71
    grey_spread: float = 0.02
    grey_a_decade: float = 0.015  # more like white, from 60 years
    csf: float = 0.22
    csf_spread: float = 0.025
    ventricles_below_csf: float = 0.03  # no vessels and membranes in there
    inhomogeneity: float = 0.02  # of tissue, in patches of the scale below
    inhomogeneity_mm: float = 6.0

    # White-matter lesions, dark in T1: mL of them, log-normal, growing with age from 60 years; first at the ventricles.
    lesion_ml_at_60: float = 2.0
    log_lesion_a_decade: float = 0.7
    log_lesion_residual: float = 0.8
    lesion_ml_most: float = 50.0
    lesion_reach_mm: float = 7.0
    lesion_darkening: float = 0.28

    shading: float = 0.04  # s.d. of each smooth component of the coil's bias field
    blur_mm: float = 0.55  # sigma of the point spread
    noise_low: float = 0.01  # s.d. in a 1 mm voxel; averages out in larger ones
    noise_high: float = 0.03


@dataclass(frozen=True)
class Painted:
    """An image in 0..1 and the same without noise, on the same scale."""

    image_XYZ: np.ndarray
    noise_free_XYZ: np.ndarray
    lesions_mm3: float


def paint(
    labels_LXYZ: np.ndarray,
    ventricle_distance_XYZ: np.ndarray,
    grid: Grid,
    age_years: float,
    seed: int,
    index: int,
    appearance: Appearance | None = None,
) -> Painted:
    """The scan of soft labels (csf, grey, white, ventricles), 0 outside the head.

    `ventricle_distance_XYZ` is in mm and is read in the white matter only.
    """
    look = appearance or Appearance()
    draws = stream(seed, "phantom appearance", index)
    csf, grey, white, ventricles = labels_LXYZ
    head = labels_LXYZ.sum(axis=0)

    # Tissue.
    decades = (age_years - 60) / 10
    grey_is = look.grey + look.grey_a_decade * decades + look.grey_spread * draws.standard_normal()
    csf_is = look.csf + look.csf_spread * draws.standard_normal()
    log_load = np.log(look.lesion_ml_at_60) + look.log_lesion_a_decade * decades
    load_mm3 = 1000 * min(np.exp(log_load + look.log_lesion_residual * draws.standard_normal()), look.lesion_ml_most)
    patches = _patches(draws, look.inhomogeneity_mm, grid)
    spots = _patches(draws, 5.0, grid)
    lesions = _lesions(white, ventricle_distance_XYZ, spots, load_mm3 / grid.voxel_mm3, look.lesion_reach_mm)
    clean = csf_is * csf + grey_is * grey + (csf_is - look.ventricles_below_csf) * ventricles
    clean += white - look.lesion_darkening * lesions
    clean *= 1 + look.inhomogeneity * patches

    # Scanner.
    clean *= _shading(draws, look.shading, grid)
    if look.blur_mm / grid.voxel_mm > 0.2:
        clean = ndi.gaussian_filter(clean, look.blur_mm / grid.voxel_mm, truncate=3.0)
    # Blurring spilled over the edge of a stripped brain; what is mostly air is air.
    clean[head < 0.05] = 0
    sigma = draws.uniform(look.noise_low, look.noise_high) / grid.voxel_mm**1.5
    image = _rician(clean, sigma, stream(seed, f"phantom noise {grid.name}", index))
    image[head < 0.05] = 0
    brightest = image.max()
    return Painted(image / brightest, np.clip(clean / brightest, 0, 1), float(lesions.sum()) * grid.voxel_mm3)


def _patches(draws: np.random.Generator, scale_mm: float, grid: Grid) -> np.ndarray:
    """Smooth noise of unit variance over the paper's box, interpolated to `grid`."""
    coarse = smooth_field(draws, _DRAWN_ON.shape_XYZ, scale_mm / _DRAWN_ON.voxel_mm)
    return _interpolated(coarse, grid)


def _interpolated(coarse_XYZ: np.ndarray, grid: Grid) -> np.ndarray:
    """A field on the 4 mm grid at the voxels of a grid of the same box: linear, one axis at a time."""
    values = coarse_XYZ
    for axis, n in enumerate(grid.shape_XYZ):
        at = (grid.origin_mm[axis] + grid.voxel_mm * np.arange(n) - _DRAWN_ON.origin_mm[axis]) / _DRAWN_ON.voxel_mm
        at = np.clip(at, 0, values.shape[axis] - 1)
        below = np.minimum(at.astype(int), values.shape[axis] - 2)
        weight = (at - below).astype(np.float32)
        weight = weight.reshape([-1 if a == axis else 1 for a in range(3)])
        values = np.take(values, below, axis) * (1 - weight) + np.take(values, below + 1, axis) * weight
    return values


def _lesions(
    white: np.ndarray, distance_mm: np.ndarray, spots: np.ndarray, load_voxels: float, reach_mm: float
) -> np.ndarray:
    """How much of each voxel is lesioned white matter; in total `load_voxels`.

    A voxel is lesioned where a score, high near the ventricles and in random spots, exceeds what gives that total.
    """
    where = np.flatnonzero(white > 0.5)
    score = np.exp(-np.maximum(distance_mm.ravel()[where], 0) / reach_mm) + 0.25 * spots.ravel()[where]
    amount = white.ravel()[where]

    def lesioned(threshold: float) -> np.ndarray:
        return amount * np.clip((score - threshold) / 0.3 + 0.5, 0, 1)

    low, high = float(score.min()) - 1, float(score.max()) + 1
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if lesioned(middle).sum() > load_voxels else (low, middle)
    lesions = np.zeros(white.size, np.float32)
    lesions[where] = lesioned(high)
    return lesions.reshape(white.shape)


def _shading(draws: np.random.Generator, size: float, grid: Grid) -> np.ndarray:
    """The coil's bias field: the exponential of the lowest cosines over the box."""
    log_shading = np.zeros(grid.shape_XYZ, np.float32)
    for i, j, k in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (2, 0, 0), (0, 2, 0), (0, 0, 2)):
        waves = [
            np.cos(np.pi * order * (np.arange(n) + 0.5) / n).astype(np.float32)
            for order, n in zip((i, j, k), grid.shape_XYZ)
        ]
        log_shading += np.float32(size * draws.standard_normal()) * (
            waves[0][:, None, None] * waves[1][:, None] * waves[2]
        )
    return np.exp(log_shading)


def _rician(signal: np.ndarray, sigma: float, draws: np.random.Generator) -> np.ndarray:
    """The magnitude of a complex signal with Gaussian noise in both channels."""
    real = signal + np.float32(sigma) * draws.standard_normal(signal.shape, dtype=np.float32)
    imaginary = np.float32(sigma) * draws.standard_normal(signal.shape, dtype=np.float32)
    return np.hypot(real, imaginary)
