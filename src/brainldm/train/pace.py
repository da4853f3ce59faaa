"""How fast a training goes, and how much of its time it waits for images."""

from __future__ import annotations

import time
from collections import deque

RECENT_STEPS = 50


class Pace:
    """Images a second and the share of time spent waiting for data, over the last RECENT_STEPS steps.

    `images_a_step` is the batch.
    """

    def __init__(self, images_a_step: int) -> None:
        self.images_a_step = images_a_step
        self._marks: deque[tuple[float, float]] = deque([(time.monotonic(), 0.0)], maxlen=RECENT_STEPS + 1)

    def mark(self, waited_seconds: float) -> float:
        """A step has ended, with so much waited since the start in all; returns how much of it was this step's."""
        before = self._marks[-1][1]
        self._marks.append((time.monotonic(), waited_seconds))
        return waited_seconds - before

    def __str__(self) -> str:
        (begun, waited_before), (now, waited) = self._marks[0], self._marks[-1]
        seconds = max(now - begun, 1e-9)
        images = self.images_a_step * (len(self._marks) - 1)
        return f"{images / seconds:.3g} images/s, {100 * (waited - waited_before) / seconds:.0f} % waiting for data"
