"""Middle slices of a volume as pictures: one convention for every picture this program draws.

Pictures are upright and not mirrored: the person's left is on the left of axial and coronal slices (as seen from above
with the nose up, and from behind), and sagittal slices look to the right (nose on the right).
"""

from __future__ import annotations

import io
from typing import Literal, get_args

import numpy as np

View = Literal["axial", "coronal", "sagittal"]
VIEWS: tuple[View, ...] = get_args(View)
_ACROSS = {"axial": 2, "coronal": 1, "sagittal": 0}


def middle_slice(image_XYZ: np.ndarray, view: View) -> np.ndarray:
    """The slice through the middle of an RAS+ volume, rows from top to bottom, columns from left to right."""
    across = _ACROSS[view]
    plane = np.take(image_XYZ, image_XYZ.shape[across] // 2, axis=across)
    return plane.T[::-1]


def grey_png(slice_RC: np.ndarray, *, white: float = 1.0) -> bytes:
    """An 8-bit greyscale PNG of a slice: 0 is black, `white` and above is white."""
    from PIL import Image

    grey = np.rint(np.clip(slice_RC / white, 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grey)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
