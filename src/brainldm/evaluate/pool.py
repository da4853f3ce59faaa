"""The same work for many images, on several processes: one bad image never takes the others along."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from brainldm.base.errors import EnvironmentProblem
from brainldm.base.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Up to `count` processes for the steps of one evaluation, started at the first step that is worth it.

    >>> from brainldm.base.progress import Quiet
    >>> with Workers(1) as workers:
    ...     sorted(workers.each(abs, [-1, 2], progress=Quiet(), what="taking absolute values"))
    [(0, 1), (1, 2)]
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def each(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        progress: Progress,
        what: str,
        done_before: int = 0,
        heavy: bool = True,
    ) -> Iterator[tuple[int, Result | Exception]]:
        """Yields (position, result or exception) for every item as it is finished, in no certain order.

        Work that is not `heavy` is done here, because starting processes would take longer. `work` must be picklable.
        Exceptions of `work` are results; only the end of a worker process itself (killed, out of memory) ends the
        whole, as EnvironmentProblem.
        """
        progress.start(what, len(items) + done_before, done_before)
        if self.count <= 1 or len(items) < 2 or not heavy:
            for position, item in enumerate(items):
                outcome = _attempt(work, item)
                progress.advance()
                yield position, outcome
            return
        if self._pool is None:
            # Spawned, not forked: this process may hold torch's and ITK's threads, which a fork copies broken.
            self._pool = ProcessPoolExecutor(self.count, mp_context=multiprocessing.get_context("spawn"))
        try:
            positions = {self._pool.submit(_attempt, work, item): position for position, item in enumerate(items)}
            for future in as_completed(positions):
                progress.advance()
                yield positions[future], future.result()
        except BrokenProcessPool as error:
            raise EnvironmentProblem(
                f"a worker process ended while {what} (killed, or out of memory).",
                remedy="Run the same command again with fewer workers: it goes on where it stopped.",
                reason="worker_died",
            ) from error


def _attempt(work: Callable[[Item], Result], item: Item) -> Result | Exception:
    try:
        return work(item)
    except Exception as error:  # one image's fault is a row in a table, not the end of the others
        return error


def usable_cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
