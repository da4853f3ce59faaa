"""Work in processes: results and faults one by one, nobody left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence

import pytest

from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.base.pool import each_in_a_pool, kept_processes


def halved(number: int) -> float:
    if number == 3:
        raise BadInput("three is odd.", remedy="Take four.", path="/x", reason="odd")
    if number == 4:
        raise ZeroDivisionError("a slip")
    return number / 2


def threads_and_process(_: int) -> tuple[str, int]:
    return os.environ["OMP_NUM_THREADS"], os.getpid()


def killed(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def slow(number: int) -> int:
    time.sleep(0.0 if number == 0 else 60.0)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_each_task_has_its_result_or_its_own_fault(workers: int) -> None:
    outcomes = dict(each_in_a_pool(halved, range(6), workers=workers))
    assert {n: outcomes[n] for n in (0, 1, 2, 5)} == {0: 0.0, 1: 0.5, 2: 1.0, 5: 2.5}
    odd, slip = outcomes[3], outcomes[4]
    assert isinstance(odd, BadInput) and (odd.remedy, odd.reason) == ("Take four.", "odd")
    assert isinstance(slip, ZeroDivisionError)
    assert multiprocessing.active_children() == []


def test_workers_use_one_thread_each_and_the_parent_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    outcomes = [outcome for _, outcome in each_in_a_pool(threads_and_process, range(8), workers=2)]
    assert {outcome[0] for outcome in outcomes if not isinstance(outcome, Exception)} == {"1"}
    assert os.getpid() not in {outcome[1] for outcome in outcomes if not isinstance(outcome, Exception)}
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_worker_killed_from_outside_is_an_environment_problem() -> None:
    with pytest.raises(EnvironmentProblem, match="killed from outside") as caught:
        list(each_in_a_pool(killed, range(4), workers=2))
    assert "--workers" in caught.value.remedy


def asked_to_end(number: int) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return number


def test_a_workers_own_sigterm_is_the_parents_to_handle() -> None:
    """A scheduler sends it to all processes of a job."""
    assert sorted(result for _, result in each_in_a_pool(asked_to_end, [1, 2, 3], workers=2)) == [1, 2, 3]


def test_who_stops_listening_does_not_wait_for_the_rest() -> None:
    outcomes = each_in_a_pool(slow, range(4), workers=2)
    assert next(outcomes) == (0, 0)
    begun = time.monotonic()
    outcomes.close()
    assert time.monotonic() - begun < 10
    assert multiprocessing.active_children() == []


def processes_of(tasks: range, workers: int = 2) -> set[int]:
    outcomes = [outcome for _, outcome in each_in_a_pool(threads_and_process, tasks, workers=workers)]
    return {outcome[1] for outcome in outcomes if not isinstance(outcome, Exception)}


def test_kept_processes_serve_one_piece_of_work_after_another() -> None:
    with kept_processes():
        processes_of(range(8))
        first = {child.pid for child in multiprocessing.active_children()}
        assert processes_of(range(3)) <= first
        assert {child.pid for child in multiprocessing.active_children()} == first
        assert processes_of(range(8), workers=3).isdisjoint(first)
        assert len(multiprocessing.active_children()) <= 3
        with pytest.raises(EnvironmentProblem, match="killed from outside"):
            list(each_in_a_pool(killed, range(4), workers=3))
        stopped = each_in_a_pool(slow, range(4), workers=3)
        assert next(stopped) == (0, 0)
        stopped.close()
        assert multiprocessing.active_children() == []
        assert len(dict(each_in_a_pool(halved, range(6), workers=3))) == 6
    assert multiprocessing.active_children() == []
    assert processes_of(range(4)).isdisjoint(first)


class Counted(Sequence[int]):
    """Numbers that know how many of them were asked for."""

    asked = 0

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.asked = index + 1
        return index


def test_tasks_are_made_shortly_before_their_turn() -> None:
    tasks = Counted()
    outcomes = each_in_a_pool(halved, tasks, workers=2)
    next(outcomes)
    assert tasks.asked < 10
    outcomes.close()


def test_no_tasks_are_no_work() -> None:
    assert list(each_in_a_pool(halved, [], workers=4)) == []
