"""A brain without its skull: by the template, or by deepbet where it is installed. Masks of the study's own come from
`bids`."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import scipy.ndimage as ndi

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.nifti import read_nifti, write_nifti
from brainldm.base.volume import Volume
from brainldm.cohort.register import Registration
from brainldm.cohort.resample import on_voxels
from brainldm.cohort.template import load_template

METHODS = ("template", "deepbet")
# How far a brain may reach over the template's edge, and how far below it the surface may be cleaned (mm).
_REACH_MM = 3.0
_SURFACE_MM = 6.0


def brain_mask(scan: Volume, registration: Registration, *, method: str = "template") -> Volume:
    """Where the brain is, on the scan's own voxels (float32, 0 or 1).

    `template`: the template's brain brought onto the scan and cleaned at its surface; good to a few millimetres, meant
    for measuring and for studies without masks. `deepbet`: the network of that name (extra `deepbet`).
    """
    if method == "template":
        return _by_template(scan, registration)
    if method == "deepbet":
        return _by_deepbet(scan)
    raise UsageError(f"no way to strip a skull is named {method!r}.", remedy=f"Choose one of: {', '.join(METHODS)}.")


@lru_cache(maxsize=1)
def _depth_in_template() -> Volume:
    """Signed distance in mm to the surface of the template's brain, inside positive; seconds of work once a process."""
    mask = load_template(1).brain_mask
    inside = ndi.distance_transform_edt(mask.data_XYZ > 0)
    outside = ndi.distance_transform_edt(mask.data_XYZ == 0)
    return Volume((inside - outside).astype(np.float32), mask.affine)


def _by_template(scan: Volume, registration: Registration) -> Volume:
    """Everything well inside the template's brain is brain; near its surface only what is bright enough and hangs
    together after an opening, which cuts the threads to dura and eyes."""
    depth = on_voxels(_depth_in_template(), scan, registration.mni_from_scan_affine, outside=-50.0)
    deep = depth > _SURFACE_MM
    if not deep.any():
        raise BadInput("the template's brain does not fall on this scan.", reason="no_brain")
    typical = float(np.median(scan.data_XYZ[deep]))
    low = float(np.percentile(scan.data_XYZ[deep], 1))
    threshold = low + 0.35 * (typical - low)
    candidate = deep | ((depth > -_REACH_MM) & (scan.data_XYZ > threshold) & (scan.data_XYZ < 2.2 * typical))
    radius = max(1, round(2.0 / float(scan.voxel_mm.mean())))
    opened = ndi.binary_opening(candidate, iterations=radius) | deep
    pieces, _ = ndi.label(opened)
    largest = pieces == np.bincount(pieces[deep]).argmax()
    filled = ndi.binary_fill_holes(ndi.binary_closing(largest, iterations=radius) | largest)
    return Volume(filled.astype(np.float32), scan.affine)


def _by_deepbet(scan: Volume) -> Volume:
    try:
        from deepbet import run_bet
    except ImportError as error:
        raise UsageError(
            "deepbet is not installed.",
            remedy="pip install 'brainldm[deepbet]', or use --strip-with template.",
            reason="missing_extra",
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        source, mask = Path(folder) / "scan.nii.gz", Path(folder) / "mask.nii.gz"
        write_nifti(source, scan.data_XYZ, scan.affine, space="aligned")
        run_bet([str(source)], mask_paths=[str(mask)], no_gpu=True)
        return Volume((read_nifti(mask).data_XYZ > 0.5).astype(np.float32), scan.affine)
