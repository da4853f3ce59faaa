"""A training run from a prepared cohort to a model folder: check, stage 1, latents, stage 2, model.

RUN/run.json                      the resolved recipe, the cohort and the versions
RUN/autoencoder/  RUN/diffusion/  log.jsonl, timing.jsonl, previews/, checkpoints/, summary.json
RUN/autoencoder/reconstruction.*  what the autoencoder loses of held-out people
RUN/cache/                        training images uncompressed, where they do not fit in memory; may be deleted
RUN/latents/                      the cohort encoded once, and what is measured in its reconstructions
RUN/model/                        what `brainldm generate` takes
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brainldm.base.errors import UsageError
from brainldm.base.files import locked_folder
from brainldm.base.progress import Progress, Quiet
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.model.precision import choose_device, choose_precision
from brainldm.train.checks import check_and_record, downsampling_of
from brainldm.train.config import STAGES, Recipe
from brainldm.train.distributed import together
from brainldm.train.first_stage import train_autoencoder
from brainldm.train.loop import EndsBetween, asked_to_end, check_asked
from brainldm.train.perceptual import PerceptualChoice
from brainldm.train.second_stage import train_diffusion
from brainldm.train.shared import Run, recorded_run
from brainldm.train.start_model import start_model
from brainldm.train.tensorboard import check_tensorboard


@dataclass(frozen=True)
class TrainSummary:
    """What a run has come to: its folder, its model's folder once there is one, and each stage's figures."""

    folder: Path
    model: Path | None
    stages: dict[str, dict[str, Any]]


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    stage: str = "all",
    steps: int | None = None,
    minutes: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    shard: bool = False,
    perceptual_weights: Sequence[Path] = (),
    cache: Path | None = None,
    tensorboard: bool = False,
    start_from: Path | None = None,
    progress: Progress = Quiet(),
) -> TrainSummary:
    """Trains `recipe` on the prepared cohort `data` in `out`, going on from whatever is already there.

    `stage` is `autoencoder`, `diffusion` or `all`; `steps` replaces the recipe's steps of the stages trained, and a
    stage that is left out keeps those recorded in `out`; `minutes` bounds the training time, divided between the stages
    as the recipe says. Started by torchrun, the processes share every batch, and with `shard` the weights as well.
    `perceptual_weights` are the files that the recipe's perceptual distance needs (train/perceptual), if any; `cache`
    is where training images that do not fit in memory lie uncompressed (default: OUT/cache). `start_from` is a model
    whose weights the stages begin with (train/start_model); with `stage` diffusion its autoencoder is used as it is.
    UsageError where the data cannot be trained on, the batch not be shared, or `out` holds another run; all of it
    before the first step.
    """
    if stage not in (*STAGES, "all"):
        raise UsageError(f"there is no stage {stage!r}.", remedy=f"Choose one of: {', '.join(STAGES)}, all.")
    stages = STAGES if stage == "all" else (stage,)
    check_asked(steps, minutes)
    cohort = PreparedCohort.open(data)
    where = choose_device(device)
    if tensorboard:
        check_tensorboard()
    with (
        asked_to_end() as asked,
        together(where) as place,
        locked_folder(out) if place.leads else contextlib.nullcontext(),
    ):
        recipe = _with_steps(recipe, stages, steps, out)
        # Before the start model is read, which is compared with the networks that this proves can be built.
        smallest_side = min(cohort.grid.shape_XYZ) // downsampling_of(recipe)
        run = Run(
            recipe=recipe,
            cohort=cohort,
            train=VolumeDataset(cohort, "train"),
            validation=VolumeDataset(cohort, "validation"),
            out=out,
            device=where,
            precision=choose_precision(precision, where, trained_side=smallest_side),
            start=None if start_from is None else start_model(start_from, recipe, cohort.grid),
            perceptual=_perceptual(recipe, perceptual_weights, cohort, out, needed="autoencoder" in stages),
            cache=cache,
            tensorboard=tensorboard,
            place=place,
            shard=shard,
            progress=EndsBetween(progress if place.leads else Quiet(), asked),
        )
        budget = dict.fromkeys(STAGES, minutes)
        if minutes is not None and stage == "all":
            budget = {name: minutes * share for name, share in recipe.minutes_share.items()}
        check_and_record(run, stages, budget["autoencoder"])
        summaries = {}
        if "autoencoder" in stages:
            summaries["autoencoder"] = train_autoencoder(run, budget["autoencoder"])
        if "diffusion" in stages:
            summaries["diffusion"] = train_diffusion(run, budget["diffusion"])
        place.wait()
    model = out / "model" if (out / "model" / "model.json").is_file() else None
    return TrainSummary(out, model, summaries)


def _with_steps(recipe: Recipe, stages: Sequence[str], steps: int | None, out: Path) -> Recipe:
    """The recipe with the `steps` asked for, if any, for the stages trained now; for the others with those recorded in
    `out`, where the recipe's own would take their place."""
    recorded = recorded_run(out).get("recipe", {})
    for name in STAGES:
        config = getattr(recipe, name)
        wanted = steps if name in stages else recorded.get(name, {}).get("steps")
        recipe = replace(recipe, **{name: replace(config, steps=wanted or config.steps)})
    return recipe


def _perceptual(
    recipe: Recipe, weights: Sequence[Path], cohort: PreparedCohort, out: Path, *, needed: bool
) -> PerceptualChoice:
    """The perceptual distance, its weights proven. Stage 2 alone does not need them: what is recorded stays."""
    config = recipe.autoencoder
    if needed and config.perceptual_weight > 0:
        return PerceptualChoice.of(config.perceptual, weights, cohort.grid.shape_XYZ)
    return PerceptualChoice(config.perceptual, sha256=tuple(recorded_run(out).get("perceptual_weights_sha256", ())))
