"""What a model folder says of the model that a recipe trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from brainldm.base.covariates import CovariateRanges, Covariates
from brainldm.base.joint import CovariateModel
from brainldm.base.volume import Grid
from brainldm.cohort.dataset import VolumeDataset
from brainldm.cohort.quality import UsualImages, figures_of
from brainldm.model.description import (
    CovariatesDescription,
    GridDescription,
    LatentDescription,
    LatentDiffusionDescription,
)
from brainldm.train.batches import evenly_spread
from brainldm.train.config import Recipe
from brainldm.train.diffusion_stage import schedule_description, unet_config

QUALITY_IMAGES = 300


def described(
    recipe: Recipe, name: str, grid: Grid, people: Sequence[Covariates], latent: LatentDescription, **known: Any
) -> LatentDiffusionDescription:
    """The description of `recipe`'s model of such people's images on `grid`, without weights. `known` are further
    fields of LatentDiffusionDescription: preprocessing, training, quality, licence, volume_reader."""
    diffusion = recipe.diffusion
    return LatentDiffusionDescription(
        name=name,
        autoencoder=recipe.autoencoder.net,
        unet=unet_config(diffusion, latent.shape_CXYZ[0]),
        schedule=schedule_description(diffusion),
        target=diffusion.target,
        latent=latent,
        covariates=CovariatesDescription(
            ranges=CovariateRanges.fitted(people).to_json(),
            joint=CovariateModel.fitted(people).to_json(),
            scaling=diffusion.covariate_scaling,
            dropout=diffusion.condition_dropout,
        ),
        grid=GridDescription.of(grid),
        weights={},
        **known,
    )


def quality_of(people: VolumeDataset) -> dict[str, Any] | None:
    """What training images look like in a few figures, from at most QUALITY_IMAGES of them; None where they are too
    few."""
    voxel_mm = people.cohort.grid.voxel_mm
    found = [figures_of(people.image_XYZ(index), voxel_mm) for index in evenly_spread(len(people), QUALITY_IMAGES)]
    population = UsualImages.fitted(figures for figures in found if figures is not None)
    return None if population is None else population.to_json()
