"""Drawings of a page as SVG, each once for light and once for dark paper. No drawing depends on colour alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from brainldm.report.results import Brain
from brainldm.report.words import Shown

# Beyond so many points the marks are drawn as pixels: an SVG of 100,000 circles opens in no browser.
MAX_VECTOR_POINTS = 2000


@dataclass(frozen=True)
class Paper:
    """Colours for one background; the data colours are Okabe and Ito's, told apart with any colour vision."""

    ink: str
    faint: str
    grid: str
    inside: str
    outside: str
    real: str


LIGHT = Paper("#1c2127", "#5b6570", "#dfe3e8", "#0072b2", "#d55e00", "#8a939c")
DARK = Paper("#e8eaed", "#a3adb8", "#333a42", "#56b4e9", "#e69f00", "#7d8791")


@dataclass(frozen=True)
class Drawing:
    """One drawing on both papers, as data URIs, with what it shows in words."""

    light: str
    dark: str
    words: str
    width: int
    height: int


@dataclass(frozen=True)
class Panel:
    """One scatter: (asked, measured) of the brains `inside` and `outside` the training range, and (recorded, measured)
    of people, `real`."""

    title: str
    unit: str
    inside: Sequence[tuple[float, float]]
    outside: Sequence[tuple[float, float]]
    real: Sequence[tuple[float, float]]
    real_are: str = "real people"


def scatter_panel(
    brains: Sequence[Brain], real: Sequence[tuple[float, float]], name: str, shown: Shown, real_are: str
) -> Panel | None:
    """The panel of one covariate; None where nothing was measured."""
    both = [brain for brain in brains if name in brain.asked and name in brain.measured]
    if not both:
        return None

    def points(beyond: bool) -> list[tuple[float, float]]:
        chosen = [brain for brain in both if (name in brain.extrapolated) is beyond]
        return [(brain.asked[name] * shown.factor, brain.measured[name] * shown.factor) for brain in chosen]

    return Panel(
        shown.title,
        shown.unit,
        points(False),
        points(True),
        [(x * shown.factor, y * shown.factor) for x, y in real],
        real_are,
    )


def draw_scatter(panel: Panel) -> Drawing:
    """Asked against measured, with the line on which all points of a perfect model lie."""
    count = len(panel.inside) + len(panel.outside)
    words = f"{panel.title}: asked against measured of {count} brains, in {panel.unit}"
    return _drawing(partial(_scatter, panel), 5.6, 5.3, words)


def _scatter(panel: Panel, axes: Axes, paper: Paper) -> None:
    everything = np.array([*panel.inside, *panel.outside, *panel.real])
    low, high = float(everything.min()), float(everything.max())
    room = 0.06 * max(high - low, 1e-9)
    limits = (low - room, high + room)
    axes.plot(limits, limits, color=paper.faint, linewidth=1, linestyle=(0, (5, 4)), label="asked = measured", zorder=1)
    for points, marker, edge, face, label, size in (
        (panel.real, "x", paper.real, paper.real, f"{panel.real_are}: recorded, measured", 26),
        (panel.inside, "o", paper.inside, paper.inside, "synthetic brains", 40),
        (panel.outside, "D", paper.outside, "none", "outside the training range", 36),
    ):
        if points:
            axes.plot(
                *np.array(points).T,
                linestyle="none",
                marker=marker,
                markersize=size**0.5,
                markeredgecolor=edge,
                markerfacecolor=face,
                markeredgewidth=1.3,
                alpha=0.85,
                label=label,
                rasterized=len(everything) > MAX_VECTOR_POINTS,
                zorder=2,
            )
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set_xlabel(f"asked for ({panel.unit})", color=paper.ink)
    axes.set_ylabel(f"measured in the image ({panel.unit})", color=paper.ink)
    axes.set_title(panel.title, color=paper.ink, loc="left", fontsize=12, fontweight="bold")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=paper.ink, loc="upper left")
    _plain(axes, paper)


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[Drawing]:
    """Loss against step, a drawing a stage."""
    stages = {name: curve for name, curve in curves.items() if len(curve.get("step", ())) > 1 and "loss" in curve}
    return [
        _drawing(partial(_curve, name, curve), 5.6, 3.4, f"{name}: loss over {int(curve['step'][-1] or 0)} steps")
        for name, curve in stages.items()
    ]


def _curve(name: str, curve: Mapping[str, Sequence[float | None]], axes: Axes, paper: Paper) -> None:
    steps, loss = (np.array(curve[key], dtype=float) for key in ("step", "loss"))  # None becomes NaN: a gap
    axes.plot(steps, loss, color=paper.inside, linewidth=1.4)
    if np.nanmin(loss) > 0 and np.nanmax(loss) / np.nanmin(loss) > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(name, color=paper.ink, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("step", color=paper.ink)
    axes.set_ylabel("loss", color=paper.ink)
    _plain(axes, paper)


def _plain(axes: Axes, paper: Paper) -> None:
    axes.patch.set_alpha(0)
    axes.grid(color=paper.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=paper.faint, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(paper.grid)


def _drawing(draw: Callable[[Axes, Paper], None], width_inches: float, height_inches: float, words: str) -> Drawing:
    uris = []
    for paper in (LIGHT, DARK):
        figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure.subplots(), paper)
        buffer = io.BytesIO()
        # A fixed salt and no date: the same results give the same page.
        with matplotlib.rc_context({"svg.hashsalt": "brainldm", "font.family": "DejaVu Sans"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        uris.append("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"))
    light, dark = uris
    return Drawing(light, dark, words, round(width_inches * 100), round(height_inches * 100))
