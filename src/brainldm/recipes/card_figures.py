"""The figures of a model's card as results.json keeps them: each with its count, interval, seed and target."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from brainldm.base.covariates import COVARIATES, VOLUMES
from brainldm.base.errors import BadInput, PartialFailure
from brainldm.base.pool import each_in_a_pool
from brainldm.base.progress import Progress
from brainldm.base.tables import read_table
from brainldm.cohort.dataset import PreparedRow
from brainldm.evaluate.conditioning import agreement
from brainldm.evaluate.estimate import Estimate, mean, share
from brainldm.evaluate.images import JudgedImage
from brainldm.evaluate.measuring import Instrument, measure_one
from brainldm.evaluate.scorecard import Scorecard
from brainldm.generate.dataset import image_name
from brainldm.generate.plan import read_plan
from brainldm.recipes.figures import figure_4, make_figure
from brainldm.recipes.reconstruction import FIGURES, PhantomStudy

Bounds = tuple[float | None, float | None]
# Of a share that must be whole: by its value alone, since the interval of a share always has room below 1.
ALL: Bounds = (1.0, None)
MET, UNCERTAIN, MISSED, NOT_JUDGED = "met", "uncertain", "missed", "not judged"
# Between what the figures should lie, by their key in results.json.
BOUNDS: Mapping[str, Bounds] = {
    "ventricles": (0.98, None),
    "ventricles.slope": (0.95, 1.05),
    "brain": (0.95, None),
    "age": (0.80, None),
    "extrapolation": ALL,
    "ms_ssim": (None, 0.01),
    "reconstruction": (32.0, None),
    "reconstruction.ssim": (0.95, None),
}
NOISES = 5  # of Figure 4: one brain a value could be monotone by luck


def figure(estimate: Estimate | None, seed: int, **more: Any) -> dict[str, Any]:
    """One figure as results.json keeps it."""
    found = estimate or Estimate.none("it was not found")
    interval = None if found.low is None or found.high is None else [found.low, found.high]
    content: dict[str, Any] = {"value": found.value, "n": found.n, "interval_95": interval, "seed": seed}
    return content | ({"reason": found.reason} if found.reason else {}) | more


def lies_within(value: float, bounds: Bounds) -> bool:
    """Between the bounds, ends included; None is no bound."""
    least, most = bounds
    return (least is None or value >= least) and (most is None or value <= most)


def sex_bounds(classifier_alone: float | None) -> Bounds:
    """No brain can be told better than the classifier tells held-out people."""
    return 0.9 if classifier_alone is None else min(0.9, classifier_alone), None


def targeted(found: Mapping[str, Any], bounds: Bounds, *, target: str = "", holds: bool = True) -> dict[str, Any]:
    """The figure with its target, its `verdict`, and whether its value at least meets the target; what else the target
    asks for either `holds` or not. "Uncertain" is met by the value and not by all of its interval."""
    value, ends = found["value"], () if bounds == ALL else found["interval_95"] or ()
    if value is None:
        verdict = NOT_JUDGED
    elif not holds or not lies_within(value, bounds):
        verdict = MISSED
    else:
        verdict = MET if all(lies_within(end, bounds) for end in ends) else UNCERTAIN
    return {**found, "target": target or _told(bounds), "met": verdict in (MET, UNCERTAIN), "verdict": verdict}


def _told(bounds: Bounds) -> str:
    least, most = bounds
    if least is not None and most is not None:
        return f"{least:g} to {most:g}"
    return f"at least {least:g}" if least is not None else f"at most {most:g}"


def judged_figures(card: Scorecard, seed: int) -> dict[str, Any]:
    """What the targets are about, from the scorecard's rows: value, target, and what can be reached at all.

    `alone` is the same for the held-out people: how the instrument repeats what was recorded of them, itself measured
    in their scans (instrument_figures tells how far that is from the truth), and what the predictor says of them.
    """
    volumes, slope = card.row("ventricles_mm3.pearson_r"), card.row("ventricles_mm3.slope")
    brain = card.row("brain_mm3.pearson_r")
    age, age_alone = _predicted(card, "age_years.pearson_r", "age")
    sex, sex_alone = _predicted(card, "sex.auc", "sex")
    alike = card.row("ms_ssim")
    found = {
        "ventricles": figure(
            volumes.synthetic,
            seed,
            figure="Pearson r of ventricular volume, asked and measured",
            paper=0.972,
            alone=figure(volumes.reference, seed),
            slope=targeted(
                figure(slope.synthetic, seed, alone=figure(slope.reference, seed)), BOUNDS["ventricles.slope"]
            ),
        ),
        "brain": figure(
            brain.synthetic,
            seed,
            figure="Pearson r of brain volume, asked and measured",
            paper=None,
            alone=figure(brain.reference, seed),
        ),
        "age": figure(
            age,
            seed,
            figure="Pearson r of age, asked and predicted",
            paper=0.692,
            alone=figure(age_alone, seed),
        ),
    }
    found["sex"] = targeted(
        figure(
            sex,
            seed,
            figure="area under the curve of sex, asked and classified",
            paper=None,
            alone=figure(sex_alone, seed),
        ),
        sex_bounds(sex_alone.value),
        target="at least 0.9, or the classifier's own on held-out phantoms",
    )
    apart = _without_sign(alike.difference)
    found["ms_ssim"] = figure(
        apart,
        seed,
        figure="distance of MS-SSIM between pairs of brains from that between pairs of held-out phantoms",
        paper={"1000 steps": 0.002, "DDIM": 0.017},
        synthetic=figure(alike.synthetic, seed),
        held_out=figure(alike.reference, seed),
    )
    found |= {name: targeted(found[name], BOUNDS[name]) for name in ("ventricles", "brain", "age", "ms_ssim")}
    copies = card.row("nearer_than_unseen")
    found["copies"] = figure(
        copies.synthetic,
        seed,
        figure="share of brains nearer to a training image than anybody held out",
        by_chance=figure(copies.reference, seed),
    )
    implausible = card.row("gate.rejected")
    found["gate"] = figure(
        implausible.synthetic,
        seed,
        figure="share of brains that the gate rejects as unlike the held-out phantoms",
        by_design=figure(implausible.reference, seed),
    )
    return found


def instrument_figures(people: Sequence[PreparedRow], study: PhantomStudy, seed: int) -> dict[str, Any]:
    """How the volumes recorded of phantoms follow those that they have, by volume: r, slope, and bias in mm^3."""
    table = read_table(study.folder / "participants.tsv")
    truth = {cells["participant_id"]: row for row, cells in enumerate(table.rows)}
    found = {}
    for name in VOLUMES:
        true_mm3 = [table.number(truth[row.participant_id], name) for row in people]
        agrees = agreement(true_mm3, [getattr(row.covariates, name) for row in people])
        found[name] = figure(
            agrees.pearson_r, seed, slope=figure(agrees.slope, seed), bias_mm3=figure(agrees.bias, seed)
        )
    return found


def _predicted(card: Scorecard, key: str, what: str) -> tuple[Estimate, Estimate]:
    """What a predictor found in the brains, and its own figure on held-out people."""
    try:
        row = card.row(key)
    except KeyError:
        untold = Estimate.none(f"no predictor of {what} was given")
        return untold, untold
    none = Estimate.none("it was not found")
    return row.synthetic or none, row.reference or none


def _without_sign(estimate: Estimate | None) -> Estimate:
    """The size of a difference, with the interval that its sign leaves."""
    if estimate is None or estimate.value is None:
        return estimate or Estimate.none("there is no difference")
    low, high = estimate.low, estimate.high
    if low is not None and high is not None:
        ends = sorted((abs(low), abs(high)))
        low, high = (0.0 if low <= 0 <= high else ends[0]), ends[1]
    return Estimate(abs(estimate.value), low, high, estimate.n, estimate.interval, estimate.reason)


def reconstruction_figures(records: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The means over people of reconstruction.FIGURES, with the targets."""
    means = {name: mean([float(record[name]) for record in records]) for name in FIGURES}
    found = figure(
        means["psnr_db"],
        seed,
        figure="PSNR in dB of the autoencoder's reconstruction against the phantom without noise",
        paper=None,
        ssim=targeted(figure(means["ssim"], seed), BOUNDS["reconstruction.ssim"]),
        in_head=figure(means["psnr_in_head_db"], seed),
        scan_itself=figure(means["psnr_of_the_scan_db"], seed),
        how="range 1, over the whole box; SSIM with a 3-D Gaussian kernel of 7 voxels and sigma 1.5",
    )
    return targeted(found, BOUNDS["reconstruction"])


def extrapolation_figures(
    model: Path, out: Path, instrument: Instrument, seed: int, workers: int, progress: Progress
) -> dict[str, Any]:
    """Figure 4 from NOISES noises: in how many the volume found grows with the volume asked, beyond what training
    covered."""
    images: list[JudgedImage] = []
    for number in range(NOISES):
        folder = out / f"noise-{number}"
        # What is empty beyond training is a finding too: it has no image, and so no volume.
        with contextlib.suppress(PartialFailure):
            make_figure(4, model, folder, seed=seed + number, progress=progress)
        for row in read_plan(folder / "plan.tsv"):
            images.append(JudgedImage(row.participant_id, folder / image_name(row), image_name(row)))
    values: dict[Path, Mapping[str, float]] = {}
    progress.start("measuring brains beyond training", len(images))
    with contextlib.closing(
        each_in_a_pool(partial(measure_one, instrument=instrument), images, workers=workers)
    ) as outcomes:
        for image, outcome in outcomes:
            # What is no brain any more cannot be measured; that is a finding, not a failure.
            if not isinstance(outcome, Exception):
                values[image.path] = outcome.values
            elif not isinstance(outcome, (BadInput, ValueError)):
                raise outcome
            progress.advance()
    noises: list[dict[str, Any]] = []
    marked = True
    for number in range(NOISES):
        folder = out / f"noise-{number}"
        table, rows = read_table(folder / "plan.tsv"), read_plan(folder / "plan.tsv")
        position, sweeps = 0, dict[str, Any]()
        for name, shares in figure_4().rows.items():
            some = range(position, position + len(shares))
            asked = [float(rows[i].covariates.as_array()[COVARIATES.index(name)]) for i in some]
            measured = [values.get(folder / image_name(rows[i]), {}).get(name) for i in some]
            marked = marked and all(name in table.rows[i]["extrapolated"].split(",") for i in some)
            sweeps[name] = {"asked_mm3": asked, "measured_mm3": measured, "monotone": is_monotone(asked, measured)}
            position += len(shares)
        noises.append({"seed": seed + number, **sweeps})
    shares_of = {name: share(sum(noise[name]["monotone"] for noise in noises), NOISES) for name in VOLUMES}
    found = figure(
        shares_of["ventricles_mm3"],
        seed,
        figure=f"share of {NOISES} noises in which measured ventricles grow with what was asked, beyond training",
        paper="shown for three values",
        marked=marked,
        brain=figure(shares_of["brain_mm3"], seed),
        noises=noises,
    )
    target = "all monotone, every brain marked as extrapolated"
    return targeted(found, BOUNDS["extrapolation"], target=target, holds=marked)


def is_monotone(asked: Sequence[float], measured: Sequence[float | None]) -> bool:
    """Whether more is found wherever more was asked; not where something could not be measured."""
    ordered = [found for _, found in sorted(zip(asked, measured), key=lambda pair: pair[0])]
    return all(a is not None and b is not None and a < b for a, b in itertools.pairwise(ordered))
