"""The model that comes with the package."""

from __future__ import annotations

from brainldm.nets.atlas import AtlasAutoencoderConfig
from brainldm.train.config import Augmentation, AutoencoderStageConfig, DiffusionStageConfig, Recipe


def demo() -> Recipe:
    """A latent diffusion model of 2 mm images (80 x 112 x 80) that trains on two cores: latent 4 x 20 x 28 x 20.

        brainldm phantom PHANTOMS --n 1000 --grid 2mm --seed 1 --workers 2
        brainldm prepare PHANTOMS COHORT --grid 2mm --workers 2
        brainldm train demo --data COHORT --out RUN

    That made the shipped model; its card says how long it took and what it scores. The autoencoder moves and mixes
    atlases (nets/atlas), and no convolution of it runs at full resolution; the U-Net folds 2 x 2 x 2 of the latent's
    voxels into channels, and begins at the population's mean latent for the given covariates. Its widths are what fits
    a package of 25 MB. Volumes are read in each image and corrected (model/volume_reader), which takes 20 people or
    more. Images are flipped, which is right for phantoms alone: their template is symmetric.
    """
    flips = Augmentation(flip_probability=0.5)
    return Recipe(
        name="demo",
        autoencoder=AutoencoderStageConfig(
            net=AtlasAutoencoderConfig(
                grid_XYZ=(80, 112, 80),
                cell=4,
                latent_channels=4,
                channels=32,
                res_blocks=1,
                norm_groups=8,
                atlases=4,
                passes=4,
            ),
            steps=3000,
            batch=2,
            learning_rate=2e-3,
            warmup_steps=50,
            cosine_decay=True,
            gradient_clip=1.0,
            kl_weight=1e-8,
            initial_log_variance=-5.0,
            perceptual_weight=0.0,
            local_histogram_weight=1.0,
            adversarial_weight=0.0,
            augmentation=flips,
        ),
        diffusion=DiffusionStageConfig(
            channels=(64, 112),
            attention=(False, True),
            head_channels=(0, 56),
            norm_groups=16,
            res_blocks=1,
            steps=5000,
            batch=6,
            learning_rate=1e-3,
            warmup_steps=100,
            cosine_decay=True,
            gradient_clip=1.0,
            ema_decay=0.998,
            target="v",
            schedule="rectified",
            timestep_shift=2.0,
            latent_population=True,
            volumes_as_decoded=True,
            volume_reader=True,
            latent_views=2,
            augmentation=Augmentation(flip_probability=1.0),
            covariate_scaling="equalised",
            covariates_in_time=True,
            fold=2,
        ),
        checkpoint_minutes=3.0,
    )
