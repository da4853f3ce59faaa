"""Work handed out to processes: one thread each, no one task able to stop the rest, nothing left behind.

The workers start fresh (spawn), so nothing of the parent's threads or torch is copied into them, and they end by
themselves when the parent is killed.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from brainldm.base.errors import EnvironmentProblem, UsageError

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


def check_workers(workers: int) -> None:
    """UsageError for fewer than one."""
    if workers < 1:
        raise UsageError(f"{workers} workers were asked for.", remedy="Ask for at least 1.")


def each_in_a_pool(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int
) -> Generator[tuple[Task, Result | Exception]]:
    """Each task with its result, or with the exception that it raised, as they finish. One worker is this process.

    A task is taken from `tasks` shortly before its turn, so a sequence may make each when it is asked for. `work` and
    tasks must be importable and picklable. EnvironmentProblem when a worker is killed from outside.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            try:
                yield task, work(task)
            except Exception as error:
                yield task, error
        return
    kept = _kept.get()
    with _one_thread_each():
        processes = _Processes(min(workers, len(tasks))) if kept is None else kept.processes(workers)
        try:
            yield from _as_finished(processes.pool, work, tasks, ahead=2 * workers)
        except BrokenProcessPool as error:
            processes.end()
            raise EnvironmentProblem(
                "a worker process was killed from outside; the usual reason is too little memory.",
                remedy="The same command goes on where it stopped; give it fewer --workers where it has them. Workers "
                "begin by reading a script of yours: call what starts them below if __name__ == '__main__'.",
                reason="worker_killed",
            ) from error
        except BaseException:
            # Ctrl-C, a full disk, a consumer that stops: half-made files are swept up by the next run.
            processes.end()
            raise
        if kept is None:
            processes.close()


@contextlib.contextmanager
def kept_processes() -> Iterator[None]:
    """Until the end, pieces of work that are handed out one after another go to the same processes, which need not
    import and read everything anew for each."""
    kept = _Kept()
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
        kept.close()


class _Processes:
    """A pool and the processes that it started."""

    def __init__(self, workers: int) -> None:
        self.workers, self.ended = workers, False
        self._children_before = set(multiprocessing.active_children())
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)

    def close(self) -> None:
        """Waits for what is running."""
        self.ended = True
        self.pool.shutdown(wait=True, cancel_futures=True)

    def end(self) -> None:
        """Without waiting for what is running."""
        for child in set(multiprocessing.active_children()) - self._children_before:
            child.kill()  # they do not hear SIGTERM
        self.close()


class _Kept:
    """The processes of the last piece of work, for the next one that wants as many."""

    def __init__(self) -> None:
        self._last: _Processes | None = None

    def processes(self, workers: int) -> _Processes:
        if self._last is None or self._last.ended or self._last.workers != workers:
            self.close()
            self._last = _Processes(workers)
        return self._last

    def close(self) -> None:
        if self._last is not None and not self._last.ended:
            self._last.close()


_kept: contextvars.ContextVar[_Kept | None] = contextvars.ContextVar("kept processes", default=None)


def _as_finished(
    pool: ProcessPoolExecutor, work: Callable[[Task], Result], tasks: Sequence[Task], *, ahead: int
) -> Iterator[tuple[Task, Result | Exception]]:
    waiting = iter(tasks)
    running: dict[Future[Result], Task] = {}
    while True:
        for task in itertools.islice(waiting, ahead - len(running)):
            running[pool.submit(work, task)] = task
        if not running:
            return
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
    # Ctrl-C, and what a scheduler sends to all processes of a job, are the parent's to handle.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
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
