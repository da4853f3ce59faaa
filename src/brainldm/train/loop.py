"""The training loop: one for every stage, in the order things happen.

A stage is a small object with a `step`; the loop owns time, logs, checkpoints, signals and the check that the loss is
a number. A run that was stopped, killed or crashed goes on from its newest checkpoint and ends with the same weights,
averages, moments and log as one that never stopped (bit for bit on a CPU).
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from brainldm.base.errors import BadInput, BrainldmError, UsageError
from brainldm.base.feeding import Feed
from brainldm.base.files import make_folder, read_json, write_json, write_text, writing
from brainldm.base.progress import Progress, Quiet, warn
from brainldm.model.tensors import write_tensors
from brainldm.train.checkpoint import (
    Checkpoint,
    check_made_for,
    check_not_beyond,
    drop_newer,
    load_newest,
    save_checkpoint,
)
from brainldm.train.distributed import ALONE, Place
from brainldm.train.pace import Pace
from brainldm.train.tensorboard import Board

FIRST_CHECKPOINT_SECONDS = 20.0
LOG_SECONDS = 1.0  # how old may be what somebody who looks at the log sees


class Stage(Protocol):
    """What the loop needs of a stage of training."""

    name: str
    steps: int

    def step(self, step: int) -> dict[str, float]:
        """Makes optimisation step number `step` (from 0) and returns what the log should say of it."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a later step depends on."""

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes `tensors()` back."""

    def batch_names(self, step: int) -> list[str]:
        """The participants of that step's batch, for messages."""

    def preview(self, path: Path) -> None:
        """Writes a picture of how far it is. All processes are asked, as sharded networks need; the leader writes."""


@runtime_checkable
class Begins(Protocol):
    """A stage that does something once, before its first step; a run that goes on has it in the checkpoint."""

    def begin(self) -> None:
        """Sets from the data what does not come from the seed."""


@runtime_checkable
class Fed(Protocol):
    """A stage whose batches are made ahead; what it waits for them is logged."""

    feed: Feed[Any]


@runtime_checkable
class ShowsBatch(Protocol):
    """A stage that can say what its networks were shown."""

    def batch_tensors(self, step: int) -> dict[str, torch.Tensor]:
        """The whole batch of that step, of all processes, made again: images or latents as they went in."""


@runtime_checkable
class MadeFor(Protocol):
    """A stage whose weights are worth nothing on anything but what `facts` identify."""

    facts: dict[str, str]


class Terminated(BrainldmError):
    """SIGTERM or SIGUSR1 came; the state was saved."""

    exit_code = 143


def check_asked(steps: int | None, minutes: float | None) -> None:
    """UsageError for no steps, or no time."""
    if steps is not None and steps < 1:
        raise UsageError(f"{steps} steps were asked for.", remedy="Ask for at least 1.")
    if minutes is not None and not 0 < minutes < math.inf:
        raise UsageError(f"{minutes:g} minutes were asked for.", remedy="Ask for more than 0, such as --minutes 60.")


def run_stage(
    stage: Stage,
    folder: Path,
    *,
    minutes: float | None = None,
    checkpoint_minutes: float = 5.0,
    tensorboard: bool = False,
    progress: Progress = Quiet(),
    place: Place = ALONE,
    asked: list[int] | None = None,
) -> dict[str, Any]:
    """Trains `stage` in `folder` to its last step, or for `minutes` of training time in all, and returns a summary.

    Resumes by itself. `asked` is the list of a caller who listens for signals already (asked_to_end). Raises BadInput
    when the loss is not finite (the batch is named and kept, nothing is saved over the good checkpoint), Terminated,
    exit code 143, after saving when the process is asked to end, and EnvironmentProblem when the disk is full or, with
    several processes (`place`), when another one ends.
    """
    checkpoints = folder / "checkpoints"
    done, seconds_before = _taken_up(stage, folder, place)
    board = Board(folder / "tensorboard", done) if tensorboard and place.leads else None
    log = _Log(folder, done, board, writes=place.leads)
    pace = Pace(len(stage.batch_names(0)))
    progress.start(f"training {stage.name}", stage.steps, done)

    begun = saved_at = time.monotonic()
    first_save, saved = not done, done or None
    with asked_to_end() if asked is None else nullcontext(asked) as asked, _feed_closed_after(stage):
        while done < stage.steps:
            elapsed = seconds_before + time.monotonic() - begun
            if minutes is not None and any(place.anywhere(elapsed >= minutes * 60)):
                break
            # One optimisation step
            figures = place.mean(stage.step(done))
            _check_finite(figures, done, stage, folder, place)
            done += 1
            waited = pace.mark(stage.feed.waited_seconds if isinstance(stage, Fed) else 0.0)
            log.write({"step": done, **figures}, elapsed, waited)
            progress.advance(1, f"loss {figures['loss']:.4f}, {pace}")

            # Save now and then, and when asked to end
            since_save = time.monotonic() - saved_at
            due = since_save >= (FIRST_CHECKPOINT_SECONDS if first_save else checkpoint_minutes * 60)
            due, ends = place.anywhere(due, bool(asked))
            if due or ends:
                _save(stage, checkpoints, done, seconds_before + time.monotonic() - begun, log, place)
                saved = done
            if ends:
                raise Terminated(
                    f"asked to end after step {done} of {stage.steps}; the state is saved.",
                    remedy="Run the same command again to go on.",
                    path=folder,
                )
            if due:
                stage.preview(folder / "previews" / f"step-{done:08d}.png")
                saved_at, first_save = time.monotonic(), False  # after the preview, which takes its time too
    seconds = seconds_before + time.monotonic() - begun
    if saved is None or done > saved:
        _save(stage, checkpoints, done, seconds, log, place)
        stage.preview(folder / "previews" / f"step-{done:08d}.png")
    summary = {
        "stage": stage.name,
        "steps": done,
        "planned_steps": stage.steps,
        "processes": place.processes,
        "seconds": seconds,  # not rounded: a time limit that was reached stays so
        "images_per_second": done * pace.images_a_step / max(seconds, 1e-9),
        "data_wait_share": log.waited_seconds() / max(seconds, 1e-9) if place.leads else 0.0,
        "last": log.mean_of_last(50) if place.leads else {},
    }
    if place.leads:
        write_json(folder / "summary.json", summary)
    return place.from_leader(summary)


@contextmanager
def _feed_closed_after(stage: Stage) -> Iterator[None]:
    try:
        yield
    finally:
        if isinstance(stage, Fed):
            stage.feed.close()


def _taken_up(stage: Stage, folder: Path, place: Place) -> tuple[int, float]:
    """Puts the stage where its newest checkpoint was, or at its beginning; steps made, and the seconds they took."""
    found = load_newest(folder / "checkpoints", warn, place)
    if found is None:
        if isinstance(stage, Begins):
            stage.begin()
        return 0, 0.0
    check_made_for(folder, _facts(stage), found.facts)
    check_not_beyond(folder, stage.steps, found.step)
    stage.restore(found.tensors)
    if place.leads:
        drop_newer(folder / "checkpoints", found.step)
    return found.step, _seconds_until(found, folder)


def _seconds_until(found: Checkpoint, folder: Path) -> float:
    """The training time until that checkpoint, with its saving and preview where the stage ended there: they may have
    taken the rest of a time limit, and the checkpoint cannot know of them."""
    path = folder / "summary.json"
    told = read_json(path) if path.is_file() else {}
    return max(found.seconds, told["seconds"]) if told.get("steps") == found.step else found.seconds


def _save(stage: Stage, checkpoints: Path, step: int, seconds: float, log: _Log, place: Place) -> None:
    tensors = stage.tensors()
    if place.leads:
        log.flush(durably=True)  # before the checkpoint that promises those steps
        save_checkpoint(checkpoints, Checkpoint(step, seconds, tensors, {"stage": stage.name, **_facts(stage)}))
    place.wait()


def _facts(stage: Stage) -> dict[str, str]:
    return stage.facts if isinstance(stage, MadeFor) else {}


def _check_finite(figures: dict[str, float], step: int, stage: Stage, folder: Path, place: Place) -> None:
    """Stops where a figure is not finite, in every process, once the leader has kept the batch."""
    if all(math.isfinite(value) for value in figures.values()):
        return
    batch = stage.batch_names(step)
    if place.leads:
        told = {name: repr(value) for name, value in figures.items()}
        facts = {"step": step + 1, "participants": batch, "figures": told}
        if isinstance(stage, ShowsBatch):
            facts["batch"] = "not_finite.safetensors"
            write_tensors(folder / "not_finite.safetensors", stage.batch_tensors(step), {"step": str(step + 1)})
        write_json(folder / "not_finite.json", facts)
    place.wait()
    raise BadInput(
        f"the loss is not a finite number at step {step + 1} (batch: {', '.join(batch)}; details in not_finite.json).",
        remedy="Look at those scans; if they are good, lower the learning rate. The last checkpoint is untouched.",
        path=folder,
        reason="loss_not_finite",
    )


@contextmanager
def asked_to_end() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM or SIGUSR1 comes (a scheduler's way to say: end soon)."""
    asked: list[int] = []
    try:
        previous = {
            number: signal.signal(number, lambda received, _frame: asked.append(received))
            for number in (signal.SIGTERM, signal.SIGUSR1)
        }
    except ValueError:  # not the main thread: nobody sends signals there
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class EndsBetween:
    """Shows `progress` for work whose finished pieces are kept, and ends it after one of them when that was asked."""

    progress: Progress
    asked: list[int]

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.check()
        self.progress.start(what, total, done)

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.progress.advance(steps, note)
        self.check()

    def check(self) -> None:
        """Terminated where it was asked to end."""
        if self.asked:
            raise Terminated("asked to end; what is finished is kept.", remedy="Run the same command again to go on.")


class _Log:
    """log.jsonl: what each step gave, a function of the run alone. timing.jsonl: when, which is not."""

    def __init__(self, folder: Path, done: int, board: Board | None = None, *, writes: bool) -> None:
        self._writes, self._board, self._flushed = writes, board, time.monotonic()
        self._paths = (folder / "log.jsonl", folder / "timing.jsonl")
        self._lines: tuple[list[str], list[str]] = ([], [])
        if writes:
            make_folder(folder)
            for path in self._paths:
                _keep_up_to(path, done)
            self.flush()

    def write(self, figures: dict[str, float], seconds: float, waited: float) -> None:
        if not self._writes:
            return
        log, timing = self._lines
        log.append(json.dumps(figures, allow_nan=False) + "\n")
        when = {"step": figures["step"], "seconds": round(seconds, 3), "wait_seconds": round(waited, 4)}
        timing.append(json.dumps(when) + "\n")
        if self._board is not None:
            self._board.write(figures)
        if time.monotonic() - self._flushed > LOG_SECONDS:
            self.flush()

    def flush(self, *, durably: bool = False) -> None:
        """Appends what was written. Files are opened anew each time: one held open would keep, after a full disk, what
        it could not write, and try it again when nobody listens."""
        for path, lines in zip(self._paths, self._lines):
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                if durably:
                    os.fsync(file.fileno())
            lines.clear()
        if self._board is not None:
            self._board.flush()
        self._flushed = time.monotonic()

    def waited_seconds(self) -> float:
        """What all steps together waited for data."""
        self.flush()
        rows = self._paths[1].read_text(encoding="utf-8").splitlines()
        return sum(json.loads(row).get("wait_seconds", 0.0) for row in rows)

    def mean_of_last(self, count: int) -> dict[str, float]:
        """Means over the last `count` steps of what the last of them logged."""
        self.flush()
        rows = [json.loads(line) for line in self._paths[0].read_text(encoding="utf-8").splitlines()[-count:]]
        names = sorted(rows[-1].keys() - {"step"}) if rows else []
        given = {name: [row[name] for row in rows if name in row] for name in names}
        return {name: sum(values) / len(values) for name, values in given.items()}


def _keep_up_to(path: Path, step: int) -> None:
    """Drops what a killed run logged after its last checkpoint: those steps will be made, and logged, again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    write_text(path, "".join(kept))


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int, cosine_decay: bool) -> float:
    """What the learning rate of `step` is multiplied by: a linear rise, then 1 or half a cosine down to 0."""
    rise = min(1.0, (step + 1) / (warmup_steps + 1))
    if not cosine_decay:
        return rise
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
