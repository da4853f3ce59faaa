"""How noise grows with the timestep, and which timesteps a sampler visits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# The ends of a rectified flow's line are pure image and pure noise, of which nothing can be learnt and from which
# logarithms of ratios cannot be taken. A hundredth is what the published schedule leaves too (its last signal: 0.0098).
LEAST_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Schedule:
    """Variances of the steps and their products: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

    Arrays are float64, shape (T,), read-only, indexed by the timestep 0..T-1.
    """

    betas: np.ndarray
    alpha_bars: np.ndarray

    def __post_init__(self) -> None:
        for name in ("betas", "alpha_bars"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def steps(self) -> int:
        return len(self.betas)

    def at(self, timesteps_B: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of each row's timestep, shaped to scale `like` (B, ...)."""
        timesteps = timesteps_B.cpu().long().numpy()
        if timesteps.size and not 0 <= timesteps.min() <= timesteps.max() < self.steps:
            raise ValueError(
                f"timesteps {timesteps.min()} to {timesteps.max()} are not all in 0..{self.steps - 1}, "
                "the steps of the schedule: draw them from there"
            )
        alpha_bar = torch.from_numpy(self.alpha_bars[timesteps])
        shape = (-1, *(1,) * (like.ndim - 1))
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return signal.to(like.device, like.dtype).reshape(shape), noise.to(like.device, like.dtype).reshape(shape)


def scaled_linear(beta_start: float = 0.0015, beta_end: float = 0.0205, steps: int = 1000) -> Schedule:
    """The paper's schedule: sqrt(beta) rises linearly (Rombach et al. 2022)."""
    if not 0 < beta_start <= beta_end < 1 or steps < 1:
        raise ValueError(
            f"betas from {beta_start} to {beta_end} in {steps} steps: they must rise between 0 and 1, in 1 step or more"
        )
    betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    return Schedule(betas, np.cumprod(1 - betas))


def rectified(steps: int = 1000) -> Schedule:
    """The straight line of rectified flow (Liu et al. 2023), t evenly from LEAST_SHARE to 1 - LEAST_SHARE:
    (1 - t) x_0 + t eps, divided by the root of (1 - t)^2 + t^2 so that it is a schedule like the others.

    Samplers see no difference; a network that is trained on the target `flow` sees the line itself (target.py).
    """
    if steps < 2:
        raise ValueError(f"{steps} steps: a line has 2 or more")
    t = np.linspace(LEAST_SHARE, 1 - LEAST_SHARE, steps)
    alpha_bars = (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    return Schedule(1 - alpha_bars / np.concatenate([[1.0], alpha_bars[:-1]]), alpha_bars)


def leading_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """`steps` timesteps evenly apart, the last one 0: 980, 960, ..., 0 for 50 of 1000. As the published bundle samples.

    MONAI 1.6 spaces them from 999 instead, which is another trajectory. Where `steps` does not divide the schedule the
    gaps differ by one; a constant gap (as MONAI had) would leave out the noisiest timesteps: for 600 of 1000 it would
    start from pure noise at t = 599, where a fifth of the amplitude should be signal.
    """
    _check_steps(steps, schedule.steps)
    return [i * schedule.steps // steps for i in reversed(range(steps))]


def original_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """The same, one later: 981, 961, ..., 1 for 50 of 1000. As the authors' first code sampled."""
    _check_steps(steps, schedule.steps - 1)
    return [t + 1 for t in leading_timesteps(schedule, steps)]


def all_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """Every timestep, falling to 0; `steps` must be their number."""
    if steps != schedule.steps:
        raise ValueError(
            f"{steps} sampling steps were asked for: ddpm takes all {schedule.steps} of the schedule; ddim takes fewer"
        )
    return list(reversed(range(steps)))


def snr_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """`steps` timesteps from the noisiest to 0, even in the logarithm of the signal-to-noise ratio (Lu et al. 2022).

    Even in time leaves the last, nearly clean steps too wide for a solver of higher order: on a model of recipe quick
    unipc with 10 steps was then 3.5 times as far from the exact result, and blends of both lay between. The steps below
    t = 0.15 change an image as a whole little, yet ending before them loses its finest texture
    (tests/test_diffusion_solvers: of a thousandth of the variance, more than half of its amplitude). Fewer than 8 steps
    are too few for this spacing.
    """
    _check_steps(steps, schedule.steps)
    log_snr = np.log(schedule.alpha_bars) - np.log1p(-schedule.alpha_bars)
    wanted = np.linspace(log_snr[0], log_snr[-1], steps) if steps > 1 else log_snr[-1:]
    found = np.rint(np.interp(-wanted, -log_snr, np.arange(schedule.steps))).astype(int)
    # Where rounding makes two the same, the later one moves up: there are enough timesteps for all.
    for k in range(1, steps):
        found[k] = max(found[k], found[k - 1] + 1)
    for k in reversed(range(steps)):
        found[k] = min(found[k], schedule.steps - steps + k)
    return [int(t) for t in found[::-1]]


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} sampling steps were asked for: ask for 1 to {most} on this schedule")
