"""A GAN baseline as one samples from it: covariates and noise in, images out, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from brainldm.base.covariates import CovariateRanges, Covariates
from brainldm.base.joint import CovariateModel
from brainldm.base.progress import Progress, Quiet
from brainldm.base.volume import Grid
from brainldm.model.description import GanDescription
from brainldm.model.latent_diffusion import RowNoise
from brainldm.model.precision import autocast
from brainldm.nets.gan import GanGenerator


@dataclass(frozen=True)
class GanModel:
    """The generator of an LSGAN or VAE-GAN and its description. `precision` is fp32 or bf16."""

    description: GanDescription
    generator: GanGenerator
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def grid(self) -> Grid:
        return self.description.grid.build()

    @property
    def ranges(self) -> CovariateRanges:
        return self.description.covariates.fitted_ranges()

    @property
    def joint(self) -> CovariateModel | None:
        return self.description.covariates.joint_model()

    @property
    def device(self) -> torch.device:
        return self.generator.first.weight.device

    @torch.no_grad()
    def sample(
        self,
        covariates: Sequence[Covariates],
        noise: Sequence[RowNoise],
        *,
        sampler: str = "none",
        steps: int | None = None,
        progress: Progress = Quiet(),
    ) -> np.ndarray:
        """Images (B, X, Y, Z) in 0..1 units of the training cohort, float32, RAS+; there is no sampler and no step.

        Row i is a function of `covariates[i]` and `noise[i]` alone. `progress` advances by one for each image.
        """
        condition_BF = self.description.covariates.conditions(covariates)
        images_XYZ = []
        for row, condition_F in zip(noise, condition_BF):  # one by one: a batch would only take memory
            drawn = row(0, (self.description.generator.noise_features,)).astype(np.float32)[None]
            inputs = (torch.from_numpy(part).to(self.device) for part in (drawn, condition_F[None]))
            with autocast(self.device, self.precision):
                image_B1XYZ = self.generator(*inputs)
            images_XYZ.append(image_B1XYZ[0, 0].float().cpu().numpy())
            progress.advance()
        return np.stack(images_XYZ)
