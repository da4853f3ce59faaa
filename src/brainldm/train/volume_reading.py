"""The volume reader of a run, fitted to the training people's reconstructions (model/volume_reader).

RUN/latents/cells/   mean intensities of the reconstructions in cells, and which latents they are of
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainldm.base.covariates import VOLUMES, Covariates, covariates_array, volumes_array
from brainldm.base.progress import Progress, Quiet
from brainldm.model.volume_reader import (
    CELL_MM,
    FEWEST_FOR_A_READER,
    LEAST_EXPLAINED,
    VolumeReader,
    cell_means,
    fitted_reader,
)
from brainldm.train.batches import evenly_spread
from brainldm.train.parts import kept_in_parts

# Two thousand people's Gram matrix takes seconds, and more people hardly change a weighted sum.
MOST_PEOPLE = 2000


def find_volume_reader(
    folder: Path,
    latents_NCXYZ: Callable[[Sequence[int]], torch.Tensor],
    people: Sequence[Covariates],
    decoded_XYZ: Callable[[int], np.ndarray],
    voxel_mm: float,
    key: str,
    *,
    progress: Progress = Quiet(),
) -> tuple[VolumeReader | None, dict[str, Any]]:
    """The reader of `people` (what the U-Net is told of them) from their latents (N, C, x, y, z) by index and what
    `decoded_XYZ` makes of them, and the facts of it. At most MOST_PEOPLE, evenly spread, are decoded, once for each
    `key`; an interrupted decoding is gone on with. None where it explains less than LEAST_EXPLAINED of either volume in
    people left out, or where these are fewer than FEWEST_FOR_A_READER."""
    if len(people) < FEWEST_FOR_A_READER:
        return None, {"people": len(people), "explained": dict.fromkeys(VOLUMES, 0.0), "used": False}
    cell_voxels = max(1, round(CELL_MM / voxel_mm))
    some = evenly_spread(len(people), MOST_PEOPLE)
    made_by = {"key": key, "cell_voxels": cell_voxels, "people": len(some)}

    def cells_of(indices: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        return ({"cells": cell_means(decoded_XYZ(index), cell_voxels)} for index in indices)

    cells = kept_in_parts(folder / "cells", made_by, some, cells_of, "decoding training people", progress)
    told = [people[at] for at in some]
    others_NF = covariates_array(told)[:, : -len(VOLUMES)]
    reader, explained_2 = fitted_reader(
        cell_voxels, cells.whole("cells"), latents_NCXYZ(some), others_NF, volumes_array(told)
    )
    used = bool((explained_2 >= LEAST_EXPLAINED).all())
    facts = {"people": len(some), "explained": dict(zip(VOLUMES, explained_2.tolist())), "used": used}
    return (reader if used else None), facts
