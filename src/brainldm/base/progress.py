"""Progress that tells the time left: a bar on a terminal, a line a minute in a log file, nothing when nobody looks.

Long work takes a `Progress` and calls `advance`; what a person sees is decided where the command starts.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

LINE_EVERY_SECONDS = 60.0


class Progress(Protocol):
    """What long work reports to."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A new piece of work of `total` steps, `done` of them finished earlier."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many more steps are finished; `note` is shown beside the bar."""


class Quiet:
    """Shows nothing: the default of every function that reports progress."""

    def start(self, what: str, total: int, done: int = 0) -> None: ...

    def advance(self, steps: int = 1, note: str = "") -> None: ...


@dataclass
class Lines:
    """One line at the start and the end of each piece of work and one a minute between, for logs and pipes."""

    what: str = ""
    total: int = 0
    done: int = 0
    _begun: float = 0.0
    _begun_at: int = 0
    _last_line: float = field(default=0.0)

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done, self._begun_at = what, total, done, done
        self._begun = self._last_line = time.monotonic()
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)  # noqa: T201

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        now = time.monotonic()
        if now - self._last_line < LINE_EVERY_SECONDS and self.done < self.total:
            return
        self._last_line = now
        rate = max(now - self._begun, 1e-9) / max(self.done - self._begun_at, 1)
        left = clock(rate * (self.total - self.done))
        tail = f", {note}" if note else ""
        print(f"{self.what}: {self.done} of {self.total}, {left} left{tail}", file=sys.stderr, flush=True)  # noqa: T201


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Progress for a command's user: rich's bars on a terminal, plain lines elsewhere, both on standard error."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars) -> None:  # type: ignore[no-untyped-def]  # rich is imported only on a terminal
        self._bars = bars
        self._task = None

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._task = self._bars.add_task(what, total=total, completed=done, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        if note:
            self._bars.update(self._task, advance=steps, note=note)
        else:
            self._bars.advance(self._task, steps)


def warn(text: str) -> None:
    """Says on stderr what somebody should know of work that goes on."""
    print(f"warning: {text}", file=sys.stderr)  # noqa: T201
