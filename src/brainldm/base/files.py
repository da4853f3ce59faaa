"""Files written whole or not at all.

Write beside, fsync, rename: a reader sees the old file or the new one, never half of either. Part files carry the
prefix below and the process that writes them, are never read, and are swept away, once it is dead, by the next run that
holds the folder's lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brainldm.base.errors import BadInput, EnvironmentProblem, UsageError

PART_PREFIX = ".part-"
LOCK_NAME = ".brainldm.lock"
_PART = re.compile(re.escape(PART_PREFIX) + r"([0-9]+)-")


def environment_problem(error: OSError, path: Path | None) -> EnvironmentProblem:
    """What the system refused when something was to be written to `path`, and what to do."""
    if error.errno == errno.ENOSPC:
        return EnvironmentProblem(
            "the disk is full; nothing half-written was kept.",
            remedy="Free some space and run the same command again: it goes on where it stopped.",
            path=path,
            reason="disk_full",
        )
    return EnvironmentProblem(
        f"cannot write: {error.strerror}.",
        remedy="Choose a folder you may write to.",
        path=path,
        reason="unwritable",
    )


def unreadable(error: OSError, path: Path) -> BadInput:
    """What the system refused when `path` was to be read."""
    return BadInput(
        f"cannot be read: {error.strerror}.",
        remedy="Check that it is a file, is yours to read, and lies on a disk that works.",
        path=path,
        reason="unreadable",
    )


def make_folder(path: Path) -> Path:
    """The folder `path`, made with its parents where it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            "a folder is needed here, and there is a file.", remedy="Choose another output.", path=path
        ) from error
    except OSError as error:
        raise environment_problem(error, path) from error
    return path


def check_output_apart(out: str | Path, *inputs: str | Path) -> None:
    """UsageError where the output folder is one of the folders that are read, holds one or lies in one.

    A study's derivatives/ is the one place below it where BIDS has results.
    """
    target = Path(os.path.realpath(out))  # Path.resolve raises RuntimeError where links lead in a circle
    for folder in inputs:
        source = Path(os.path.realpath(folder))
        below = target.relative_to(source).parts if source in target.parents else ()
        in_derivatives = len(below) > 1 and below[0] == "derivatives"
        if target == source or target in source.parents or (below and not in_derivatives):
            raise UsageError(
                f"the output would lie over or in {folder}, which is only read.",
                remedy="Choose an output folder of its own.",
                path=out,
            )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where the machine refuses a write to `path`, says so as an EnvironmentProblem with the remedy."""
    try:
        yield
    except OSError as error:
        raise environment_problem(error, path) from error


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder; on success it is fsynced and becomes `path`, on failure it is removed.

    The temporary name keeps the suffixes of `path`, because writers choose their format by them.
    """
    path = Path(path)
    make_folder(path.parent)
    part = path.with_name(f"{PART_PREFIX}{os.getpid()}-{path.name}")
    try:
        with writing(path):
            yield part
            with part.open("rb+") as handle:
                os.fsync(handle.fileno())
            part.replace(path)
            _fsync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | Path, payload: bytes) -> None:
    """Writes `payload` as the whole of `path`, atomically."""
    with atomic_path(path) as part:
        part.write_bytes(payload)


def write_text(path: str | Path, text: str) -> None:
    r"""Writes `text` as the whole of `path` in UTF-8, atomically; a stray byte of a file's name becomes \udcff."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """What the JSON file holds; BadInput when it is missing or broken."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise BadInput("there is no such file.", remedy="Check the path.", path=path, reason="missing") from error
    except OSError as error:
        raise unreadable(error, path) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput(
            f"is not valid JSON ({error}).",
            remedy="Restore the file from where it came.",
            path=path,
            reason="bad_json",
        ) from error


def read_json_object(path: str | Path, **needed: type) -> dict[str, Any]:
    """The JSON object in the file, with the keys `needed`, each of its type; BadInput when it is another thing."""
    content = read_json(path)
    if not isinstance(content, dict):
        fault = "it holds no JSON object"
    else:
        lacking = [key for key, kind in needed.items() if not isinstance(content.get(key), kind)]
        if not lacking:
            return content
        fault = f"{lacking[0]!r} is missing or of another type"
    raise BadInput(f"is damaged: {fault}.", remedy="Restore the file from where it came.", path=path, reason="bad_json")


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remove_stale_parts(folder: str | Path) -> int:
    """Removes part files left by killed runs anywhere below `folder`; returns how many. Hold the lock.

    Those of a process that runs here are left, and so is every folder that another run holds: its writers may be on
    other machines.
    """
    removed = 0
    for place, below, files in os.walk(folder):
        if LOCK_NAME in files and Path(place) != Path(folder) and lock_holder(place) is not None:
            below.clear()
            continue
        for name in files:
            writer = _PART.match(name)
            if writer is not None and not _is_running(int(writer[1])):
                Path(place, name).unlink(missing_ok=True)
                removed += 1
    return removed


def _is_running(process: int) -> bool:
    """Whether this machine runs another process of this number. Where containers start over, a dead run had our own."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
        # What is dead and not yet waited for, which a container may never do, can still be signalled.
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, OverflowError):
        return False
    except (PermissionError, FileNotFoundError):  # somebody else's; a system without /proc
        return True


@contextlib.contextmanager
def locked_folder(folder: str | Path) -> Iterator[Path]:
    """Holds `folder` for this process alone; a second run is refused with the host and process that hold it.

    The lock is the operating system's (flock), so a killed run leaves none behind. Part files of killed runs are
    removed on entry.
    """
    folder = make_folder(Path(folder))
    lock_path = folder / LOCK_NAME
    try:
        handle = lock_path.open("a+", encoding="utf-8")
    except OSError as error:
        raise environment_problem(error, folder) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file when it ends: what was opened here may by now be nobody's lock.
            if os.fstat(handle.fileno()).st_ino != lock_path.stat().st_ino:
                raise BlockingIOError(errno.EWOULDBLOCK, "the lock changed hands")
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.ENOENT, errno.ESTALE):
                raise EnvironmentProblem(
                    f"this file system cannot lock files ({error.strerror}), so two runs could spoil each other.",
                    remedy="Choose a folder on another one, or mount it with locks (Lustre: -o flock).",
                    path=folder,
                    reason="no_locks",
                ) from error
            handle.seek(0)
            raise UsageError(
                f"another run is writing to this folder ({handle.read().strip() or 'it did not say which'}).",
                remedy="Wait for it to end, or choose another folder.",
                path=folder,
                reason="in_use",
            ) from error
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        with writing(lock_path):
            handle.truncate(0)
            handle.write(f"host {socket.gethostname()}, process {os.getpid()}, since {started}")
            handle.flush()
        remove_stale_parts(folder)
        try:
            yield folder
        finally:
            lock_path.unlink(missing_ok=True)


def lock_holder(folder: str | Path) -> str | None:
    """Who holds `folder` now, as it said itself (host, process, since when); None when nobody does."""
    try:
        with (Path(folder) / LOCK_NAME).open(encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once, with the handle
            except OSError:
                return handle.read().strip() or "a process that did not say which"
    except OSError:
        return None
    return None
