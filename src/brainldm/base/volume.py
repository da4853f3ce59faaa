"""A volume is an array with a place in the world; a grid is the place without the array.

Arrays are X (left to right), Y (back to front), Z (down to up): RAS+. An affine maps voxel indices to millimetres.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import nibabel
import numpy as np

from brainldm.base.errors import BadInput, UsageError


@dataclass(frozen=True)
class Volume:
    """A 3-D image in millimetres.

    `affine` is (4, 4) and maps voxel indices to RAS+ mm. `notes` says what had to be assumed or converted on the way
    in, for the record.
    """

    data_XYZ: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.data_XYZ.ndim != 3:
            raise ValueError(f"a volume has 3 axes, this array has shape {self.data_XYZ.shape}")
        if self.affine.shape != (4, 4):
            raise ValueError(f"an affine is 4 x 4, this one has shape {self.affine.shape}")

    @property
    def shape_XYZ(self) -> tuple[int, int, int]:
        x, y, z = self.data_XYZ.shape
        return x, y, z

    @property
    def voxel_mm(self) -> np.ndarray:
        """Edge lengths of a voxel in mm, shape (3,)."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))

    @property
    def voxel_mm3(self) -> float:
        return float(abs(np.linalg.det(self.affine[:3, :3])))


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a prepared or generated image lie: isotropic, axis-aligned, RAS+.

    `origin_mm` is the centre of voxel (0, 0, 0).
    """

    name: str
    shape_XYZ: tuple[int, int, int]
    voxel_mm: float
    origin_mm: tuple[float, float, float]
    affine: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        affine = np.diag([self.voxel_mm, self.voxel_mm, self.voxel_mm, 1.0])
        affine[:3, 3] = self.origin_mm
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    @property
    def voxel_mm3(self) -> float:
        return float(self.voxel_mm**3)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape_XYZ": list(self.shape_XYZ),
            "voxel_mm": self.voxel_mm,
            "origin_mm": list(self.origin_mm),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Grid:
        try:
            x, y, z = (int(n) for n in content["shape_XYZ"])
            ox, oy, oz = (float(o) for o in content["origin_mm"])
            return cls(str(content["name"]), (x, y, z), float(content["voxel_mm"]), (ox, oy, oz))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"the grid {content!r} is incomplete.", remedy="Restore the file from where it came.", reason="bad_grid"
            ) from error


class Placed(Protocol):
    """A volume, or a grid of any kind: so many voxels, and the affine that says where they lie."""

    @property
    def shape_XYZ(self) -> tuple[int, int, int]: ...

    @property
    def affine(self) -> np.ndarray: ...


def same_voxels(one: Placed, other: Placed) -> bool:
    """Whether their voxels lie in the same places, but for a hundredth of a millimetre: programs round what they write
    into headers."""
    return one.shape_XYZ == other.shape_XYZ and np.allclose(one.affine, other.affine, rtol=0, atol=0.01)


# The paper's images are 192 x 256 x 256 at 1 mm, stored right to left with origin (96.48, -141.48, -156.55), cropped
# to x 16:176, y 16:240, z 96:256. Flipped to RAS+ the crop starts at these millimetres.
_PAPER_SHAPE_XYZ = (160, 224, 160)
_PAPER_ORIGIN_MM = (96.48149872 - 175.0, -141.47715759 + 16.0, -156.55375671 + 96.0)


def _paper_box_at(name: str, voxel_mm: int) -> Grid:
    x, y, z = (n // voxel_mm for n in _PAPER_SHAPE_XYZ)
    # Coarser voxels fill the same box, so their centres move in by half the difference.
    ox, oy, oz = (o + (voxel_mm - 1) / 2 for o in _PAPER_ORIGIN_MM)
    return Grid(name, (x, y, z), float(voxel_mm), (ox, oy, oz))


GRIDS: dict[str, Grid] = {
    "paper": _paper_box_at("paper", 1),
    "2mm": _paper_box_at("2mm", 2),
    "4mm": _paper_box_at("4mm", 4),
}


def grid_named(name: str) -> Grid:
    """The grid of that name: `paper` (1 mm), `2mm` or `4mm`, all the same box."""
    if name in GRIDS:
        return GRIDS[name]
    raise UsageError(f"no grid is named {name!r}.", remedy=f"Choose one of: {', '.join(GRIDS)}.")


def canonical(volume: Volume) -> Volume:
    """The same image with its axes flipped and permuted to the nearest RAS+; nothing is resampled.

    Voxel values and their millimetres are unchanged: storage orders of one image come out identical.
    """
    orientation = nibabel.orientations.io_orientation(volume.affine)
    data_XYZ = nibabel.orientations.apply_orientation(volume.data_XYZ, orientation)
    affine = volume.affine @ nibabel.orientations.inv_ornt_aff(orientation, volume.shape_XYZ)
    return Volume(np.ascontiguousarray(data_XYZ), affine, volume.notes)
