"""Recipes: the paper's has the paper's values, and every one of them makes two networks that fit its grid."""

from __future__ import annotations

import pytest
import torch

from brainldm.base.volume import GRIDS
from brainldm.nets.atlas import build_autoencoder
from brainldm.nets.autoencoder import AutoencoderConfig
from brainldm.nets.unet import DiffusionUNet, UNetConfig
from brainldm.recipes import NAMES, recipe_named
from brainldm.train.diffusion_stage import schedule_description, unet_config

GRID_OF = {"quick": "4mm", "demo": "2mm", "small": "2mm", "fast": "paper", "paper": "paper"}


def test_the_papers_recipe_is_the_papers_system() -> None:
    """Architecture, schedule and target of the published bundle; weights and rates of the authors' sister projects."""
    recipe = recipe_named("paper")
    first, second = recipe.autoencoder, recipe.diffusion
    assert first.net == AutoencoderConfig() and unet_config(second, 3) == UNetConfig()
    assert first.net.latent_shape_CXYZ(GRIDS["paper"].shape_XYZ) == (3, 20, 28, 20)
    assert (first.perceptual_weight, first.adversarial_weight, first.kl_weight) == (0.002, 0.005, 1e-8)
    assert (first.learning_rate, first.discriminator_learning_rate, second.learning_rate) == (5e-5, 1e-4, 2.5e-5)
    assert first.local_histogram_weight == 0 and first.adversarial_from_step == 200_000  # epoch 5 of 40,000 scans
    assert (second.target, second.timestep_draw, second.timestep_shift) == ("eps", "uniform", 1.0)
    assert (second.latent_population, second.covariate_scaling, second.condition_dropout) == (False, "min_max", 0)
    alpha_bars = schedule_description(second).build().alpha_bars
    assert len(alpha_bars) == 1000 and alpha_bars[0] == pytest.approx(1 - 0.0015)
    assert alpha_bars[999] == pytest.approx(9.69e-5, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_networks_can_be_made_and_fit_its_grid(name: str) -> None:
    recipe, shape_XYZ = recipe_named(name), GRIDS[GRID_OF[name]].shape_XYZ
    assert recipe.name == name
    with torch.device("meta"):
        autoencoder = build_autoencoder(recipe.autoencoder.net)
        unet = DiffusionUNet(unet_config(recipe.diffusion, recipe.autoencoder.net.latent_channels))
    channels, *latent_XYZ = autoencoder.config.latent_shape_CXYZ(shape_XYZ)
    unet.config.check_latent(tuple(latent_XYZ))
    assert (unet.config.in_channels, unet.config.out_channels) == (channels + 4, channels)
