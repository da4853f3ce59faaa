"""Tensors of many people, found one after another and kept in files of some people each.

No interruption loses many, no file is ever whole in memory (30,000 people's latents at 1 mm are hundreds of gigabytes),
and the processes of one training share the work. Each file's header holds the SHA-256 of its tensors: beside them it
would be another thing to be killed before, and a list in one file is not for several processes to write to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from brainldm.base.errors import EnvironmentProblem
from brainldm.base.progress import Progress
from brainldm.model.tensors import write_tensors
from brainldm.train.distributed import ALONE, Place

PART_LENGTH = 64
_SHA256 = "sha256"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Parts:
    """Rows of tensors by name, so many in each of `parts` but the last; mapped from disk, so that only rows asked for
    are read."""

    parts: tuple[Mapping[str, torch.Tensor], ...]

    def rows(self, name: str, members: Sequence[int]) -> torch.Tensor:
        """Those rows, stacked."""
        length = len(self.parts[0][name])
        return torch.stack([self.parts[at // length][name][at % length] for at in members])

    def whole(self, name: str) -> torch.Tensor:
        """All rows: only of what is small."""
        return torch.cat([part[name] for part in self.parts])


def kept_in_parts(
    folder: Path,
    made_by: Mapping[str, Any],
    items: Sequence[Item],
    found: Callable[[Sequence[Item]], Iterator[dict[str, torch.Tensor]]],
    what: str,
    progress: Progress,
    place: Place = ALONE,
) -> Parts:
    """What `found` of the items, one after another: tensors by name. PART_LENGTH items at a time are kept in `folder`
    under the digest of `made_by`, and not found again; what something else made is deleted, what is damaged found anew.
    A file without a SHA-256, as earlier versions wrote them, is taken as it is.
    Several processes share the parts and come back together. `what` is the progress bar's."""
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    parts = {
        folder / f"{digest}-{start}.safetensors": items[start : start + PART_LENGTH]
        for start in range(0, len(items), PART_LENGTH)
    }
    if place.leads:
        for path in folder.glob("[!.]*.safetensors"):
            if path not in parts:
                path.unlink()
    first, end = (rank * len(parts) // place.processes for rank in (place.rank, place.rank + 1))
    mine = list(parts)[first:end]
    missing = [path for path in mine if not path.is_file()]
    there = [path for path in mine if path not in missing]
    if there:
        progress.start(f"{what}: proving what is there", len(there))
    for path in there:  # hundreds of gigabytes at 1 mm
        if not _is_whole(path):
            missing.append(path)
        progress.advance()
    if missing:
        total, left = (sum(len(parts[path]) for path in some) for some in (mine, missing))
        progress.start(what, total, total - left)
    tensors = found([item for path in missing for item in parts[path]])
    for path in missing:
        rows = []
        for _ in parts[path]:
            rows.append(next(tensors))
            progress.advance()
        part = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        write_tensors(path, part, {_SHA256: _digest(part)})
    place.wait()
    return Parts(tuple(_read_by_all(path, place) for path in parts))


def _is_whole(path: Path) -> bool:
    """Whether the file holds what was written."""
    tensors = _read(path)
    if tensors is None:
        return False
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get(_SHA256)
    return written is None or written == _digest(tensors)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """What is in the file, mapped; None where there is none or it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return None


def _read_by_all(path: Path, place: Place) -> dict[str, torch.Tensor]:
    tensors = _read(path)
    if tensors is None:
        raise EnvironmentProblem(
            f"what another process of this training wrote is not to be seen by {place.rank} of {place.processes}.",
            remedy="Put the run's folder on a file system that all nodes share.",
            path=path,
            reason="not_shared",
        )
    return tensors
