"""The anatomy that phantoms are deformed from, as soft labels in MNI space, and where new ones come in.

Whatever can fill an `Anatomy` can be deformed, painted and measured: nilearn's template does by default, and label maps
of the user's own bring real folding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.ndimage as ndi

from brainldm.base.volume import Grid, Volume
from brainldm.cohort.template import load_template

SULCAL_CSF = (0.03, 0.43)  # this much CSF in the average is none, and all, in a person
MARGIN_VOXELS = 16  # air around the head, for the flows and distances to run out in
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
    grey, white, csf = (volume.data_XYZ for volume in (template.grey, template.white, template.csf))
    # Averaging 152 people has blurred sulci into a little CSF everywhere in the cortex; one person's are clear.
    low, high = SULCAL_CSF
    clear_csf = np.clip((csf - low) / (high - low), 0, 1)
    kept = (1 - clear_csf) / np.maximum(1 - csf, 1e-6)
    ventricles = template.ventricles.data_XYZ
    return _anatomy("MNI152", template.brain_mask, grey * kept, white * kept, clear_csf, ventricles)


def _anatomy(
    name: str, head: Volume, grey: np.ndarray, white: np.ndarray, csf: np.ndarray, ventricles: np.ndarray
) -> Anatomy:
    """Crops to the head with a margin, and shares out each voxel so that the labels sum to 1, the ventricles first."""
    others = grey + white + np.maximum(csf - ventricles, 0)
    share = np.where(head.data_XYZ, (1 - ventricles) / np.maximum(others, 1e-6), 0).astype(np.float32)
    occupied = ndi.find_objects(head.data_XYZ.astype(np.int8))[0]

    def framed(data_XYZ: np.ndarray) -> np.ndarray:
        return np.pad(data_XYZ[occupied], MARGIN_VOXELS)

    start = np.array([s.start - MARGIN_VOXELS for s in occupied])
    ox, oy, oz = (head.affine[:3, :3] @ start + head.affine[:3, 3]).tolist()
    head_XYZ = framed(head.data_XYZ)
    x, y, z = head_XYZ.shape
    return Anatomy(
        name,
        Grid(name, (x, y, z), float(head.affine[0, 0]), (ox, oy, oz)),
        framed(grey * share),
        framed(white * share),
        framed(ventricles * head.data_XYZ),
        head_XYZ,
    )
