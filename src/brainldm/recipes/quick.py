"""The short training of `make demo-train`: minutes on two cores."""

from __future__ import annotations

from brainldm.nets.autoencoder import AutoencoderConfig
from brainldm.train.config import AutoencoderStageConfig, DiffusionStageConfig, Recipe


def quick() -> Recipe:
    """A small latent diffusion model of 4 mm images (40 x 56 x 40), trained in minutes on a laptop.

        brainldm train quick --data PREPARED --out RUN

    The same code as the paper's, narrower, with the first halving done by folding 2 x 2 x 2 voxels into channels.
    """
    return Recipe(
        name="quick",
        autoencoder=AutoencoderStageConfig(
            net=AutoencoderConfig(channels=(32, 64), res_blocks=1, norm_groups=8, latent_channels=4, fold=2),
            steps=1000,
            batch=2,
            learning_rate=1e-3,
            warmup_steps=20,
            cosine_decay=True,
            gradient_clip=1.0,
            kl_weight=1e-6,
            perceptual_weight=0.0,
            adversarial_weight=0.0,
        ),
        diffusion=DiffusionStageConfig(
            channels=(32, 64),
            attention=(False, True),
            head_channels=(0, 64),
            norm_groups=8,
            res_blocks=1,
            steps=1800,
            batch=4,
            learning_rate=1e-3,
            warmup_steps=50,
            cosine_decay=True,
            gradient_clip=1.0,
            ema_decay=0.995,
        ),
        checkpoint_minutes=1.0,
    )
