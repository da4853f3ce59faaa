"""Figures 2 and 4 of Pinaya et al. 2022, from any model: the brains as a dataset, and the figure drawn of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainldm.base.covariates import COVARIATES, CovariateRanges, Covariates
from brainldm.base.errors import PartialFailure
from brainldm.base.files import atomic_path
from brainldm.base.nifti import read_nifti
from brainldm.base.progress import Progress, Quiet
from brainldm.base.slices import VIEWS, middle_slice
from brainldm.diffusion.solvers import DEFAULT_SAMPLER

_LABELS = {"ventricles_mm3": "ventricles", "brain_mm3": "brain"}
_FIXED = {"sex": 1.0, "age_years": 0.5, "ventricles_mm3": 0.3, "brain_mm3": 0.5}
_WHITE_QUANTILE = 99.8


@dataclass(frozen=True)
class FigurePlan:
    """Which brains a figure shows: for each row of it the covariate that changes and its values, as shares of the
    training range (0 its low end, 1 its high end). What does not change is at `fixed`."""

    number: int
    rows: dict[str, tuple[float, ...]]
    fixed: dict[str, float]

    def covariates(self, ranges: CovariateRanges) -> list[Covariates]:
        """Row by row, in physical units."""
        shares = [
            [value if name == swept else self.fixed[name] for name in COVARIATES]
            for swept, values in self.rows.items()
            for value in values
        ]
        return [Covariates.from_array(physical) for physical in ranges.denormalise(np.array(shares))]


def figure_2() -> FigurePlan:
    """Two sweeps of five: ventricular volume, then brain volume, from the low end of training to the high end."""
    sweep = (0.0, 0.25, 0.5, 0.75, 1.0)
    return FigurePlan(2, {"ventricles_mm3": sweep, "brain_mm3": sweep}, _FIXED)


def figure_4() -> FigurePlan:
    """Beyond training: ventricles at 1.5, 1.9 and -0.5 of their range, brain volume at -0.1, -0.3 and -0.5."""
    return FigurePlan(4, {"ventricles_mm3": (1.5, 1.9, -0.5), "brain_mm3": (-0.1, -0.3, -0.5)}, _FIXED)


FIGURES = {2: figure_2, 4: figure_4}


def make_figure(
    number: int,
    model: Path,
    out: Path,
    *,
    seed: int = 0,
    sampler: str = DEFAULT_SAMPLER,
    steps: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    max_memory: str | None = None,
    progress: Progress = Quiet(),
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Generates the figure's brains into `out` and draws out/figure.png; the same call goes on with a broken one.

    Every brain starts from the same noise, so that what differs between two is what was asked of them. Where some could
    not be made their places stay black, and PartialFailure is raised after the figure is drawn.
    """
    from brainldm.generate.plan import PlanRow, check_ranges
    from brainldm.generate.run import GenerateSettings, generate
    from brainldm.generate.start import start
    from brainldm.model.folder import read_description

    plan = FIGURES[number]()
    ranges = read_description(model).covariates.fitted_ranges()
    asked = [PlanRow(index, covariates) for index, covariates in enumerate(plan.covariates(ranges))]
    rows = check_ranges(asked, ranges, allow_extrapolation=True)
    settings = GenerateSettings(seed=seed, sampler=sampler, steps=steps, same_noise=True)
    ready = start(
        model,
        rows,
        settings,
        device=device,
        precision=precision,
        max_memory=max_memory,
        may_shrink_batch=True,
        begun=out,
        say=say,
    )
    try:
        generate(ready.load(), out, rows, ready.settings, progress=progress)
    except PartialFailure:
        draw_figure(plan, out)
        raise
    draw_figure(plan, out)
    return out / "figure.png"


def draw_figure(plan: FigurePlan, dataset: Path) -> None:
    """dataset/figure.png: for each sweep a row of middle slices in three views, with what was asked above each; black
    where the dataset has no brain."""
    from matplotlib.figure import Figure

    from brainldm.generate.dataset import image_name
    from brainldm.generate.plan import read_plan

    rows = read_plan(dataset / "plan.tsv")
    files = [dataset / image_name(row) for row in rows]
    images = [read_nifti(file).data_XYZ if file.is_file() else None for file in files]
    bright = np.concatenate([image[image > 0.04] for image in images if image is not None] or [np.ones(1)])
    white = float(np.percentile(bright, _WHITE_QUANTILE))
    across = max(len(values) for values in plan.rows.values())
    figure = Figure(figsize=(2.2 * across, 2.4 * len(VIEWS) * len(plan.rows)), facecolor="black", layout="constrained")
    axes = figure.subplots(len(plan.rows) * len(VIEWS), across, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    position = 0
    for line, (name, shares) in enumerate(plan.rows.items()):
        for column, share in enumerate(shares):
            value = rows[position].covariates.as_array()[COVARIATES.index(name)] / 1000
            image_XYZ = images[position]
            for number, view in enumerate(VIEWS):
                if image_XYZ is not None:
                    ax = axes[line * len(VIEWS) + number, column]
                    ax.imshow(middle_slice(image_XYZ, view), cmap="gray", vmin=0, vmax=white)
            top = axes[line * len(VIEWS), column]
            top.set_title(f"{_LABELS[name]} {value:.0f} ml\n({share:g} of the range)", color="white", fontsize=9)
            position += 1
    with atomic_path(dataset / "figure.png") as part:
        figure.savefig(part, dpi=110, format="png")
