"""A GAN baseline from a prepared cohort to a model folder: check, train, write.

RUN/run.json               what was asked, on which cohort
RUN/lsgan/ or RUN/vaegan/  log, previews and checkpoints of the training
RUN/model/                 what `brainldm generate` takes
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import brainldm
from brainldm.base.covariates import CovariateRanges
from brainldm.base.errors import UsageError
from brainldm.base.files import locked_folder
from brainldm.base.joint import CovariateModel
from brainldm.base.progress import Progress, Quiet
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset, check_trainable, warn_of_flagged
from brainldm.model.description import (
    CovariatesDescription,
    GanDescription,
    GanNetDescription,
    GridDescription,
)
from brainldm.model.folder import save_model
from brainldm.model.gan import GanModel
from brainldm.model.precision import choose_device, choose_precision
from brainldm.nets.gan import GanConfig
from brainldm.train.config import GanStageConfig
from brainldm.train.describe_model import quality_of
from brainldm.train.distributed import one_process_only
from brainldm.train.gan_stage import GanStage
from brainldm.train.loop import check_asked, run_stage
from brainldm.train.record import record_one_stage
from brainldm.train.run import TrainSummary
from brainldm.train.tensorboard import check_tensorboard


def train_gan(
    config: GanStageConfig,
    data: Path,
    out: Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    cache: Path | None = None,
    tensorboard: bool = False,
    progress: Progress = Quiet(),
) -> TrainSummary:
    """Trains the baseline `config` on the cohort `data` in `out`, going on from whatever is already there.

    `steps` and `seed` replace the config's. With `cache`, images are laid out uncompressed in that folder first.
    UsageError where the cohort cannot be trained on, or `out` holds another run; before the first step.
    """
    one_process_only("a GAN baseline")
    if tensorboard:
        check_tensorboard()
    check_asked(steps, minutes)
    config = config if steps is None else replace(config, steps=steps)
    config = config if seed is None else replace(config, seed=seed)
    cohort = PreparedCohort.open(data)
    people = VolumeDataset(cohort, "train")
    check_trainable(people, config.batch)
    warn_of_flagged(people)
    covariates = CovariatesDescription(
        ranges=CovariateRanges.fitted(people.covariates).to_json(),
        joint=CovariateModel.fitted(people.covariates).to_json(),
    )
    net = _net(config, cohort)
    where = choose_device(device)
    chosen = choose_precision(precision, where, trained_side=min(net.coarse_XYZ))
    with locked_folder(out):
        what = {"baseline": config.kind}
        record_one_stage(out, what, config, cohort, stage=config.kind, precision=chosen, device=where.type)
        condition_NF = covariates.conditions(people.covariates)
        if cache is not None:
            people.keep_uncompressed(cache, progress)
        stage = GanStage(config, net, people, condition_NF, seed=config.seed, device=where, precision=chosen)
        summary = run_stage(stage, out / stage.name, minutes=minutes, tensorboard=tensorboard, progress=progress)
        training: dict[str, Any] = {
            "baseline": config.kind,
            "seed": config.seed,
            "cohort": cohort.name,
            "split_by": dict(cohort.split_by),
            "training_images": len(people),
            config.kind: summary,
            "precision": chosen,
            "versions": {"brainldm": brainldm.__version__, "torch": torch.__version__},
        }
        description = GanDescription(
            kind=config.kind,
            name=f"{cohort.name}-{config.kind}",
            generator=GanNetDescription(
                channels=net.channels,
                noise_features=net.noise_features,
                covariates=net.covariates,
                norm_groups=net.norm_groups,
            ),
            covariates=covariates,
            grid=GridDescription.of(cohort.grid),
            preprocessing=dict(cohort.preprocessing),
            training=training,
            quality=quality_of(people),
            licence=cohort.licence,
            weights={},
        )
        save_model(out / "model", GanModel(description, stage.generator))
    return TrainSummary(out, out / "model", {config.kind: summary})


def _net(config: GanStageConfig, cohort: PreparedCohort) -> GanConfig:
    try:
        return GanConfig(
            cohort.grid.shape_XYZ,
            config.channels,
            config.noise_features,
            covariates=4 if config.conditioned else 0,
            norm_groups=config.norm_groups,
        )
    except ValueError as error:
        raise UsageError(f"{error}.", remedy="Choose another recipe or another grid.", path=cohort.folder) from error
