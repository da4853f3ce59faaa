"""The grid on which images are judged, and the one way in which an image gets onto it.

The rule: the coarser of the two folders' most common grids, because nothing can be compared that one of them does not
hold. An image on that grid is taken as it is; one on another grid is brought there through millimetres, averaged over
the larger voxel; one that does not lie where the others lie is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from brainldm.base.errors import BadInput
from brainldm.base.nifti import read_header
from brainldm.base.volume import Volume

# An image that covers less than this of the judging box has another field of view, so that it is not comparable.
MIN_COVERAGE = 0.75
COARSE_MM = 4.0


@dataclass(frozen=True)
class JudgingGrid:
    """Shape and affine (4 x 4, RAS+ mm) of the images as they are compared. Hashable, so that it can be counted."""

    shape_XYZ: tuple[int, int, int]
    affine_rows: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, shape_XYZ: Sequence[int], affine: np.ndarray) -> JudgingGrid:
        x, y, z = (int(n) for n in shape_XYZ)
        # Rounded to a micrometre: float32 headers store the same place with different last digits.
        return cls((x, y, z), tuple(tuple(float(v) + 0.0 for v in row) for row in np.round(affine, 3)))

    @property
    def affine(self) -> np.ndarray:
        return np.array(self.affine_rows)

    @property
    def voxel_mm(self) -> np.ndarray:
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))

    @property
    def voxels(self) -> int:
        return int(np.prod(self.shape_XYZ))

    @property
    def key(self) -> str:
        """Names the grid in lists on disk: shape and place, so that no other grid has the same."""
        return f"{self.shape_XYZ} {self.affine_rows}"

    def coarse(self) -> JudgingGrid:
        """The same box in voxels of about 4 mm (a whole number of these voxels each; 4 mm or coarser stays)."""
        factors = np.maximum(1, np.rint(COARSE_MM / self.voxel_mm)).astype(int)
        shape = [max(1, n // f) for n, f in zip(self.shape_XYZ, factors)]
        affine = self.affine.copy()
        affine[:3, :3] = affine[:3, :3] * factors
        affine[:3, 3] += self.affine[:3, :3] @ ((factors - 1) / 2)
        return JudgingGrid.of(shape, affine)

    def describe(self) -> str:
        shape = " x ".join(str(n) for n in self.shape_XYZ)
        voxel = " x ".join(f"{v:g}" for v in np.round(self.voxel_mm, 3))
        return f"{shape} voxels of {voxel} mm"


def grid_of_file(path: Path) -> JudgingGrid | None:
    """The grid that a file's header claims, in RAS+ order; None where the header cannot be read (said later, when the
    image is)."""
    try:
        if not path.is_file():
            return None
        header = read_header(path)
        shape, affine = header.get_data_shape()[:3], header.get_best_affine()
        if len(shape) < 3:
            return None
        # Turned to RAS+ by the header alone: nibabel's as_closest_canonical would read the voxels of every image.
        orientation = nibabel.orientations.io_orientation(affine)
        turned = tuple(int(shape[axis]) for axis in np.argsort(orientation[:, 0]))
        return JudgingGrid.of(turned, affine @ nibabel.orientations.inv_ornt_aff(orientation, shape))
    except Exception:  # whatever a broken header makes nibabel raise
        return None


def judging_grid(sides: Sequence[Sequence[Path]]) -> JudgingGrid | None:
    """The coarser of the sides' most common grids; None when no header could be read."""
    commonest = []
    for paths in sides:
        counts = Counter(grid for grid in map(grid_of_file, paths) if grid is not None)
        if counts:
            commonest.append(counts.most_common(1)[0][0])
    if not commonest:
        return None
    return max(commonest, key=lambda grid: float(np.prod(grid.voxel_mm)))


def on_grid(volume: Volume, grid: JudgingGrid) -> np.ndarray:
    """The image on `grid`, shape X, Y, Z; BadInput (reason "grid") when it covers too little of the grid's box."""
    shape, affine = grid.shape_XYZ, grid.affine
    if volume.shape_XYZ == shape and np.abs(volume.affine - affine).max() < 2e-3:
        return volume.data_XYZ
    blocks = _whole_blocks(volume, grid)
    if blocks is not None:
        x, y, z = shape
        fx, fy, fz = blocks
        cut = volume.data_XYZ[: x * fx, : y * fy, : z * fz]
        return cut.reshape(x, fx, y, fy, z, fz).mean(axis=(1, 3, 5), dtype=np.float64).astype(np.float32)
    image_from_grid = np.linalg.inv(volume.affine) @ affine
    coverage = _coverage(volume.shape_XYZ, shape, image_from_grid)
    if coverage < MIN_COVERAGE:
        raise BadInput(
            f"lies elsewhere than the other images: it covers {coverage:.0%} of the box they are compared in "
            f"({grid.describe()}); at least {MIN_COVERAGE:.0%} is needed.",
            remedy="Prepare (register) the images to one space first.",
            reason="grid",
        )
    # Averaging over the larger voxel: the Gaussian whose width makes up the difference between the two voxel sizes.
    ratio = np.maximum(grid.voxel_mm / volume.voxel_mm, 1.0)
    smoothed = ndimage.gaussian_filter(volume.data_XYZ, 0.5 * np.sqrt(ratio**2 - 1), mode="nearest")
    moved_XYZ = ndimage.affine_transform(smoothed, image_from_grid, output_shape=shape, order=1, mode="constant")
    return moved_XYZ.astype(np.float32)


def _whole_blocks(volume: Volume, grid: JudgingGrid) -> tuple[int, int, int] | None:
    """How many of the image's voxels make up one of the grid's along each axis, where the two boxes share a corner."""
    ratio = grid.voxel_mm / volume.voxel_mm
    factors = np.rint(ratio).astype(int)
    if (factors < 1).any() or np.abs(ratio - factors).max() > 1e-3:
        return None
    expected = volume.affine.copy()
    expected[:3, :3] = volume.affine[:3, :3] * factors
    expected[:3, 3] += volume.affine[:3, :3] @ ((factors - 1) / 2)
    fits = all(n * f <= have for n, f, have in zip(grid.shape_XYZ, factors, volume.shape_XYZ))
    if not fits or np.abs(expected - grid.affine).max() > 2e-3:
        return None
    fx, fy, fz = (int(f) for f in factors)
    return fx, fy, fz


def _coverage(image_shape: Sequence[int], grid_shape: Sequence[int], image_from_grid: np.ndarray) -> float:
    """The share of the grid's box that lies inside the image, from a lattice of points."""
    axes = [(np.arange(16) + 0.5) / 16 * n - 0.5 for n in grid_shape]
    points = np.array(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    voxels = image_from_grid[:3, :3] @ points + image_from_grid[:3, 3:]
    limits = np.array(image_shape, dtype=float)[:, None] - 0.5
    inside: np.ndarray = ((voxels > -0.5) & (voxels < limits)).all(axis=0)
    return float(inside.mean())
