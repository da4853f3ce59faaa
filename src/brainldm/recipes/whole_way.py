"""The whole way in one call: what `brainldm demo` (and `make demo`, `make demo-train`) runs.

`run_demo` uses the model that comes with the package, `run_demo_training` trains a small one first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from brainldm.base.covariates import COVARIATES, CovariateRanges
from brainldm.base.errors import BadInput
from brainldm.base.files import make_folder
from brainldm.base.progress import Progress, Quiet
from brainldm.base.shipped import shipped_folder

if TYPE_CHECKING:
    from brainldm.generate.plan import Sweep

_REAL_PEOPLE_MEASURED = 24  # enough for the instrument's own row; measuring is what takes the time
# The fewest that every figure can be told of (the gate asks for most). At 2 mm a phantom takes 3 s of one core to paint
# and a brain 2 s to measure: that is most of the demo's time.
_REFERENCE_PEOPLE = 20
_REFERENCE_SEED = 7_000_000  # added to the demo's seed: none of them is a person that a shipped model was trained on
_PAIRS = 200

_CLOSING = """
Done in {minutes:.1f} minutes. What was made, in {out}:
  brains/     {brains} brains of nobody over a sweep of age and ventricular volume (BIDS derivative)
  phantoms/   {people} phantoms to compare with, whom the model has not seen
  report/     their evaluation

Look at {page}
Make more: brainldm generate demo OUT --n 8 --age 70 --sex F --ventricles 40ml
"""

_CLOSING_OF_TRAINING = """
Done in {minutes:.1f} minutes. What was made, in {out}:
  phantoms/   {people} made-up people with known anatomy (BIDS)
  cohort/     the same, registered to one grid, with covariates and a split
  run/        the trained autoencoder and diffusion model (run/model is what one shares)
  brains/     {brains} brains of nobody over a sweep of age and ventricular volume (BIDS derivative)
  report/     their evaluation

Look at {page}
Make more: brainldm generate {run} OUT --n 8 --age 70 --sex F --ventricles 40ml
"""


def demo_sweeps(ranges: CovariateRanges, *, ages: int = 4, ventricles: int = 4) -> dict[str, Sweep]:
    """So many ages by so many ventricular volumes, well inside the training ranges."""
    from brainldm.generate.plan import Sweep

    def inner(name: str, count: int) -> Sweep:
        position = COVARIATES.index(name)
        low, high = ranges.low[position], ranges.high[position]
        return Sweep(low + 0.1 * (high - low), high - 0.1 * (high - low), count)

    return {"age_years": inner("age_years", ages), "ventricles_mm3": inner("ventricles_mm3", ventricles)}


def run_demo(
    out: Path,
    *,
    people: int = _REFERENCE_PEOPLE,
    seed: int = 0,
    workers: int = 2,
    progress: Progress = Quiet(),
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """24 brains by the shipped model, phantoms made on the spot to compare with, evaluation and page below `out`, in
    three minutes on two cores; returns the page's path.

    An interrupted demo goes on where it stopped. BadInput where the package has no shipped model.
    """
    from brainldm.cohort.phantom import write_phantom_study
    from brainldm.evaluate.scorecard import evaluate_dataset
    from brainldm.generate.plan import make_plan
    from brainldm.generate.run import GenerateSettings, generate
    from brainldm.generate.start import start
    from brainldm.model.folder import read_description
    from brainldm.report import write_report

    begun = time.monotonic()
    try:
        folder = shipped_folder("demo")
    except BadInput as error:
        raise BadInput(
            error.message,
            remedy="Train a small one instead, in minutes: `brainldm demo OUT --train`.",
            path=error.path,
            reason=error.reason,
        ) from error
    make_folder(out)
    description = read_description(folder)
    covariates = description.covariates
    ranges = covariates.fitted_ranges()
    sweeps = demo_sweeps(ranges, ages=4, ventricles=6)
    rows = make_plan(sweeps, n=None, seed=seed, ranges=ranges, joint=covariates.joint_model())
    say(f"1/4 {len(rows)} brains by the model that comes with brainldm")
    ready = start(folder, rows, GenerateSettings(seed=seed), may_shrink_batch=True, begun=out / "brains", say=say)
    generate(ready.load(), out / "brains", rows, ready.settings, progress=progress)
    say(f"2/4 {people} phantoms to compare with")
    write_phantom_study(
        out / "phantoms",
        n=people,
        grid=description.grid.build(),
        seed=_REFERENCE_SEED + seed,
        workers=workers,
        progress=progress,
    )
    say("3/4 evaluate the brains")
    scorecard = evaluate_dataset(
        out / "brains",
        out / "phantoms",
        out / "report",
        pairs=_PAIRS,
        seed=seed,
        workers=workers,
        progress=progress,
    )
    say(scorecard.as_text())
    say("4/4 write the page")
    page = write_report(out / "report")
    spent = (time.monotonic() - begun) / 60
    say(_CLOSING.format(minutes=spent, out=out, brains=len(rows), people=people, page=page))
    return page


def run_demo_training(
    out: Path,
    *,
    people: int = 64,
    seed: int = 0,
    minutes: float = 6.5,
    workers: int = 2,
    progress: Progress = Quiet(),
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Phantoms, cohort, both trainings, 16 brains, evaluation and page below `out`; returns the page's path.

    Each part is the command of that name with its own files, so a demo that was interrupted goes on where it stopped.
    """
    from brainldm.base.volume import grid_named
    from brainldm.cohort.phantom import write_phantom_study
    from brainldm.cohort.prepare import PrepareConfig, prepare_study
    from brainldm.evaluate.scorecard import evaluate_dataset
    from brainldm.generate.plan import make_plan
    from brainldm.generate.run import GenerateSettings, generate
    from brainldm.generate.start import start
    from brainldm.model.folder import read_description
    from brainldm.recipes.quick import quick
    from brainldm.report import write_report
    from brainldm.train.run import train

    begun = time.monotonic()
    make_folder(out)
    grid = "4mm"
    say(f"1/6 a population of {people} phantoms")
    write_phantom_study(
        out / "phantoms", n=people, grid=grid_named(grid), seed=seed, workers=workers, progress=progress
    )
    say("2/6 prepare it as a cohort")
    prepare_study(out / "phantoms", out / "cohort", PrepareConfig(grid=grid), workers=workers, progress=progress)
    say("3/6 train the autoencoder, then the diffusion model")
    train(replace(quick(), seed=seed), out / "cohort", out / "run", minutes=minutes, progress=progress)
    say("4/6 generate brains")
    covariates = read_description(out / "run").covariates
    ranges = covariates.fitted_ranges()
    rows = make_plan(demo_sweeps(ranges), n=None, seed=seed, ranges=ranges, joint=covariates.joint_model())
    ready = start(out / "run", rows, GenerateSettings(seed=seed), may_shrink_batch=True, begun=out / "brains", say=say)
    generate(ready.load(), out / "brains", rows, ready.settings, progress=progress)
    say("5/6 evaluate them")
    scorecard = evaluate_dataset(
        out / "brains",
        out / "cohort",
        out / "report",
        runs=out / "run",
        max_real=_REAL_PEOPLE_MEASURED,
        workers=workers,
        progress=progress,
    )
    say(scorecard.as_text())
    say("6/6 write the page")
    page = write_report(out / "report")
    spent = (time.monotonic() - begun) / 60
    say(
        _CLOSING_OF_TRAINING.format(minutes=spent, out=out, people=people, brains=len(rows), page=page, run=out / "run")
    )
    return page
