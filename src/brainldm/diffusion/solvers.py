"""Samplers: functions of a callable, from noise to a sample.

`denoise(x, timesteps_B) -> eps` is all they know of a network; `step_noise(k)` gives the standard normal draw number k
of every row (0 starts the trajectory), so rows keep their own streams. Tested with a lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from brainldm.base.errors import UsageError
from brainldm.diffusion.schedule import (
    Schedule,
    all_timesteps,
    leading_timesteps,
    original_timesteps,
    snr_timesteps,
)

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
StepNoise = Callable[[int], torch.Tensor]


class Advance(Protocol):
    def __call__(self, steps: int = 1, note: str = "") -> None: ...


def _no_progress(steps: int = 1, note: str = "") -> None: ...


def _check_falling(timesteps: list[int]) -> None:
    if not timesteps or any(later >= t for t, later in pairwise(timesteps)) or timesteps[-1] < 0:
        raise ValueError(f"the timesteps {timesteps} must fall strictly, to 0 or above")


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
    _check_falling(timesteps)
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
    denoise: Denoise,
    step_noise: StepNoise,
    schedule: Schedule,
    timesteps: list[int],
    *,
    advance: Advance = _no_progress,
) -> torch.Tensor:
    """Ancestral sampling (Ho et al. 2020, equations 6, 7 and 15), posterior variance; `timesteps` must be all."""
    x = step_noise(0)
    for k, t in enumerate(timesteps):
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
class _Point:
    """A place on the schedule: x = signal x_0 + noise eps, and half the logarithm of their ratio's square."""

    timestep: int
    signal: float
    noise: float

    @property
    def log_snr(self) -> float:
        return math.log(self.signal / self.noise)


def _points(schedule: Schedule, timesteps: list[int]) -> list[_Point]:
    _check_falling(timesteps)
    alpha_bars = {t: float(schedule.alpha_bars[t]) for t in timesteps}
    return [_Point(t, alpha_bars[t] ** 0.5, (1 - alpha_bars[t]) ** 0.5) for t in timesteps]


def _clean(denoise: Denoise, x: torch.Tensor, at: _Point) -> torch.Tensor:
    """The clean sample that the network sees in x."""
    eps = denoise(x, torch.full((len(x),), at.timestep, device=x.device))
    return (x - at.noise * eps) / at.signal


def dpm_solver_pp(
    denoise: Denoise,
    step_noise: StepNoise,
    schedule: Schedule,
    timesteps: list[int],
    *,
    advance: Advance = _no_progress,
) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one network call a step, deterministic.

    The first and the last step are first order: at the start nothing is known of the past, and the last, to a sample
    without noise, is the network's own clean estimate.
    """
    points = _points(schedule, timesteps)
    x = step_noise(0)
    before: torch.Tensor | None = None
    last_h = 0.0
    for now, then in pairwise(points):
        clean = _clean(denoise, x, now)
        h = then.log_snr - now.log_snr
        ahead = clean if before is None else clean + (clean - before) * (h / (2 * last_h))
        x = (then.noise / now.noise) * x - then.signal * math.expm1(-h) * ahead
        before, last_h = clean, h
        advance()
    x = _clean(denoise, x, points[-1])
    advance()
    return x


def unipc(
    denoise: Denoise,
    step_noise: StepNoise,
    schedule: Schedule,
    timesteps: list[int],
    *,
    advance: Advance = _no_progress,
) -> torch.Tensor:
    """UniPC of second order (Zhao et al. 2023, B_2(h), multistep): a prediction, corrected by the network call that
    the next step needs anyway. One call a step, third-order accurate, deterministic."""
    points = _points(schedule, timesteps)
    x = step_noise(0)
    # Clean estimates and where they were made: the newest last.
    history: list[tuple[_Point, torch.Tensor]] = [(points[0], _clean(denoise, x, points[0]))]
    advance()
    for then in points[1:]:
        predicted = _unified_step(x, history[-2:], then)
        history.append((then, _clean(denoise, predicted, then)))
        advance()
        x = _unified_step(x, history[-3:-1], then, corrected_by=history[-1][1])
        history = history[-2:]
    # The estimate made at the last prediction is the sample: correcting x would ask for one more call.
    return history[-1][1]


def _unified_step(
    x: torch.Tensor, history: list[tuple[_Point, torch.Tensor]], then: _Point, corrected_by: torch.Tensor | None = None
) -> torch.Tensor:
    """One step of the unified formula (Zhao et al. 2023, equations 3 and 9, data prediction).

    It interpolates the clean estimate in log SNR through the estimates in `history` (newest last) and, for the
    corrector, the one at the end of the step; order is the number of those beyond the newest, plus one.
    """
    now, clean = history[-1]
    h = then.log_snr - now.log_snr
    others = [((point.log_snr - now.log_snr) / h, estimate) for point, estimate in history[:-1]]
    if corrected_by is not None:
        others.append((1.0, corrected_by))
    base = (then.noise / now.noise) * x - then.signal * math.expm1(-h) * clean
    if not others:
        return base
    # The weights rho solve a small Vandermonde system that makes the polynomial's terms exact.
    ratios = np.array([ratio for ratio, _ in others])
    scale = math.expm1(-h)
    terms, phi = [], math.expm1(-h) / -h - 1
    for order in range(1, len(others) + 1):
        terms.append(phi * math.factorial(order) / scale)
        phi = phi / -h - 1 / math.factorial(order + 1)
    if len(others) == 1:
        weights = np.array([0.5])  # what B_2(h) tends to, and what the authors take at this order
    else:
        weights = np.linalg.solve(np.vander(ratios, increasing=True).T, np.array(terms))
    change = sum(
        float(weight) * (estimate - clean) / float(ratio) for weight, (ratio, estimate) in zip(weights, others)
    )
    return base - then.signal * scale * change


def heun(
    denoise: Denoise,
    step_noise: StepNoise,
    schedule: Schedule,
    timesteps: list[int],
    *,
    advance: Advance = _no_progress,
) -> torch.Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1) on dz/dsigma = eps, z = x / signal, sigma = noise / signal.

    Second order, two network calls a step except the last, which goes to a sample without noise at once.
    """
    points = _points(schedule, timesteps)
    z = step_noise(0) / points[0].signal
    for now, then in pairwise(points):
        width = then.noise / then.signal - now.noise / now.signal
        slope = denoise(z * now.signal, torch.full((len(z),), now.timestep, device=z.device))
        guess = z + width * slope
        there = denoise(guess * then.signal, torch.full((len(z),), then.timestep, device=z.device))
        z = z + width * 0.5 * (slope + there)
        advance()
    x = _clean(denoise, z * points[-1].signal, points[-1])
    advance()
    return x


def _original_ddim(
    denoise: Denoise,
    step_noise: StepNoise,
    schedule: Schedule,
    timesteps: list[int],
    *,
    advance: Advance = _no_progress,
) -> torch.Tensor:
    """The authors' first code: eta 1, ending at alpha_bar_0."""
    last = float(schedule.alpha_bars[0])
    return ddim(denoise, step_noise, schedule, timesteps, eta=1.0, last_alpha_bar=last, advance=advance)


@dataclass(frozen=True)
class Sampler:
    """A sampler by name: `solver` along `timesteps`; `default_steps` is what it is known for.

    `timesteps(schedule, steps)` is where it calls the network; ValueError for a number of steps it cannot take, so that
    callers can ask before the work begins.
    """

    solver: Callable[..., torch.Tensor]
    timesteps: Callable[[Schedule, int], list[int]]
    default_steps: int
    calls_twice: bool = False  # at every step but the last

    def run(
        self,
        denoise: Denoise,
        step_noise: StepNoise,
        schedule: Schedule,
        steps: int,
        advance: Advance = _no_progress,
    ) -> torch.Tensor:
        """A sample of the noise, in `steps` steps."""
        return self.solver(denoise, step_noise, schedule, self.timesteps(schedule, steps), advance=advance)


# Of those that come as near to 1000 steps as 50 of DDIM the one with the fewest calls, and a few to spare
# (docs/samplers.json, by `brainldm samplers`).
DEFAULT_SAMPLER = "unipc"

SAMPLERS = {
    "ddim": Sampler(ddim, leading_timesteps, 50),
    "ddim-original": Sampler(_original_ddim, original_timesteps, 50),
    "ddpm": Sampler(ddpm, all_timesteps, 1000),
    "dpm++": Sampler(dpm_solver_pp, snr_timesteps, 12),
    "unipc": Sampler(unipc, snr_timesteps, 12),
    "heun": Sampler(heun, snr_timesteps, 13, calls_twice=True),
}


def sampler_named(name: str) -> Sampler:
    """The sampler of that name; UsageError for one that is not there."""
    if name not in SAMPLERS:
        raise UsageError(f"no sampler is named {name!r}.", remedy=f"Choose one of: {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]
