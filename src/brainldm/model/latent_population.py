"""How latents are distributed voxel by voxel among the training people, told their covariates.

Registered brains are alike: at each place of the latent there is a mean brain, and a straight line by which it changes
with each covariate. That much needs no network. The U-Net works on what is left, divided by its standard deviation:

    x = (z - mean - slopes . covariates) / std

A network that begins here does not have to learn the average brain, and what it is asked for is already in the image
where its own answer is 0. It is not the paper's way, which scales all of the latent by one number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from brainldm.base.covariates import COVARIATES

# Standard deviations below this share of the mean one are raised to it: where nothing differs (air), noise of the
# encoder must not be blown up.
_LEAST_STD = 0.05
FEWEST_FOR_A_POPULATION = len(COVARIATES) + 2  # a line for each covariate, its height, and something left over


@dataclass(frozen=True)
class LatentPopulation:
    """`mean_CXYZ` is at covariates of 0, `slopes_FCXYZ` for each covariate as the network is told it, `std_CXYZ` of the
    residual; all in the autoencoder's units."""

    mean_CXYZ: torch.Tensor
    slopes_FCXYZ: torch.Tensor
    std_CXYZ: torch.Tensor

    @classmethod
    def fitted(
        cls, latents: Iterable[tuple[torch.Tensor, torch.Tensor]], condition_NF: torch.Tensor
    ) -> LatentPopulation:
        """Least squares over people, in float64; the variance is that of the means about the line plus the encoder's
        own. `latents` are their means and log-variances (P, C, X, Y, Z) in order, some people at a time. More people
        than covariates + 1 are needed."""
        people = len(condition_NF)
        if people <= condition_NF.shape[1] + 1:
            raise ValueError(f"{people} people cannot carry a line for each of {condition_NF.shape[1]} covariates")
        design_NG = torch.cat([torch.ones(people, 1), condition_NF], dim=1).double()
        # By the pseudo-inverse, so that a covariate that is the same in everybody gets no slope.
        solve_GN = torch.linalg.pinv(design_NG)
        done, shape = 0, torch.Size()
        lines_GV, squares_V, own_V = (torch.zeros(1, dtype=torch.float64) for _ in range(3))
        for mean_PCXYZ, log_variance_PCXYZ in latents:
            shape, values_PV = mean_PCXYZ.shape[1:], mean_PCXYZ.flatten(1).double()
            lines_GV = lines_GV + solve_GN[:, done : done + len(values_PV)] @ values_PV
            squares_V = squares_V + values_PV.square().sum(0)
            own_V = own_V + log_variance_PCXYZ.flatten(1).double().exp().sum(0)
            done += len(values_PV)
        # The line and what is left are orthogonal, so that squares subtract.
        on_line_V = (lines_GV * (design_NG.T @ design_NG @ lines_GV)).sum(0)
        left_V = (squares_V - on_line_V).clamp(min=0) / (people - design_NG.shape[1])
        std_V = (left_V + own_V / people).sqrt()
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
