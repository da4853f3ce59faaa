"""SqueezeNet 1.1 (Iandola et al. 2016) as LPIPS (Zhang et al. 2018) listens to it: seven maps of a 2-D picture.

Parameter names are torchvision's, so that its published state dict fits as it is. Weights come from the user: none are
shipped. Letters: B pictures, C channels, H W rows and columns.
"""

from __future__ import annotations

import torch
from torch import nn

# Where LPIPS taps the chain: after the stem and after each of these (its `squeeze` net, slices 1 to 7).
TAPS = (1, 4, 7, 9, 10, 11, 12)
TAP_CHANNELS = (64, 128, 256, 384, 384, 512, 512)
SMALLEST_SIDE = 17  # below it, nothing is left for the third pooling's window of 3


class Fire(nn.Module):
    """A narrow 1 x 1 convolution, then 1 x 1 and 3 x 3 ones side by side."""

    def __init__(self, before: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = self.squeeze(x_BCHW).relu()
        return torch.cat([self.expand1x1(x_BCHW).relu(), self.expand3x3(x_BCHW).relu()], 1)


def _halving() -> nn.Module:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


class SqueezeNetFeatures(nn.Module):
    """The convolutional part of SqueezeNet 1.1: pictures (B, 3, H, W) to its maps at `TAPS`, finest first."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2),
            nn.ReLU(),
            _halving(),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            _halving(),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            _halving(),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )

    def forward(self, picture_B3HW: torch.Tensor) -> list[torch.Tensor]:
        maps, x_BCHW = [], picture_B3HW
        for number, layer in enumerate(self.features):
            x_BCHW = layer(x_BCHW)
            if number in TAPS:
                maps.append(x_BCHW)
        return maps
