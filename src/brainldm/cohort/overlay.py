"""A picture to check a registration by: the prepared scan with the template's outlines drawn on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from brainldm.base.files import atomic_path
from brainldm.base.volume import Volume
from brainldm.cohort.resample import on_voxels
from brainldm.cohort.template import load_template

_SHARES = (0.3, 0.42, 0.54, 0.66)
_PLANES = ("sagittal", "coronal", "axial")
_SIDES = {"sagittal": ("P", "A"), "coronal": ("L", "R"), "axial": ("L", "R")}


def write_overlay(path: Path, image: Volume, *, title: str) -> None:
    """Writes a PNG: four slices of each plane, the template's brain (yellow) and ventricles (blue) as outlines.

    The template is larger than most people, so its outline lies a little outside a well aligned brain, evenly all
    around. Left is left; letters say so.
    """
    template = load_template(2)
    brain, ventricles = on_voxels(template.brain_mask, image), on_voxels(template.ventricles, image)
    figure = Figure(figsize=(9, 7.2), dpi=80, facecolor="black")
    figure.suptitle(title, color="white", fontsize=11, parse_math=False)
    panels = figure.subplots(3, len(_SHARES))
    top = float(np.percentile(image.data_XYZ, 99.8)) or 1.0
    for axis, (plane, row) in enumerate(zip(_PLANES, panels)):
        for share, panel in zip(_SHARES, row):
            number = int(share * image.shape_XYZ[axis])
            panel.imshow(image.data_XYZ.take(number, axis).T, origin="lower", cmap="gray", vmin=0, vmax=top)
            for outline, colour in ((brain, "gold"), (ventricles, "deepskyblue")):
                drawn = outline.take(number, axis).T
                if 0 < (drawn > 0.5).sum() < drawn.size:
                    panel.contour(drawn, levels=[0.5], colors=colour, linewidths=0.8)
            low, high = _SIDES[plane]
            panel.text(0.03, 0.5, low, color="white", fontsize=8, transform=panel.transAxes)
            panel.text(0.92, 0.5, high, color="white", fontsize=8, transform=panel.transAxes)
            panel.set_axis_off()
    figure.subplots_adjust(left=0, right=1, bottom=0, top=0.93, wspace=0.02, hspace=0.02)
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(str(part))
