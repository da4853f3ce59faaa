"""What the network learns to predict, and that its answer leads back to noise and image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainldm.diffusion.schedule import LEAST_SHARE, rectified, scaled_linear
from brainldm.diffusion.target import (
    TARGETS,
    add_noise,
    eps_of,
    network_input,
    training_pair,
)

SCHEDULE = scaled_linear()
TIMES = torch.tensor([0, 20, 500, 999])


def draw(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((4, 3, 2, 3, 4), generator=generator, dtype=torch.float64)


def test_noise_is_added_by_each_row_s_timestep() -> None:
    x0, eps = draw(0), draw(1)
    x = add_noise(x0, eps, TIMES, SCHEDULE)
    for row, t in enumerate(TIMES.tolist()):
        alpha_bar = SCHEDULE.alpha_bars[t]
        torch.testing.assert_close(x[row], alpha_bar**0.5 * x0[row] + (1 - alpha_bar) ** 0.5 * eps[row])


@pytest.mark.parametrize("target", TARGETS)
def test_the_answer_leads_back_to_noise_and_image(target: str) -> None:
    x0, eps = draw(0), draw(1)
    x, answer = training_pair(target, x0, eps, TIMES, SCHEDULE)
    noisy = add_noise(x0, eps, TIMES, SCHEDULE)
    torch.testing.assert_close(x, network_input(target, noisy, TIMES, SCHEDULE))
    found = eps_of(target, answer, noisy, TIMES, SCHEDULE)
    torch.testing.assert_close(found, eps)
    signal, noise = SCHEDULE.at(TIMES, x0)
    torch.testing.assert_close((noisy - noise * found) / signal, x0)


def test_a_flow_network_is_shown_the_straight_line_and_asked_for_its_direction() -> None:
    x0, eps, line = draw(0), draw(1), rectified(1000)
    shown, answer = training_pair("flow", x0, eps, TIMES, line)
    for row, t in enumerate(np.linspace(LEAST_SHARE, 1 - LEAST_SHARE, 1000)[TIMES.numpy()]):
        torch.testing.assert_close(shown[row], (1 - t) * x0[row] + t * eps[row])
    torch.testing.assert_close(answer, eps - x0)


def test_v_is_an_image_where_all_is_noise_and_noise_where_all_is_image() -> None:
    """The angle view (Salimans & Ho 2022): (x, v) is (x_0, eps) turned by arctan(n / s)."""
    x0, eps = draw(0), draw(1)
    x, v = training_pair("v", x0, eps, TIMES, SCHEDULE)
    torch.testing.assert_close(x**2 + v**2, x0**2 + eps**2)
    torch.testing.assert_close(v[3], -x0[3], atol=0.05, rtol=0)  # t = 999
    torch.testing.assert_close(v[0], eps[0], atol=0.2, rtol=0)  # t = 0


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="no target is named 'x'; known: eps, v, flow"):
        training_pair("x", draw(0), draw(1), TIMES, SCHEDULE)
