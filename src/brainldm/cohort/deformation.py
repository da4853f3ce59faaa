"""How an anatomy becomes a person's: their own head size and shape, ventricular and brain volume.

Three maps follow one another, from a point of the person to the point of the anatomy whose tissue is found there:

    person --size, shape--> unfolded head --sulcal flow--> --ventricular flow--> anatomy

The gains of the last two are found by root finding on the volumes they give, and vary slowly over the head,
differently left and right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi
from scipy.optimize import brentq

from brainldm.base.streams import stream
from brainldm.base.volume import GRIDS, Grid
from brainldm.cohort.flow import LATTICE_MM, Fields, Ladder, exponential, indices, sample
from brainldm.cohort.population import Person

SHAPE_LATTICE_MM = 4.0

@dataclass(frozen=True)
class Shape:
    """How much people differ beyond the volumes. Sigmas are of Gaussian smoothing, sizes are standard deviations."""

    # Two scales; together they move the head's points by 3-6 mm.
    scales_mm: tuple[float, ...] = (20.0, 12.0)
    sizes_mm: tuple[float, ...] = (2.0, 1.2)
    aspect: float = 0.025  # length : width : height
    gain_scale_mm: float = 30.0
    sulcal_gain_spread: float = 0.2
    ventricular_gain_spread: float = 0.15


@dataclass(frozen=True)
class Deformation:
    """Where in the anatomy each point of a person's head comes from, on the 2 mm grid of the paper's box.

    `displacement_CXYZ` (mm) is added to `affine_points`; `head_depth_XYZ` (mm) is positive inside the person's head.
    """

    person: Person
    fields: Fields
    centre_mm: np.ndarray
    stretch: np.ndarray  # template mm = centre + (person mm - centre) / stretch
    displacement_CXYZ: np.ndarray
    head_depth_XYZ: np.ndarray
    ventricular_gain: float
    sulcal_gain: float


def deform(
    person: Person, fields: Fields, seed: int, index: int, shape: Shape | None = None
) -> Deformation:
    """The deformation that gives `person` their head, ventricular and brain volume, with a shape of their own."""
    shape = shape or Shape()
    draws = stream(seed, "phantom shape", index)
    aspect = draws.standard_normal(3) * shape.aspect
    shape_grid = _coarser(fields.grid, SHAPE_LATTICE_MM)
    backward_CXYZ = _random_shape(draws, shape, shape_grid, fields)
    gain_grid = _coarser(fields.grid, 8.0)
    uneven_sulci, uneven_ventricles = (
        1 + spread * smooth_field(draws, gain_grid.shape_XYZ, shape.gain_scale_mm / gain_grid.voxel_mm)
        for spread in (shape.sulcal_gain_spread, shape.ventricular_gain_spread)
    )
    stretch = np.exp(aspect - aspect.mean())
    stretch *= (person.head_mm3 / _head_mm3(fields, shape_grid, backward_CXYZ)) ** (1 / 3)
    centre = np.array(ndi.center_of_mass(fields.head_depth_XYZ > 0)) * fields.grid.voxel_mm + fields.grid.origin_mm

    box = GRIDS["2mm"]
    affine_points = _affine_points(box, centre, stretch)
    near = np.flatnonzero(sample_nearest(fields.head_depth_XYZ, fields.grid, affine_points, -99.0) > -14)
    unfolded = affine_points[:, near]
    unfolded = unfolded + np.stack([sample(c, shape_grid, unfolded) for c in backward_CXYZ])
    depth = sample(fields.head_depth_XYZ, fields.grid, unfolded, -99.0)
    stretch_of = float(stretch.prod()) ** (1 / 3)
    fraction_inside = np.clip(depth * stretch_of / LATTICE_MM + 0.5, 0, 1)

    voxel_mm3 = box.voxel_mm3
    sulcal_unevenness = sample(uneven_sulci, gain_grid, unfolded, 1.0)

    def through(points_3N: np.ndarray, sulcal_unevenness: np.ndarray, sulcal: float, ventricular: float) -> np.ndarray:
        middle = fields.sulcal.move(points_3N, sulcal * sulcal_unevenness)
        uneven = sample(uneven_ventricles, gain_grid, middle, 1.0)
        return fields.ventricular.move(middle, ventricular * uneven)

    # The sulcal field leaves the ventricles alone, so one gain is found after the other.
    central = np.flatnonzero(sample(fields.ventricle_distance_XYZ, fields.grid, unfolded, 99.0) < 24)
    central_points, central_unevenness = unfolded[:, central], sulcal_unevenness[central]

    def ventricles_mm3(gain: float) -> float:
        points = through(central_points, central_unevenness, 2.0, gain)
        return float(sample(fields.anatomy.ventricles_XYZ, fields.anatomy.grid, points).sum()) * voxel_mm3

    ventricular_gain = _gain_for(ventricles_mm3, person.ventricles_mm3, fields.ventricular)
    # Every eighth point (both lattices interleave evenly) is enough for the brain's volume.
    few = _every_other(box, near)
    few_points, few_unevenness = unfolded[:, few], sulcal_unevenness[few]
    head_points = float(fraction_inside[few].sum())

    def brain_fraction(gain: float) -> float:
        points = through(few_points, few_unevenness, gain, ventricular_gain)
        tissue = sample(fields.tissue_XYZ, fields.grid, points)
        return float(np.minimum(tissue, fraction_inside[few]).sum()) / head_points

    sulcal_gain = _gain_for(brain_fraction, person.brain_fraction, fields.sulcal)
    came_from = through(unfolded, sulcal_unevenness, sulcal_gain, ventricular_gain)
    displacement = np.zeros((3, affine_points.shape[1]), np.float32)
    displacement[:, near] = came_from - affine_points[:, near]
    head_depth = np.full(affine_points.shape[1], -99, np.float32)
    head_depth[near] = depth * stretch_of
    return Deformation(
        person,
        fields,
        centre,
        stretch,
        displacement.reshape(3, *box.shape_XYZ),
        head_depth.reshape(box.shape_XYZ),
        ventricular_gain,
        sulcal_gain,
    )
