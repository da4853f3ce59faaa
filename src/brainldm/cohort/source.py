"""Which file a prepared image was made of: what its record says, and whether that is still what lies there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brainldm.base.files import sha256_of
from brainldm.cohort.bids import Scan


def stamp_of(path: Path) -> dict[str, Any]:
    """What tells a file from another of its name: size, time of writing (looked at first) and SHA-256."""
    status = path.stat()
    return {
        "source_bytes": status.st_size,
        "source_mtime_ns": status.st_mtime_ns,
        "source_sha256": sha256_of(path),
    }


def is_source_of(record: Mapping[str, Any], scan: Scan, mask: Path | None) -> bool:
    """Whether the record was made of this scan, and of this mask, as the files are now. Records of earlier versions
    know a file by its size alone."""
    try:
        status = scan.path.stat()
        if record["source"] != scan.file or record["source_bytes"] != status.st_size:
            return False
        if "source_sha256" not in record:
            return True
        touched = record["source_mtime_ns"] != status.st_mtime_ns
        if touched and record["source_sha256"] != sha256_of(scan.path):
            return False
        return bool(record["mask_sha256"] == (None if mask is None else sha256_of(mask)))
    except OSError:
        return False
