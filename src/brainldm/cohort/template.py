"""The MNI152 template (ICBM 2009a, symmetric) that nilearn carries: a brain without a skull, and its soft labels.

It is opened from the installed nilearn package: nothing is downloaded, and nothing of it lies in this repository.
The template averages 152 people linearly registered to Talairach's space and is about 30 % larger than they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.ndimage as ndi
from nilearn import datasets

from brainldm.base.volume import Volume

# The lateral ventricles are the connected pieces of CSF that touch these points and lie within this box (RAS mm),
# this far below the brain's surface. The box cuts off the third ventricle below and the quadrigeminal cistern behind.
VENTRICLE_SEEDS_MM = ((10, -10, 20), (-10, -10, 20), (14, -30, 16), (-14, -30, 16), (8, 14, 10), (-8, 14, 10))
VENTRICLE_BOX_MM = ((-40, 40), (-62, 42), (-12, 32))
VENTRICLE_DEPTH_MM = 14.0
CSF_THRESHOLD = 0.5
BRAIN_THRESHOLD = 0.2  # of the T1 template scaled to 0..1; nilearn's own choice for its brain mask


@dataclass(frozen=True)
class Template:
    """The template's T1 image (0..1) and its labels, all on one grid.

    `grey`, `white` and `csf` are soft, sum to 1 inside `brain_mask` and are 0 outside. `ventricles` (soft) is the
    part of the brain that lies in the lateral ventricles. The mask is filled and bool: everything inside the skull.
    """

    t1: Volume
    grey: Volume
    white: Volume
    csf: Volume
    ventricles: Volume
    brain_mask: Volume

    @property
    def head_mm3(self) -> float:
        """What the skull holds: the volume of the filled mask."""
        return float(self.brain_mask.data_XYZ.sum()) * self.brain_mask.voxel_mm3

    @property
    def brain_mm3(self) -> float:
        """Grey and white matter together."""
        both = self.grey.data_XYZ.sum(dtype=np.float64) + self.white.data_XYZ.sum(dtype=np.float64)
        return float(both) * self.grey.voxel_mm3

    @property
    def ventricles_mm3(self) -> float:
        return float(self.ventricles.data_XYZ.sum(dtype=np.float64)) * self.ventricles.voxel_mm3


@lru_cache(maxsize=3)
def load_template(resolution_mm: int = 1) -> Template:
    """The template at 1 mm, or averaged over blocks of `resolution_mm` voxels, so that soft labels keep their volume.

    The arrays are shared between callers and locked against writing.
    """
    if resolution_mm == 1:
        return _template_at_1mm()
    fine = load_template(1)
    mask = _block_mean(_as_float(fine.brain_mask), resolution_mm)
    hard_mask = Volume(_locked(mask.data_XYZ >= 0.5), mask.affine)
    return Template(
        t1=_block_mean(fine.t1, resolution_mm),
        grey=_block_mean(fine.grey, resolution_mm),
        white=_block_mean(fine.white, resolution_mm),
        csf=_block_mean(fine.csf, resolution_mm),
        ventricles=_block_mean(fine.ventricles, resolution_mm),
        brain_mask=hard_mask,
    )


def _template_at_1mm() -> Template:
    t1_image = datasets.load_mni152_template(resolution=1)
    affine = np.asarray(t1_image.affine, dtype=np.float64)
    t1 = np.asarray(t1_image.dataobj, dtype=np.float32)
    grey = np.asarray(datasets.load_mni152_gm_template(resolution=1).dataobj, dtype=np.float32)
    white = np.asarray(datasets.load_mni152_wm_template(resolution=1).dataobj, dtype=np.float32)
    mask = ndi.binary_fill_holes(t1 > BRAIN_THRESHOLD)
    grey, white = grey * mask, white * mask
    csf = np.clip(1 - grey - white, 0, 1) * mask
    ventricles = soft_ventricles(csf, mask, affine)

    def volume(data_XYZ: np.ndarray) -> Volume:
        return Volume(_locked(data_XYZ), affine)

    return Template(volume(t1), volume(grey), volume(white), volume(csf), volume(ventricles), volume(mask))


def soft_ventricles(csf_XYZ: np.ndarray, brain_mask_XYZ: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The lateral ventricles in 0..1, by the rule above, from the CSF of a template in MNI space at 1 mm.

    Inside, where the template shows choroid plexus as a little grey, they are 1; in the shell of boundary voxels they
    are the CSF fraction.
    """
    x, y, z = (affine[i, 3] + affine[i, i] * np.arange(n) for i, n in enumerate(csf_XYZ.shape))
    (x0, x1), (y0, y1), (z0, z1) = VENTRICLE_BOX_MM
    box = ((x > x0) & (x < x1))[:, None, None] & ((y > y0) & (y < y1))[:, None] & ((z > z0) & (z < z1))
    deep = ndi.distance_transform_edt(brain_mask_XYZ, sampling=np.diag(affine)[:3]) > VENTRICLE_DEPTH_MM
    pieces, _ = ndi.label((csf_XYZ > CSF_THRESHOLD) & box & deep)
    seeds = np.rint(np.linalg.solve(affine[:3, :3], (np.array(VENTRICLE_SEEDS_MM) - affine[:3, 3]).T)).astype(int)
    touched = [piece for piece in np.unique(pieces[tuple(seeds)]) if piece]
    core = np.isin(pieces, touched)
    shell = csf_XYZ * ndi.binary_dilation(core)
    return np.where(ndi.binary_erosion(core), np.float32(1), shell).astype(np.float32)


def _as_float(volume: Volume) -> Volume:
    return Volume(volume.data_XYZ.astype(np.float32), volume.affine)


def _locked(data_XYZ: np.ndarray) -> np.ndarray:
    data_XYZ.setflags(write=False)
    return data_XYZ


def _block_mean(volume: Volume, factor: int) -> Volume:
    """Means over blocks of factor x factor x factor voxels; the far edges are padded with zeros to whole blocks."""
    padding = [(0, -n % factor) for n in volume.shape_XYZ]
    padded = np.pad(volume.data_XYZ, padding)
    x, y, z = (n // factor for n in padded.shape)
    blocks = padded.reshape(x, factor, y, factor, z, factor).mean(axis=(1, 3, 5), dtype=np.float32)
    affine = volume.affine.copy()
    affine[:3, :3] *= factor
    affine[:3, 3] += volume.affine[:3, :3] @ np.full(3, (factor - 1) / 2)
    return Volume(_locked(blocks), affine)
