"""The latent diffusion model as one samples from it: covariates and noise in, images out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from brainldm.base.covariates import NOT_TOLD, CovariateRanges, Covariates, volumes_array
from brainldm.base.joint import CovariateModel
from brainldm.base.progress import Progress, Quiet
from brainldm.base.volume import Grid
from brainldm.diffusion.solvers import DEFAULT_SAMPLER, SAMPLERS, Denoise, Sampler
from brainldm.diffusion.target import eps_of, network_input
from brainldm.model.description import LatentDiffusionDescription
from brainldm.model.latent_population import LatentPopulation
from brainldm.model.memory import return_freed_memory
from brainldm.model.precision import autocast
from brainldm.model.volume_reader import VolumeReader
from brainldm.nets.atlas import AnyAutoencoder
from brainldm.nets.blocks import forget, is_forgotten
from brainldm.nets.slabs import decode_in_slabs
from brainldm.nets.unet import DiffusionUNet, with_covariates

# step, shape of one row -> noise of that shape: every row brings its own stream.
RowNoise = Callable[[int, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class LatentDiffusion:
    """Autoencoder, U-Net and their description: the system of Pinaya et al. 2022, and how it runs here.

    `precision` is fp32 or bf16. With `slab_bytes` images are decoded in slabs of about that size. With `reload_unet`
    the U-Net is given up before decoding, and read again by that function when it is needed next. `guidance` above 1
    exaggerates what is asked (Ho & Salimans 2022): two calls a step, of a model whose training kept it back at times.
    With a `volume_reader` the volumes of each image are read and its latent changed until they are those told.
    """

    description: LatentDiffusionDescription
    autoencoder: AnyAutoencoder
    unet: DiffusionUNet
    precision: str = "fp32"
    slab_bytes: int | None = None
    reload_unet: Callable[[], None] | None = None
    population: LatentPopulation | None = None
    guidance: float = 1.0
    volume_reader: VolumeReader | None = None

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
        return next(self.autoencoder.parameters()).device

    @torch.no_grad()
    def sample(
        self,
        covariates: Sequence[Covariates],
        noise: Sequence[RowNoise],
        *,
        sampler: str = DEFAULT_SAMPLER,
        steps: int | None = None,
        progress: Progress = Quiet(),
    ) -> np.ndarray:
        """Images (B, X, Y, Z) in 0..1 units of the training cohort, not clipped, float32, RAS+.

        Row i is a function of `covariates[i]` and `noise[i]` alone, up to the arithmetic of the batch size. `progress`
        advances by one for each sampling step and each time that an image is decoded.
        """
        latent_BCXYZ = self.sample_latents(covariates, noise, SAMPLERS[sampler], steps, progress)
        image_BXYZ = self.decode(latent_BCXYZ, progress)
        if self.volume_reader is None:
            return image_BXYZ
        told_B2 = volumes_array(self.description.covariates.told(covariates))
        changed = [self.volume_reader.changed(*row) for row in zip(latent_BCXYZ, image_BXYZ, told_B2)]
        return self.decode(torch.stack(changed), progress)

    @torch.no_grad()
    def sample_latents(
        self,
        covariates: Sequence[Covariates],
        noise: Sequence[RowNoise],
        sampler: Sampler,
        steps: int | None = None,
        progress: Progress = Quiet(),
    ) -> torch.Tensor:
        """Latents (B, C, x, y, z) in the autoencoder's units, float32, as the U-Net leaves them."""
        self.ready_unet()
        shape_CXYZ = tuple(self.description.latent.shape_CXYZ)

        def step_noise(step: int) -> torch.Tensor:
            rows = np.stack([row(step, shape_CXYZ) for row in noise]).astype(np.float32)
            return torch.from_numpy(rows).to(self.device)

        schedule = self.description.schedule.build()
        steps = sampler.default_steps if steps is None else steps
        x_BCXYZ = sampler.run(self.denoiser(covariates), step_noise, schedule, steps, progress.advance)
        if self.population is None:
            return x_BCXYZ / self.description.latent.scale
        return self.population.restored(x_BCXYZ, self._conditions(covariates))

    def ready_unet(self) -> None:
        """Reads the U-Net's weights again where they were given up."""
        if self.reload_unet is not None and is_forgotten(self.unet):
            self.reload_unet()

    def _conditions(self, covariates: Sequence[Covariates]) -> torch.Tensor:
        return torch.from_numpy(self.description.covariates.conditions(covariates)).to(self.device)

    def denoiser(self, covariates: Sequence[Covariates]) -> Denoise:
        """The network as the callable samplers want: (x, timesteps) -> eps."""
        told_BF = self._conditions(covariates)
        untold_BF = torch.full_like(told_BF, NOT_TOLD)
        schedule, target = self.description.schedule.build(), self.description.target

        def answer(x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, condition_BF: torch.Tensor) -> torch.Tensor:
            with autocast(self.device, self.precision):
                return self.unet(*with_covariates(x_BCXYZ, timesteps_B, condition_BF)).float()

        def denoise(x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
            shown_BCXYZ = network_input(target, x_BCXYZ, timesteps_B, schedule)
            output = answer(shown_BCXYZ, timesteps_B, told_BF)
            if self.guidance != 1:
                blind = answer(shown_BCXYZ, timesteps_B, untold_BF)
                output = blind + self.guidance * (output - blind)
            return eps_of(target, output, x_BCXYZ, timesteps_B, schedule)

        return denoise

    @torch.no_grad()
    def decode(
        self,
        latent_BCXYZ: torch.Tensor,
        progress: Progress = Quiet(),
    ) -> np.ndarray:
        """Images (B, X, Y, Z), float32, RAS+, of latents as `sample_latents` gives them, one by one to bound memory."""
        if self.reload_unet is not None:
            forget(self.unet)
            return_freed_memory()
        images_XYZ = []
        for latent_CXYZ in latent_BCXYZ:
            with autocast(self.device, self.precision):
                if self.slab_bytes is None:
                    image_BCXYZ = self.autoencoder.decode(latent_CXYZ[None])
                else:
                    image_BCXYZ = decode_in_slabs(self.autoencoder, latent_CXYZ[None], self.slab_bytes)
            image_XYZ = image_BCXYZ[0, 0].float().cpu().numpy()
            images_XYZ.append(image_XYZ[::-1] if self.description.grid.network_x == "right_to_left" else image_XYZ)
            progress.advance()
        image_BXYZ = np.stack(images_XYZ)
        if self.reload_unet is not None:
            return_freed_memory()
        return image_BXYZ
