"""The anatomy that phantoms are deformed from, as soft labels in MNI space, and where new ones come in.

Whatever can fill an `Anatomy` can be deformed, painted and measured: nilearn's template does by default, and label maps
of the user's own bring real folding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from brainldm.base.volume import Grid, Volume
from brainldm.cohort.template import load_template

LABELS = ("csf", "grey", "white", "ventricles")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Soft labels of one head at the template's size and place: 0..1, on an axis-aligned 1 mm grid.

    Where `head_XYZ` (bool) is true and no label claims a voxel, there is CSF. Compared by identity, so that what is
    derived from an anatomy can be cached by it.
    """

    name: str
    grid: Grid
    grey_XYZ: np.ndarray
    white_XYZ: np.ndarray
    ventricles_XYZ: np.ndarray
    head_XYZ: np.ndarray

    @property
    def head_mm3(self) -> float:
        return float(self.head_XYZ.sum()) * self.grid.voxel_mm3


@lru_cache(maxsize=1)
def template_anatomy() -> Anatomy:
    """The nilearn template's anatomy: one brain, with the smooth sulci of an average."""
    template = load_template(1)
    head = template.brain_mask.data_XYZ
    grid = _grid_of("MNI152", template.brain_mask)
    grey, white, csf = (v.data_XYZ for v in (template.grey, template.white, template.csf))
    return _partition("MNI152", grid, head, grey, white, csf, template.ventricles.data_XYZ)


def _grid_of(name: str, volume: Volume) -> Grid:
    ox, oy, oz = volume.affine[:3, 3].tolist()
    return Grid(name, volume.shape_XYZ, float(volume.affine[0, 0]), (ox, oy, oz))


def _partition(
    name: str,
    grid: Grid,
    head: np.ndarray,
    grey: np.ndarray,
    white: np.ndarray,
    csf: np.ndarray,
    ventricles: np.ndarray,
) -> Anatomy:
    """Shares out each voxel of the head so that the labels sum to 1, the ventricles first."""
    others = grey + white + np.maximum(csf - ventricles, 0)
    share = np.where(head, (1 - ventricles) / np.maximum(others, 1e-6), 0).astype(np.float32)
    return Anatomy(name, grid, grey * share, white * share, ventricles * head, head)
