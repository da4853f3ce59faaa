"""The same work for many images, on several processes: one bad image never takes the others along."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from brainldm.base.errors import EnvironmentProblem
from brainldm.base.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    progress: Progress,
    what: str,
    finished_before: int = 0,
) -> Iterator[tuple[int, Result | Exception]]:
    """Yields (position, result or exception) for every item as it is finished, in no certain order.

    `work` must be picklable when `workers` > 1. Exceptions of `work` are results; only the end of a worker process
    itself (killed, out of memory) ends the whole, as EnvironmentProblem.
    """
    progress.start(what, len(items) + finished_before, finished_before)
    if workers <= 1 or len(items) < 2:
        for position, item in enumerate(items):
            outcome = _attempt(work, item)
            progress.advance()
            yield position, outcome
        return
    # Spawned, not forked: the parent may hold torch's and ITK's threads, which a fork copies in a broken state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=context)
    try:
        positions = {pool.submit(_attempt, work, item): position for position, item in enumerate(items)}
        for future in as_completed(positions):
            progress.advance()
            yield positions[future], future.result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            f"a worker process ended while {what} (killed, or out of memory).",
            remedy="Run the same command again with fewer workers: it goes on where it stopped.",
            reason="worker_died",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _attempt(work: Callable[[Item], Result], item: Item) -> Result | Exception:
    try:
        return work(item)
    except Exception as error:  # one image's fault is a row in a table, not the end of the others
        return error


def usable_cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
