"""Pictures that show how far a training is: middle slices in a row, rows below one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brainldm.base.files import write_bytes
from brainldm.base.slices import VIEWS, grey_png, middle_slice


def save_rows(path: Path, rows: Sequence[np.ndarray]) -> None:
    """Writes a PNG with one row for each (B, X, Y, Z) array of values 0..1: of every image its three middle slices."""
    write_bytes(path, grey_png(np.concatenate([_row(images_BXYZ) for images_BXYZ in rows])))


def _row(images_BXYZ: np.ndarray) -> np.ndarray:
    return np.concatenate([_three_planes(image_XYZ) for image_XYZ in images_BXYZ], axis=1)


def _three_planes(image_XYZ: np.ndarray) -> np.ndarray:
    slices = [middle_slice(image_XYZ, view) for view in VIEWS]
    height = max(slice_RC.shape[0] for slice_RC in slices)
    room = [height - slice_RC.shape[0] for slice_RC in slices]
    padded = [np.pad(s, ((r // 2, r - r // 2), (0, 0))) for s, r in zip(slices, room)]
    return np.concatenate(padded, axis=1)
