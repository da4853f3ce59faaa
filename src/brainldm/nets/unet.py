"""The diffusion U-Net of Pinaya et al. 2022, at any width.

Hybrid conditioning: the covariates are both constant maps beside the latent channels and a token to attend to. Halving
and doubling are residual blocks with a mean or a repetition inside (`resblock_updown`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from brainldm.nets.blocks import (
    Convolution,
    SpatialTransformer,
    activated,
    at_full_precision,
    check_at_least_one,
    check_divisible,
    check_widths,
    double_by_nearest,
    fold,
    halve_by_mean,
    run_block,
    unfold,
    zeroed,
)

MAX_PERIOD = 10_000.0


@dataclass(frozen=True)
class UNetConfig:
    """Widths of a U-Net, one entry a level in `channels`, `attention` and `head_channels`.

    `in_channels` counts the latent channels and the covariates; `head_channels` is the width of one attention head
    (the paper has one head, so the level's width), read where `attention` is on and at the last level, in whose width
    the middle always attends. `covariates_in_time` and `fold` are not the paper's: the covariates are told a third
    time, to every residual block, beside the timestep; and fold^3 voxels of the latent become channels before the
    first convolution, and voxels again after the last.
    """

    in_channels: int = 7
    out_channels: int = 3
    channels: tuple[int, ...] = (256, 512, 768)
    attention: tuple[bool, ...] = (False, True, True)
    head_channels: tuple[int, ...] = (0, 512, 768)
    res_blocks: int = 2
    context_features: int = 4
    norm_groups: int = 32
    norm_eps: float = 1e-6
    covariates_in_time: bool = False
    fold: int = 1

    def __post_init__(self) -> None:
        for name in ("channels", "attention", "head_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.channels) == len(self.attention) == len(self.head_channels):
            raise ValueError(
                f"channels {self.channels}, attention {self.attention} and head_channels {self.head_channels} "
                "differ in length: give each one entry a level"
            )
        check_widths(self.channels, self.norm_groups, self.norm_eps)
        check_at_least_one(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            res_blocks=self.res_blocks,
            context_features=self.context_features,
            fold=self.fold,
        )
        for level, (width, head) in enumerate(zip(self.channels, self.head_channels)):
            if self.attends(level) and (head < 1 or width % head):
                raise ValueError(
                    f"{width} channels cannot be divided into attention heads of {head}: "
                    f"use a divisor of {width} in head_channels, {width} itself for a single head"
                )

    @property
    def downsampling(self) -> int:
        """What the sides of a latent must be divisible by."""
        return int(self.fold * 2 ** (len(self.channels) - 1))

    def attends(self, level: int) -> bool:
        """Whether a head width is needed there: where `attention` is on, and in the middle, which always attends."""
        return self.attention[level] or level == len(self.channels) - 1

    def check_latent(self, shape_XYZ: tuple[int, ...]) -> None:
        """ValueError for a latent whose sides do not divide by `downsampling`: its skips would not fit."""
        check_divisible(tuple(shape_XYZ), self.downsampling, "the latent grid")


def with_covariates(
    x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, condition_BF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The U-Net's three inputs for latents and normalised covariates: maps after the latent channels, and one token."""
    maps_BFXYZ = condition_BF[:, :, None, None, None].expand(-1, -1, *x_BCXYZ.shape[2:]).to(x_BCXYZ.dtype)
    return torch.cat([x_BCXYZ, maps_BFXYZ], dim=1), timesteps_B, condition_BF[:, None, :]


def timestep_embedding(timesteps_B: torch.Tensor, features: int) -> torch.Tensor:
    """Cosines, then sines, of the timestep at `features / 2` geometric frequencies (Ho et al. 2020)."""
    half = features // 2
    # The order of operations is that of the published weights: at t = 999 a rounding of the frequency is seen.
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=timesteps_B.device)
    angles_BF = timesteps_B.float()[:, None] * torch.exp(exponents / half)[None]
    embedding = torch.cat([angles_BF.cos(), angles_BF.sin()], dim=1)
    return F.pad(embedding, (0, features % 2))


class ResidualBlock(nn.Module):
    """norm, SiLU, [resample], convolution, + time, norm, SiLU, convolution, added to the [resampled] input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_features: int,
        config: UNetConfig,
        resample: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, config.norm_eps)
        self.conv1 = Convolution(in_channels, out_channels, doubles=resample is double_by_nearest)
        self.time_emb_proj = nn.Linear(time_features, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, config.norm_eps)
        self.conv2 = zeroed(Convolution(out_channels, out_channels))
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else Convolution(in_channels, out_channels, kernel=1)

    def forward(self, x_BCXYZ: torch.Tensor, time_BF: torch.Tensor) -> torch.Tensor:
        h_BCXYZ = activated(self.norm1, x_BCXYZ)
        if self.resample is not None:
            x_BCXYZ = self.resample(x_BCXYZ)
        if self.resample is halve_by_mean:  # the first convolution does the doubling itself
            h_BCXYZ = halve_by_mean(h_BCXYZ)
        h_BCXYZ = self.conv1(h_BCXYZ) + self.time_emb_proj(F.silu(time_BF))[:, :, None, None, None]
        h_BCXYZ = self.conv2(activated(self.norm2, h_BCXYZ))
        return self.skip_connection(x_BCXYZ) + h_BCXYZ


class _Level(nn.Module):
    """The residual blocks, and where the level attends the transformers, of one resolution."""

    def __init__(
        self, widths: list[tuple[int, int]], time_features: int, config: UNetConfig, head_channels: int | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(i, o, time_features, config) for i, o in widths])
        if head_channels is not None:
            self.attentions = nn.ModuleList([_transformer(o, head_channels, config) for _, o in widths])
        self.blocks = len(widths)

    @property
    def resampler(self) -> ResidualBlock | None:
        """The block that halves (on the way down) or doubles (on the way up) the grid after this level."""
        found = getattr(self, "downsampler", None) or getattr(self, "upsampler", None)
        assert found is None or isinstance(found, ResidualBlock)
        return found

    def block(
        self, number: int, x_BCXYZ: torch.Tensor, time_BF: torch.Tensor, context_BNF: torch.Tensor
    ) -> torch.Tensor:
        """Residual block `number` and its transformer."""
        x_BCXYZ = self.resnets[number](x_BCXYZ, time_BF)
        return self.attentions[number](x_BCXYZ, context_BNF) if hasattr(self, "attentions") else x_BCXYZ


def _levels(blocks: nn.ModuleList) -> Iterator[_Level]:
    for block in blocks:
        assert isinstance(block, _Level)
        yield block


class _Middle(nn.Module):
    def __init__(self, width: int, head_channels: int, time_features: int, config: UNetConfig) -> None:
        super().__init__()
        self.resnet_1 = ResidualBlock(width, width, time_features, config)
        self.attention = _transformer(width, head_channels, config)
        self.resnet_2 = ResidualBlock(width, width, time_features, config)

    def forward(self, x_BCXYZ: torch.Tensor, time_BF: torch.Tensor, context_BNF: torch.Tensor) -> torch.Tensor:
        x_BCXYZ = self.attention(self.resnet_1(x_BCXYZ, time_BF), context_BNF)
        return self.resnet_2(x_BCXYZ, time_BF)


def _transformer(width: int, head_channels: int, config: UNetConfig) -> SpatialTransformer:
    return SpatialTransformer(width, head_channels, config.context_features, config.norm_groups, config.norm_eps)


class DiffusionUNet(nn.Module):
    """Predicts noise (or velocity) from a noisy latent, the timestep and the covariates."""

    def __init__(self, config: UNetConfig, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        widths, levels = config.channels, len(config.channels)
        time = 4 * widths[0]
        heads = [head if on else None for on, head in zip(config.attention, config.head_channels)]

        self.conv_in = Convolution(config.in_channels * config.fold**3, widths[0])
        self.time_embed = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time))
        if config.covariates_in_time:
            self.covariate_embed = nn.Sequential(
                nn.Linear(config.context_features, time), nn.SiLU(), nn.Linear(time, time)
            )

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # widths of the feature maps handed across, in the order they are made
        before = widths[0]
        for level, width in enumerate(widths):
            pairs = [(before if number == 0 else width, width) for number in range(config.res_blocks)]
            down = _Level(pairs, time, config, heads[level])
            skips += [width] * config.res_blocks
            if level < levels - 1:
                down.downsampler = ResidualBlock(width, width, time, config, resample=halve_by_mean)
                skips.append(width)
            self.down_blocks.append(down)
            before = width

        self.middle_block = _Middle(widths[-1], config.head_channels[-1], time, config)

        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(config.res_blocks + 1):
                pairs.append((before + skips.pop(), width))
                before = width
            up = _Level(pairs, time, config, heads[level])
            if level > 0:
                up.upsampler = ResidualBlock(width, width, time, config, resample=double_by_nearest)
            self.up_blocks.append(up)

        final = zeroed(Convolution(widths[0], config.out_channels * config.fold**3))
        self.out = nn.Sequential(nn.GroupNorm(config.norm_groups, widths[0], config.norm_eps), nn.SiLU(), final)

    @property
    def exact_parts(self) -> tuple[nn.Module, ...]:
        """What runs in the weights' own precision whatever the context: the last convolution."""
        return (self.out[2],)

    def forward(self, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, context_BNF: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, X, Y, Z), (B,), (B, N, context_features) to (B, out_channels, X, Y, Z).

        Timesteps may be fractional. ValueError for a grid that cannot be halved once a level.
        """
        self.config.check_latent(tuple(x_BCXYZ.shape[2:]))
        time_BF = self.time_embed(timestep_embedding(timesteps_B, self.config.channels[0]).to(x_BCXYZ.dtype))
        if self.config.covariates_in_time:
            time_BF = time_BF + self.covariate_embed(context_BNF[:, 0])
        h = self.conv_in(fold(x_BCXYZ, self.config.fold).contiguous(memory_format=torch.channels_last_3d))
        handed = [h]
        for level in _levels(self.down_blocks):
            for number in range(level.blocks):
                h = self._run(level.block, number, h, time_BF, context_BNF)
                handed.append(h)
            if level.resampler is not None:
                h = self._run(level.resampler, h, time_BF)
                handed.append(h)
        h = self._run(self.middle_block, h, time_BF, context_BNF)
        for level in _levels(self.up_blocks):
            for number in range(level.blocks):
                joined = torch.cat([h, handed.pop()], dim=1)
                h = self._run(level.block, number, joined, time_BF, context_BNF)
            if level.resampler is not None:
                h = self._run(level.resampler, h, time_BF)
        norm, _, convolution = self.out
        return unfold(at_full_precision(convolution, activated(norm, h)), self.config.fold)

    def _run(self, block: Callable[..., torch.Tensor], *inputs: object) -> torch.Tensor:
        return run_block(block, *inputs, checkpointing=self.checkpointing)
