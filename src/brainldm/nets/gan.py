"""The paper's baselines in 3-D: the networks of LSGAN (Mao et al. 2017) and VAE-GAN (Larsen et al. 2016).

The paper does not give its baselines' architecture. Here a generator doubles a coarse map up to the image by transposed
convolutions and a discriminator halves the image down to it, one the mirror of the other (as in DCGAN, Radford et al.
2016, and LSGAN); no map but the image is at full resolution. Group norm stands for batch norm, because batches of whole
brains are small. The paper compares its models unconditioned; ours may also be asked for covariates
(`covariates` 0 is the paper's way), so that the same judge can ask whether they obey.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from brainldm.nets.blocks import at_full_precision, check_at_least_one


@dataclass(frozen=True)
class GanConfig:
    """`channels` of each level, finest first; a level halves the image, so sides divide by 2 ** levels."""

    shape_XYZ: tuple[int, int, int]
    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    noise_features: int = 128
    covariates: int = 4
    norm_groups: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape_XYZ", tuple(self.shape_XYZ))
        object.__setattr__(self, "channels", tuple(self.channels))
        check_at_least_one(levels=len(self.channels), noise_features=self.noise_features, norm_groups=self.norm_groups)
        if any(n % 2 ** len(self.channels) for n in self.shape_XYZ):
            raise ValueError(
                f"an image of {self.shape_XYZ} voxels cannot be halved {len(self.channels)} times: choose fewer levels"
            )
        if any(width % self.norm_groups for width in self.channels):
            raise ValueError(f"channels {self.channels} must be multiples of norm_groups ({self.norm_groups})")

    @property
    def coarse_XYZ(self) -> tuple[int, ...]:
        return tuple(n // 2 ** len(self.channels) for n in self.shape_XYZ)

    @property
    def coarse_features(self) -> int:
        x, y, z = self.coarse_XYZ
        return self.channels[-1] * x * y * z


class GanGenerator(nn.Module):
    """Noise (B, N) and covariates (B, F) to images (B, 1, X, Y, Z) in 0..1: a sigmoid, since that is where images lie.

    It is also the decoder of the VAE-GAN.
    """

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(config.noise_features + config.covariates, config.coarse_features)
        widths = [*reversed(config.channels), 1]
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(config.norm_groups, before),
                nn.LeakyReLU(0.2),
                nn.ConvTranspose3d(before, after, 4, stride=2, padding=1),
            )
            for before, after in pairwise(widths)
        )

    def forward(self, noise_BN: torch.Tensor, covariates_BF: torch.Tensor) -> torch.Tensor:
        known = covariates_BF[:, : self.config.covariates]
        x = self.first(torch.cat([noise_BN, known], dim=1))
        x = x.view(-1, self.config.channels[-1], *self.config.coarse_XYZ)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        *coarse, finest = self.levels
        for level in coarse:
            x = level(x)
        return torch.sigmoid(at_full_precision(finest, x))


class EvenLinear(nn.Linear):
    """A linear layer whose inputs are divided by the root of their number (equalised rate, Karras et al. 2018).

    With tens of thousands of inputs a step of Adam would otherwise move the output by tens.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x / self.in_features**0.5)


class Halvings(nn.Module):
    """(B, 1, X, Y, Z) to the maps of every level, coarser each: what discriminator and encoder share."""

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        levels: list[nn.Module] = []
        before = 1
        for position, width in enumerate(config.channels):
            norm = [nn.GroupNorm(config.norm_groups, width)] if position else []  # raw grey values reach the first
            levels.append(nn.Sequential(nn.Conv3d(before, width, 4, stride=2, padding=1), *norm, nn.LeakyReLU(0.2)))
            before = width
        self.levels = nn.ModuleList(levels)

    def forward(self, image_B1XYZ: torch.Tensor) -> list[torch.Tensor]:
        maps = [image_B1XYZ]
        for level in self.levels:
            maps.append(level(maps[-1]))
        return maps[1:]


class GanDiscriminator(nn.Module):
    """Images and covariates to a score (B,), near 1 for real ones, and the map of the last level but one, in which the
    VAE-GAN compares images. Covariates act by projection (Miyato and Koyama 2018)."""

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        self.config = config
        self.halvings = Halvings(config)
        self.last = EvenLinear(config.coarse_features, 1)
        self.projection = nn.Linear(config.covariates, config.channels[-1]) if config.covariates else None

    def forward(self, image_B1XYZ: torch.Tensor, covariates_BF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.halvings(image_B1XYZ)
        score = self.last(maps[-1].flatten(1))[:, 0]
        if self.projection is not None:
            pooled = maps[-1].mean(dim=(2, 3, 4))
            score = score + (self.projection(covariates_BF) * pooled).sum(dim=1)
        return score, maps[max(0, len(maps) - 2)]


class GanEncoder(nn.Module):
    """Images to mean and log variance (B, N) of the noise they are made of: the VAE-GAN's encoder."""

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        self.halvings = Halvings(config)
        self.last = EvenLinear(config.coarse_features, 2 * config.noise_features)
        nn.init.zeros_(self.last.weight)  # it begins at the generator's own noise, from which images will be asked

    def forward(self, image_B1XYZ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.last(self.halvings(image_B1XYZ)[-1].flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)
