"""What the network is asked to predict, and how one prediction becomes another.

With s = sqrt(alpha_bar_t) and n = sqrt(1 - alpha_bar_t):  x_t = s x_0 + n eps,  v = s eps - n x_0 (Salimans & Ho 2022).
"""

from __future__ import annotations

import torch

from brainldm.diffusion.schedule import Schedule

TARGETS = ("eps", "v")


def add_noise(
    x0_BCXYZ: torch.Tensor, eps_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """x_t = s x_0 + n eps, each row at its own timestep."""
    signal, noise = schedule.at(timesteps_B, x0_BCXYZ)
    return signal * x0_BCXYZ + noise * eps_BCXYZ


def training_pair(
    target: str, x0_BCXYZ: torch.Tensor, eps_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's noisy input x_t and what it should answer."""
    x_BCXYZ = add_noise(x0_BCXYZ, eps_BCXYZ, timesteps_B, schedule)
    if target == "eps":
        return x_BCXYZ, eps_BCXYZ
    if target == "v":
        signal, noise = schedule.at(timesteps_B, x0_BCXYZ)
        return x_BCXYZ, signal * eps_BCXYZ - noise * x0_BCXYZ
    raise ValueError(f"no target is named {target!r}; known: {', '.join(TARGETS)}")


def eps_from_v(
    v_BCXYZ: torch.Tensor, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """eps = s v + n x_t."""
    signal, noise = schedule.at(timesteps_B, x_BCXYZ)
    return signal * v_BCXYZ + noise * x_BCXYZ


def x0_from_v(
    v_BCXYZ: torch.Tensor, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """x_0 = s x_t - n v."""
    signal, noise = schedule.at(timesteps_B, x_BCXYZ)
    return signal * x_BCXYZ - noise * v_BCXYZ


def v_from_eps(
    eps_BCXYZ: torch.Tensor, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """v = (eps - n x_t) / s; ill-conditioned where little signal is left, as x_0 from eps is."""
    signal, noise = schedule.at(timesteps_B, x_BCXYZ)
    return (eps_BCXYZ - noise * x_BCXYZ) / signal


def x0_from_eps(
    eps_BCXYZ: torch.Tensor, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """x_0 = (x_t - n eps) / s."""
    signal, noise = schedule.at(timesteps_B, x_BCXYZ)
    return (x_BCXYZ - noise * eps_BCXYZ) / signal


def eps_from_x0(
    x0_BCXYZ: torch.Tensor, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """eps = (x_t - s x_0) / n."""
    signal, noise = schedule.at(timesteps_B, x_BCXYZ)
    return (x_BCXYZ - signal * x0_BCXYZ) / noise
