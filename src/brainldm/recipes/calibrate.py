"""A model that shows what it is asked for: its answer is measured once, and taken into account from then on.

OUT/brains/            brains of the model's own joint distribution, as the model shows them untold of all this
OUT/measured/          what the instrument finds in them
OUT/model/             the model, its model.json saying how it answers (model/response)
OUT/calibration.json   the lines, and how well brains are expected to follow what is asked, before and after

The lines are only as true as the instrument that found them. They move the mean of what is shown, not its scatter: a
model that scatters widely does so afterwards as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import brainldm
from brainldm.base.covariates import VOLUMES, Covariates, volumes_array
from brainldm.base.errors import PartialFailure, UsageError
from brainldm.base.files import atomic_path, make_folder, write_json
from brainldm.base.progress import Progress, Quiet
from brainldm.base.tables import read_table
from brainldm.evaluate.conditioning import agreement
from brainldm.evaluate.instrument import check_instrument
from brainldm.evaluate.measuring import Instrument
from brainldm.generate.plan import PlanRow, make_plan
from brainldm.generate.run import GenerateSettings, generate
from brainldm.generate.start import start
from brainldm.model.description import LatentDiffusionDescription, ResponseDescription
from brainldm.model.folder import DESCRIPTION_NAME, find_model, read_description
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.response import LEAST_SLOPE, fitted_lines, own_slopes

FEWEST = 40  # brains: five numbers a line, and something to see of the scatter
_FOLDS = 10


@dataclass(frozen=True)
class Calibration:
    """`before` and `after` are agreements of asked and shown volumes, by name; those after are expected: each tenth of
    the brains is corrected by lines through the others."""

    response: ResponseDescription
    scatter_mm3: dict[str, float]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]

    def as_text(self) -> str:
        lines = [f"{self.response.brains} brains, measured by {self.response.instrument}:"]
        for name in VOLUMES:
            before, after = self.before[name], self.after[name]
            lines.append(
                f"{name}: slope {before['slope']['value']:.3f}, r {before['pearson_r']['value']:.3f}, "
                f"bias {before['bias']['value'] / 1e3:+.1f} ml; expected from now on: slope "
                f"{after['slope']['value']:.3f}, r {after['pearson_r']['value']:.3f}, bias "
                f"{after['bias']['value'] / 1e3:+.1f} ml (scatter {self.scatter_mm3[name] / 1e3:.1f} ml)"
            )
        return "\n".join(lines)


def calibrate(
    model: Path,
    out: Path,
    *,
    n: int = 200,
    seed: int = 1,
    instrument: Instrument | None = None,
    device: str = "auto",
    precision: str = "auto",
    workers: int = 1,
    progress: Progress = Quiet(),
    say: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Makes `n` brains of `model`, measures them and writes the calibrated model; goes on with what is there.

    A model that was calibrated before is calibrated anew, not further. UsageError for fewer than FEWEST brains, an
    `out` that holds the model itself or another one, a model that does not know its people's joint distribution, or one
    that hardly follows what it is asked.
    """
    if n < FEWEST:
        raise UsageError(f"{n} brains are too few for a calibration.", remedy=f"Ask for --n {FEWEST} or more.")
    description = read_description(model)
    if not isinstance(description, LatentDiffusionDescription) or description.covariates.joint_model() is None:
        raise UsageError(
            "this model does not know how covariates are distributed in its training people.",
            remedy="Calibrate a model that brainldm trained.",
            path=model,
        )
    covariates = description.covariates
    _check_place(description, out)
    make_folder(out)
    say(f"1/2 {n} brains")
    rows = make_plan({}, n=n, seed=seed, ranges=covariates.fitted_ranges(), joint=covariates.joint_model())
    ready = start(
        model,
        rows,
        GenerateSettings(seed=seed),
        device=device,
        precision=precision,
        may_shrink_batch=True,
        begun=out / "brains",
        say=say,
    )
    loaded = ready.load()
    assert isinstance(loaded, LatentDiffusion), "the description says so"
    loaded = replace(loaded, description=_with_response(description, None))
    generate(loaded, out / "brains", rows, ready.settings, progress=progress)
    say("2/2 measure them")
    try:
        name = check_instrument(
            out / "brains", out / "measured", instrument=instrument, workers=workers, progress=progress
        ).instrument
    except PartialFailure as failure:
        raise UsageError(
            "some of its brains cannot be measured, so the model is not fit to be calibrated.",
            remedy="Train it for longer; instrument.json says which and why.",
            path=failure.path,
        ) from failure
    asked, shown_N2 = _asked_and_shown(rows, out / "measured" / "measured.tsv")
    intercepts_2, slopes_24, scatter_2 = fitted_lines(asked, shown_N2)
    for volume, slope in own_slopes(slopes_24).items():
        if slope < LEAST_SLOPE:
            raise UsageError(
                f"asked for 10 ml more of {volume}, this model shows {10 * slope:.1f} ml more: too little to correct.",
                remedy="Train it for longer, or tell it volumes as decoded (docs/training.md).",
                path=model,
            )
    response = ResponseDescription.model_validate(
        {
            "intercepts_mm3": intercepts_2.tolist(),
            "slopes": slopes_24.tolist(),
            "brains": len(asked),
            "seed": seed,
            "instrument": name,
        }
    )
    asked_N2 = volumes_array(asked)
    found = Calibration(
        response,
        dict(zip(VOLUMES, scatter_2.tolist())),
        _agreements(asked_N2, shown_N2),
        _agreements(asked_N2, _expected(asked, asked_N2, shown_N2)),
    )
    _copy_calibrated(find_model(model), out / "model", _with_response(description, response))
    facts = {"software": {"brainldm": brainldm.__version__}, "response": response.model_dump(mode="json")}
    rest = {"scatter_mm3": found.scatter_mm3, "before": found.before, "after": found.after}
    write_json(out / "calibration.json", facts | rest)
    return found


def _check_place(description: LatentDiffusionDescription, out: Path) -> None:
    """UsageError where `out` holds a model that is no calibration of this one: it would be replaced."""
    if not (out / "model" / DESCRIPTION_NAME).is_file():
        return
    there = read_description(out / "model")
    if there.covariates.response is None or there.weights != description.weights:
        raise UsageError(
            "this folder holds a model that is no calibration of this one.",
            remedy="Give the calibration a folder of its own.",
            path=out,
        )


def _with_response(
    description: LatentDiffusionDescription, response: ResponseDescription | None
) -> LatentDiffusionDescription:
    covariates = description.covariates.model_copy(update={"response": response})
    return description.model_copy(update={"covariates": covariates})


def _copy_calibrated(model: Path, out: Path, description: LatentDiffusionDescription) -> None:
    """The weights as they are; model.json last, so that a folder with a model.json is whole."""
    for name in description.weights:
        with atomic_path(out / name) as part:
            shutil.copyfile(model / name, part)
    write_json(out / DESCRIPTION_NAME, description.model_dump(mode="json"))


def _asked_and_shown(rows: list[PlanRow], measured: Path) -> tuple[list[Covariates], np.ndarray]:
    """What was asked of each brain, and the volumes (N, 2) found in it."""
    table = read_table(measured)
    of = {
        cells["participant_id"]: [table.number(position, name) for name in VOLUMES]
        for position, cells in enumerate(table.rows)
    }
    return [row.covariates for row in rows], np.array([of[row.participant_id] for row in rows], dtype=np.float64)


def _expected(asked: list[Covariates], asked_N2: np.ndarray, shown_N2: np.ndarray) -> np.ndarray:
    """What such brains would show if each had been told by lines through the brains of the other folds: what was asked,
    and by how much it missed those lines."""
    expected_N2 = np.empty_like(shown_N2)
    for fold in range(_FOLDS):
        here = np.arange(len(asked)) % _FOLDS == fold
        intercepts_2, slopes_24, _ = fitted_lines(
            [row for row, in_it in zip(asked, here) if not in_it], shown_N2[~here]
        )
        values_N4 = np.array([row.as_array() for row, in_it in zip(asked, here) if in_it])
        expected_N2[here] = asked_N2[here] + shown_N2[here] - (intercepts_2 + values_N4 @ slopes_24.T)
    return expected_N2


def _agreements(asked_N2: np.ndarray, shown_N2: np.ndarray) -> dict[str, dict[str, Any]]:
    return {
        name: asdict(agreement(asked_N2[:, at].tolist(), shown_N2[:, at].tolist())) for at, name in enumerate(VOLUMES)
    }
