"""Samplers: functions of a callable, from noise to a sample.

`denoise(x, timesteps_B) -> eps` is all they know of a network; `step_noise(k)` gives the standard normal draw number k
of every row (0 starts the trajectory), so rows keep their own streams. Tested with a lambda.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from brainldm.diffusion.schedule import Schedule, all_timesteps, leading_timesteps, original_timesteps

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
StepNoise = Callable[[int], torch.Tensor]


class Advance(Protocol):
    def __call__(self, steps: int = 1, note: str = "") -> None: ...


def _no_progress(steps: int = 1, note: str = "") -> None: ...


def ddim(
    denoise: Denoise,
    step_noise: StepNoise,
    schedule: Schedule,
    timesteps: list[int],
    *,
    eta: float = 0.0,
    last_alpha_bar: float = 1.0,
    advance: Advance = _no_progress,
) -> torch.Tensor:
    """DDIM (Song et al. 2021, equation 12) along falling `timesteps`; eta 0 is deterministic, 1 as noisy as DDPM.

    After the last timestep the sample is brought to `last_alpha_bar`: 1 in the published bundle, alpha_bar_0 in the
    authors' original code.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it must be from 0 (deterministic) to 1 (as noisy as DDPM)")
    if not timesteps or any(later >= t for t, later in pairwise(timesteps)) or timesteps[-1] < 0:
        raise ValueError(f"the timesteps {timesteps} must fall strictly, to 0 or above")
    x = step_noise(0)
    alpha_bars = [float(schedule.alpha_bars[t]) for t in timesteps] + [last_alpha_bar]
    for k, t in enumerate(timesteps):
        now, then = alpha_bars[k], alpha_bars[k + 1]
        eps = denoise(x, torch.full((len(x),), t, device=x.device))
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x = then**0.5 * x0 + max(0.0, 1 - then - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * step_noise(k + 1)
        advance()
    return x


def ddpm(
    denoise: Denoise, step_noise: StepNoise, schedule: Schedule, *, advance: Advance = _no_progress
) -> torch.Tensor:
    """Ancestral sampling through every timestep (Ho et al. 2020, equations 6, 7 and 15), posterior variance."""
    x = step_noise(0)
    for k, t in enumerate(reversed(range(schedule.steps))):
        beta, now = float(schedule.betas[t]), float(schedule.alpha_bars[t])
        before = float(schedule.alpha_bars[t - 1]) if t > 0 else 1.0
        eps = denoise(x, torch.full((len(x),), t, device=x.device))
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = (before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - before) * x) / (1 - now)
        if t > 0:
            x = x + ((1 - before) / (1 - now) * beta) ** 0.5 * step_noise(k + 1)
        advance()
    return x


@dataclass(frozen=True)
class Sampler:
    """A sampler by name: `run` takes the number of steps; `default_steps` is what it is known for.

    `timesteps(schedule, steps)` is where it calls the network; ValueError for a number of steps it cannot take, so that
    callers can ask before the work begins.
    """

    run: Callable[[Denoise, StepNoise, Schedule, int, Advance], torch.Tensor]
    timesteps: Callable[[Schedule, int], list[int]]
    default_steps: int


def _bundle_ddim(
    denoise: Denoise, step_noise: StepNoise, schedule: Schedule, steps: int, advance: Advance = _no_progress
) -> torch.Tensor:
    return ddim(denoise, step_noise, schedule, leading_timesteps(schedule, steps), advance=advance)


def _original_ddim(
    denoise: Denoise, step_noise: StepNoise, schedule: Schedule, steps: int, advance: Advance = _no_progress
) -> torch.Tensor:
    """The authors' first code: timesteps one later, eta 1, ending at alpha_bar_0."""
    timesteps, last = original_timesteps(schedule, steps), float(schedule.alpha_bars[0])
    return ddim(denoise, step_noise, schedule, timesteps, eta=1.0, last_alpha_bar=last, advance=advance)


def _all_steps_ddpm(
    denoise: Denoise, step_noise: StepNoise, schedule: Schedule, steps: int, advance: Advance = _no_progress
) -> torch.Tensor:
    all_timesteps(schedule, steps)
    return ddpm(denoise, step_noise, schedule, advance=advance)


SAMPLERS = {
    "ddim": Sampler(_bundle_ddim, leading_timesteps, 50),
    "ddim-original": Sampler(_original_ddim, original_timesteps, 50),
    "ddpm": Sampler(_all_steps_ddpm, all_timesteps, 1000),
}
