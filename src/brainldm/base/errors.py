"""What can go wrong, said so that a person can act on it.

Every error carries the value that was found, the rule it breaks, the file it is in and what to do about it; its class
decides the exit code of the command (0 done, 1 a bug, 2 wrong use, 3 bad input, 4 part of a batch failed, 5 the
machine, 130 interrupted, 143 asked to end).
"""

from __future__ import annotations

from pathlib import Path


class BrainldmError(Exception):
    """An error with a remedy. `reason` is a short code for tables such as failures.tsv."""

    exit_code = 1

    def __init__(
        self, message: str, *, remedy: str = "", path: str | Path | None = None, reason: str = "error"
    ) -> None:
        super().__init__(message, remedy, path, reason)  # all of them, so that the error survives a process pool
        self.message = message
        self.remedy = remedy
        self.path = None if path is None else Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.message, self.remedy, self.path, self.reason)

    def __str__(self) -> str:
        place = f"{self.path}: " if self.path is not None else ""
        fix = f" {self.remedy}" if self.remedy else ""
        return f"{place}{self.message}{fix}"


def _rebuild(kind: type[BrainldmError], message: str, remedy: str, path: Path | None, reason: str) -> BrainldmError:
    return kind(message, remedy=remedy, path=path, reason=reason)


class UsageError(BrainldmError):
    """The command was used wrongly."""

    exit_code = 2


class BadInput(BrainldmError):
    """A file, table or model folder is not what it must be."""

    exit_code = 3


class PartialFailure(BrainldmError):
    """Part of a batch failed; the rest is done and the failures are listed in failures.tsv."""

    exit_code = 4


class EnvironmentProblem(BrainldmError):
    """The machine, not the input: disk full, no permission, a missing device."""

    exit_code = 5
