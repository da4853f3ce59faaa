"""A predictor of age or sex from a prepared cohort: train, judge on held-out people, write its folder.

RUN/run.json         what was asked, on which cohort
RUN/predictor/       log, previews and checkpoints of the training; predictor.json and the weights once it is done
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

import brainldm
from brainldm.base.errors import UsageError
from brainldm.base.files import locked_folder
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import stream
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset, check_trainable, warn_of_flagged
from brainldm.cohort.predictor import Predictor, Target, write_predictor
from brainldm.cohort.split import HELD_OUT
from brainldm.model.precision import choose_device, choose_precision
from brainldm.nets.cole import ColeConfig
from brainldm.train.config import PredictorConfig
from brainldm.train.distributed import one_process_only
from brainldm.train.loop import check_asked, run_stage
from brainldm.train.predictor_stage import PredictorStage
from brainldm.train.record import record_one_stage

TARGETS: dict[str, Target] = {"age": "age_years", "sex": "sex"}
_RESAMPLINGS = 2000


def train_predictor(
    what: str,
    data: Path,
    out: Path,
    *,
    config: PredictorConfig = PredictorConfig(),
    steps: int | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = Quiet(),
) -> Predictor:
    """Trains the predictor of `what` (age or sex) on the training people of the cohort `data`, and tells how well it
    does on everybody held out. Goes on where an interrupted run stopped; UsageError where `out` holds another run.
    `steps` and `seed` replace the config's."""
    target = TARGETS[what]
    one_process_only("a predictor")
    check_asked(steps, minutes)
    config = config if steps is None else replace(config, steps=steps)
    config = config if seed is None else replace(config, seed=seed)
    cohort = PreparedCohort.open(data)
    people, validation = VolumeDataset(cohort, "train"), VolumeDataset(cohort, "validation")
    config = replace(config, batch=min(config.batch, max(2, len(people) // 2)))
    check_trainable(people, config.batch)
    warn_of_flagged(people)
    _check_varied(people, target)
    where = choose_device(device)
    chosen = choose_precision(precision, where, trained_side=1)
    try:
        ColeConfig.fitting(cohort.grid.shape_XYZ, config.averaging)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"averaging over {config.averaging} voxels does not suit images of {cohort.grid.shape_XYZ}: {error}.",
            remedy="Choose a smaller --averaging, 1 or more.",
        ) from error
    with locked_folder(out):
        named = {"predictor": what}
        record_one_stage(out, named, config, cohort, stage="predictor", precision=chosen, device=where.type)
        stage = PredictorStage(
            target,
            config,
            people,
            validation,
            shape_XYZ=cohort.grid.shape_XYZ,
            seed=config.seed,
            device=where,
            precision=chosen,
        )
        summary = run_stage(stage, out / stage.name, minutes=minutes, progress=progress)
        predictor = Predictor(
            target,
            cohort.grid,
            stage.network.config.channels,
            stage.network.config.averaging,
            stage.offset,
            stage.scale,
            {
                "cohort": cohort.name,
                "split_by": dict(cohort.split_by),
                "training_images": len(people),
                "steps": summary["steps"],
                "seed": config.seed,
                "held_out": held_out_figures(stage, cohort, config.seed),
                "software": {"brainldm": brainldm.__version__, "torch": torch.__version__},
            },
            out / "predictor",
        )
        return write_predictor(out / "predictor", predictor, stage.network)


def _check_varied(people: VolumeDataset, target: Target) -> None:
    values = {getattr(row, target) for row in people.covariates}
    if len(values) < 2:
        raise UsageError(
            f"everybody in the training split has the same {target}: there is nothing to learn.",
            remedy="Prepare people who differ in it.",
            path=people.cohort.folder,
        )


def held_out_figures(stage: PredictorStage, cohort: PreparedCohort, seed: int) -> dict[str, Any]:
    """How well it does on the people it has not seen (validation and test), with 95 % bootstrap intervals over people:
    r and mean absolute error of age, or the area under the curve of sex. None where there are too few to say."""
    sets = [VolumeDataset(cohort, split) for split in HELD_OUT]
    known = np.array([getattr(row, stage.target) for people in sets for row in people.covariates], dtype=float)
    found = np.concatenate([stage.predictions(people) for people in sets])
    figures: dict[str, Any] = {"n": len(known), "seed": seed}
    measures = {"auc": _auc} if stage.target == "sex" else {"r": _r, "mae_years": _mae}
    draws = stream(seed, "predictor/held-out").integers(0, max(1, len(known)), (_RESAMPLINGS, len(known)))
    for name, measure in measures.items():
        values = [v for draw in draws if (v := measure(known[draw], found[draw])) is not None] if len(known) > 3 else []
        interval = np.percentile(values, [2.5, 97.5]).tolist() if len(values) > _RESAMPLINGS / 2 else None
        figures[name] = {"value": measure(known, found), "interval_95": interval}
    return figures


def _r(known: np.ndarray, found: np.ndarray) -> float | None:
    if len(known) < 3 or np.ptp(known) == 0 or np.ptp(found) == 0:
        return None
    return float(stats.pearsonr(known, found).statistic)


def _mae(known: np.ndarray, found: np.ndarray) -> float | None:
    return float(np.abs(known - found).mean()) if len(known) else None


def _auc(known: np.ndarray, found: np.ndarray) -> float | None:
    return float(roc_auc_score(known, found)) if np.unique(known).size == 2 else None
