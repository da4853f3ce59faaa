"""A mosaic: brains of two or more origins side by side, for the eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from brainldm.base.files import atomic_path
from brainldm.base.nifti import read_nifti
from brainldm.base.slices import VIEWS, Crop, middle_slice

SHOWN = 12  # brains of each side
_WHITE_QUANTILE = 99.8


def draw_mosaic(sides: Mapping[str, Sequence[Path]], path: Path, *, across: int = 3) -> None:
    """A picture of the first SHOWN images of each side, one side beside the other: middle slices in three views, all in
    one grey scale. None is chosen by eye."""
    from matplotlib.figure import Figure

    images = {title: [read_nifti(file).data_XYZ for file in files[:SHOWN]] for title, files in sides.items()}
    everything = [image for some in images.values() for image in some]
    inside = np.concatenate([image[image > 0.04] for image in everything])
    white = float(np.percentile(inside, _WHITE_QUANTILE)) if inside.size else 1.0
    crop = Crop.around(everything[0], 0.1)
    for image in everything[1:]:
        crop = crop.joined(Crop.around(image, 0.1))
    blocks = {title: _block([_views(image, crop) for image in some], across) for title, some in images.items()}
    height, width = max(b.shape[0] for b in blocks.values()), sum(b.shape[1] for b in blocks.values())
    drawn = Figure(figsize=(15.0, 15.0 * height / width + 0.4), facecolor="black", layout="constrained")
    for ax, (title, block) in zip(np.atleast_1d(drawn.subplots(1, len(blocks))), blocks.items()):
        ax.imshow(block, cmap="gray", vmin=0, vmax=white, interpolation="nearest")
        ax.set_title(f"{title} ({len(images[title])})", color="white", fontsize=12)
        ax.set_axis_off()
    with atomic_path(path) as part:
        drawn.savefig(part, dpi=110, format="png")


def _views(image_XYZ: np.ndarray, crop: Crop) -> np.ndarray:
    """The three middle slices of one brain beside each other, centred on black."""
    slices = [crop.of(middle_slice(image_XYZ, view), view) for view in VIEWS]
    height = max(len(one) for one in slices)
    padded = []
    for one in slices:
        above = (height - len(one)) // 2
        padded.append(np.pad(one, ((above + 1, height - len(one) - above + 1), (1, 1))))
    return np.pad(np.hstack(padded), 2)


def _block(tiles: Sequence[np.ndarray], across: int) -> np.ndarray:
    """Tiles of one size in rows of `across`, black where there are none."""
    rows = []
    for first in range(0, len(tiles), across):
        row = list(tiles[first : first + across])
        rows.append(np.hstack(row + [np.zeros_like(row[0])] * (across - len(row))))
    return np.vstack(rows)
