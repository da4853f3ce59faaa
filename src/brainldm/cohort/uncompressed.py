"""A split's images uncompressed in one file, so that epochs are read at the disk's speed and inflated only once.

FOLDER/<split>.int16    (N, X, Y, Z) little-endian 16-bit integers, value x 32767, images in the order of their ids
FOLDER/<split>.jsonl    first what it is of (the key), then a line an image: index, the SHA-256 of the image's own file
                        as proven when it was read, and that of the integers written

A folder is one cohort's at a time. A file of another key (another cohort, grid or split of it) is removed and written
anew, but nothing that is not of this kind; one that a killed run left unfinished is gone on with; a whole one is used
as it is. Other processes that want the same file wait for the one that writes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainldm.base.errors import EnvironmentProblem, UsageError
from brainldm.base.feeding import made_ahead
from brainldm.base.files import locked_folder, make_folder, writing
from brainldm.base.manifest import Manifest
from brainldm.base.progress import Progress

FORMAT = 1
_WAIT_SECONDS = 1.0
_LEFT_FREE = 0.1  # of what is free now: checkpoints and latents often lie on the same disk


@dataclass(frozen=True)
class UncompressedImages:
    """The file, open for reading. `sha256`: of each image's integers."""

    path: Path
    shape_XYZ: tuple[int, int, int]
    sha256: tuple[str, ...]
    mapped_NXYZ: np.ndarray

    def stored_XYZ(self, index: int) -> np.ndarray:
        """One image's int16, an array of its own."""
        return np.array(self.mapped_NXYZ[index], dtype=np.int16)

    def proves(self, index: int, stored_XYZ: np.ndarray) -> bool:
        """Whether these are the integers that were written."""
        return _digest(stored_XYZ) == self.sha256[index]

    def mend(self, index: int, stored_XYZ: np.ndarray) -> None:
        """Puts an image in its place again. Where the file cannot be written to, it stays damaged."""
        with contextlib.suppress(OSError), self.path.open("r+b") as file:
            file.seek(index * stored_XYZ.nbytes)
            file.write(stored_XYZ.astype("<i2").tobytes())


def write_uncompressed(
    folder: Path,
    split: str,
    cohort_digest: str,
    shape_XYZ: tuple[int, int, int],
    sources: list[str],
    read: Callable[[int], np.ndarray],
    progress: Progress,
) -> UncompressedImages:
    """The images of `split` in `folder`: those that are there, or written now, in order, by `read(index)`
    (several at once).

    `sources` are the SHA-256 of the images' own files; `read` proves them and gives int16 (X, Y, Z).
    UsageError where `folder` holds files of these names that are not of this kind. EnvironmentProblem where the disk
    has no room for all, before the first is written; where it becomes full later, what was written is given back.
    """
    made = _Made(make_folder(folder), split, cohort_digest, shape_XYZ, sources)
    if not made.is_whole():
        made.check_ours()
        with _alone(folder):
            try:
                made.write(read, progress)
            except EnvironmentProblem as error:
                if error.reason == "disk_full":
                    made.path.unlink(missing_ok=True)
                raise
    return made.open()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder, waiting for whoever holds it now: another process of the same training writes the same."""
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(locked_folder(folder))
                break
            except UsageError as error:
                if error.reason != "in_use":
                    raise
                time.sleep(_WAIT_SECONDS)
        yield


@dataclass(frozen=True)
class _Made:
    folder: Path
    split: str
    cohort_digest: str
    shape_XYZ: tuple[int, int, int]
    sources: list[str]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.split}.int16"

    @property
    def lines(self) -> Manifest:
        return Manifest(self.folder / f"{self.split}.jsonl")

    @property
    def image_bytes(self) -> int:
        return 2 * int(np.prod(self.shape_XYZ))

    @property
    def key(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "cohort": self.cohort_digest,
            "split": self.split,
            "images": len(self.sources),
            "shape_XYZ": list(self.shape_XYZ),
        }

    def digests(self) -> list[str]:
        """SHA-256 of the images that are there, from the first on; none where the file is of another key."""
        records = self.lines.records()
        size = self.path.stat().st_size if self.path.is_file() else 0
        if not records or records[0].get("key") != self.key:
            return []
        by_index = {record.get("index"): record for record in records[1:]}
        found: list[str] = []
        for index, source in enumerate(self.sources):
            record = by_index.get(index)
            if record is None or record.get("source") != source or (index + 1) * self.image_bytes > size:
                break
            found.append(str(record.get("sha256")))
        return found

    def is_whole(self) -> bool:
        return len(self.digests()) == len(self.sources)

    def check_ours(self) -> None:
        """UsageError where what would be removed is none of these files."""
        # In this order: the process that writes puts its key beside the images before there are any.
        there = [path for path in (self.path, self.lines.path) if path.exists()]
        records = self.lines.records() if self.lines.path.is_file() else []
        key = records[0].get("key") if records else None
        if there and not (isinstance(key, dict) and {"format", "cohort"} <= key.keys()):
            raise UsageError(
                f"this folder holds other things: its {there[0].name} is no cache of images.",
                remedy="Give --cache another folder.",
                path=self.folder,
                reason="in_use",
            )

    def write(self, read: Callable[[int], np.ndarray], progress: Progress) -> None:
        done = len(self.digests())  # asked again under the lock: somebody else may have written it meanwhile
        if done == len(self.sources):
            return
        if not done:
            self.path.unlink(missing_ok=True)
            self.lines.rewrite([{"key": self.key}])
        self._check_room(done)
        progress.start("uncompressing images", len(self.sources), done)
        with writing(self.path), self.path.open("ab") as file:
            file.truncate(done * self.image_bytes)  # what a killed run wrote and did not list
            ahead = made_ahead(lambda position: read(done + position), len(self.sources) - done)
            for index, stored_XYZ in enumerate(ahead, start=done):
                file.write(stored_XYZ.astype("<i2").tobytes())
                file.flush()
                os.fsync(file.fileno())
                self.lines.append(index=index, source=self.sources[index], sha256=_digest(stored_XYZ))
                progress.advance()

    def _check_room(self, done: int) -> None:
        wanted = (len(self.sources) - done) * self.image_bytes
        free = shutil.disk_usage(self.folder).free
        if wanted + _LEFT_FREE * free > free:
            raise EnvironmentProblem(
                f"{len(self.sources)} uncompressed images take {wanted / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are "
                f"free, of which a {1 / _LEFT_FREE:.0f}th is left for checkpoints.",
                remedy="Give --cache a folder on a disk with room.",
                path=self.folder,
                reason="disk_full",
            )

    def open(self) -> UncompressedImages:
        digests = self.digests()
        mapped = np.memmap(self.path, dtype="<i2", mode="r", shape=(len(digests), *self.shape_XYZ))
        return UncompressedImages(self.path, self.shape_XYZ, tuple(digests), mapped)


def _digest(stored_XYZ: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(stored_XYZ, dtype="<i2").data).hexdigest()
