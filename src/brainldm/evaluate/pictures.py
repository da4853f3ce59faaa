"""Middle slices of some synthetic and some real images, left beside the scorecard so that a page can show them without
the images themselves.

All pictures share one grey scale, so that what looks brighter is brighter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from brainldm.base.errors import BrainldmError
from brainldm.base.files import write_bytes, write_json
from brainldm.base.nifti import read_nifti
from brainldm.base.slices import VIEWS, Crop, View, grey_png, middle_slice
from brainldm.base.streams import stream
from brainldm.evaluate.examine import HISTOGRAM_BINS, Examined, Sketch, to_unit

MAX_SYNTHETIC, MAX_REAL = 64, 16
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
    folder: Path, sides: Mapping[str, Sequence[Examined]], *, white: float, seed: int, show_real: bool
) -> None:
    """Writes PNGs of three views an image and figures.json, which lists them; removes those of an earlier call.

    All are cut to one box, around all the heads shown.
    """
    shown: list[tuple[str, Examined, dict[View, np.ndarray]]] = []
    crop: Crop | None = None
    for side, limit in (("synthetic", MAX_SYNTHETIC), ("real", MAX_REAL if show_real else 0)):
        for look in _some(sides.get(side, ()), limit, seed, side):
            with contextlib.suppress(BrainldmError):  # gone since it was examined: no picture, and nothing else
                data_XYZ, _ = to_unit(read_nifti(look.image.path).data_XYZ)
                shown.append((side, look, {view: middle_slice(data_XYZ, view) for view in VIEWS}))
                around = Crop.around(data_XYZ, 0.1 * white)
                crop = around if crop is None else crop.joined(around)
    listed, kept = [], set()
    for number, (side, look, slices) in enumerate(shown):
        files = {view: f"{number:03d}-{side}-{view}.png" for view in VIEWS}
        for view, file in files.items():
            write_bytes(folder / file, grey_png((crop or Crop()).of(slices[view], view), white=white))
            kept.add(file)
        # A real person's picture is tied to their row nowhere.
        tie = {"sha256": look.sha256} if side == "synthetic" else {}
        listed.append({"side": side, **tie, "views": files})
    write_json(folder / "figures.json", {"white": white, "images": listed})
    for path in folder.glob("*.png"):
        if path.name not in kept:
            path.unlink()


def _some(looks: Sequence[Examined], limit: int, seed: int, side: str) -> Sequence[Examined]:
    """At most `limit` of them, drawn at random, in their order."""
    if len(looks) <= limit:
        return looks
    chosen = stream(seed, f"evaluate/pictures/{side}").choice(len(looks), size=limit, replace=False)
    return [looks[position] for position in sorted(chosen.tolist())]
