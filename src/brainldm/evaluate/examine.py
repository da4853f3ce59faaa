"""One look at every image: is it whole, is it the file that the manifest states, where do its intensities lie, and a
coarse copy for comparisons that need many images at once.

Images are read one at a time and only small things are kept, so that a folder of any size fits.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from brainldm.base.errors import BadInput
from brainldm.base.files import sha256_of
from brainldm.base.nifti import read_nifti
from brainldm.base.progress import Progress
from brainldm.base.volume import Volume
from brainldm.cohort.normalise import to_unit
from brainldm.cohort.quality import figures_of
from brainldm.evaluate.grids import JudgingGrid, on_grid
from brainldm.evaluate.images import Failure, JudgedImage
from brainldm.evaluate.pool import each

HISTOGRAM_BINS = 256
# Below so many voxels, starting worker processes takes longer than reading them.
VOXELS_WORTH_A_PROCESS = 50_000_000


@dataclass(frozen=True, eq=False)
class Sketch:
    """What comparisons of many images need of one.

    `histogram` is the share of voxels in each of HISTOGRAM_BINS equal bins of 0..1, on the judging grid; `coarse_XYZ`
    the image in voxels of about 4 mm.
    """

    histogram: np.ndarray
    coarse_XYZ: np.ndarray


@dataclass(frozen=True, eq=False)
class Examined:
    """What one look at an image gave.

    `scaled`: its intensities were not 0..1 and were min-max scaled. `resampled`: it lay on another grid than the
    judging grid. `sketch` is None where it was not asked for. `figures` are those of cohort/quality.py, None where it
    shows no head.
    """

    image: JudgedImage
    sha256: str
    scaled: bool
    resampled: bool
    notes: tuple[str, ...]
    sketch: Sketch | None
    figures: np.ndarray | None = None


@dataclass(frozen=True)
class Examination:
    """The images of one side that can be judged, in the order given, and those that cannot."""

    images: tuple[Examined, ...]
    failures: tuple[Failure, ...]

    @property
    def sketches(self) -> list[Sketch]:
        return [look.sketch for look in self.images if look.sketch is not None]


def read_for_judging(image: JudgedImage, grid: JudgingGrid) -> np.ndarray:
    """The image as every comparison sees it: on the judging grid, intensities in 0..1."""
    volume = read_nifti(image.path)
    return on_grid(Volume(to_unit(volume.data_XYZ)[0], volume.affine), grid)


def examine_one(request: tuple[JudgedImage, bool], grid: JudgingGrid) -> Examined:
    """What is to be known of one image, with a sketch where one is requested; BadInput when it cannot be judged."""
    image, wants_sketch = request
    volume = read_nifti(image.path)
    sha256 = sha256_of(image.path)
    if image.sha256 is not None and image.sha256 != sha256:
        raise BadInput(
            "is not the file that the manifest states: the checksums differ.",
            remedy="Restore it, or remove it and run the command that made it again.",
            path=image.path,
            reason="checksum",
        )
    data_XYZ, scaled = to_unit(volume.data_XYZ)
    placed_XYZ = on_grid(Volume(data_XYZ, volume.affine), grid)
    resampled = JudgingGrid.of(volume.shape_XYZ, volume.affine) != grid
    sketch = sketch_of(placed_XYZ, grid) if wants_sketch else None
    figures = figures_of(placed_XYZ, float(grid.voxel_mm.mean()))
    return Examined(image, sha256, scaled, resampled, volume.notes, sketch, figures)


def sketch_of(image_XYZ: np.ndarray, grid: JudgingGrid) -> Sketch:
    """The sketch of an image that lies on the judging grid in 0..1."""
    counts, _ = np.histogram(image_XYZ, bins=HISTOGRAM_BINS, range=(0, 1))
    coarse_XYZ = on_grid(Volume(image_XYZ, grid.affine), grid.coarse())
    return Sketch((counts / image_XYZ.size).astype(np.float32), coarse_XYZ.astype(np.float32))


def examine(
    images: Sequence[JudgedImage],
    side: str,
    grid: JudgingGrid,
    *,
    sketched: Container[str],
    workers: int,
    progress: Progress,
    who: str = "",
) -> Examination:
    """Looks at every image of one side once; what cannot be judged becomes a failure and the rest goes on.

    Sketches are made of the files in `sketched`: they are what takes memory. `who` is said in place of the side while
    they are read.
    """
    good: dict[int, Examined] = {}
    failures: dict[int, Failure] = {}
    requests = [(image, image.file in sketched) for image in images]
    look = partial(examine_one, grid=grid)
    heavy = len(images) * grid.voxels >= VOXELS_WORTH_A_PROCESS
    for position, outcome in each(
        look, requests, workers=workers, progress=progress, what=f"reading {who or side} images", heavy=heavy
    ):
        if isinstance(outcome, Exception):
            failures[position] = Failure.of(side, images[position], outcome)
        else:
            good[position] = outcome
    return Examination(
        tuple(good[position] for position in sorted(good)),
        tuple(failures[position] for position in sorted(failures)),
    )
