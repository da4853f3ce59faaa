"""The moving average of weights and the learning rate's course, in numbers that can be written down."""

from __future__ import annotations

import pytest
import torch

from brainldm.train.averages import MovingAverage
from brainldm.train.loop import learning_rate_factor


@pytest.mark.parametrize(("step", "decay", "average"), [(0, 0.999, 0.9), (0, 0.05, 0.95), (10**6, 0.999, 0.001)])
def test_an_average_takes_its_share_of_new_weights_and_a_larger_one_early(
    step: int, decay: float, average: float
) -> None:
    module = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(module.weight)
    averaged = MovingAverage(module, decay)
    torch.nn.init.ones_(module.weight)
    averaged.update(module, step)
    assert averaged.weights["weight"].item() == pytest.approx(average, rel=1e-4)


def test_the_learning_rate_rises_in_a_line_and_stays() -> None:
    factors = [learning_rate_factor(step, warmup_steps=3, total_steps=9, cosine_decay=False) for step in range(9)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]


def test_the_learning_rate_falls_by_half_a_cosine_to_0_and_no_further() -> None:
    factors = [learning_rate_factor(step, warmup_steps=0, total_steps=10, cosine_decay=True) for step in (0, 5, 10, 12)]
    assert factors == pytest.approx([1, 0.5, 0, 0], abs=1e-12)
    assert learning_rate_factor(0, warmup_steps=3, total_steps=10, cosine_decay=True) == 0.25
