"""A perceptual distance that needs no download: a fixed random 3-D network's features.

The authors use LPIPS (SqueezeNet) on slices; its weights are not ours to ship and are not fetched silently. Features of
a random convolutional network already punish blur (Amos et al., and Ulyanov's deep image prior, rest on the same fact),
but they are not LPIPS: the model folder records which one was used.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from brainldm.base.streams import stream

NAME = "random-3d"


class RandomFeatures(nn.Module):
    """Three levels of fixed random convolutions; their weights are a function of the seed alone."""

    def __init__(self, seed: int, channels: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        generator = stream(seed, "perceptual-weights")
        levels = []
        for before, after in zip((1, *channels), channels):
            convolution = nn.Conv3d(before, after, 3, padding=1, bias=False)
            weights = generator.standard_normal(convolution.weight.shape) / (27 * before) ** 0.5
            convolution.weight = nn.Parameter(torch.from_numpy(weights).float(), requires_grad=False)
            levels.append(convolution)
        self.levels = nn.ModuleList(levels)

    def distance(self, image_B1XYZ: torch.Tensor, reference_B1XYZ: torch.Tensor) -> torch.Tensor:
        """Mean over levels of the squared difference of channel-normalised features (the form of LPIPS); 0 for equal
        images."""
        total = torch.zeros((), device=image_B1XYZ.device)
        x, y = image_B1XYZ, reference_B1XYZ
        for level in self.levels:
            x, y = F.leaky_relu(level(x), 0.1), F.leaky_relu(level(y), 0.1)
            total = total + (F.normalize(x, dim=1, eps=1e-3) - F.normalize(y, dim=1, eps=1e-3)).square().sum(1).mean()
            x, y = F.avg_pool3d(x, 2, ceil_mode=True), F.avg_pool3d(y, 2, ceil_mode=True)
        return total / len(self.levels)
