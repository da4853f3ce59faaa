"""What a run is refused for, or warned of, before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from brainldm.base.covariates import CovariateRanges
from brainldm.base.errors import UsageError
from brainldm.base.files import read_json
from brainldm.base.progress import warn
from brainldm.cohort.dataset import check_trainable, warn_of_flagged
from brainldm.diffusion.solvers import DEFAULT_SAMPLER, SAMPLERS
from brainldm.model.latent_population import FEWEST_FOR_A_POPULATION
from brainldm.nets.atlas import AtlasAutoencoderConfig
from brainldm.train.config import STAGES, Recipe
from brainldm.train.diffusion_stage import schedule_description, unet_config
from brainldm.train.distributed import check_divides
from brainldm.train.record import record_run
from brainldm.train.shared import Run, recorded_run


def check_and_record(run: Run, stages: tuple[str, ...], autoencoder_minutes: float | None) -> None:
    """Refuses what cannot be trained, then records the run, or compares it with the one recorded here."""
    if stages == STAGES:
        _check_that_stage_2_may_go_on(run, autoencoder_minutes)
    if run.shard and run.place.alone:
        raise UsageError(
            "there is nothing to shard in one process.", remedy="Start several: torchrun --nproc-per-node N ..."
        )
    check_trainable(run.train, run.recipe.autoencoder.batch)
    downsampling = downsampling_of(run.recipe)
    if any(n % downsampling for n in run.cohort.grid.shape_XYZ):
        raise UsageError(
            f"the grid {run.cohort.grid.shape_XYZ} is not divisible by {downsampling}, what the autoencoder "
            f"and the U-Net of recipe {run.recipe.name!r} divide it by together.",
            remedy="Choose another recipe or another grid.",
        )
    net = run.recipe.autoencoder.net
    if isinstance(net, AtlasAutoencoderConfig) and net.grid_XYZ != run.cohort.grid.shape_XYZ:
        raise UsageError(
            f"recipe {run.recipe.name!r} is for images of {net.grid_XYZ} voxels, and the cohort's have "
            f"{run.cohort.grid.shape_XYZ}.",
            remedy="Prepare the study on that grid, or choose another recipe.",
        )
    if run.recipe.diffusion.latent_population and len(run.train) < FEWEST_FOR_A_POPULATION:
        raise UsageError(
            f"{len(run.train)} people to train on do not show how latents follow the covariates; recipe "
            f"{run.recipe.name!r} needs {FEWEST_FOR_A_POPULATION}.",
            remedy="Prepare more people, or choose a recipe without latent_population.",
        )
    batches = {
        "autoencoder": run.recipe.autoencoder.batch,
        "diffusion": min(run.recipe.diffusion.batch, len(run.train) * run.recipe.diffusion.latent_views),
    }
    for name in stages:
        check_divides(run.place, name, batches[name])
    CovariateRanges.fitted(run.train.covariates)  # refuses what all people share
    description = {
        "recipe": asdict(run.recipe),
        "cohort": {"name": run.cohort.name, "digest": run.cohort.digest, "training_images": len(run.train)},
        "perceptual_weights_sha256": run.perceptual.sha256,
        "precision": run.precision,
        "device": run.device.type,
        "started_from": run.start_facts,
    }
    run.place.check_same(description, "recipes, cohorts or precisions")
    if run.place.leads:
        recorded = recorded_run(run.out).get("recipe", {})
        record_run(run.out, description, {name: getattr(run.recipe, name).steps for name in stages})
        _warn_of_learning_rates_that_rise(run, stages, recorded)
        _warn_of_an_adversary_too_late(run.recipe, stages)
        warn_of_flagged(run.train)
    run.place.wait()


def _check_that_stage_2_may_go_on(run: Run, minutes: float | None) -> None:
    """UsageError where stage 1 would be trained further under a stage 2 that has learnt its latents."""
    path = run.out / "autoencoder" / "summary.json"
    if not path.is_file() or not list(run.out.glob("diffusion/checkpoints/*.safetensors")):
        return
    ended = read_json(path)
    in_time = minutes is None or ended["seconds"] < minutes * 60
    if ended["steps"] < run.recipe.autoencoder.steps and in_time:
        raise UsageError(
            f"stage 1 ended after {ended['steps']} steps and would go on, and stage 2 has learnt the latents that "
            "it made.",
            remedy="For a longer stage 2: --stage diffusion. For both longer: delete RUN/diffusion first.",
            path=run.out,
        )


def _warn_of_learning_rates_that_rise(run: Run, stages: Sequence[str], recorded: Mapping[str, Any]) -> None:
    """Where a run that goes on is made longer than its learning rate was falling over."""
    for name in stages:
        config, before = getattr(run.recipe, name), recorded.get(name, {}).get("steps", math.inf)
        if config.cosine_decay and config.steps > before and (run.out / name / "checkpoints").is_dir():
            warn(
                f"the {name}'s learning rate was falling over {before} steps. Over {config.steps} it is "
                "higher again from here on, and the loss rises at first."
            )


def _warn_of_an_adversary_too_late(recipe: Recipe, stages: Sequence[str]) -> None:
    config = recipe.autoencoder
    if "autoencoder" in stages and not config.reaches_adversarial(config.steps):
        warn(
            f"the adversarial loss of recipe {recipe.name!r} begins at step {config.adversarial_from_step}, "
            f"and stage 1 ends after {config.steps}: it is never trained. For a quarter of the steps without it, in a "
            f"new folder: --set autoencoder.adversarial_from_step={config.steps // 4}."
        )


def downsampling_of(recipe: Recipe) -> int:
    """How many voxels along an image's edge become one of the U-Net's coarsest map. UsageError where no such U-Net or
    noise schedule can be built, or the schedule has fewer steps than a brain takes."""
    try:
        unet = unet_config(recipe.diffusion, recipe.autoencoder.net.latent_channels)
        sampler = SAMPLERS[DEFAULT_SAMPLER]
        sampler.timesteps(schedule_description(recipe.diffusion).build(), sampler.default_steps)
    except ValueError as error:
        raise UsageError(
            f"no stage 2 can be made of recipe {recipe.name!r}: {error}.",
            remedy="Change it: --set diffusion.NAME=VALUE.",
        ) from error
    return recipe.autoencoder.net.downsampling * unet.downsampling
