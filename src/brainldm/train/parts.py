"""Tensors of many people, found one after another and kept part by part, so that no interruption loses many."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from brainldm.base.progress import Progress
from brainldm.model.tensors import write_tensors

PART_LENGTH = 64

Item = TypeVar("Item")


def kept_in_parts(
    folder: Path,
    made_by: Mapping[str, Any],
    items: Sequence[Item],
    tensors_of: Callable[[Item], dict[str, torch.Tensor]],
    what: str,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """`tensors_of` each item, by name, joined along the first axis. PART_LENGTH items at a time are kept in `folder`
    under the digest of `made_by`, and not found again; what something else made is deleted, and what is damaged is
    found anew. `what` is the progress bar's."""
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    parts = {
        folder / f"{digest}-{start}.safetensors": items[start : start + PART_LENGTH]
        for start in range(0, len(items), PART_LENGTH)
    }
    for path in folder.glob("*.safetensors"):
        if path not in parts:
            path.unlink()
    found = {path: tensors for path in parts if (tensors := _read(path)) is not None}
    missing = [path for path in parts if path not in found]
    if missing:
        progress.start(what, len(items), sum(len(parts[path]) for path in found))
    for path in missing:
        rows = []
        for item in parts[path]:
            rows.append(tensors_of(item))
            progress.advance()
        found[path] = _joined(rows)
        write_tensors(path, found[path])
    return _joined([found[path] for path in parts])


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        return load_file(path)
    except (SafetensorError, OSError):  # none, or damaged
        return None


def _joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
