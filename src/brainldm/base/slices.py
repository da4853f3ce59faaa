"""Middle slices of a volume as pictures: one convention for every picture this program draws.

Pictures are upright and not mirrored: the person's left is on the left of axial and coronal slices (as seen from above
with the nose up, and from behind), and sagittal slices look to the right (nose on the right).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

View = Literal["axial", "coronal", "sagittal"]
VIEWS: tuple[View, ...] = get_args(View)
_ACROSS: dict[View, int] = {"axial": 2, "coronal": 1, "sagittal": 0}
_IN_PLANE: dict[View, tuple[int, int]] = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}


def middle_slice(image_XYZ: np.ndarray, view: View) -> np.ndarray:
    """The slice through the middle of an RAS+ volume, rows from top to bottom, columns from left to right."""
    across = _ACROSS[view]
    plane = np.take(image_XYZ, image_XYZ.shape[across] // 2, axis=across)
    return plane.T[::-1]


@dataclass(frozen=True)
class Crop:
    """The part of a box that pictures show, as shares 0..1 of its sides: `low_XYZ` to `high_XYZ`."""

    low_XYZ: tuple[float, float, float] = (0.0, 0.0, 0.0)
    high_XYZ: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def around(cls, image_XYZ: np.ndarray, threshold: float) -> Crop:
        """Where the image is above `threshold`, with a little room; the whole where it is nowhere."""
        inside = [np.flatnonzero((image_XYZ > threshold).any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
        if any(len(found) == 0 for found in inside):
            return cls()
        sides = zip(inside, image_XYZ.shape)
        pairs = [(max(0.0, found[0] / n - 0.02), min(1.0, (found[-1] + 1) / n + 0.02)) for found, n in sides]
        (a, b), (c, d), (e, f) = pairs
        return cls((a, c, e), (b, d, f))

    def joined(self, other: Crop) -> Crop:
        """The smallest part that holds both."""
        low, high = np.minimum(self.low_XYZ, other.low_XYZ), np.maximum(self.high_XYZ, other.high_XYZ)
        return Crop((low[0], low[1], low[2]), (high[0], high[1], high[2]))

    def of(self, slice_RC: np.ndarray, view: View) -> np.ndarray:
        """What it leaves of a slice as `middle_slice` gives it."""
        across, up = _IN_PLANE[view]
        rows, columns = slice_RC.shape
        left, right = round(self.low_XYZ[across] * columns), round(self.high_XYZ[across] * columns)
        top, bottom = round((1 - self.high_XYZ[up]) * rows), round((1 - self.low_XYZ[up]) * rows)
        return slice_RC[top:bottom, left:right]


def grey_png(slice_RC: np.ndarray, *, white: float = 1.0) -> bytes:
    """An 8-bit greyscale PNG of a slice: 0 is black, `white` and above is white."""
    grey = np.rint(np.clip(slice_RC / white, 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grey)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
