"""Middle slices of some synthetic and some real images, left beside the scorecard so that a page can show them without
the images themselves.

All pictures share one grey scale, so that what looks brighter is brighter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainldm.base.errors import BrainldmError
from brainldm.base.files import write_bytes, write_json
from brainldm.base.nifti import read_nifti
from brainldm.base.slices import VIEWS, Crop, View, grey_png, middle_slice
from brainldm.base.streams import drawn, stream
from brainldm.cohort.normalise import to_unit
from brainldm.evaluate.examine import HISTOGRAM_BINS, Examined, Sketch

MAX_SYNTHETIC, MAX_REAL = 64, 16
ABREAST = 4
BACKGROUND_BELOW = 0.04
WHITE_QUANTILE = 0.998


def white_point(sketches: Sequence[Sketch]) -> float:
    """The intensity that is drawn white: all but the brightest few voxels of the heads lie below it."""
    pooled = np.sum([sketch.histogram for sketch in sketches], axis=0)
    first = int(BACKGROUND_BELOW * HISTOGRAM_BINS)
    head = pooled[first:]
    if head.sum() <= 0:
        return 1.0
    above = int(np.searchsorted(np.cumsum(head) / head.sum(), WHITE_QUANTILE))
    return (first + above + 1) / HISTOGRAM_BINS


def draw_pictures(
    folder: Path, sides: Mapping[str, Sequence[Examined]], *, shown: Collection[str], white: float, seed: int
) -> None:
    """Writes a mosaic of each side that is `shown`, synthetic.png and real.png, and figures.json, which says what is
    where in them.

    All pictures are cut to one box, around all the heads shown.
    """
    drawings: dict[str, list[tuple[Examined, dict[View, np.ndarray]]]] = {}
    crop: Crop | None = None
    for side, limit in (("synthetic", MAX_SYNTHETIC), ("real", MAX_REAL)):
        drawings[side] = []
        for look in drawn(sides[side] if side in shown else (), limit, stream(seed, f"evaluate/pictures/{side}")):
            with contextlib.suppress(BrainldmError):  # gone since it was examined: no picture, and nothing else
                data_XYZ, _ = to_unit(read_nifti(look.image.path).data_XYZ)
                drawings[side].append((look, {view: middle_slice(data_XYZ, view) for view in VIEWS}))
                around = Crop.around(data_XYZ, 0.1 * white)
                crop = around if crop is None else crop.joined(around)
    cut = crop or Crop()
    index: dict[str, Any] = {"white": white}
    for side, images in drawings.items():
        mosaic, boxes = _mosaic([[cut.of(slices[view], view) for view in VIEWS] for _, slices in images])
        path = folder / f"{side}.png"
        if not images:
            path.unlink(missing_ok=True)
            continue
        write_bytes(path, grey_png(mosaic, white=white))
        # A real person's picture is tied to their row nowhere.
        ties = [{"sha256": look.sha256} if side == "synthetic" else {} for look, _ in images]
        index[side] = [tie | {"boxes": dict(zip(VIEWS, row))} for tie, row in zip(ties, boxes)]
    write_json(folder / "figures.json", index)


def _mosaic(rows: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, list[list[list[int]]]]:
    """The pictures of each row side by side, rows below one another, several abreast, and where each one lies: [left,
    top, right, bottom]."""
    if not rows:
        return np.zeros((1, 1)), []
    height = max(picture.shape[0] for row in rows for picture in row)
    width = max(sum(picture.shape[1] for picture in row) for row in rows)
    canvas = np.zeros((height * -(-len(rows) // ABREAST), width * min(ABREAST, len(rows))))
    boxes: list[list[list[int]]] = []
    for number, row in enumerate(rows):
        top, left = height * (number // ABREAST), width * (number % ABREAST)
        boxes.append([])
        for picture in row:
            down, across = picture.shape
            canvas[top : top + down, left : left + across] = picture
            boxes[-1].append([left, top, left + across, top + down])
            left += across
    return canvas, boxes
