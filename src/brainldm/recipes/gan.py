"""The paper's two baselines, LSGAN and VAE-GAN, sized for a grid."""

from __future__ import annotations

from brainldm.base.errors import UsageError
from brainldm.train.config import GanStageConfig

KINDS = ("lsgan", "vaegan")


def baseline(kind: str, shape_XYZ: tuple[int, int, int]) -> GanStageConfig:
    """A baseline for images of this shape: as many levels as leave 5 x 7 x 5 voxels of the paper's box.

        brainldm train lsgan --data PREPARED --out RUN

    Channels double from 16 with each level, to 256 at the paper's 160 x 224 x 160 voxels, where a step of one image
    runs on a CPU in 2 GB.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no baseline {kind!r}.", remedy=f"Choose one of: {', '.join(KINDS)}.")
    levels = 1
    while levels < 5 and all(n % 2 ** (levels + 1) == 0 for n in shape_XYZ):
        levels += 1
    fine = min(shape_XYZ) >= 128
    return GanStageConfig(
        kind="lsgan" if kind == "lsgan" else "vaegan",
        channels=tuple(16 * 2**level for level in range(levels)),
        steps=200_000 if fine else 20_000,
        batch=1 if fine else 4,
    )
