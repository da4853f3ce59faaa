"""How much of each block of an image is brighter than this and that: what an autoencoder must keep to keep volumes.

L1 alone is least where a blurred border has the median of what it might be: thin dark sulci close, and the brains that
have the widest lose most. In a block's histogram a closed sulcus shows, wherever exactly it was.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

BLOCK_VOXELS = 8
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_WIDTH = 0.08  # of a threshold: wider than noise, narrower than tissues are apart


def local_histogram_distance(a_B1XYZ: torch.Tensor, b_B1XYZ: torch.Tensor) -> torch.Tensor:
    """The mean difference of the two images' cumulative histograms over blocks of BLOCK_VOXELS along each axis: 0 for
    equal images, at most 1. Images are in 0..1, float32; voxels beyond the last whole block are left out."""
    total = a_B1XYZ.new_zeros(())
    for threshold in _THRESHOLDS:  # one at a time: eight maps of a 1 mm image are 180 MB
        share_a, share_b = (
            F.avg_pool3d(torch.sigmoid((image - threshold) / _WIDTH), BLOCK_VOXELS) for image in (a_B1XYZ, b_B1XYZ)
        )
        total = total + (share_a - share_b).abs().mean()
    return total / len(_THRESHOLDS)
