"""A perceptual distance that needs no download: a fixed random 3-D network's features.

The authors use LPIPS (SqueezeNet) on slices; its weights are not ours to ship and are not fetched silently. Features of
a random convolutional network already punish blur (Amos et al., and Ulyanov's deep image prior, rest on the same fact),
but they are not LPIPS: the model folder records which one was used.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from brainldm.base.streams import stream
from brainldm.nets.random_network import RandomNetwork

NAME = "random-3d"


class RandomFeatures(RandomNetwork):
    """Three levels of fixed random convolutions; their weights are a function of the seed alone."""

    def __init__(self, seed: int, channels: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__(stream(seed, "perceptual-weights"), channels)

    def distance(self, image_B1XYZ: torch.Tensor, reference_B1XYZ: torch.Tensor) -> torch.Tensor:
        """Mean over levels of the squared difference of channel-normalised features (the form of LPIPS); 0 for equal
        images."""
        total = torch.zeros((), device=image_B1XYZ.device)
        for (x, _), (y, _) in zip(self.maps(image_B1XYZ), self.maps(reference_B1XYZ)):
            total = total + (F.normalize(x, dim=1, eps=1e-3) - F.normalize(y, dim=1, eps=1e-3)).square().sum(1).mean()
        return total / len(self.levels)
