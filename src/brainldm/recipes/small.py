"""A model for a small study and a modest machine."""

from __future__ import annotations

from brainldm.nets.autoencoder import AutoencoderConfig
from brainldm.train.config import AutoencoderStageConfig, DiffusionStageConfig, Recipe


def small() -> Recipe:
    """A latent diffusion model of 2 mm images (80 x 112 x 80): latent 3 x 10 x 14 x 10, all loss terms on, the
    adversarial one from step 5000.

        brainldm train small --data PREPARED --out RUN --minutes 120

    With few scans it copies its training people; the report says so. Hours on a CPU for a usable model of a study.
    """
    return Recipe(
        name="small",
        autoencoder=AutoencoderStageConfig(
            net=AutoencoderConfig(channels=(32, 64, 96), res_blocks=1, norm_groups=16, latent_channels=3, fold=2),
            steps=20_000,
            batch=1,
            learning_rate=5e-4,
            warmup_steps=50,
            kl_weight=1e-7,
            perceptual_weight=0.002,
            adversarial_weight=0.005,
            adversarial_from_step=5_000,
            discriminator_channels=32,
        ),
        diffusion=DiffusionStageConfig(
            channels=(96, 192),
            attention=(False, True),
            head_channels=(0, 192),
            steps=40_000,
            batch=4,
            learning_rate=2e-4,
            warmup_steps=100,
            gradient_clip=1.0,
            ema_decay=0.999,
        ),
    )
