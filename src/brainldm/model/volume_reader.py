"""The volumes that an image shows, read by a weighted sum, and how a latent is changed until they are those told.

What a U-Net answers scatters: of brains that are told the same volumes, each shows a little more or less. Among
registered brains that is read with little error from an image's mean intensities in cells of 8 mm,

    volume = centre + weights . (cells - mean cells)

and changed along the direction in which the training people's latents go with the volume read, at the same age and sex.
One image more is decoded for it. The weights were found on reconstructed training people, and none on what a model
generated. The volumes are those that the U-Net is told: recorded, or with `volumes_as_decoded` recorded times what
cohort/measure found decoding to keep, and only so much does that instrument, which may judge the brains, enter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import avg_pool3d

from brainldm.model.description import VolumeReaderDescription

CELL_MM = 8.0
# Of the volumes of people left out while it was fitted, a reader explains so much of the variance, or is not used: what
# it does not explain, it writes into each image. A U-Net that answers with a slope of 0.7 and a scatter of 0.4 standard
# deviations errs as much by itself as it would after a reader of 0.75.
LEAST_EXPLAINED = 0.8
FEWEST_FOR_A_READER = 20
_PENALTIES = np.logspace(-2, 1, 7)  # of ridge regression, relative to the cells' own variance
# Cells that differ less than this share of the mean cell (air) are not blown up.
_LEAST_STD = 0.05
_VOXELS_AT_ONCE = 4096
# So many spreads beyond the training people a reading is still trusted: calibration tells a little more than is asked.
_MARGIN = 0.5


@dataclass(frozen=True)
class VolumeReader:
    """Of ventricles and brain, in this order (2): their `centre_mm3_2` and `spread_mm3_2` in the training people. One
    spread of what is read is a change by `directions_2CXYZ` of the latent, and a sum of `weights_2XYZ` over cells of
    `cell_voxels` along each axis, about `cells_XYZ`, the mean ones. Below `lowest_mm3_2` and above `highest_mm3_2`
    nothing is corrected: there a straight line through people deforms what is none of theirs."""

    cell_voxels: int
    centre_mm3_2: tuple[float, float]
    spread_mm3_2: tuple[float, float]
    lowest_mm3_2: tuple[float, float]
    highest_mm3_2: tuple[float, float]
    cells_XYZ: torch.Tensor
    weights_2XYZ: torch.Tensor
    directions_2CXYZ: torch.Tensor

    def read(self, image_XYZ: np.ndarray) -> np.ndarray:
        """Volumes (2,) of an image (X, Y, Z) in 0..1, in mm^3."""
        left_XYZ = cell_means(image_XYZ, self.cell_voxels) - self.cells_XYZ
        read_2 = torch.einsum("vxyz,xyz->v", self.weights_2XYZ.double(), left_XYZ.double()).numpy()
        return np.array(self.centre_mm3_2) + np.array(self.spread_mm3_2) * read_2

    def changed(self, latent_CXYZ: torch.Tensor, image_XYZ: np.ndarray, told_mm3_2: np.ndarray) -> torch.Tensor:
        """The latent of that image, changed by what its volumes miss of those told, both as far as they are trusted."""
        told_2, read_2 = (
            np.clip(volumes_2, self.lowest_mm3_2, self.highest_mm3_2)
            for volumes_2 in (told_mm3_2, self.read(image_XYZ))
        )
        missed_2 = (told_2 - read_2) / np.array(self.spread_mm3_2)
        change_2 = torch.from_numpy(missed_2.astype(np.float32)).to(latent_CXYZ.device)
        return latent_CXYZ + torch.einsum("v,vcxyz->cxyz", change_2, self.directions_2CXYZ.to(latent_CXYZ.device))

    def description(self) -> VolumeReaderDescription:
        return VolumeReaderDescription(
            cell_voxels=self.cell_voxels,
            centre_mm3=self.centre_mm3_2,
            spread_mm3=self.spread_mm3_2,
            lowest_mm3=self.lowest_mm3_2,
            highest_mm3=self.highest_mm3_2,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"cells": self.cells_XYZ, "weights": self.weights_2XYZ, "directions": self.directions_2CXYZ}


def cell_means(image_XYZ: np.ndarray, cell_voxels: int) -> torch.Tensor:
    """Mean intensities in cells of so many voxels along each axis, of an image clipped to 0..1; what is left over at an
    end counts nowhere."""
    image = torch.from_numpy(np.clip(image_XYZ, 0.0, 1.0, dtype=np.float32))
    return avg_pool3d(image[None, None], cell_voxels)[0, 0]


def fitted_reader(
    cell_voxels: int,
    cells_NXYZ: torch.Tensor,
    latent_NCXYZ: torch.Tensor,
    others_NF: np.ndarray,
    volumes_mm3_N2: np.ndarray,
) -> tuple[VolumeReader, np.ndarray]:
    """A reader of the people whose reconstructions have these cells and volumes, and the shares (2,) of the volumes'
    variance that it explains in people left out. `others_NF` are the covariates that a change of volumes leaves alone.

    Ridge regression, its penalty chosen by leaving out one person at a time. A share of nobody's variance is 0.
    """
    from sklearn.linear_model import RidgeCV  # takes a second to import

    centre_2, spread_2 = volumes_mm3_N2.mean(axis=0), np.maximum(volumes_mm3_N2.std(axis=0), 1.0)
    cells_XYZ = cells_NXYZ.mean(0)
    std_XYZ = cells_NXYZ.std(0)
    std_XYZ = std_XYZ.clamp(min=max(1e-6, _LEAST_STD * float(std_XYZ.mean())))
    scaled_NV = ((cells_NXYZ - cells_XYZ) / std_XYZ).flatten(1).double().numpy()
    wanted_N2 = (volumes_mm3_N2 - centre_2) / spread_2
    penalties = _PENALTIES * max(1e-6, float(np.square(scaled_NV).sum(axis=1).mean()))
    # With an intercept although all is centred: who is left out must not be known from the mean of all.
    ridge = RidgeCV(penalties, alpha_per_target=True).fit(scaled_NV, wanted_N2)
    variance_2 = wanted_N2.var(axis=0)
    explained_2 = np.where(variance_2 > 0, np.clip(1 + ridge.best_score_ / np.maximum(1e-12, variance_2), 0, 1), 0)
    weights_2XYZ = torch.from_numpy(ridge.coef_).reshape(2, *cells_XYZ.shape) / std_XYZ

    read_N2 = scaled_NV @ ridge.coef_.T
    design_NG = np.column_stack([np.ones(len(read_N2)), others_NF, read_N2])
    solve_2N = torch.from_numpy(np.linalg.pinv(design_NG)[-2:])
    directions = [solve_2N @ part.double() for part in latent_NCXYZ.flatten(1).split(_VOXELS_AT_ONCE, 1)]
    margin_2 = _MARGIN * spread_2
    reader = VolumeReader(
        cell_voxels,
        _pair(centre_2),
        _pair(spread_2),
        _pair(volumes_mm3_N2.min(axis=0) - margin_2),
        _pair(volumes_mm3_N2.max(axis=0) + margin_2),
        cells_XYZ.float(),
        weights_2XYZ.float(),
        torch.cat(directions, 1).reshape(2, *latent_NCXYZ.shape[1:]).float(),
    )
    return reader, explained_2


def _pair(values_2: np.ndarray) -> tuple[float, float]:
    ventricles, brain = values_2.tolist()
    return ventricles, brain
