"""Which file a prepared image was made of: what its record says, and whether that is still what lies there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brainldm.base.files import sha256_of
from brainldm.cohort.bids import Scan

# To be raised whenever a scan would be prepared, or measured, otherwise than before: people of both ways are not mixed.
# 2: whole heads in MNI space begin at the size of a brain.
# 3: small whole heads are known as such; scans that stay in place are compared with the template too.
PREPARATION = 3


def stamp_of(path: Path) -> dict[str, Any]:
    """What tells a file from another of its name: size, time of writing (looked at first) and SHA-256; and which
    preparation it went through."""
    status = path.stat()
    return {
        "preparation": PREPARATION,
        "source_bytes": status.st_size,
        "source_mtime_ns": status.st_mtime_ns,
        "source_sha256": sha256_of(path),
    }


def is_source_of(record: Mapping[str, Any], scan: Scan, mask: Path | None) -> bool:
    """Whether the record was made of this scan and this mask, as the files are now, by this program's preparation.
    OSError where they cannot be read."""
    if record.get("preparation") != PREPARATION:
        return False
    status = scan.path.stat()
    if record["source"] != scan.file or record["source_bytes"] != status.st_size:
        return False
    touched = record["source_mtime_ns"] != status.st_mtime_ns
    if touched and record["source_sha256"] != sha256_of(scan.path):
        return False
    return bool(record["mask_sha256"] == (None if mask is None else sha256_of(mask)))
