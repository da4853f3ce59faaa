"""The patch discriminator, MONAI's, and the least-squares adversarial losses (Mao et al. 2017)."""

from __future__ import annotations

import torch
from torch import nn

from brainldm.nets.blocks import check_at_least_one


def patch_discriminator(channels: int, layers: int) -> nn.Module:
    """MONAI's 3-D PatchGAN discriminator; its output is a list whose last entry (B, 1, x, y, z) judges patches."""
    check_at_least_one(channels=channels, layers=layers)
    from monai.networks.nets import PatchDiscriminator  # takes seconds to import

    return PatchDiscriminator(spatial_dims=3, channels=channels, in_channels=1, out_channels=1, num_layers_d=layers)


def generator_loss(judged_fake: torch.Tensor) -> torch.Tensor:
    """(D(fake) - 1)^2: small when the discriminator takes the fake for real."""
    return (judged_fake - 1).square().mean()


def discriminator_loss(judged_real: torch.Tensor, judged_fake: torch.Tensor) -> torch.Tensor:
    """[(D(real) - 1)^2 + D(fake)^2] / 2."""
    return 0.5 * ((judged_real - 1).square().mean() + judged_fake.square().mean())
