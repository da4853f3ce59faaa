"""The manifest: one JSON line per finished thing, and the only word on whether it is finished.

A line is appended and fsynced after the file it names has been renamed into place. A line torn by a crash is
ignored, so the thing is simply made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainldm.base.files import make_folder, sha256_of, write_text, writing


@dataclass(frozen=True)
class Manifest:
    """An append-only list of records in a JSON-lines file."""

    path: Path

    def append(self, **record: Any) -> None:
        """Adds one record and returns when it is on disk."""
        make_folder(self.path.parent)
        line = _line(record)
        with writing(self.path), self.path.open("ab+") as handle:
            # A torn last line must not swallow the new one.
            if handle.tell() > 0:
                handle.seek(-1, os.SEEK_END)
                if handle.read(1) != b"\n":
                    line = "\n" + line
            handle.write(line.encode("utf-8", "backslashreplace"))
            handle.flush()
            os.fsync(handle.fileno())

    def records(self) -> list[dict[str, Any]]:
        """All whole records, in the order written; empty when there is no manifest yet."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_bytes().decode("utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def proven(self, root: Path, *, full: bool = False) -> dict[int, dict[str, Any]]:
        """The finished records by their `index`: those whose `file` below `root` has the size (and, with `full`,
        the SHA-256) that the record states. The last complete record of an index counts."""
        complete = [r for r in self.records() if isinstance(r.get("index"), int) and _names_a_file(r)]
        latest = {record["index"]: record for record in complete}
        return {index: record for index, record in latest.items() if is_intact(root, record, full=full)}

    def rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replaces everything by these records in this order, so that equal folders have equal manifests."""
        write_text(self.path, "".join(_line(record) for record in records))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def _names_a_file(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(key), kind) for key, kind in (("file", str), ("bytes", int), ("sha256", str)))


def is_intact(root: Path, record: Mapping[str, Any], *, full: bool) -> bool:
    """Whether the record's `file` below `root` has the bytes (and, with `full`, the SHA-256) that it states."""
    if not _names_a_file(record):
        return False
    path = root / record["file"]
    if not path.is_file() or path.stat().st_size != record["bytes"]:
        return False
    return not full or sha256_of(path) == record["sha256"]
