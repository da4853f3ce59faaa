"""The samplers, against distributions known in closed form and against MONAI's schedulers.

The truth: for images that are independent normals N(MEAN, SPREAD^2), the best prediction of the noise in x_t is linear
in x_t, and the deterministic sampler in the limit of small steps is the linear map that takes the normal at the end of
the schedule to the one of the images.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from brainldm.diffusion.schedule import (
    Schedule,
    all_timesteps,
    leading_timesteps,
    original_timesteps,
    rectified,
    scaled_linear,
    snr_timesteps,
)
from brainldm.diffusion.solvers import SAMPLERS, ddim, ddpm, dpm_solver_pp, heun, unipc
from brainldm.diffusion.target import eps_from_v

MEAN, SPREAD = 0.7, 0.4
SCHEDULE = scaled_linear()
EVERY = all_timesteps(SCHEDULE, SCHEDULE.steps)
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def exact_eps(schedule: Schedule) -> Denoise:
    """E[eps | x_t] for images from N(MEAN, SPREAD^2)."""

    def denoise(x: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        signal, noise = schedule.at(timesteps_B, x)
        return noise * (x - signal * MEAN) / (signal**2 * SPREAD**2 + noise**2)

    return denoise


def step_noise(*shape: int, seed: int = 0) -> Callable[[int], torch.Tensor]:
    """Draw number k of a seeded stream, the same whenever asked."""
    return lambda k: torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + k), dtype=torch.float64)


def test_ddim_converges_to_the_true_map_at_first_order() -> None:
    fine = scaled_linear(0.0015 / 32, 0.0205 / 32, 32_000)  # so that its last step, to alpha_bar 1, is small
    start = step_noise(4, 50)
    alpha_bar = fine.alpha_bars[-1]
    standard = (start(0) - alpha_bar**0.5 * MEAN) / (alpha_bar * SPREAD**2 + 1 - alpha_bar) ** 0.5
    true = MEAN + SPREAD * standard
    errors = []
    for steps in (50, 100, 200, 400):
        timesteps = leading_timesteps(fine, steps)
        found = ddim(exact_eps(fine), start, fine, timesteps)
        errors.append((found - true).abs().max().item())
    assert errors[-1] < 0.03
    rates = [coarse / finer for coarse, finer in pairwise(errors)]
    assert all(1.7 < rate < 2.3 for rate in rates), rates


def test_ddim_is_deterministic_and_draws_only_the_start() -> None:
    asked: list[int] = []

    def noise(k: int) -> torch.Tensor:
        asked.append(k)
        return step_noise(2, 10)(k)

    first = SAMPLERS["ddim"].run(exact_eps(SCHEDULE), noise, SCHEDULE, 50)
    assert asked == [0]
    assert torch.equal(first, SAMPLERS["ddim"].run(exact_eps(SCHEDULE), noise, SCHEDULE, 50))


def linear_moments(
    solve: Callable[[Denoise, Callable[[int], torch.Tensor]], torch.Tensor], draws: int, schedule: Schedule
) -> tuple[float, float]:
    """Exact mean and standard deviation of what a solver makes, read off its answers to unit noises: it is linear."""
    zero = torch.zeros(1, draws + 1, dtype=torch.float64)

    def unit(k: int) -> torch.Tensor:
        noise = zero.clone()
        noise[0, k] = 1.0
        return noise

    offset = solve(exact_eps(schedule), lambda k: zero)
    response = solve(exact_eps(schedule), unit) - offset
    return offset[0, 0].item(), response.square().sum().sqrt().item()


# Few steps narrow the distribution: by 9 and 15 % for images as narrow as these. A thousand hardly do.
@pytest.mark.parametrize(("name", "narrowing"), [("ddim", 0.1), ("ddim-original", 0.16), ("ddpm", 0.02)])
def test_samples_have_the_mean_and_nearly_the_spread_of_the_images(name: str, narrowing: float) -> None:
    sampler = SAMPLERS[name]
    steps = sampler.default_steps
    mean, spread = linear_moments(lambda eps, noise: sampler.run(eps, noise, SCHEDULE, steps), steps, SCHEDULE)
    assert mean == pytest.approx(MEAN, rel=0.01)
    assert (1 - narrowing) * SPREAD < spread < SPREAD


def test_ddpm_converges_to_the_spread_of_the_images_at_first_order() -> None:
    errors = []
    for refined in (1, 2, 4):
        schedule = scaled_linear(0.0015 / refined, 0.0205 / refined, 1000 * refined)
        every = all_timesteps(schedule, schedule.steps)
        _, spread = linear_moments(lambda eps, noise: ddpm(eps, noise, schedule, every), schedule.steps, schedule)  # noqa: B023
        errors.append(SPREAD - spread)
    assert all(1.6 < coarse / finer < 2.2 for coarse, finer in pairwise(errors)), errors


def test_ddpm_s_samples_scatter_as_the_moments_say() -> None:
    """The same by drawing: mean and variance of 40,000 independent samples, within four standard errors."""
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    samples = ddpm(exact_eps(SCHEDULE), lambda k: torch.randn((1, n), generator=generator), SCHEDULE, EVERY)
    steps = SCHEDULE.steps
    mean, spread = linear_moments(lambda eps, noise: ddpm(eps, noise, SCHEDULE, EVERY), steps, SCHEDULE)
    assert samples.mean().item() == pytest.approx(mean, abs=4 * spread / n**0.5)
    assert samples.var().item() == pytest.approx(spread**2, abs=4 * spread**2 * (2 / n) ** 0.5)


def test_ddim_with_eta_one_through_every_step_is_ddpm() -> None:
    noise = step_noise(3, 7)
    torch.testing.assert_close(
        ddim(exact_eps(SCHEDULE), noise, SCHEDULE, EVERY, eta=1.0), ddpm(exact_eps(SCHEDULE), noise, SCHEDULE, EVERY)
    )


def rough_eps(x: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
    """A denoiser that is nothing like linear."""
    return torch.sin(3 * x) + 0.001 * timesteps_B.reshape(-1, *(1,) * (x.ndim - 1))


def test_ddim_is_monai_s_step_on_the_bundle_s_timesteps() -> None:
    from monai.networks.schedulers import DDIMScheduler

    theirs = DDIMScheduler(1000, "scaled_linear_beta", clip_sample=False, beta_start=0.0015, beta_end=0.0205)
    theirs.set_timesteps(50)
    x = start = step_noise(2, 3, 4, 5, 4)(0)
    for t in leading_timesteps(SCHEDULE, 50):  # not theirs.timesteps: see leading_timesteps
        x, _ = theirs.step(rough_eps(x, torch.full((2,), t)), t, x)
    found = SAMPLERS["ddim"].run(rough_eps, lambda k: start, SCHEDULE, 50)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)  # their schedule is float32


def test_ddpm_is_monai_s() -> None:
    from monai.networks.schedulers import DDPMScheduler

    short = scaled_linear(0.01, 0.2, 30)
    theirs = DDPMScheduler(30, schedule="scaled_linear_beta", beta_start=0.01, beta_end=0.2, clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn((2, 3, 4), generator=generator) for _ in range(30)]
    generator.manual_seed(0)
    x = torch.randn((2, 3, 4), generator=generator)
    for t in reversed(range(30)):
        x, _ = theirs.step(rough_eps(x, torch.full((2,), t)), t, x, generator=generator)
    found = ddpm(rough_eps, lambda k: draws[k], short, all_timesteps(short, 30))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_the_original_sampler_ends_at_the_first_alpha_and_is_noisy_to_the_last() -> None:
    asked: list[int] = []

    def noise(k: int) -> torch.Tensor:
        asked.append(k)
        return torch.ones(1, 1, dtype=torch.float64)

    visited: list[int] = []

    def denoise(x: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        visited.append(int(timesteps_B[0]))
        return torch.zeros_like(x)

    found = SAMPLERS["ddim-original"].run(denoise, noise, SCHEDULE, 50).item()
    assert visited == original_timesteps(SCHEDULE, 50) == SAMPLERS["ddim-original"].timesteps(SCHEDULE, 50)
    assert asked == list(range(51))
    # Denoised by 0 and noised by 1 at every step, the sample is a sum that can be written down.
    bars = [*SCHEDULE.alpha_bars[visited], SCHEDULE.alpha_bars[0]]
    expected = 1.0
    for now, then in pairwise(bars):
        expected = (then / now) ** 0.5 * expected + ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_row_is_the_same_whoever_is_in_the_batch(name: str) -> None:
    sampler, rows = SAMPLERS[name], [step_noise(1, 6, seed=i) for i in range(3)]

    def sample(members: list[int]) -> torch.Tensor:
        return sampler.run(
            rough_eps, lambda k: torch.cat([rows[i](k) for i in members]), SCHEDULE, sampler.default_steps
        )

    together = sample([0, 1, 2])
    assert torch.isfinite(together).all()
    for i in range(3):
        assert torch.equal(sample([i])[0], together[i])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_progress_is_told_of_every_step_and_the_timesteps_are_those_visited(name: str) -> None:
    sampler, told, visited = SAMPLERS[name], [], []

    def denoise(x: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        visited.append(int(timesteps_B[0]))
        return torch.zeros_like(x)

    def advance(steps: int = 1, note: str = "") -> None:
        told.append(steps)

    sampler.run(denoise, step_noise(1, 2), SCHEDULE, sampler.default_steps, advance)
    assert sum(told) == sampler.default_steps
    assert list(dict.fromkeys(visited)) == sampler.timesteps(SCHEDULE, sampler.default_steps)


@pytest.mark.parametrize(
    ("timesteps", "eta", "told"),
    [
        ([10, 10, 0], 0.0, "must fall strictly"),
        ([0, 10], 0.0, "must fall strictly"),
        ([], 0.0, "must fall strictly"),
        ([10, -1], 0.0, "must fall strictly"),
        ([10, 0], 1.5, "eta is 1.5"),
    ],
)
def test_a_trajectory_that_is_none_is_refused(timesteps: list[int], eta: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ddim(rough_eps, step_noise(1, 2), SCHEDULE, timesteps, eta=eta)


def test_ddpm_with_fewer_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"50 sampling steps .* ddpm takes all 1000"):
        SAMPLERS["ddpm"].run(rough_eps, step_noise(1, 2), SCHEDULE, 50)


def test_arithmetic_in_float32_is_near_that_in_float64() -> None:
    """The division by sqrt(alpha_bar) = 0.01 at the start magnifies roundings a hundredfold, and they stay small."""
    start = step_noise(2, 100)(0)
    exact = ddim(exact_eps(SCHEDULE), lambda k: start, SCHEDULE, leading_timesteps(SCHEDULE, 50))
    single = ddim(exact_eps(SCHEDULE), lambda k: start.float(), SCHEDULE, leading_timesteps(SCHEDULE, 50))
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.double(), exact, atol=1e-4)


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (dpm_solver_pp, 2), (heun, 2), (unipc, 3)])
@pytest.mark.parametrize("target", ["eps", "v"])
def test_each_solver_converges_at_its_order(solver: Callable[..., torch.Tensor], order: int, target: str) -> None:
    """Doubling the steps divides the error by 2^order. The truth is the flow's clean estimate at the last timestep."""
    fine = scaled_linear(0.0015 / 40, 0.0205 / 40, 40_000)
    eps = exact_eps(fine)

    def through_v(x: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        signal, noise = fine.at(timesteps_B, x)
        return eps_from_v((eps(x, timesteps_B) - noise * x) / signal, x, timesteps_B, fine)

    start = step_noise(4, 50)
    alpha_bar = fine.alpha_bars[-1]
    standard = (start(0) - alpha_bar**0.5 * MEAN) / (alpha_bar * SPREAD**2 + 1 - alpha_bar) ** 0.5
    signal, noise = fine.alpha_bars[0] ** 0.5, (1 - fine.alpha_bars[0]) ** 0.5
    spread = (signal**2 * SPREAD**2 + noise**2) ** 0.5
    true = MEAN + signal * SPREAD**2 / spread * standard
    errors = []
    for steps in (20, 40, 80):
        found = solver(eps if target == "eps" else through_v, start, fine, snr_timesteps(fine, steps))
        errors.append((found - true).abs().max().item())
    rates = [coarse / finer for coarse, finer in pairwise(errors)]
    assert all(0.8 * 2**order < rate < 1.35 * 2**order for rate in rates), rates


@pytest.mark.parametrize(("name", "calls_a_step"), [("ddim", 1), ("dpm++", 1), ("unipc", 1), ("heun", 2)])
def test_what_a_step_costs(name: str, calls_a_step: int) -> None:
    calls = 0

    def counted(x: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return exact_eps(SCHEDULE)(x, timesteps_B)

    advanced: list[int] = []
    SAMPLERS[name].run(counted, step_noise(1, 2), SCHEDULE, 12, lambda steps=1, note="": advanced.append(steps))
    assert calls == (12 if calls_a_step == 1 else 2 * 12 - 1)
    assert sum(advanced) == 12


@pytest.mark.parametrize("name", ["dpm++", "unipc", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
def test_any_number_of_steps_gives_numbers(name: str, steps: int) -> None:
    found = SAMPLERS[name].run(exact_eps(SCHEDULE), step_noise(1, 8), SCHEDULE, steps)
    assert torch.isfinite(found).all()


def test_few_steps_come_nearer_to_the_limit_than_ddim_with_fifty() -> None:
    start = step_noise(4, 50)
    limit = SAMPLERS["unipc"].run(exact_eps(SCHEDULE), start, SCHEDULE, 400)

    def distance(name: str, steps: int) -> float:
        return (SAMPLERS[name].run(exact_eps(SCHEDULE), start, SCHEDULE, steps) - limit).abs().max().item()

    assert distance("dpm++", 12) < distance("ddim", 50)
    assert distance("unipc", 10) < distance("ddim", 50)


@pytest.mark.parametrize("schedule", [scaled_linear(), rectified()])
def test_twelve_steps_keep_the_spread_of_large_things_and_of_small_ones(schedule: Schedule) -> None:
    """Directions of variances from a thousandth (the finest texture) to thousands (what all voxels share)."""
    variances_V = torch.logspace(-3, 3.4, 33, dtype=torch.float64)

    def exact(x: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        signal, noise = schedule.at(timesteps_B, x)
        return noise * x / (signal**2 * variances_V + noise**2)

    def spread(timesteps: list[int]) -> torch.Tensor:
        return unipc(exact, lambda _: torch.ones(1, len(variances_V), dtype=torch.float64), schedule, timesteps)[0]

    limit = spread(snr_timesteps(schedule, 400))
    assert spread(snr_timesteps(schedule, 12)) == pytest.approx(limit, rel=0.04)
    # To leave the last steps out, where an image as a whole hardly changes, would lose its texture.
    early = [t for t in snr_timesteps(schedule, 16) if schedule.alpha_bars[t] < 0.98]
    assert (spread(early)[0] < 0.5 * limit[0]).item()
