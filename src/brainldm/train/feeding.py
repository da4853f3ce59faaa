"""The next step's images are made ready while this step runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """What `make(step)` gives, one step ahead, by a thread of its own.

    `make` must be a function of the step alone, so that what a step gets is the same whether it was made ahead or not
    (a resumed run begins anywhere). Nothing is made ahead from `steps` on. An error of `make` is raised by the step
    that asks for what it failed to make. `waited_seconds` is what all steps together waited.
    """

    def __init__(self, make: Callable[[int], T], steps: int) -> None:
        self._make, self._steps = make, steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[T]] | None = None
        self.waited_seconds = 0.0

    def take(self, step: int) -> T:
        """What belongs to `step`; begins on the step after it."""
        begun = time.monotonic()
        if self._ahead is not None and self._ahead[0] == step:
            made = self._ahead[1].result()
        else:
            made = self._make_now(step)
        self.waited_seconds += time.monotonic() - begun
        self._ahead = (step + 1, self._thread.submit(self._make, step + 1)) if step + 1 < self._steps else None
        return made

    def _make_now(self, step: int) -> T:
        # In the same thread, after whatever it still makes: `make` never runs twice at a time.
        return self._thread.submit(self._make, step).result()
