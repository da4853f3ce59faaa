"""Flows: smooth invertible maps made from velocity fields, and the two that age a brain.

A stationary velocity field followed for some time gives a diffeomorphism: tissue is stretched, never torn. An anatomy
has two such fields, one that opens its ventricles and one that opens its sulci; both run along the gradient of the
distance to what they open. They are followed once, and kept as displacements on a ladder of gains.

All maps are written in the direction in which images are sampled: from where did the tissue at this point come.
Displacements are (3, X, Y, Z), points are (3, N), both in mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.ndimage as ndi

from brainldm.base.volume import Grid
from brainldm.cohort.anatomy import Anatomy

LATTICE_MM = 2.0  # the fields' resolution


@dataclass(frozen=True, eq=False)
class Ladder:
    """Displacements (mm) of one velocity field's flow at evenly spaced gains.

    `steps_CKXYZ[:, k]` is at the gain first_gain + k * rung; a gain of 1 moves the tissue at the wall by about 1 mm.
    """

    grid: Grid
    steps_CKXYZ: np.ndarray
    first_gain: float
    rung: float

    @property
    def last_gain(self) -> float:
        return self.first_gain + self.rung * (self.steps_CKXYZ.shape[1] - 1)

    def move(self, points_3N: np.ndarray, gain_N: np.ndarray) -> np.ndarray:
        """Where the points come from when the flow has run for `gain_N` (clipped to the ladder)."""
        rungs = (np.clip(gain_N, self.first_gain, self.last_gain) - self.first_gain) / self.rung
        where = np.concatenate([rungs[None].astype(np.float32), indices(self.grid, points_3N)])
        return np.stack([p + _linear(step, where) for p, step in zip(points_3N, self.steps_CKXYZ)])


@dataclass(frozen=True, eq=False)
class Fields:
    """What the deformations of one anatomy need, at 2 mm."""

    anatomy: Anatomy
    grid: Grid
    centre_mm: np.ndarray  # of the head
    head_depth_XYZ: np.ndarray  # mm inside the head's surface; negative outside
    ventricle_distance_XYZ: np.ndarray  # mm from the ventricles; negative inside
    tissue_XYZ: np.ndarray  # grey + white
    ventricular: Ladder
    sulcal: Ladder


@lru_cache(maxsize=2)
def fields_of(anatomy: Anatomy) -> Fields:
    """The fields of an anatomy; some seconds the first time."""
    csf = anatomy.head_XYZ & (anatomy.grey_XYZ + anatomy.white_XYZ + anatomy.ventricles_XYZ < 0.7)
    head_depth, csf_depth, ventricle_depth = (
        _halved(_signed_depth(inside))
        for inside in (anatomy.head_XYZ, csf | ~anatomy.head_XYZ, anatomy.ventricles_XYZ > 0.5)
    )
    grid = _halved_grid(anatomy.grid)
    from_ventricles = np.maximum(-ventricle_depth, 0)
    # Half the push is left 21 mm from the ventricles, and none at the head's surface, which must stay where it is.
    inside = np.clip(head_depth / 12, 0, 1)
    ventricular = _push(-ventricle_depth, reach_mm=18, smooth_mm=2.0) * inside
    # The ventricles and what is close to them belong to the other field.
    sulcal = _push(-csf_depth, reach_mm=5, smooth_mm=2.0) * (1 - np.exp(-((from_ventricles / 12) ** 2)))
    centre_mm = np.argwhere(head_depth > 0).mean(axis=0) * grid.voxel_mm + grid.origin_mm
    return Fields(
        anatomy,
        grid,
        centre_mm,
        head_depth,
        -ventricle_depth,
        _halved(anatomy.grey_XYZ + anatomy.white_XYZ),
        _ladder(grid, ventricular, first_gain=-6.0, last_gain=18.0, rung=1.5),
        _ladder(grid, sulcal, first_gain=-3.0, last_gain=4.5, rung=1.5),
    )


def _signed_depth(inside: np.ndarray) -> np.ndarray:
    """Distance to the surface in voxels: positive inside, negative outside, half a voxel in the voxels beside it."""
    skin = inside & ~ndi.binary_erosion(inside, border_value=1)  # the array's edge is no surface
    from_skin = ndi.distance_transform_edt(~skin).astype(np.float32)
    return np.where(inside, from_skin + np.float32(0.5), np.float32(0.5) - from_skin)


def _halved(data_XYZ: np.ndarray) -> np.ndarray:
    """Means over blocks of 2 x 2 x 2, the last odd planes repeated."""
    padded = np.pad(data_XYZ, [(0, n % 2) for n in data_XYZ.shape], mode="edge")
    x, y, z = (n // 2 for n in padded.shape)
    return padded.reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5), dtype=np.float32)


def _halved_grid(grid: Grid) -> Grid:
    x, y, z = ((n + 1) // 2 for n in grid.shape_XYZ)
    ox, oy, oz = (o + grid.voxel_mm / 2 for o in grid.origin_mm)
    return Grid(grid.name, (x, y, z), 2 * grid.voxel_mm, (ox, oy, oz))


def _push(distance_XYZ: np.ndarray, reach_mm: float, smooth_mm: float) -> np.ndarray:
    """A velocity field away from a structure along its distance gradient, 1 at the wall, fading with distance.

    Smoothing turns the ridges of the distance (the structure's own middle, and halfway to its neighbour) into places
    where nothing moves. Shape (3, X, Y, Z).
    """
    gradient = np.stack(np.gradient(ndi.gaussian_filter(distance_XYZ, 0.5), LATTICE_MM))
    fade = np.exp(-((np.abs(distance_XYZ) / reach_mm) ** 2) / 2)
    return np.stack([ndi.gaussian_filter(g * fade, smooth_mm / LATTICE_MM) for g in gradient]).astype(np.float32)


def _ladder(grid: Grid, velocity_CXYZ: np.ndarray, first_gain: float, last_gain: float, rung: float) -> Ladder:
    """Runs the flow backwards (images are sampled from where tissue came) rung by rung, cropped to where it moves."""
    moving = ndi.find_objects((np.abs(velocity_CXYZ).max(axis=0) > 0.01).astype(np.int8))[0]
    moving = tuple(slice(max(s.start - 2, 0), s.stop + 2) for s in moving)
    velocity = velocity_CXYZ[(slice(None), *moving)]
    _, x, y, z = velocity.shape
    ox, oy, oz = (o + s.start * grid.voxel_mm for o, s in zip(grid.origin_mm, moving))
    cropped = Grid(grid.name, (x, y, z), grid.voxel_mm, (ox, oy, oz))
    counts = round(-first_gain / rung), round(last_gain / rung)
    rungs = [np.zeros_like(velocity)]
    for sign, count in ((1, counts[0]), (-1, counts[1])):
        one = exponential(sign * rung * velocity, cropped)
        reached = rungs[0] if sign > 0 else rungs[-1]
        for _ in range(count):
            reached = compose(one, reached, cropped)
            rungs.insert(0, reached) if sign > 0 else rungs.append(reached)
    return Ladder(cropped, np.ascontiguousarray(np.stack(rungs, axis=1)), first_gain, rung)


def exponential(velocity_CXYZ: np.ndarray, grid: Grid) -> np.ndarray:
    """The displacement (mm) after flowing along a stationary velocity field for unit time, by scaling and squaring
    (Arsigny et al. 2006)."""
    fastest = float(np.abs(velocity_CXYZ).max())
    squarings = max(0, int(np.ceil(np.log2(max(fastest, 1e-9) / (0.25 * grid.voxel_mm)))))
    displacement = (velocity_CXYZ / 2**squarings).astype(np.float32)
    for _ in range(squarings):
        displacement = compose(displacement, displacement, grid)
    return displacement


def compose(first_CXYZ: np.ndarray, then_CXYZ: np.ndarray, grid: Grid) -> np.ndarray:
    """The displacement of moving by `first` and then by `then`: first + then(x + first)."""
    voxels = np.indices(grid.shape_XYZ, dtype=np.float32) + first_CXYZ / np.float32(grid.voxel_mm)
    moved = [ndi.map_coordinates(c, voxels, np.float32, order=1, mode="nearest") for c in then_CXYZ]
    return first_CXYZ + np.stack(moved)


def indices(grid: Grid, points_3N: np.ndarray) -> np.ndarray:
    """Voxel coordinates of points in mm."""
    origin = np.asarray(grid.origin_mm, np.float32)[:, None]
    return (points_3N - origin) / np.float32(grid.voxel_mm)


def _linear(data: np.ndarray, where: np.ndarray) -> np.ndarray:
    return ndi.map_coordinates(data, where, np.float32, order=1, mode="constant", cval=0.0)


def sample(data_XYZ: np.ndarray, grid: Grid, points_3N: np.ndarray, outside: float = 0.0) -> np.ndarray:
    """Linear interpolation at points in mm; `outside` beyond the grid."""
    return ndi.map_coordinates(data_XYZ, indices(grid, points_3N), np.float32, order=1, mode="constant", cval=outside)


def smooth_field(draws: np.random.Generator, shape_XYZ: tuple[int, ...], sigma_voxels: float) -> np.ndarray:
    """White noise smoothed by a Gaussian: mean 0 and standard deviation 1 over the ensemble."""
    noise = draws.standard_normal(shape_XYZ, dtype=np.float32)
    smooth = ndi.gaussian_filter(noise, sigma_voxels, mode="wrap", truncate=3.0)
    return smooth * np.float32((2 * np.sqrt(np.pi) * sigma_voxels) ** 1.5)
