"""An image at the voxels of another, through millimetres."""

from __future__ import annotations

import numpy as np
import scipy.ndimage as ndi

from brainldm.base.volume import Grid, Volume


def on_voxels(
    image: Volume,
    there: Volume | Grid,
    image_mm_from_there_mm: np.ndarray | None = None,
    *,
    mode: str = "constant",
    outside: float = 0.0,
) -> np.ndarray:
    """The image at the voxels of `there`, trilinear, float32; `outside` where it does not reach. Nothing is smoothed:
    coarser voxels see points of the image."""
    to_image = np.linalg.inv(image.affine)
    if image_mm_from_there_mm is not None:
        to_image = to_image @ image_mm_from_there_mm
    return ndi.affine_transform(
        image.data_XYZ.astype(np.float32),
        to_image @ there.affine,
        output_shape=there.shape_XYZ,
        order=1,
        mode=mode,
        cval=outside,
    )
