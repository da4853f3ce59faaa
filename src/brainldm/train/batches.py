"""Which images make up which batch: the data order is two integers, the seed and the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from brainldm.cohort.dataset import data_order


class BatchOrder:
    """The members of every batch of a run over `count` images: each epoch is a permutation of its own.

    An epoch is cut into whole batches; what is left over stays out until the next epoch's permutation.
    """

    def __init__(self, seed: int, count: int, batch: int) -> None:
        self._seed, self._count, self._batch = seed, count, batch
        self.steps_an_epoch = count // batch
        self._current = (0, data_order(seed, 0, count))

    def members(self, step: int) -> list[int]:
        """Dataset indices of the batch of `step`. Threads may ask for different steps at once."""
        epoch, position = divmod(step, self.steps_an_epoch)
        current = self._current  # one assignment, so that no thread sees one epoch's number with another's order
        if current[0] != epoch:
            self._current = current = (epoch, data_order(self._seed, epoch, self._count))
        order = current[1]
        return [int(i) for i in order[position * self._batch : (position + 1) * self._batch]]

    def numbers(self, step: int) -> range:
        """The places of the step's members among all images that a run is shown. What is drawn for one of them is drawn
        from a stream of that number, so that a process can draw for its share of a batch alone."""
        return range(step * self._batch, (step + 1) * self._batch)


def normal_each(draws: Iterable[np.random.Generator], shape_CXYZ: Sequence[int]) -> torch.Tensor:
    """Standard normal numbers (B, C, X, Y, Z), each image's of draws of its own."""
    return torch.from_numpy(np.stack([draw.standard_normal(shape_CXYZ, np.float32) for draw in draws]))


def images_tensor(images_BXYZ: Sequence[np.ndarray] | np.ndarray, device: torch.device) -> torch.Tensor:
    """The images as networks take them: (B, 1, X, Y, Z), float32, channels last."""
    image_BXYZ = torch.from_numpy(np.ascontiguousarray(images_BXYZ, dtype=np.float32))
    return image_BXYZ[:, None].to(device).contiguous(memory_format=torch.channels_last_3d)


def evenly_spread(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))})
