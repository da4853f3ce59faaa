"""What the next steps need is made ready while this step runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from brainldm.base.pool import usable_cpus

MOST_THREADS = 8  # enough for any step measured so far; each holds a batch

T = TypeVar("T")


class Feed(Generic[T]):
    """What `make(step)` gives, made ahead by threads of its own, one step each.

    `make` must be a function of the step alone and safe to run in several threads, so that what a step gets is the
    same whenever it was made (a resumed run begins anywhere). Nothing is made ahead from `steps` on. An error of `make`
    is raised by the step that asks for what it failed to make. `waited_seconds` is what all steps together waited.
    """

    def __init__(self, make: Callable[[int], T], steps: int, *, threads: int | None = None) -> None:
        self._make, self._steps = make, steps
        self._threads = threads or max(1, min(MOST_THREADS, usable_cpus() // 2))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="feed")
        self._ahead: dict[int, Future[T]] = {}
        self.waited_seconds = 0.0

    def take(self, step: int) -> T:
        """What belongs to `step`; begins on the steps after it, one a thread."""
        begun = time.monotonic()
        wanted = range(step, min(step + 1 + self._threads, self._steps))
        for passed in self._ahead.keys() - set(wanted):
            self._ahead.pop(passed).cancel()
        self._begin(step)
        made = self._ahead.pop(step).result()
        self.waited_seconds += time.monotonic() - begun
        for later in wanted[1:]:
            self._begin(later)
        return made

    def close(self) -> None:
        """Gives up what is being made and the threads; whoever took the last step calls it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._ahead.clear()
        del self._make  # which may hold whom the feed belongs to: a stage's networks would stay in memory

    def _begin(self, step: int) -> None:
        if step not in self._ahead:
            self._ahead[step] = self._pool.submit(self._make, step)


def made_ahead(make: Callable[[int], T], count: int) -> Iterator[T]:
    """`make(0)` to `make(count - 1)` in order, made ahead as in a Feed."""
    feed = Feed(make, count)
    try:
        for index in range(count):
            yield feed.take(index)
    finally:
        feed.close()
