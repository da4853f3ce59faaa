"""Feature spaces: named ways to turn an image into a row of numbers, and what they gave, kept on disk.

Spaces themselves are in networks.py. Rows are kept by image hash and grid, so that they are computed once and sets of
any size need little memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from brainldm.base.errors import BadInput
from brainldm.base.files import make_folder, writing
from brainldm.base.manifest import Manifest
from brainldm.base.progress import Progress
from brainldm.evaluate.examine import Examined, read_for_judging
from brainldm.evaluate.grids import JudgingGrid
from brainldm.evaluate.images import JudgedImage
from brainldm.evaluate.pool import each

# Below so many voxels, starting worker processes (which import torch) takes longer than the work.
VOXELS_WORTH_A_PROCESS = 100_000_000


class FeatureSpace(Protocol):
    """Turns an image in 0..1 into features; `name` stands for the network, its weights and its input scaling."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    def __call__(self, image_XYZ: np.ndarray) -> np.ndarray:
        """Features (F,), float32."""


# ------------------------------------------------------------------------------------------------------- many images


@dataclass(frozen=True)
class FeatureStore:
    """What a space gave for images on a grid: rows of float32 in FOLDER/NAME.f32, and whose they are in NAME.jsonl.

    A row counts once its line is in the list, so a killed run goes on where it stopped.
    """

    folder: Path
    space: FeatureSpace
    grid: JudgingGrid

    @property
    def _rows_path(self) -> Path:
        return self.folder / f"{self.space.name}.f32"

    @property
    def _names(self) -> Manifest:
        return Manifest(self.folder / f"{self.space.name}.jsonl")

    def known(self) -> dict[str, int]:
        """Row numbers by an image's key."""
        size = self._rows_path.stat().st_size if self._rows_path.is_file() else 0
        return {
            record["key"]: record["row"]
            for record in self._names.records()
            if record.get("grid") == self.grid.key and (record["row"] + 1) * 4 * record["features"] <= size
        }

    def append(self, key: str, features_F: np.ndarray) -> int:
        """Adds a row and returns its number."""
        make_folder(self.folder)
        row_bytes = 4 * len(features_F)
        with writing(self._rows_path), self._rows_path.open("ab") as file:
            row = file.tell() // row_bytes
            file.truncate(row * row_bytes)  # what a killed run left of a row
            file.write(features_F.astype("<f4").tobytes())
        self._names.append(key=key, row=row, features=len(features_F), grid=self.grid.key)
        return row

    def rows(self, numbers: Sequence[int], features: int) -> np.ndarray:
        """(n, F) of the rows with those numbers, in that order."""
        whole = self._rows_path.stat().st_size // (4 * features)  # without what a killed run left of a row
        held = np.memmap(self._rows_path, dtype="<f4", mode="r", shape=(whole, features))
        return np.asarray(held[list(numbers)], dtype=np.float32)


def extract(
    images: Sequence[Examined],
    side: str,
    store: FeatureStore,
    *,
    mirrored: bool = False,
    workers: int,
    progress: Progress,
) -> np.ndarray:
    """(n, F) features of the images in their order, or of their mirror images; only what the store lacks is made."""
    known = store.known()

    def key(look: Examined) -> str:
        return look.sha256 + (":mirrored" if mirrored else "")

    waiting = list({key(look): look for look in images if key(look) not in known}.values())
    work = partial(features_of, space=store.space, grid=store.grid, mirrored=mirrored)
    what = f"features of {side} images" + (", mirrored" if mirrored else "")
    heavy = len(waiting) * store.grid.voxels >= VOXELS_WORTH_A_PROCESS
    for position, outcome in each(
        work,
        [look.image for look in waiting],
        workers=workers,
        progress=progress,
        what=what,
        done_before=len(images) - len(waiting),
        heavy=heavy,
    ):
        if isinstance(outcome, Exception):
            raise outcome  # the image was read a moment ago: this is no bad image
        known[key(waiting[position])] = store.append(key(waiting[position]), outcome)
    if not images:
        return np.empty((0, 0), dtype=np.float32)
    size = next(record["features"] for record in store._names.records())
    return store.rows([known[key(look)] for look in images], size)


def features_of(image: JudgedImage, space: FeatureSpace, grid: JudgingGrid, mirrored: bool = False) -> np.ndarray:
    """The features of one image as it is judged; `mirrored`: left and right exchanged."""
    image_XYZ = read_for_judging(image, grid)
    found = space(image_XYZ[::-1] if mirrored else image_XYZ)
    if not np.isfinite(found).all():
        raise BadInput(f"the features of {space.name} are not finite.", path=image.path, reason="not_measurable")
    return found
