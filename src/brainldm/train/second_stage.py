"""Stage 2 of a run: the cohort becomes latents, the U-Net learns them, and the model is put together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import brainldm
from brainldm.base.covariates import Covariates
from brainldm.base.progress import warn
from brainldm.cohort.dataset import PreparedCohort
from brainldm.model.description import LatentDescription, LatentDiffusionDescription
from brainldm.model.folder import save_model
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.latent_population import LatentPopulation
from brainldm.model.memory import SLAB_BYTES
from brainldm.model.precision import autocast
from brainldm.model.volume_reader import LEAST_EXPLAINED, VolumeReader
from brainldm.nets.atlas import AnyAutoencoder
from brainldm.nets.slabs import decode_in_slabs
from brainldm.train.checkpoint import check_made_for, newest_facts
from brainldm.train.config import AutoencoderStageConfig
from brainldm.train.describe_model import described, quality_of
from brainldm.train.diffusion_stage import DiffusionStage
from brainldm.train.first_stage import trained_autoencoder
from brainldm.train.kept_volumes import kept_volumes
from brainldm.train.latents import Latents, distributions, encode_cohort
from brainldm.train.shared import Run
from brainldm.train.volume_reading import find_volume_reader


def train_diffusion(run: Run, minutes: float | None) -> dict[str, Any]:
    """RUN/latents, RUN/diffusion and RUN/model: trained to its end or for so long; the summary of the U-Net.

    UsageError, before anybody is encoded, where the U-Net that is there has learnt other latents.
    """
    config = run.recipe.diffusion
    autoencoder, autoencoder_summary = trained_autoencoder(run)
    key = _latents_key(autoencoder, run.cohort)
    made_for, folder = {"latents": key}, run.out / "diffusion"
    check_made_for(folder, made_for, newest_facts(folder))
    latents = encode_cohort(
        run.out / "latents",
        autoencoder,
        run.train,
        key,
        views=config.latent_views,
        augmentation=config.augmentation,
        seed=run.recipe.seed,
        device=run.device,
        precision=run.precision,
        place=run.place,
        progress=run.progress,
    )
    scale = 1.0 / latents.std if config.latent_scale is None else config.latent_scale
    people = _covariates_of(run, latents, autoencoder, key)
    description = _description(run, latents, scale, {})
    condition_NF = description.covariates.conditions(people)
    population = None
    if config.latent_population:
        told_NF = torch.from_numpy(condition_NF)
        fitted = LatentPopulation.fitted(distributions(latents.kept), told_NF) if run.place.leads else None
        population = run.place.from_leader(fitted)
    stage = DiffusionStage(
        config,
        latents,
        scale,
        population,
        condition_NF,
        run.train.names * config.latent_views,
        seed=run.recipe.seed,
        device=run.device,
        precision=run.precision,
        place=run.place,
        sharded=run.shard,
        start=None if run.start is None else run.start.unet,
    )
    stage.facts = made_for
    here = None if population is None else LatentPopulation.from_tensors(population.tensors(), run.device)
    stage.sample_preview = LatentDiffusion(description, autoencoder, stage.unet, slab_bytes=SLAB_BYTES, population=here)
    summary = run.run_stage(stage, minutes)
    unet = stage.trained_unet()
    if not run.place.leads:
        return summary
    reader, reader_facts = _volume_reader(run, latents, autoencoder, people, key)
    model = LatentDiffusion(
        _description(run, latents, scale, _training_facts(run, autoencoder_summary, summary, reader_facts), reader),
        autoencoder,
        unet,
        population=population,
        volume_reader=reader,
    )
    save_model(run.out / "model", model)
    return summary


def _covariates_of(run: Run, latents: Latents, autoencoder: AnyAutoencoder, key: str) -> list[Covariates]:
    """What the U-Net is told of each latent: the recorded covariates, changed as an augmentation changed the image
    and, where the recipe asks, as decoding changes it."""
    people, config = run.train.covariates, run.recipe.diffusion
    if config.volumes_as_decoded:
        decoded_XYZ = _decoder(run, latents, autoencoder)
        with run.place.leader_first():
            kept = kept_volumes(run.out / "latents", run.train, decoded_XYZ, key, progress=run.progress)
        people = [
            replace(row, ventricles_mm3=row.ventricles_mm3 * ventricles, brain_mm3=row.brain_mm3 * brain)
            for row, (ventricles, brain) in zip(people, kept.shares_NV.tolist())
        ]
    return [
        replace(row, ventricles_mm3=row.ventricles_mm3 * factor)
        for row, factor in zip(people * config.latent_views, latents.ventricle_factor_N.tolist())
    ]


def _decoder(run: Run, latents: Latents, autoencoder: AnyAutoencoder) -> Callable[[int], np.ndarray]:
    """What the autoencoder makes of the latent of that number: (X, Y, Z), float32."""

    def decoded_XYZ(index: int) -> np.ndarray:
        with torch.no_grad(), autocast(run.device, run.precision):
            latent_BCXYZ = latents.mean_BCXYZ([index]).to(run.device)
            image_BCXYZ = decode_in_slabs(autoencoder, latent_BCXYZ, SLAB_BYTES)
        return image_BCXYZ[0, 0].float().cpu().numpy()

    return decoded_XYZ


def _volume_reader(
    run: Run, latents: Latents, autoencoder: AnyAutoencoder, told: list[Covariates], key: str
) -> tuple[VolumeReader | None, dict[str, Any] | None]:
    """The reader that the recipe asks for, and how well it reads; of the images as they are, without views."""
    if not run.recipe.diffusion.volume_reader:
        return None, None
    people, voxel_mm = told[: len(run.train)], run.cohort.grid.voxel_mm
    reader, facts = find_volume_reader(
        run.out / "latents",
        latents.mean_BCXYZ,
        people,
        _decoder(run, latents, autoencoder),
        voxel_mm,
        key,
        progress=run.progress,
    )
    if reader is None:
        explained = ", ".join(f"{100 * share:.1f} % of {name}" for name, share in facts["explained"].items())
        warn(
            f"volumes cannot be read in reconstructions of {facts['people']} people ({explained} is "
            "explained; it takes "
            f"{100 * LEAST_EXPLAINED:.0f} %), so the model does not correct them. More people would help, or more "
            "steps of stage 1."
        )
    return reader, facts


def _training_facts(
    run: Run, autoencoder: dict[str, Any], diffusion: dict[str, Any], reader: dict[str, Any] | None
) -> dict[str, Any]:
    """What model.json says of the training, with the summaries of both stages and how well volumes are read."""
    config = run.recipe.autoencoder
    return {
        "recipe": run.recipe.name,
        "settings": list(run.recipe.settings),
        "seed": run.recipe.seed,
        "cohort": run.cohort.name,
        "split_by": dict(run.cohort.split_by),
        "training_images": len(run.train),
        "validation_images": len(run.validation),
        "perceptual": config.perceptual if config.perceptual_weight > 0 else "none",
        "perceptual_weights_sha256": list(run.perceptual.sha256),
        "volumes": "as decoded" if run.recipe.diffusion.volumes_as_decoded else "as recorded",
        "volume_reader": reader,
        "adversarial": _adversarial(config, autoencoder),
        "autoencoder": autoencoder,
        "diffusion": diffusion,
        "started_from": run.start_facts,
        "precision": run.precision,
        "versions": {"brainldm": brainldm.__version__, "torch": torch.__version__},
    }


def _adversarial(config: AutoencoderStageConfig, summary: dict[str, Any]) -> str:
    """Whether an adversarial loss trained the autoencoder: a shorter stage 1 may have ended before it."""
    if "steps" not in summary:
        return "as in the model that it was taken from"
    if config.adversarial_weight == 0:
        return "none"
    began = f"from step {config.adversarial_from_step}"
    return began if config.reaches_adversarial(summary["steps"]) else f"{began}, never reached"


def _description(
    run: Run, latents: Latents, scale: float, training: dict[str, Any], reader: VolumeReader | None = None
) -> LatentDiffusionDescription:
    c, x, y, z = latents.shape_CXYZ
    latent = LatentDescription(
        shape_CXYZ=(c, x, y, z),
        scale=scale,
        channel_mean=latents.channel_mean,
        channel_std=latents.channel_std,
        by_population=run.recipe.diffusion.latent_population,
    )
    return described(
        run.recipe,
        f"{run.cohort.name}-{run.recipe.name}",
        run.cohort.grid,
        run.train.covariates,
        latent,
        preprocessing=dict(run.cohort.preprocessing),
        training=training,
        quality=quality_of(run.train) if training else None,
        licence=run.cohort.licence,
        volume_reader=None if reader is None else reader.description(),
    )


def _latents_key(autoencoder: AnyAutoencoder, cohort: PreparedCohort) -> str:
    digest = hashlib.sha256(cohort.digest.encode())
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
