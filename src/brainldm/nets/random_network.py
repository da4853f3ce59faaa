"""A fixed random 3-D network: features that need no download, a function of a seed alone.

Random convolutions keep where edges and textures lie, and lose nothing of how images differ at the scales they see
(deep image prior and random-feature Frechet distances rest on the same fact). They know nothing of brains.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class RandomNetwork(nn.Module):
    """Levels of a 3 x 3 x 3 convolution and a leaky ReLU, each followed by a halving mean."""

    def __init__(self, generator: np.random.Generator, channels: tuple[int, ...]) -> None:
        super().__init__()
        levels = []
        for before, after in zip((1, *channels), channels):
            convolution = nn.Conv3d(before, after, 3, padding=1, bias=False)
            weights = generator.standard_normal(convolution.weight.shape) / (27 * before) ** 0.5
            convolution.weight = nn.Parameter(torch.from_numpy(weights).float(), requires_grad=False)
            levels.append(convolution)
        self.levels = nn.ModuleList(levels)

    def maps(self, image_B1XYZ: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each level's map (B, C, X, Y, Z), and the same halved, which the next level sees."""
        halved = image_B1XYZ
        for level in self.levels:
            whole = F.leaky_relu(level(halved), 0.1)
            halved = F.avg_pool3d(whole, 2, ceil_mode=True)
            yield whole, halved

    def forward(self, image_B1XYZ: torch.Tensor) -> torch.Tensor:
        """The last level's map, halved."""
        *_, (_, last) = self.maps(image_B1XYZ)
        return last
