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
from brainldm.base.slices import VIEWS, grey_png, middle_slice
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
    """Writes PNGs of three views an image and figures.json, which lists them; removes those of an earlier call."""
    listed = []
    for side, limit in (("synthetic", MAX_SYNTHETIC), ("real", MAX_REAL if show_real else 0)):
        looks = sides.get(side, ())
        chosen = list(range(len(looks)))
        if len(chosen) > limit:
            generator = stream(seed, f"evaluate/pictures/{side}")
            chosen = sorted(generator.choice(len(looks), size=limit, replace=False).tolist())
        for number, position in enumerate(chosen):
            look = looks[position]
            with contextlib.suppress(BrainldmError):  # gone since it was examined: no picture, and nothing else
                data_XYZ, _ = to_unit(read_nifti(look.image.path).data_XYZ)
                files = {view: f"{side}-{number:03d}-{view}.png" for view in VIEWS}
                for view, file in files.items():
                    write_bytes(folder / file, grey_png(middle_slice(data_XYZ, view), white=white))
                # A real person's picture is not tied to their row anywhere.
                tie = {"sha256": look.sha256} if side == "synthetic" else {}
                listed.append({"side": side, **tie, "views": files})
    write_json(folder / "figures.json", {"white": white, "images": listed})
    kept = {file for entry in listed for file in entry["views"].values()}  # type: ignore[attr-defined]
    for path in folder.glob("*.png"):
        if path.name not in kept:
            path.unlink()
