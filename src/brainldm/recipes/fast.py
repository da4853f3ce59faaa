"""The paper's task at a fraction of its cost."""

from __future__ import annotations

from brainldm.nets.atlas import AtlasAutoencoderConfig
from brainldm.train.config import Augmentation, AutoencoderStageConfig, DiffusionStageConfig, Recipe


def fast() -> Recipe:
    """A latent diffusion model of 1 mm images (160 x 224 x 160) that makes a brain in seconds on a CPU.

        brainldm train fast --data COHORT --out RUN
        brainldm generate RUN OUT --steps 10

    The autoencoder moves and mixes atlases (nets/atlas): a latent voxel is a cell of 4 x 4 x 4 voxels, no convolution
    runs at full resolution, and the residual that it adds is for what no atlas has. The latent is 4 x 40 x 56 x 40
    (16-fold compression); the U-Net folds it to 20 x 28 x 20. Steps along the line of rectified flow, velocity
    predicted (docs/training.md says why), on what the population's mean leaves; timesteps drawn towards the noisy end,
    covariates equalised and told to every block, dropped one time in ten for guidance. No flips: people are not
    symmetric.

    Cost: about 80 GFLOP a network call and 100 a decode, where the paper's take 1440 and 15,000; `brainldm generate
    --dry-run` tells the seconds on your machine. A model of 200 phantoms, with 1230 short steps of stage 2, is judged
    in docs/training.md.
    """
    changes = Augmentation(affine_probability=0.1, shift_probability=0.1, gamma_probability=0.1)
    return Recipe(
        name="fast",
        autoencoder=AutoencoderStageConfig(
            net=AtlasAutoencoderConfig(
                grid_XYZ=(160, 224, 160),
                cell=4,
                latent_channels=4,
                channels=64,
                res_blocks=2,
                norm_groups=8,
                atlases=4,
                passes=6,
            ),
            steps=300_000,
            batch=2,
            learning_rate=2e-4,
            warmup_steps=500,
            cosine_decay=True,
            gradient_clip=1.0,
            kl_weight=1e-8,
            initial_log_variance=-5.0,
            perceptual_weight=0.002,
            adversarial_weight=0.005,
            adversarial_from_step=50_000,
            discriminator_channels=64,
            augmentation=changes,
        ),
        diffusion=DiffusionStageConfig(
            channels=(64, 128, 256),
            attention=(False, True, True),
            head_channels=(0, 64, 64),
            res_blocks=1,
            norm_groups=16,
            steps=300_000,
            batch=16,
            learning_rate=3e-4,
            warmup_steps=1000,
            cosine_decay=True,
            gradient_clip=1.0,
            ema_decay=0.9995,
            target="v",
            schedule="rectified",
            timestep_shift=6.0,
            latent_population=True,
            latent_views=4,
            augmentation=changes,
            volumes_as_decoded=True,
            covariate_scaling="equalised",
            covariates_in_time=True,
            fold=2,
            condition_dropout=0.1,
        ),
        checkpoint_minutes=15.0,
    )
