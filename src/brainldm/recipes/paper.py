"""The system of Pinaya et al. 2022 at its own size."""

from __future__ import annotations

from brainldm.nets.autoencoder import AutoencoderConfig
from brainldm.train.config import PAPER_AUGMENTATION, AutoencoderStageConfig, DiffusionStageConfig, Recipe


def paper() -> Recipe:
    """The paper's autoencoder (13.8 M parameters) and U-Net (553 M) on the 160 x 224 x 160 grid.

        brainldm train paper --data PREPARED --out RUN --perceptual lpips-squeeze \\
            --perceptual-weights squeezenet1_1.pth --perceptual-weights squeeze.pth

    Architecture, schedule and target are those of the published bundle. Loss weights and rates are the ones that the
    same authors published for their sister projects, because the paper's supplement is not public: L1 + 0.002
    perceptual + 0.005 least-squares adversarial + 1e-8 KL, Adam 5e-5 / 1e-4; Adam 2.5e-5 on the noise prediction,
    without a moving average of the weights (`--set diffusion.ema_decay=0.999` takes one). Their perceptual distance
    needs the two files of weights (docs/training.md, "The losses of stage 1"); without `--perceptual` the term is a
    stand-in, the distance of fixed random convolutions, of which 0.002 is not known to be the right share.
    The latent scale is measured (the bundle has none, that is 1). Augmented as theirs, flips included; for stage 2
    latents of four views of each scan are kept, one of them the scan as it is, where they encode anew at every step.

    Cost: they report one A100 for about 40,000 scans; on a CPU a step takes minutes, which proves the path and no more.
    The paper's scores on 31,740 UK Biobank scans: FID 0.0076, MS-SSIM 0.656 (real images: 0.654), ventricles r 0.972.
    """
    return Recipe(
        name="paper",
        autoencoder=AutoencoderStageConfig(
            net=AutoencoderConfig(),
            steps=800_000,  # 20 epochs of 40,000 scans, one at a time
            adversarial_from_step=200_000,  # epoch 5
            checkpointing=True,
            augmentation=PAPER_AUGMENTATION,
        ),
        diffusion=DiffusionStageConfig(
            channels=(256, 512, 768),
            attention=(False, True, True),
            head_channels=(0, 512, 768),
            steps=250_000,  # 25 epochs of 40,000 scans, four at a time
            latent_views=4,
            ema_decay=None,
            augmentation=PAPER_AUGMENTATION,
            checkpointing=True,
        ),
        checkpoint_minutes=30.0,
    )
