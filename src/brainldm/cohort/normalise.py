"""Intensities to 0..1, with nothing at 0."""

from __future__ import annotations

import numpy as np

from brainldm.base.errors import BadInput

# A scan in which so much is exactly 0 was masked: noise outside a head is hardly ever 0 after reconstruction, and
# a brain fills less than half of its box.
MASKED_SHARE = 0.2
# Prepared and generated images lie in 0..1; this far outside is rounding or a decoder's overshoot, and is clipped.
UNIT_TOLERANCE = 0.1
SHOULDER = 0.9


def is_masked(data_XYZ: np.ndarray) -> bool:
    """Whether the background of this image was set to 0 (a brain already taken out of its skull, or a defaced box)."""
    return bool((data_XYZ == 0).mean() >= MASKED_SHARE)


def background_at_zero(data_XYZ: np.ndarray, mask_XYZ: np.ndarray | None = None) -> np.ndarray:
    """float32 with nothing below 0 and the background at 0, so that what lies outside the scan can be 0 too.

    With a mask, everything outside it is background; without one, the zeros of a masked image are. A brain that has
    values below 0 (z-scores, say) is lifted whole above its background. A head with its own background is shifted to
    begin at 0, which min-max would do anyway.
    """
    data_XYZ = np.asarray(data_XYZ, dtype=np.float32)
    if mask_XYZ is None and not is_masked(data_XYZ):
        return data_XYZ - data_XYZ.min()
    foreground = data_XYZ != 0 if mask_XYZ is None else mask_XYZ.astype(bool)
    if not foreground.any():
        raise BadInput("the brain mask is empty.", remedy="Check the mask.", reason="empty_mask")
    lift = min(float(data_XYZ[foreground].min()), 0.0)
    return np.where(foreground, data_XYZ - np.float32(lift), np.float32(0))


def unit_range(data_XYZ: np.ndarray, *, percentile: float | None = None) -> np.ndarray:
    """float32 in 0..1: the paper's min-max. With `percentile` (say, 99.9, of the voxels above 0) the bright end is
    taken there and what is brighter becomes 1, which keeps one hot vessel from darkening the rest."""
    data_XYZ = np.asarray(data_XYZ, dtype=np.float32)
    low, high = float(data_XYZ.min()), float(data_XYZ.max())
    if percentile is not None and high > low:
        high = float(np.percentile(data_XYZ[data_XYZ > low], percentile))
    if not high > low:
        raise BadInput(
            f"every voxel inside the box has the value {low:g}; there is no image.",
            remedy="Look at the overlay: the scan may lie elsewhere.",
            reason="constant",
        )
    return np.clip((data_XYZ - low) / np.float32(high - low), 0, 1)


def drawn_into_unit_range(data_XYZ: np.ndarray) -> np.ndarray:
    """A decoder's image in 0..1. Where it goes beyond 1, all that is brighter than SHOULDER is drawn together, so that
    its brightest voxel is 1, as that of every min-max scaled image is; cut off there, it would have flat patches."""
    data_XYZ = np.maximum(data_XYZ, 0.0)
    brightest = data_XYZ.max()
    if brightest <= 1:
        return data_XYZ
    drawn_XYZ = SHOULDER + (data_XYZ - SHOULDER) * ((1 - SHOULDER) / (brightest - SHOULDER))
    return np.where(data_XYZ > SHOULDER, np.minimum(drawn_XYZ, 1.0), data_XYZ).astype(data_XYZ.dtype)


def to_unit(data_XYZ: np.ndarray) -> tuple[np.ndarray, bool]:
    """Intensities in 0..1 and whether they had to be scaled: what lies in 0..1 already (up to the tolerance, clipped)
    is taken as it is, anything else is min-max scaled, which is what a prepared cohort is made by."""
    low, high = float(data_XYZ.min()), float(data_XYZ.max())
    if low >= -UNIT_TOLERANCE and high <= 1 + UNIT_TOLERANCE:
        return np.clip(data_XYZ, 0, 1), False
    return ((data_XYZ - low) / (high - low)).astype(np.float32), True
