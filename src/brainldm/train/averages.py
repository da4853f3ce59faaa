"""The exponential moving average of a network's weights."""

from __future__ import annotations

import torch


class MovingAverage:
    """Weights averaged over the steps: w_ema <- d w_ema + (1 - d) w.

    The decay d rises to `decay` from 0 as (1 + step) / (10 + step), so that a short run is not an average of its random
    beginning.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = module.state_dict()
        averages = list(self.weights.values())
        torch._foreach_lerp_(averages, [current[name] for name in self.weights], 1 - decay)
