"""What the network is asked to predict, and what noise its answer means.

With s = sqrt(alpha_bar_t) and n = sqrt(1 - alpha_bar_t):

    x_t = s x_0 + n eps      v = s eps - n x_0 (Salimans & Ho 2022)      flow = eps - x_0 (Liu et al. 2023)

A network of the target `flow` is shown the point of the straight line from image to noise, x_t / (s + n): with
t = n / (s + n) that is (1 - t) x_0 + t eps, whatever the schedule.
"""

from __future__ import annotations

import torch

from brainldm.diffusion.schedule import Schedule

TARGETS = ("eps", "v", "flow")


def add_noise(
    x0_BCXYZ: torch.Tensor, eps_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """x_t = s x_0 + n eps, each row at its own timestep."""
    signal, noise = schedule.at(timesteps_B, x0_BCXYZ)
    return signal * x0_BCXYZ + noise * eps_BCXYZ


def training_pair(
    target: str, x0_BCXYZ: torch.Tensor, eps_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's noisy input and what it should answer."""
    x_BCXYZ = add_noise(x0_BCXYZ, eps_BCXYZ, timesteps_B, schedule)
    if target == "eps":
        return x_BCXYZ, eps_BCXYZ
    if target == "v":
        signal, noise = schedule.at(timesteps_B, x0_BCXYZ)
        return x_BCXYZ, signal * eps_BCXYZ - noise * x0_BCXYZ
    if target == "flow":
        return network_input(target, x_BCXYZ, timesteps_B, schedule), eps_BCXYZ - x0_BCXYZ
    raise ValueError(f"no target is named {target!r}; known: {', '.join(TARGETS)}")


def network_input(target: str, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """What a network of this target is shown of x_t."""
    if target != "flow":
        return x_BCXYZ
    signal, noise = schedule.at(timesteps_B, x_BCXYZ)
    return x_BCXYZ / (signal + noise)


def eps_of(
    target: str, answer_BCXYZ: torch.Tensor, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """The noise in x_t that a network's answer means."""
    if target == "eps":
        return answer_BCXYZ
    if target == "v":
        return eps_from_v(answer_BCXYZ, x_BCXYZ, timesteps_B, schedule)
    return eps_from_flow(answer_BCXYZ, x_BCXYZ, timesteps_B, schedule)


def eps_from_flow(
    flow_BCXYZ: torch.Tensor, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """eps = (x_t + s flow) / (s + n)."""
    signal, noise = schedule.at(timesteps_B, x_BCXYZ)
    return (x_BCXYZ + signal * flow_BCXYZ) / (signal + noise)


def eps_from_v(
    v_BCXYZ: torch.Tensor, x_BCXYZ: torch.Tensor, timesteps_B: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """eps = s v + n x_t."""
    signal, noise = schedule.at(timesteps_B, x_BCXYZ)
    return signal * v_BCXYZ + noise * x_BCXYZ
