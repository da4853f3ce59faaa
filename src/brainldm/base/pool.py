"""Work handed out to processes: one thread each, no one task able to stop the rest, nothing left behind.

The workers start fresh (spawn), so nothing of the parent's threads or torch is copied into them, and they end by
themselves when the parent is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from brainldm.base.errors import EnvironmentProblem

Task = TypeVar("Task")
Result = TypeVar("Result")

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


def usable_cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each_in_a_pool(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int
) -> Generator[tuple[Task, Result | Exception]]:
    """Each task with its result, or with the exception that it raised, as they finish. One worker is this process.

    `work` and tasks must be importable and picklable. EnvironmentProblem when a worker is killed from outside.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            try:
                yield task, work(task)
            except Exception as error:
                yield task, error
        return
    with _one_thread_each():
        pool = ProcessPoolExecutor(
            min(workers, len(tasks)), multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        children_before = set(multiprocessing.active_children())
        try:
            yield from _as_finished(pool, work, tasks, ahead=2 * workers)
        except BrokenProcessPool as error:
            raise EnvironmentProblem(
                "a worker process was killed from outside; the usual reason is too little memory.",
                remedy="Run the same command again with fewer --workers: it goes on where it stopped.",
                reason="worker_killed",
            ) from error
        except BaseException:
            # Ctrl-C, a full disk, a consumer that stops: half-made files are swept up by the next run.
            for child in set(multiprocessing.active_children()) - children_before:
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _as_finished(
    pool: ProcessPoolExecutor, work: Callable[[Task], Result], tasks: Sequence[Task], *, ahead: int
) -> Iterator[tuple[Task, Result | Exception]]:
    waiting = list(reversed(tasks))
    running: dict[Future[Result], Task] = {}
    while waiting or running:
        while waiting and len(running) < ahead:
            task = waiting.pop()
            running[pool.submit(work, task)] = task
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            task = running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            if isinstance(error, Exception):
                yield task, error
            else:
                yield task, future.result()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started meanwhile use one thread: libraries read these variables when they are imported."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
