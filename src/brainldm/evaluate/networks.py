"""The networks whose features sets are compared in.

`random` is a fixed random 3-D network: no download, the offline default. `med3d` is MedicalNet's ResNet-50 from a
checkpoint that the user has; only distances in that space may be called Med3D FID. Values in different spaces, on
different grids or with different input scalings are different quantities.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import sha256_of
from brainldm.base.streams import stream
from brainldm.evaluate.features import FeatureSpace
from brainldm.nets.medicalnet import MED3D_NAME, MED3D_SHA256, MedicalNet, read_medicalnet
from brainldm.nets.random_network import RandomNetwork

_GAIN = 16.0


@dataclass(frozen=True)
class RandomSpace:
    """Means of the last level of a fixed random network over 3 x 4 x 3 boxes of the image: 1152 features.

    Scaled so that the features of a brain are about 1. Intensities are divided by their 90th percentile first, so that
    a change of gain is no difference. With boxes the same person, slightly noisy, warped, mirrored or resampled, is
    nearer than any other (`brainldm validate` shows it).
    """

    seed: int = 0
    channels: tuple[int, ...] = (16, 32, 64, 32)
    boxes_XYZ: tuple[int, int, int] = (3, 4, 3)

    @property
    def name(self) -> str:
        return f"random-3d-{self.seed}"

    @property
    def title(self) -> str:
        return "random"

    @torch.no_grad()
    def __call__(self, image_XYZ: np.ndarray) -> np.ndarray:
        bright = float(np.percentile(image_XYZ[::2, ::2, ::2], 90))
        image = torch.from_numpy(np.ascontiguousarray(image_XYZ, dtype=np.float32)) / (bright if bright > 0 else 1.0)
        last = _random_network(self)(_GAIN * image[None, None])  # the network passes a factor through
        return F.adaptive_avg_pool3d(last, self.boxes_XYZ).flatten().numpy()


@functools.lru_cache(maxsize=2)
def _random_network(space: RandomSpace) -> RandomNetwork:
    return RandomNetwork(stream(space.seed, "evaluate/random-network"), space.channels).eval()


@dataclass(frozen=True)
class MedicalNetSpace:
    """MedicalNet ResNet-50, mean over space: 2048 features. Only with a published checkpoint is it called Med3D.

    `scaling` is what the network sees: `zscore`, each image to mean 0 and deviation 1 (as the authors' later FID code),
    or `signed`, 0..1 to -1..1 (as HA-GAN's, which the paper cites). paper.md 3.3.
    """

    checkpoint: Path
    sha256: str
    scaling: Literal["zscore", "signed"] = "zscore"

    @property
    def name(self) -> str:
        return f"{'med3d' if self.is_published else 'unknown'}-resnet50-{self.sha256[:12]}-{self.scaling}"

    @property
    def title(self) -> str:
        network = "Med3D" if self.is_published else "ResNet-50 of unknown weights"
        return network if self.scaling == "zscore" else f"{network}, -1 to 1"

    @property
    def is_published(self) -> bool:
        return self.sha256 in MED3D_SHA256.values()

    @torch.no_grad()
    def __call__(self, image_XYZ: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(np.ascontiguousarray(image_XYZ, dtype=np.float32))
        if self.scaling == "signed":
            image = 2 * image - 1
        else:
            image = (image - image.mean()) / image.std().clamp(min=1e-6)
        return _medicalnet(self.checkpoint, self.sha256)(image[None, None])[0].numpy()


def space_named(text: str) -> FeatureSpace:
    """The space that a user means: `random`, `med3d=CHECKPOINT` or `med3d-signed=CHECKPOINT`.

    UsageError for another name; BadInput for a checkpoint that is no MedicalNet ResNet-50.
    """
    name, _, where = text.partition("=")
    if name == "random" and not where:
        return RandomSpace()
    if name not in ("med3d", "med3d-signed") or not where:
        raise UsageError(
            f"there is no feature space {text!r}.",
            remedy="Take random, med3d=CHECKPOINT or med3d-signed=CHECKPOINT.",
        )
    checkpoint = Path(where)
    if not checkpoint.is_file():
        raise BadInput(
            "there is no such checkpoint.",
            remedy=f"Get {MED3D_NAME}: brainldm fetch med3d, or from MedicalNet's pages.",
            path=checkpoint,
            reason="missing",
        )
    sha256 = sha256_of(checkpoint)
    _medicalnet(checkpoint, sha256)
    return MedicalNetSpace(checkpoint, sha256, "signed" if name == "med3d-signed" else "zscore")


@functools.lru_cache(maxsize=1)
def _medicalnet(checkpoint: Path, sha256: str) -> MedicalNet:
    """The network with the checkpoint's weights, read once a process."""
    return read_medicalnet(checkpoint)
