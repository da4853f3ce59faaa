"""The volume reader of a run, fitted to the training people's reconstructions (model/volume_reader).

RUN/latents/cells.safetensors   mean intensities of the reconstructions in cells, and which latents they are of; those
                                found so far, while they are decoded
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from brainldm.base.covariates import VOLUMES, Covariates, covariates_array, volumes_array
from brainldm.base.progress import Progress, Quiet
from brainldm.model.tensors import write_tensors
from brainldm.model.volume_reader import (
    CELL_MM,
    FEWEST_FOR_A_READER,
    LEAST_EXPLAINED,
    VolumeReader,
    cell_means,
    fitted_reader,
)
from brainldm.train.batches import evenly_spread

# Two thousand people's Gram matrix takes seconds, and more people hardly change a weighted sum.
MOST_PEOPLE = 2000
PART_LENGTH = 64


def find_volume_reader(
    folder: Path,
    latent_NCXYZ: torch.Tensor,
    people: Sequence[Covariates],
    decoded_XYZ: Callable[[int], np.ndarray],
    voxel_mm: float,
    key: str,
    *,
    progress: Progress = Quiet(),  # noqa: B008  # stateless
) -> tuple[VolumeReader | None, dict[str, Any]]:
    """The reader of `people` (what the U-Net is told of them) from their latents (N, C, x, y, z) and what
    `decoded_XYZ` makes of them, and the facts of it. At most MOST_PEOPLE, evenly spread, are decoded, once for each
    `key`; an interrupted decoding is gone on with. None where it explains less than LEAST_EXPLAINED of either volume in
    people left out, or where these are fewer than FEWEST_FOR_A_READER."""
    if len(people) < FEWEST_FOR_A_READER:
        return None, {"people": len(people), "explained": dict.fromkeys(VOLUMES, 0.0), "used": False}
    cell_voxels = max(1, round(CELL_MM / voxel_mm))
    some = evenly_spread(len(people), MOST_PEOPLE)
    cells_NXYZ = _cells(folder / "cells.safetensors", some, decoded_XYZ, cell_voxels, key, progress)
    told = [people[at] for at in some]
    latents = latent_NCXYZ[: len(people)] if len(some) == len(people) else latent_NCXYZ[some]
    others_NF = covariates_array(told)[:, : -len(VOLUMES)]
    reader, explained_2 = fitted_reader(cell_voxels, cells_NXYZ, latents, others_NF, volumes_array(told))
    used = bool((explained_2 >= LEAST_EXPLAINED).all())
    facts = {"people": len(some), "explained": dict(zip(VOLUMES, explained_2.tolist())), "used": used}
    return (reader if used else None), facts


def _cells(
    path: Path,
    people: list[int],
    decoded_XYZ: Callable[[int], np.ndarray],
    cell_voxels: int,
    key: str,
    progress: Progress,
) -> torch.Tensor:
    """(N, x, y, z); those that the file holds of the same latents are not decoded again."""
    made_by = {"key": key, "cell_voxels": str(cell_voxels), "people": str(len(people))}
    rows = _found_before(path, made_by)
    if len(rows) < len(people):
        progress.start("decoding training people", len(people), len(rows))
    while len(rows) < len(people):
        for index in people[len(rows) : len(rows) + PART_LENGTH]:
            rows.append(cell_means(decoded_XYZ(index), cell_voxels))
            progress.advance()
        write_tensors(path, {"cells": torch.stack(rows)}, made_by)
    return torch.stack(rows)


def _found_before(path: Path, made_by: dict[str, str]) -> list[torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.get_tensor("cells")) if file.metadata() == made_by else []
    except (SafetensorError, OSError):  # none, or damaged
        return []
