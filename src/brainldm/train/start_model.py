"""A trained model whose weights a run begins with, instead of random ones: one's own, the shipped one, anybody's.

Stage 1 begins with its autoencoder, stage 2 with its U-Net; where stage 1 is left out, stage 2 takes the autoencoder as
it is. What belongs to a cohort is made anew: covariate ranges, latents and their scale, the population's mean latent.
"""

from __future__ import annotations

from pathlib import Path

from brainldm.base.errors import UsageError
from brainldm.base.progress import warn
from brainldm.base.volume import Grid
from brainldm.model.description import LatentDiffusionDescription
from brainldm.model.folder import load_latent_diffusion
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.train.config import Recipe
from brainldm.train.diffusion_stage import schedule_description, unet_config


def start_model(folder: Path, recipe: Recipe, grid: Grid) -> LatentDiffusion:
    """The model in `folder`, float32, on the CPU. BadInput for a folder that holds none; UsageError where its networks
    are not those of `recipe` or mean something else, or its images are not on `grid`.

    Networks that learnt people from right to left, as the published ones did, are taken with a warning: half of their
    images were mirrored (Pinaya et al. 2022), so that hardly anything they know is of one side.
    """
    model = load_latent_diffusion(folder)
    theirs = model.description
    if theirs.grid.network_x != "left_to_right":
        warn(
            f"the networks of {theirs.name!r} learnt images that run from right to left; training shows them "
            "people from left to right. What they know of either side is learnt anew."
        )
    net = recipe.autoencoder.net
    ours = {"autoencoder": net, "U-Net": unet_config(recipe.diffusion, net.latent_channels)}
    of_model = {"autoencoder": theirs.autoencoder, "U-Net": theirs.unet}
    for name, config in ours.items():
        if config != of_model[name]:
            raise UsageError(
                f"the {name} of {theirs.name!r} is not that of recipe {recipe.name!r}: "
                f"{_differences(config, of_model[name])}.",
                remedy=_remedy(theirs, recipe),
                path=folder,
            )
    diffusion = recipe.diffusion
    means = {
        "target": (theirs.target, diffusion.target),
        "schedule": (theirs.schedule, schedule_description(diffusion)),
        "covariate_scaling": (theirs.covariates.scaling, diffusion.covariate_scaling),
        "latent_population": (theirs.latent.by_population, diffusion.latent_population),
    }
    for name, (there, here) in means.items():
        if there != here:
            raise UsageError(
                f"the U-Net of {theirs.name!r} learnt with {name} {there}, recipe {recipe.name!r} has {here}: its "
                "answers would be read as something else.",
                remedy=_remedy(theirs, recipe),
                path=folder,
            )
    scale, asked = theirs.latent.scale, diffusion.latent_scale
    # One that was measured there is about what is measured here; 1 is of latents as they are.
    if not theirs.latent.by_population and (scale == 1 if asked is None else scale != asked):
        raise UsageError(
            f"the U-Net of {theirs.name!r} learnt latents of scale {scale:g}, and recipe {recipe.name!r} "
            f"{'measures its own' if asked is None else f'takes {asked:g}'}: it would be shown other latents than it "
            "knows.",
            remedy=f"Add --set diffusion.latent_scale={scale:.17g}.",
            path=folder,
        )
    if model.grid.shape_XYZ != grid.shape_XYZ or model.grid.voxel_mm != grid.voxel_mm:
        raise UsageError(
            f"images of {theirs.name!r} have {model.grid.shape_XYZ} voxels of {model.grid.voxel_mm:g} mm, the cohort's "
            f"{grid.shape_XYZ} of {grid.voxel_mm:g} mm.",
            remedy="Prepare the study on the model's grid.",
            path=folder,
        )
    return model


def _differences(ours: object, theirs: object) -> str:
    if type(ours) is not type(theirs):
        return f"{type(theirs).__name__} there, {type(ours).__name__} in the recipe"
    there, here = vars(theirs), vars(ours)
    return "; ".join(f"{k}: {there[k]} there, {here[k]} in the recipe" for k in here if here[k] != there[k])


def _remedy(theirs: LatentDiffusionDescription, recipe: Recipe) -> str:
    trained = theirs.training.get("recipe")
    if trained and trained != recipe.name:
        return f"Train recipe {trained}, which the model was trained with."
    return "Choose the recipe that the model was trained with."
