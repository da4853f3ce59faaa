"""How noise grows with the timestep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Schedule:
    """Variances of the steps and their products: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

    Arrays are float64, shape (T,), indexed by the timestep 0..T-1.
    """

    betas: np.ndarray
    alpha_bars: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.betas)

    def at(self, timesteps_B: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of each row's timestep, shaped to scale `like` (B, ...)."""
        alpha_bar = torch.from_numpy(self.alpha_bars)[timesteps_B.cpu().long()]
        shape = (-1, *(1,) * (like.ndim - 1))
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return tuple(factor.to(like.device, like.dtype).reshape(shape) for factor in (signal, noise))  # type: ignore[return-value]


def scaled_linear(beta_start: float = 0.0015, beta_end: float = 0.0205, steps: int = 1000) -> Schedule:
    """The paper's schedule: sqrt(beta) rises linearly (Rombach et al. 2022)."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    return Schedule(betas, np.cumprod(1 - betas))


def leading_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """`steps` timesteps evenly apart, the last one 0: 980, 960, ..., 0 for 50 of 1000. As the published bundle samples.

    MONAI 1.6 spaces them from 999 instead, which is another trajectory.
    """
    _check_steps(schedule, steps)
    stride = schedule.steps // steps
    return [stride * i for i in reversed(range(steps))]


def _check_steps(schedule: Schedule, steps: int) -> None:
    if not 1 <= steps <= schedule.steps:
        raise ValueError(f"{steps} sampling steps; the schedule has {schedule.steps}, so ask for 1 to {schedule.steps}")
