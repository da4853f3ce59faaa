"""Pictures that show how far a training is: middle slices in a row, rows below one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.image import imsave

from brainldm.base.files import atomic_path


def save_rows(path: Path, rows: Sequence[np.ndarray]) -> None:
    """Writes a PNG with one row of images for each (B, X, Y, Z) array, values 0..1: per image its middle axial, coronal
    and sagittal slice, seen from above, from the front and from the right, up and front up."""
    picture = np.concatenate([_row(images_BXYZ) for images_BXYZ in rows])
    with atomic_path(path) as part:
        imsave(part, np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1)


def _row(images_BXYZ: np.ndarray) -> np.ndarray:
    return np.concatenate([_three_planes(image_XYZ) for image_XYZ in images_BXYZ], axis=1)


def _three_planes(image_XYZ: np.ndarray) -> np.ndarray:
    x, y, z = (n // 2 for n in image_XYZ.shape)
    planes = (image_XYZ[:, :, z], image_XYZ[:, y, :], image_XYZ[x, :, :])
    height = max(plane.shape[1] for plane in planes)
    upright = []
    for plane in planes:
        turned = np.flipud(plane.T)
        missing = height - turned.shape[0]
        upright.append(np.pad(turned, ((missing // 2, missing - missing // 2), (0, 0))))
    return np.concatenate(upright, axis=1)
