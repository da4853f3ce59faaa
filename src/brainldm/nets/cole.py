"""The 3-D convolutional network that predicts age from a brain (Cole et al. 2017), and its twin for sex.

Blocks of convolution, ReLU, convolution, batch norm, ReLU and a halving maximum; channels double from 8; one linear
layer at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from brainldm.nets.blocks import check_at_least_one


@dataclass(frozen=True)
class ColeConfig:
    """`shape_XYZ` is the image's; the paper's five blocks need at least 32 voxels along each side.

    `averaging` is not the paper's: so many voxels along each axis become their mean before the first block, which
    makes the network as much cheaper as there are fewer.
    """

    shape_XYZ: tuple[int, int, int]
    channels: tuple[int, ...] = (8, 16, 32, 64, 128)
    averaging: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape_XYZ", tuple(self.shape_XYZ))
        object.__setattr__(self, "channels", tuple(self.channels))
        check_at_least_one(
            blocks=len(self.channels),
            averaging=self.averaging,
            **{f"channels_{i}": c for i, c in enumerate(self.channels)},
        )
        if min(self.averaged_XYZ) < 2 ** len(self.channels):
            raise ValueError(
                f"an image of {self.averaged_XYZ} voxels cannot be halved {len(self.channels)} times: "
                "use fewer channels"
            )

    @classmethod
    def fitting(cls, shape_XYZ: tuple[int, int, int], averaging: int = 1) -> ColeConfig:
        """The paper's widths, as many of them as the grid can be halved."""
        halvings = (min(shape_XYZ) // averaging).bit_length() - 1
        return cls(shape_XYZ, cls.channels[: max(1, halvings)], averaging)

    @property
    def averaged_XYZ(self) -> tuple[int, ...]:
        return tuple(n // self.averaging for n in self.shape_XYZ)

    @property
    def last_shape_XYZ(self) -> tuple[int, ...]:
        return tuple(n // 2 ** len(self.channels) for n in self.averaged_XYZ)


class ColeNet(nn.Module):
    """(B, 1, X, Y, Z) to (B,): one number an image, in units that its training chose."""

    def __init__(self, config: ColeConfig) -> None:
        super().__init__()
        self.config = config
        self.averaged = nn.AvgPool3d(config.averaging) if config.averaging > 1 else nn.Identity()
        blocks: list[nn.Module] = []
        before = 1
        for width in config.channels:
            blocks += [
                nn.Conv3d(before, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv3d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm3d(width),
                nn.ReLU(),
                nn.MaxPool3d(2),
            ]
            before = width
        self.blocks = nn.Sequential(*blocks)
        x, y, z = config.last_shape_XYZ
        self.last = nn.Linear(before * x * y * z, 1)

    def forward(self, image_B1XYZ: torch.Tensor) -> torch.Tensor:
        if tuple(image_B1XYZ.shape[2:]) != self.config.shape_XYZ:
            raise ValueError(
                f"images of {tuple(image_B1XYZ.shape[2:])} voxels: this net was made for {self.config.shape_XYZ}"
            )
        return self.last(self.blocks(self.averaged(image_B1XYZ)).flatten(1))[:, 0]
