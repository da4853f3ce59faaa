"""How latents are distributed voxel by voxel among the training people, told their covariates.

Registered brains are alike: at each place of the latent there is a mean brain, and a straight line by which it changes
with each covariate. That much needs no network. The U-Net works on what is left, divided by its standard deviation:

    x = (z - mean - slopes . covariates) / std

A network that begins here does not have to learn the average brain, and what it is asked for is already in the image
where its own answer is 0. It is not the paper's way, which scales all of the latent by one number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from brainldm.base.covariates import COVARIATES

# Standard deviations below this share of the mean one are raised to it: where nothing differs (air), noise of the
# encoder must not be blown up.
_LEAST_STD = 0.05
FEWEST_FOR_A_POPULATION = len(COVARIATES) + 2  # a line for each covariate, its height, and something left over
_VOXELS_AT_ONCE = 4096  # 40,000 people's in float64 are 1.3 GB


@dataclass(frozen=True)
class LatentPopulation:
    """`mean_CXYZ` is at covariates of 0, `slopes_FCXYZ` for each covariate as the network is told it, `std_CXYZ` of the
    residual; all in the autoencoder's units."""

    mean_CXYZ: torch.Tensor
    slopes_FCXYZ: torch.Tensor
    std_CXYZ: torch.Tensor

    @classmethod
    def fitted(
        cls, mean_NCXYZ: torch.Tensor, log_variance_NCXYZ: torch.Tensor, condition_NF: torch.Tensor
    ) -> LatentPopulation:
        """Least squares over people, in float64; the variance is that of the means about the line plus the encoder's
        own, whose logarithm is given. More people than covariates + 1 are needed."""
        people, shape = len(mean_NCXYZ), mean_NCXYZ.shape[1:]
        if people <= condition_NF.shape[1] + 1:
            raise ValueError(f"{people} people cannot carry a line for each of {condition_NF.shape[1]} covariates")
        design_NG = torch.cat([torch.ones(people, 1), condition_NF], dim=1).double()
        # By the pseudo-inverse, so that a covariate that is the same in everybody gets no slope.
        solve_GN = torch.linalg.pinv(design_NG)
        lines, variances = [], []
        for values, own in zip(
            mean_NCXYZ.flatten(1).split(_VOXELS_AT_ONCE, 1), log_variance_NCXYZ.flatten(1).split(_VOXELS_AT_ONCE, 1)
        ):
            values_NV = values.double()
            lines.append(solve_GN @ values_NV)
            left_NV = values_NV - design_NG @ lines[-1]
            variances.append(left_NV.square().sum(0) / (people - design_NG.shape[1]) + own.double().exp().mean(0))
        lines_GV, std_V = torch.cat(lines, 1), torch.cat(variances).sqrt()
        std_V = std_V.clamp(min=_LEAST_STD * float(std_V.mean()))
        return cls(
            lines_GV[0].reshape(shape).float(),
            lines_GV[1:].reshape(-1, *shape).float(),
            std_V.reshape(shape).float(),
        )

    def expected(self, condition_BF: torch.Tensor) -> torch.Tensor:
        """The mean latent of such people."""
        return self.mean_CXYZ + torch.einsum("bf,fcxyz->bcxyz", condition_BF, self.slopes_FCXYZ)

    def standardised(self, latent_BCXYZ: torch.Tensor, condition_BF: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents as the U-Net sees them."""
        return (latent_BCXYZ - self.expected(condition_BF)) / self.std_CXYZ

    def restored(self, x_BCXYZ: torch.Tensor, condition_BF: torch.Tensor) -> torch.Tensor:
        """The inverse of `standardised`."""
        return x_BCXYZ * self.std_CXYZ + self.expected(condition_BF)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean_CXYZ, "slopes": self.slopes_FCXYZ, "std": self.std_CXYZ}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], device: torch.device) -> LatentPopulation:
        return cls(*(tensors[name].float().to(device) for name in ("mean", "slopes", "std")))
