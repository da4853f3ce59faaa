"""How an anatomy becomes a person's: their own head size and shape, ventricular and brain volume.

Three maps follow one another, from a point of the person to the point of the anatomy whose tissue is found there:

    person --size, shape--> anatomy's head --sulcal flow--> --ventricular flow--> anatomy

The gains of the two flows are found by root finding on the volumes they give; they vary slowly over the head,
differently left and right. Everything is solved on one 2 mm lattice, so that a person is the same on every grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from brainldm.base.streams import stream
from brainldm.base.volume import GRIDS, Grid
from brainldm.cohort.flow import Fields, Ladder, exponential, sample, smooth_field
from brainldm.cohort.population import Person

LATTICE = GRIDS["2mm"]
MARGIN_MM = 14.0  # how far outside the anatomy's head a point of the person's can come from


@dataclass(frozen=True)
class Shape:
    """How much people differ beyond their volumes. Scales are sigmas of Gaussian smoothing; the rest are s.d."""

    # Two scales of random velocity; together they move most of the head by 2-6 mm.
    scales_mm: tuple[float, ...] = (20.0, 12.0)
    sizes_mm: tuple[float, ...] = (2.0, 1.2)
    aspect: float = 0.025  # each of length, width, height, as a fraction
    gain_scale_mm: float = 30.0
    sulcal_unevenness: float = 0.2
    ventricular_unevenness: float = 0.15


@dataclass(frozen=True)
class Deformation:
    """From where in the anatomy the tissue at each point of the 2 mm lattice comes.

    A point goes to centre + (point - centre) / stretch + displacement. `head_depth_XYZ` is in mm, positive inside the
    person's head; where it is below -MARGIN_MM the displacement is 0 and means nothing.
    """

    centre_mm: np.ndarray
    stretch: np.ndarray
    displacement_CXYZ: np.ndarray
    head_depth_XYZ: np.ndarray
    ventricular_gain: float
    sulcal_gain: float


def deform(person: Person, fields: Fields, seed: int, index: int, shape: Shape | None = None) -> Deformation:
    """The deformation that gives `person` their volumes, and a shape that belongs to (seed, index)."""
    shape = shape or Shape()
    draws = stream(seed, "phantom shape", index)
    shape_grid = _coarser(fields.grid, 4.0)
    shape_CXYZ = _random_shape(draws, shape, shape_grid, fields)
    gain_grid = _coarser(fields.grid, 8.0)
    gain_sigma = shape.gain_scale_mm / gain_grid.voxel_mm
    uneven_sulci = 1 + shape.sulcal_unevenness * smooth_field(draws, gain_grid.shape_XYZ, gain_sigma)
    uneven_ventricles = 1 + shape.ventricular_unevenness * smooth_field(draws, gain_grid.shape_XYZ, gain_sigma)

    # Size: the head's volume, shared out over the axes unevenly.
    aspect = draws.standard_normal(3) * shape.aspect
    own_size_mm3 = _head_mm3(fields, shape_grid, shape_CXYZ)
    stretch = np.exp(aspect - aspect.mean()) * (person.head_mm3 / own_size_mm3) ** (1 / 3)
    mean_stretch = float(stretch.prod() ** (1 / 3))
    affine_3N = points_of(LATTICE, fields.centre_mm, stretch)

    # Shape: only points in and around the head are followed from here on.
    near = np.flatnonzero(sample(fields.head_depth_XYZ, fields.grid, affine_3N, -99.0) > -MARGIN_MM)
    head_3N = _displaced(affine_3N[:, near], shape_grid, shape_CXYZ)
    depth_mm = mean_stretch * sample(fields.head_depth_XYZ, fields.grid, head_3N, -99.0)
    inside = np.clip(depth_mm / LATTICE.voxel_mm + 0.5, 0, 1)
    sulcal_share = sample(uneven_sulci, gain_grid, head_3N, 1.0)

    def follow(which: np.ndarray | slice, sulcal_gain: float, ventricular_gain: float) -> np.ndarray:
        between_3N = fields.sulcal.move(head_3N[:, which], sulcal_gain * sulcal_share[which])
        ventricular_share = sample(uneven_ventricles, gain_grid, between_3N, 1.0)
        return fields.ventricular.move(between_3N, ventricular_gain * ventricular_share)

    # Volumes. The sulcal flow spares the ventricles' surroundings, so one gain can be found after the other.
    central = np.flatnonzero(sample(fields.ventricle_distance_XYZ, fields.grid, head_3N, 99.0) < 25)

    def ventricles_mm3(gain: float) -> float:
        at_3N = follow(central, 1.5, gain)
        soft = sample(fields.anatomy.ventricles_XYZ, fields.anatomy.grid, at_3N)
        return float(soft.sum(dtype=np.float64)) * LATTICE.voxel_mm3

    ventricular_gain = _gain_for(person.ventricles_mm3, ventricles_mm3, fields.ventricular)
    few = _every_other(near)  # along each axis: 4 mm apart is enough for a volume as large as the brain's

    def brain_fraction(gain: float) -> float:
        tissue = sample(fields.tissue_XYZ, fields.grid, follow(few, gain, ventricular_gain))
        return float(np.minimum(tissue, inside[few]).sum(dtype=np.float64) / inside[few].sum(dtype=np.float64))

    sulcal_gain = _gain_for(person.brain_fraction, brain_fraction, fields.sulcal)

    displacement = np.zeros((3, affine_3N.shape[1]), np.float32)
    displacement[:, near] = follow(slice(None), sulcal_gain, ventricular_gain) - affine_3N[:, near]
    head_depth = np.full(affine_3N.shape[1], -99, np.float32)
    head_depth[near] = depth_mm
    return Deformation(
        fields.centre_mm,
        stretch,
        displacement.reshape(3, *LATTICE.shape_XYZ),
        head_depth.reshape(LATTICE.shape_XYZ),
        ventricular_gain,
        sulcal_gain,
    )


def points_of(grid: Grid, centre_mm: np.ndarray, stretch: np.ndarray) -> np.ndarray:
    """Where the grid's voxels lie in the anatomy when only the head's size is undone: (3, N) mm, in C order."""
    axes = [
        (centre + (origin + grid.voxel_mm * np.arange(n) - centre) / s).astype(np.float32)
        for n, origin, centre, s in zip(grid.shape_XYZ, grid.origin_mm, centre_mm, stretch)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)


def _coarser(grid: Grid, voxel_mm: float) -> Grid:
    """A grid of larger voxels from the same corner, reaching at least as far."""
    x, y, z = (int(np.ceil((n - 1) * grid.voxel_mm / voxel_mm)) + 1 for n in grid.shape_XYZ)
    return Grid(grid.name, (x, y, z), voxel_mm, grid.origin_mm)


def _random_shape(draws: np.random.Generator, shape: Shape, grid: Grid, fields: Fields) -> np.ndarray:
    """The displacement of a random smooth flow that leaves the head, on the whole, where it is."""
    velocity = np.zeros((3, *grid.shape_XYZ), np.float32)
    for scale_mm, size_mm in zip(shape.scales_mm, shape.sizes_mm):
        for component in velocity:
            component += size_mm * smooth_field(draws, grid.shape_XYZ, scale_mm / grid.voxel_mm)
    in_head = _head_fraction(fields, grid, np.zeros_like(velocity))
    mean_velocity = (velocity * in_head).sum(axis=(1, 2, 3)) / in_head.sum()
    return exponential(velocity - mean_velocity[:, None, None, None], grid)


def _head_fraction(fields: Fields, grid: Grid, displacement_CXYZ: np.ndarray) -> np.ndarray:
    """How much of each voxel of `grid` lies in the displaced head."""
    points = points_of(grid, fields.centre_mm, np.ones(3)) + displacement_CXYZ.reshape(3, -1)
    depth = sample(fields.head_depth_XYZ, fields.grid, points, -99.0)
    return np.clip(depth / grid.voxel_mm + 0.5, 0, 1).reshape(grid.shape_XYZ)


def _head_mm3(fields: Fields, grid: Grid, displacement_CXYZ: np.ndarray) -> float:
    return float(_head_fraction(fields, grid, displacement_CXYZ).sum(dtype=np.float64)) * grid.voxel_mm3


def _displaced(points_3N: np.ndarray, grid: Grid, displacement_CXYZ: np.ndarray) -> np.ndarray:
    return points_3N + np.stack([sample(component, grid, points_3N) for component in displacement_CXYZ])


def _gain_for(target: float, volume_at: Callable[[float], float], ladder: Ladder) -> float:
    """The gain at which `volume_at` (monotone) gives the target, or the end of the ladder that comes nearest."""
    low, high = ladder.first_gain, ladder.last_gain
    off_low, off_high = volume_at(low) - target, volume_at(high) - target
    if off_low * off_high > 0:
        return low if abs(off_low) < abs(off_high) else high
    return float(brentq(lambda gain: volume_at(gain) - target, low, high, xtol=0.01))


def _every_other(flat_indices: np.ndarray) -> np.ndarray:
    """Positions in `flat_indices` of the lattice points whose three indices are all even."""
    even = [i % 2 == 0 for i in np.unravel_index(flat_indices, LATTICE.shape_XYZ)]
    return np.flatnonzero(even[0] & even[1] & even[2])
