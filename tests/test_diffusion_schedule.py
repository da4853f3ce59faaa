"""The noise schedule and the timesteps of the samplers: the paper's numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from brainldm.diffusion.schedule import (
    LEAST_SHARE,
    all_timesteps,
    leading_timesteps,
    original_timesteps,
    rectified,
    scaled_linear,
    snr_timesteps,
)


def test_the_paper_s_schedule() -> None:
    schedule = scaled_linear()
    assert schedule.steps == 1000
    assert schedule.betas[0] == pytest.approx(0.0015) and schedule.betas[-1] == pytest.approx(0.0205)
    # sqrt(beta) is linear, so the middle one is the square of the mean of the ends'.
    assert scaled_linear(steps=3).betas[1] == pytest.approx(((0.0015**0.5 + 0.0205**0.5) / 2) ** 2)
    assert schedule.alpha_bars.dtype == np.float64
    assert schedule.alpha_bars[999] == pytest.approx(9.69e-5, rel=1e-3)
    np.testing.assert_allclose(schedule.alpha_bars, np.cumprod(1 - schedule.betas))


def test_the_schedule_is_monai_s() -> None:
    from monai.networks.schedulers import DDIMScheduler

    theirs = DDIMScheduler(1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0205)
    np.testing.assert_allclose(scaled_linear().alpha_bars, theirs.alphas_cumprod.numpy(), rtol=2e-5)


def test_a_schedule_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        scaled_linear().alpha_bars[0] = 0.5


def test_signal_and_noise_share_the_variance_of_each_row() -> None:
    schedule, like = scaled_linear(), torch.zeros(3, 2, 4, 5, 6)
    signal, noise = schedule.at(torch.tensor([0, 500, 999]), like)
    assert signal.shape == noise.shape == (3, 1, 1, 1, 1)
    assert signal.dtype == torch.float32
    torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal))
    assert signal.flatten().tolist() == pytest.approx(np.sqrt(schedule.alpha_bars[[0, 500, 999]]).tolist())


@pytest.mark.parametrize("outside", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(outside: int) -> None:
    with pytest.raises(ValueError, match=r"not all in 0\.\.999"):
        scaled_linear().at(torch.tensor([5, outside]), torch.zeros(2, 1))


def test_fifty_steps_as_the_bundle_and_as_the_authors() -> None:
    schedule = scaled_linear()
    assert leading_timesteps(schedule, 50) == list(range(980, -1, -20))
    assert original_timesteps(schedule, 50) == list(range(981, 0, -20))
    assert leading_timesteps(schedule, 1000) == all_timesteps(schedule, 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 300, 600, 999])
def test_any_number_of_steps_falls_evenly_from_the_noisy_end_to_the_clean_one(steps: int) -> None:
    schedule = scaled_linear()
    for timesteps, last in ((leading_timesteps(schedule, steps), 0), (original_timesteps(schedule, steps), 1)):
        assert len(timesteps) == steps
        gaps = -np.diff([1000 + last, *timesteps])
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
        assert timesteps[-1] == last and timesteps[0] < schedule.steps


@pytest.mark.parametrize(
    ("choose", "steps"),
    [(leading_timesteps, 0), (leading_timesteps, 1001), (original_timesteps, 1000), (all_timesteps, 50)],
)
def test_numbers_of_steps_that_do_not_fit_are_refused(choose, steps: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=f"{steps} sampling steps"):
        choose(scaled_linear(), steps)


@pytest.mark.parametrize("wrong", [{"beta_start": 0.0}, {"beta_end": 1.0}, {"beta_start": 0.03}, {"steps": 0}])
def test_a_schedule_that_is_none_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must rise between 0 and 1"):
        scaled_linear(**wrong)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
def test_timesteps_even_in_log_snr_fall_from_the_noisiest_to_nought(steps: int) -> None:
    schedule = scaled_linear()
    timesteps = snr_timesteps(schedule, steps)
    assert len(timesteps) == steps
    assert timesteps[0] == 999
    assert steps == 1 or timesteps[-1] == 0
    assert all(a > b for a, b in pairwise(timesteps))
    if steps == 7:
        log_snr = np.log(schedule.alpha_bars[timesteps] / (1 - schedule.alpha_bars[timesteps]))
        np.testing.assert_allclose(np.diff(log_snr), np.diff(log_snr).mean(), rtol=0.15)


def test_a_rectified_flow_is_a_schedule_like_the_others() -> None:
    schedule = rectified(1000)
    t = np.linspace(LEAST_SHARE, 1 - LEAST_SHARE, 1000)
    np.testing.assert_allclose(np.sqrt(schedule.alpha_bars), (1 - t) / np.hypot(t, 1 - t))
    np.testing.assert_allclose(np.cumprod(1 - schedule.betas), schedule.alpha_bars)
    assert (np.diff(schedule.alpha_bars) < 0).all()
    with pytest.raises(ValueError, match="2 or more"):
        rectified(1)
