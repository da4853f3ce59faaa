"""Random changes of training images. What is drawn is a plan of its own, so that it can be looked at and made again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi

from brainldm.train.config import Augmentation


@dataclass(frozen=True)
class Change:
    """What is done to one image: scaled about its middle and moved, flipped, brightened, its contrast bent."""

    flip: bool = False
    translation_voxels: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0
    shift: float = 0.0
    gamma: float = 1.0


def draw_change(draws: np.random.Generator, config: Augmentation) -> Change:
    """A change of the configured kinds. The same number of random numbers is used whatever comes of it."""
    flip, affine, shift, gamma = draws.random(4)
    translation, scale = draws.uniform(-1, 1, 3), draws.uniform(-1, 1)
    by, bent = draws.uniform(-1, 1), draws.uniform(*config.gamma_range)
    moves = affine < config.affine_probability
    x, y, z = (translation * config.translation_voxels * moves).tolist()
    return Change(
        flip=bool(flip < config.flip_probability),
        translation_voxels=(x, y, z),
        scale=1 + config.scaling * scale * moves,
        shift=config.intensity_shift * by * (shift < config.shift_probability),
        gamma=bent if gamma < config.gamma_probability else 1.0,
    )


def changed(image_XYZ: np.ndarray, change: Change) -> np.ndarray:
    """The changed image, float32 in 0..1. Background, exactly 0, stays background."""
    if change.scale != 1 or any(change.translation_voxels):
        middle = (np.array(image_XYZ.shape) - 1) / 2
        offset = middle - (middle + np.array(change.translation_voxels)) / change.scale
        image_XYZ = ndi.affine_transform(image_XYZ, np.full(3, 1 / change.scale), offset, order=1)
    if change.flip:
        image_XYZ = image_XYZ[::-1]
    if change.gamma != 1:
        image_XYZ = np.clip(image_XYZ, 0, 1) ** np.float32(change.gamma)
    if change.shift:
        image_XYZ = np.where(image_XYZ > 0, image_XYZ + np.float32(change.shift), 0)
    return np.clip(image_XYZ, 0, 1).astype(np.float32)
