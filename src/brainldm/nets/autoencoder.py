"""The autoencoder of Pinaya et al. 2022, at any width: brains in, a small latent out, and back.

Encoder: convolution; per level residual blocks, then a halving convolution; norm; convolution. The decoder is its
mirror. No attention. With the defaults it is the paper's: 160 x 224 x 160 becomes 3 x 20 x 28 x 20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from brainldm.nets.blocks import (
    Convolution,
    activated,
    at_full_precision,
    channels_last,
    check_at_least_one,
    check_divisible,
    check_widths,
    fold,
    run_block,
    unfold,
)

# The encoder's log-variance is held in this range (Rombach et al. 2022).
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Widths of an autoencoder. `channels` has one entry a level, each level half the grid of the one before.

    `fold` is not the paper's: fold^3 voxels become channels before the first convolution and voxels again after the
    last, so that no convolution runs at full resolution.
    """

    in_channels: int = 1
    latent_channels: int = 3
    channels: tuple[int, ...] = (64, 128, 128, 128)
    res_blocks: int = 2
    norm_groups: int = 32
    norm_eps: float = 1e-6
    fold: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        check_widths(self.channels, self.norm_groups, self.norm_eps)
        check_at_least_one(
            in_channels=self.in_channels,
            latent_channels=self.latent_channels,
            res_blocks=self.res_blocks,
            fold=self.fold,
        )

    @property
    def downsampling(self) -> int:
        """Voxels along an image's edge for one of the latent."""
        return int(self.fold * 2 ** (len(self.channels) - 1))

    def latent_shape_CXYZ(self, grid_XYZ: tuple[int, ...]) -> tuple[int, int, int, int]:
        """The latent of an image on that grid; ValueError for a grid that does not divide by `downsampling`."""
        check_divisible(tuple(grid_XYZ), self.downsampling, "the image grid")
        x, y, z = (n // self.downsampling for n in grid_XYZ)
        return self.latent_channels, x, y, z


@dataclass(frozen=True)
class LatentDistribution:
    """A normal distribution for every voxel of the latent."""

    mean_BCXYZ: torch.Tensor
    log_variance_BCXYZ: torch.Tensor

    def sample(self, noise_BCXYZ: torch.Tensor) -> torch.Tensor:
        """mean + sigma x noise; the noise is the caller's, so that every draw has its named stream."""
        return self.mean_BCXYZ + (0.5 * self.log_variance_BCXYZ).exp() * noise_BCXYZ

    def kl_B(self) -> torch.Tensor:
        """Kullback-Leibler divergence from the standard normal, summed over the latent, per image."""
        mean, log_variance = self.mean_BCXYZ.float(), self.log_variance_BCXYZ.float()
        return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=(1, 2, 3, 4))


class ResidualBlock(nn.Module):
    """norm, SiLU, convolution, twice, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Convolution(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = Convolution(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else Convolution(in_channels, out_channels, kernel=1)

    def forward(self, x_BCXYZ: torch.Tensor) -> torch.Tensor:
        h_BCXYZ = self.conv1(activated(self.norm1, x_BCXYZ))
        h_BCXYZ = self.conv2(activated(self.norm2, h_BCXYZ))
        return self.nin_shortcut(x_BCXYZ) + h_BCXYZ


class Downsample(nn.Module):
    """Halves the grid by a convolution of stride 2, padded at the far ends."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, stride=2)

    def forward(self, x_BCXYZ: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BCXYZ, (0, 1, 0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the grid by repetition, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.postconv = Convolution(channels, channels, doubles=True)

    def forward(self, x_BCXYZ: torch.Tensor) -> torch.Tensor:
        return self.postconv(x_BCXYZ)


class Chain(nn.Module):
    """Blocks one after the other, the last in full precision.

    With `checkpointing`, activations are computed again in the backward pass instead of being kept.
    """

    def __init__(self, blocks: list[nn.Module], *, checkpointing: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpointing = checkpointing

    def forward(self, x_BCXYZ: torch.Tensor) -> torch.Tensor:
        *blocks, last = self.blocks
        for block in blocks:
            x_BCXYZ = run_block(block, x_BCXYZ, checkpointing=self.checkpointing)
        return at_full_precision(last, x_BCXYZ)


def _encoder_blocks(config: AutoencoderConfig) -> list[nn.Module]:
    groups, eps, widths = config.norm_groups, config.norm_eps, config.channels
    blocks: list[nn.Module] = [Convolution(config.in_channels * config.fold**3, widths[0])]
    before = widths[0]
    for level, width in enumerate(widths):
        for _ in range(config.res_blocks):
            blocks.append(ResidualBlock(before, width, groups, eps))
            before = width
        if level < len(widths) - 1:
            blocks.append(Downsample(width))
    return [*blocks, nn.GroupNorm(groups, before, eps), Convolution(before, config.latent_channels)]


def _decoder_blocks(config: AutoencoderConfig) -> list[nn.Module]:
    groups, eps, widths = config.norm_groups, config.norm_eps, config.channels[::-1]
    blocks: list[nn.Module] = [Convolution(config.latent_channels, widths[0])]
    before = widths[0]
    for level, width in enumerate(widths):
        for _ in range(config.res_blocks):
            blocks.append(ResidualBlock(before, width, groups, eps))
            before = width
        if level < len(widths) - 1:
            blocks.append(Upsample(width))
    out_channels = config.in_channels * config.fold**3
    return [*blocks, nn.GroupNorm(groups, before, eps), Convolution(before, out_channels)]


class Autoencoder(nn.Module):
    """Variational autoencoder of images (B, in_channels, X, Y, Z); X, Y and Z divisible by `config.downsampling`."""

    def __init__(self, config: AutoencoderConfig, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = Chain(_encoder_blocks(config), checkpointing=checkpointing)
        self.decoder = Chain(_decoder_blocks(config), checkpointing=checkpointing)
        latent = config.latent_channels
        self.quant_conv_mu = Convolution(latent, latent, kernel=1)
        self.quant_conv_log_sigma = Convolution(latent, latent, kernel=1)
        self.post_quant_conv = Convolution(latent, latent, kernel=1)

    def set_log_variance(self, value: float) -> None:
        """Makes the encoder begin with about that logarithm of the latent's variance."""
        bias = self.quant_conv_log_sigma.conv.bias
        assert bias is not None
        nn.init.constant_(bias, value)

    @property
    def exact_parts(self) -> tuple[nn.Module, ...]:
        """What runs in the weights' own precision whatever the context: small and at either end of the latent."""
        ends = self.encoder.blocks[-1], self.decoder.blocks[-1]
        return (*ends, self.quant_conv_mu, self.quant_conv_log_sigma, self.post_quant_conv)

    def encode(self, image_BCXYZ: torch.Tensor) -> LatentDistribution:
        """The latent's distribution, float32. ValueError for a grid that does not divide."""
        self.config.latent_shape_CXYZ(tuple(image_BCXYZ.shape[2:]))
        x_BCXYZ = channels_last(fold(image_BCXYZ, self.config.fold))
        # Not even the maps between its blocks are kept: at the paper's size they are 4 GB beside the decoder's.
        h_BCXYZ = run_block(self.encoder, x_BCXYZ, checkpointing=self.encoder.checkpointing)
        mean = at_full_precision(self.quant_conv_mu, h_BCXYZ).float()
        # The paper's code names this log sigma and uses it as the logarithm of the variance.
        log_variance = at_full_precision(self.quant_conv_log_sigma, h_BCXYZ).float()
        return LatentDistribution(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def encoder_maps(self, image_BCXYZ: torch.Tensor, levels: int) -> list[torch.Tensor]:
        """What the encoder sees at the end of its first `levels` levels (of all, where it has fewer), finest first."""
        maps: list[torch.Tensor] = []
        x_BCXYZ = channels_last(fold(image_BCXYZ, self.config.fold))
        for block in self.encoder.blocks[:-2]:  # the last two make the latent
            if isinstance(block, Downsample):
                maps.append(x_BCXYZ)
                if len(maps) == levels:
                    return maps
            x_BCXYZ = block(x_BCXYZ)
        return [*maps, x_BCXYZ]

    def decode(self, latent_BCXYZ: torch.Tensor) -> torch.Tensor:
        """The image of a latent. No activation at the end: values lie near 0..1 by training, not by force."""
        h_BCXYZ = at_full_precision(self.post_quant_conv, channels_last(latent_BCXYZ))
        return unfold(self.decoder(h_BCXYZ), self.config.fold)
