"""How an anatomy becomes a person's: their own head size and shape, ventricular and brain volume.

Three maps follow one another, from a point of the person to the point of the anatomy whose tissue is found there:

    person --size, shape--> anatomy's head --sulcal flow--> --ventricular flow--> anatomy

The gains of the two flows are found by root finding on the volumes they give; they vary slowly over the head,
differently left and right. Everything is solved on one 2 mm lattice, so that a person is the same on every grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from brainldm.base.streams import stream
from brainldm.base.volume import GRIDS, Grid
from brainldm.cohort.flow import Fields, Ladder, exponential, sample, smooth_field
from brainldm.cohort.population import Person

LATTICE = GRIDS["2mm"]
TYPICAL_SULCAL_GAIN = 1.5
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

    def sulci(which: np.ndarray | slice, gain: float) -> np.ndarray:
        return fields.sulcal.move(head_3N[:, which], gain * sulcal_share[which])

    def ventricles(points_3N: np.ndarray, gain: float) -> np.ndarray:
        return fields.ventricular.move(points_3N, gain * sample(uneven_ventricles, gain_grid, points_3N, 1.0))

    # Volumes. The sulcal flow spares the ventricles' surroundings, so one gain can be found after the other. The
    # ventricular flow moves nothing by more than 16 mm.
    central = np.flatnonzero(sample(fields.ventricle_distance_XYZ, fields.grid, head_3N, 99.0) < 18)
    central_3N = sulci(central, TYPICAL_SULCAL_GAIN)

    def ventricles_mm3(gain: float) -> float:
        soft = sample(fields.anatomy.ventricles_XYZ, fields.anatomy.grid, ventricles(central_3N, gain))
        return float(soft.sum(dtype=np.float64)) * LATTICE.voxel_mm3

    ventricular_gain = _gain_for(person.ventricles_mm3, ventricles_mm3, fields.ventricular)
    few = _every_other(near)  # along each axis: 4 mm apart is enough for a volume as large as the brain's

    def brain_fraction(gain: float) -> float:
        tissue = sample(fields.tissue_XYZ, fields.grid, ventricles(sulci(few, gain), ventricular_gain))
        return float(np.minimum(tissue, inside[few]).sum(dtype=np.float64) / inside[few].sum(dtype=np.float64))

    sulcal_gain = _gain_for(person.brain_fraction, brain_fraction, fields.sulcal)
    anatomy_3N = ventricles(sulci(slice(None), sulcal_gain), ventricular_gain)

    displacement = np.zeros((3, affine_3N.shape[1]), np.float32)
    displacement[:, near] = anatomy_3N - affine_3N[:, near]
    head_depth = np.full(affine_3N.shape[1], -99, np.float32)
    head_depth[near] = depth_mm
    return Deformation(
        fields.centre_mm,
        stretch,
        displacement.reshape(3, *LATTICE.shape_XYZ),
        head_depth.reshape(LATTICE.shape_XYZ),
    )


def warped_labels(deformation: Deformation, fields: Fields, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The person's soft labels on `grid`, and the distance (mm) to the ventricles before the head was deformed.

    Labels are looked up at points half a voxel apart (but at most 1 mm) and averaged over each voxel.
    """
    fine, factor = {"paper": ("paper", 1), "2mm": ("paper", 2), "4mm": ("2mm", 2)}[grid.name]
    points_grid = GRIDS[fine]
    displacement, depth = deformation.displacement_CXYZ, deformation.head_depth_XYZ
    if points_grid.voxel_mm < LATTICE.voxel_mm:
        displacement, depth = np.stack([_doubled(c) for c in displacement]), _doubled(depth)
    head = np.clip(depth.ravel() / points_grid.voxel_mm + 0.5, 0, 1)
    inside = np.flatnonzero(head > 0)
    affine_3N = points_of(points_grid, deformation.centre_mm, deformation.stretch)
    points = affine_3N[:, inside] + displacement.reshape(3, -1)[:, inside]
    anatomy = fields.anatomy
    space = head[inside]
    soft = (anatomy.grey_XYZ, anatomy.white_XYZ, anatomy.ventricles_XYZ)
    tissue = [sample(data, anatomy.grid, points) for data in soft]
    # At the rim a point can be mostly air and yet come from tissue: the labels share what there is of head.
    too_much = np.maximum(sum(tissue) / np.maximum(space, 1e-6), 1)
    grey, white, ventricles = (t / too_much for t in tissue)
    csf = np.maximum(space - grey - white - ventricles, 0)
    distance = sample(fields.ventricle_distance_XYZ, fields.grid, points, 99.0)
    values = np.zeros((5, head.size), np.float32)
    for row, value in zip(values, (csf, grey, white, ventricles, distance)):
        row[inside] = value
    x, y, z = grid.shape_XYZ
    means = values.reshape(5, x, factor, y, factor, z, factor).mean(axis=(2, 4, 6), dtype=np.float32)
    return means[:4], means[4]


def _doubled(data_XYZ: np.ndarray) -> np.ndarray:
    """Linear interpolation to voxels of half the size in the same box, one axis at a time."""
    for axis in range(3):
        data = np.moveaxis(data_XYZ, axis, 0)
        padded = np.concatenate([data[:1], data, data[-1:]])
        doubled = np.empty((2 * len(data), *data.shape[1:]), np.float32)
        doubled[0::2] = 0.75 * data + 0.25 * padded[:-2]
        doubled[1::2] = 0.75 * data + 0.25 * padded[2:]
        data_XYZ = np.moveaxis(doubled, 0, axis)
    return np.ascontiguousarray(data_XYZ)


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

    def off(gain: float) -> float:  # in logarithms, where it is nearly a straight line
        return math.log(max(volume_at(gain), 1e-9) / target)

    off_low, off_high = off(low), off(high)
    if off_low * off_high > 0:
        return low if abs(off_low) < abs(off_high) else high
    known = {low: off_low, high: off_high}
    return float(brentq(lambda gain: known.get(gain) or off(gain), low, high, xtol=0.01))


def _every_other(flat_indices: np.ndarray) -> np.ndarray:
    """Positions in `flat_indices` of the lattice points whose three indices are all even."""
    even = [i % 2 == 0 for i in np.unravel_index(flat_indices, LATTICE.shape_XYZ)]
    return np.flatnonzero(even[0] & even[1] & even[2])
