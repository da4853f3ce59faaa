"""The latent diffusion model as one samples from it: covariates and noise in, images out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from brainldm.base.covariates import CovariateModel, CovariateRanges, Covariates, covariates_array
from brainldm.base.progress import Progress, Quiet
from brainldm.base.volume import Grid
from brainldm.diffusion.solvers import SAMPLERS
from brainldm.diffusion.target import eps_from_v
from brainldm.model.description import LatentDiffusionDescription
from brainldm.model.precision import autocast
from brainldm.nets.autoencoder import Autoencoder
from brainldm.nets.unet import DiffusionUNet, with_covariates

# step, shape of one row -> noise of that shape: every row brings its own stream.
RowNoise = Callable[[int, tuple[int, ...]], np.ndarray]


class ImageModel(Protocol):
    """What generation needs of a model, whatever is inside: latent diffusion, a GAN, anything."""

    name: str
    grid: Grid
    ranges: CovariateRanges
    joint: CovariateModel | None

    def sample(
        self,
        covariates: Sequence[Covariates],
        noise: Sequence[RowNoise],
        *,
        sampler: str,
        steps: int | None,
        precision: str,
        progress: Progress = ...,
    ) -> np.ndarray:
        """Images (B, X, Y, Z), float32, one a row of covariates."""


@dataclass(frozen=True)
class LatentDiffusion:
    """Autoencoder, U-Net and their description: the system of Pinaya et al. 2022."""

    description: LatentDiffusionDescription
    autoencoder: Autoencoder
    unet: DiffusionUNet

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
        return next(self.unet.parameters()).device

    def to(self, device: str | torch.device) -> LatentDiffusion:
        """The same model on `device`; the networks lie channels-last, which their convolutions are fastest in."""
        layout = torch.channels_last_3d
        return LatentDiffusion(
            self.description,
            self.autoencoder.to(device=device, memory_format=layout),  # type: ignore[call-overload]
            self.unet.to(device=device, memory_format=layout),  # type: ignore[call-overload]
        )

    @torch.no_grad()
    def sample(
        self,
        covariates: Sequence[Covariates],
        noise: Sequence[RowNoise],
        *,
        sampler: str = "ddim",
        steps: int | None = None,
        precision: str = "fp32",
        progress: Progress = Quiet(),  # noqa: B008  # stateless
    ) -> np.ndarray:
        """Images (B, X, Y, Z) in 0..1 units of the training cohort, not clipped, float32.

        Row i is a function of `covariates[i]` and `noise[i]` alone, up to the arithmetic of the batch size.
        """
        denoise = self._denoiser(covariates, precision)
        shape_CXYZ = tuple(self.description.latent.shape_CXYZ)

        def step_noise(step: int) -> torch.Tensor:
            rows = np.stack([row(step, shape_CXYZ) for row in noise]).astype(np.float32)
            return torch.from_numpy(rows).to(self.device)

        solve = SAMPLERS[sampler]
        latent_BCXYZ = solve.run(
            denoise,
            step_noise,
            self.description.schedule.build(),
            solve.default_steps if steps is None else steps,
            progress.advance,
        )
        image_BCXYZ = self.decode(latent_BCXYZ, precision)
        return image_BCXYZ[:, 0].float().cpu().numpy()

    def _denoiser(
        self, covariates: Sequence[Covariates], precision: str
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The network as the callable samplers want: (x, timesteps) -> eps."""
        normalised_BF = self.ranges.normalise(covariates_array(covariates)).astype(np.float32)
        condition_BF = torch.from_numpy(normalised_BF).to(self.device)
        schedule = self.description.schedule.build()

        def denoise(x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
            with autocast(self.device, precision):
                output = self.unet(*with_covariates(x_BCXYZ, timesteps_B, condition_BF)).float()
            return output if self.description.target == "eps" else eps_from_v(output, x_BCXYZ, timesteps_B, schedule)

        return denoise

    @torch.no_grad()
    def decode(self, latent_BCXYZ: torch.Tensor, precision: str = "fp32") -> torch.Tensor:
        """Images (B, 1, X, Y, Z) of latents in the U-Net's scale, decoded one by one to bound memory."""
        with autocast(self.device, precision):
            rows = [self.autoencoder.decode(row[None] / self.description.latent.scale) for row in latent_BCXYZ]
        return torch.cat(rows).float()
