"""A prepared cohort as training sees it: rows, and images by index. No torch here; the trainer makes tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from brainldm.base.covariates import CONTINUOUS, COVARIATES, Covariates, implausible, sex_code
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import read_json, sha256_of
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import read_nifti
from brainldm.base.progress import Progress, Quiet, warn
from brainldm.base.streams import stream
from brainldm.base.tables import Table, read_table
from brainldm.base.volume import Grid, same_voxels
from brainldm.cohort.split import SPLITS, Split
from brainldm.cohort.uncompressed import UncompressedImages, write_uncompressed

KIND = "brainldm prepared cohort"
FORMAT = 1
CACHE_BYTES = 4 << 30
_INT16_UNIT = 32767
_RECORD = {"participant_id": str, "file": str, "bytes": int, "sha256": str}  # of manifest.jsonl, what is needed here


@dataclass(frozen=True)
class PreparedRow:
    """One person of a prepared cohort."""

    participant_id: str
    covariates: Covariates
    split: Split
    path: Path
    bytes: int
    sha256: str
    flags: tuple[str, ...] = ()  # what preparing found to be looked at


@dataclass(frozen=True)
class PreparedCohort:
    """A folder that `brainldm prepare` finished. `preprocessing` is what a model must record of how it was made,
    `split_by` the share and the seed by which people were held out."""

    folder: Path
    name: str
    grid: Grid
    preprocessing: Mapping[str, Any]
    licence: str
    people: tuple[PreparedRow, ...]
    split_by: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> PreparedCohort:
        """The cohort in `folder`; BadInput when it is none, is unfinished, lacks a file that its tables name, or has a
        person twice or with a covariate that nobody can have."""
        folder = Path(folder)
        facts = read_prepared_json(folder)
        remedy = "Run the same brainldm prepare command again: it finishes what is missing."
        if not facts.get("finished"):
            raise BadInput(
                "the preparation of this cohort was interrupted.", remedy=remedy, path=folder, reason="unfinished"
            )
        table = read_table(folder / "participants.tsv")
        table.require("participant_id", *COVARIATES, "split")
        records = Manifest(folder / "manifest.jsonl").records()
        whole = [r for r in records if all(isinstance(r.get(key), kind) for key, kind in _RECORD.items())]
        latest = {record["participant_id"]: record for record in whole}
        flags = _flags(folder / "quality.tsv")
        people: dict[str, PreparedRow] = {}
        for row, cells in enumerate(table.rows):
            participant_id = cells["participant_id"]
            if participant_id in people:
                first = table.lines[list(people).index(participant_id)]
                raise table.fault(row, "participant_id", f"is in line {first} already.", "Keep one row a person.")
            record = latest.get(participant_id)
            path = folder / record["file"] if record else folder
            if record is None or not path.is_file() or path.stat().st_size != record["bytes"]:
                what = "has no line in manifest.jsonl" if record is None else f"lacks its image {record['file']}"
                raise BadInput(
                    f"{participant_id} of participants.tsv {what}.",
                    remedy=remedy,
                    path=folder,
                    reason="missing",
                )
            people[participant_id] = _row(table, row, path, record, flags.get(participant_id, ()))
        return cls(
            folder,
            str(facts["name"]),
            Grid.from_json(facts["grid"]),
            facts["preprocessing"],
            str(facts.get("licence", "")),
            tuple(people.values()),
            {name: facts["config"][name] for name in ("holdout", "seed") if name in facts["config"]},
        )

    def rows(self, split: Split | None = None) -> tuple[PreparedRow, ...]:
        """The people of one split, or of all, in the order of their ids."""
        return tuple(row for row in self.people if split in (None, row.split))

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits that change when an image, a covariate, a split, a person or the grid does."""
        lines = [repr((self.grid.name, self.grid.shape_XYZ, self.grid.voxel_mm, self.grid.origin_mm))]
        lines += [repr((r.participant_id, r.split, r.covariates.as_array().tolist(), r.sha256)) for r in self.people]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_prepared_json(folder: Path) -> dict[str, Any]:
    """What prepared.json says; BadInput when the folder is no prepared cohort or one of a newer program."""
    remedy = "Prepare the study first: brainldm prepare BIDS_FOLDER OUT."
    path = folder / "prepared.json"
    if not folder.is_dir():
        raise BadInput("there is no such folder.", remedy="Check the path.", path=folder, reason="missing")
    if not path.is_file():
        raise BadInput(
            "is no prepared cohort: it has no prepared.json.", remedy=remedy, path=folder, reason="not_prepared"
        )
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise BadInput(f"does not describe a {KIND}.", remedy=remedy, path=path, reason="not_prepared")
    if facts.get("format") != FORMAT:
        raise BadInput(
            f"has the format {facts.get('format')!r}; this program knows {FORMAT}.",
            remedy="Use the version of brainldm that made it, or prepare the study again.",
            path=path,
            reason="format",
        )
    needed = {"name": str, "grid": dict, "preprocessing": dict, "config": dict}
    lacking = [key for key, kind in needed.items() if not isinstance(facts.get(key), kind)]
    if lacking:
        raise BadInput(
            f"is damaged: {', '.join(lacking)} missing or of another type.",
            remedy=remedy,
            path=path,
            reason="not_prepared",
        )
    return facts


def _flags(path: Path) -> dict[str, tuple[str, ...]]:
    """What should be looked at, by person; a cohort without a table of quality has no flags."""
    if not path.is_file():
        return {}
    table = read_table(path)
    table.require("participant_id", "flags")
    told = {cells["participant_id"]: cells["flags"] for cells in table.rows}
    return {person: tuple(text.split(", ")) for person, text in told.items() if text not in ("", "n/a")}


def _row(table: Table, row: int, path: Path, record: Mapping[str, Any], flags: tuple[str, ...]) -> PreparedRow:
    cells = table.rows[row]
    sex = sex_code(cells["sex"])
    if sex is None:
        raise table.fault(row, "sex", "is neither F nor M.")
    numbers: dict[str, float] = {}
    for name in CONTINUOUS:
        value = table.number(row, name)
        if value is None:
            raise table.fault(row, name, "is no value, and every person of a cohort has one.")
        if fault := implausible(name, value):
            raise table.fault(row, name, f"{fault}.", "Correct it, or prepare the study again.")
        numbers[name] = value
    split = next((s for s in SPLITS if s == cells["split"]), None)
    if split is None:
        raise table.fault(row, "split", f"is none of {', '.join(SPLITS)}.")
    covariates = Covariates(sex, **numbers)
    return PreparedRow(
        cells["participant_id"], covariates, split, path, int(record["bytes"]), str(record["sha256"]), flags
    )


class VolumeDataset:
    """The images of one split by index, in the order of their ids.

    Every file read is compared with the manifest's SHA-256. Images are kept in memory, as the 16-bit integers they
    are stored as, while they fit into `cache_bytes`; the rest are read again each time, or from one uncompressed file
    after `keep_uncompressed`. Several threads may ask at once.
    """

    def __init__(self, cohort: PreparedCohort, split: Split | None = None, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.cohort, self.split = cohort, split
        self.grid = cohort.grid
        self.rows = cohort.rows(split)
        self.names = [row.participant_id for row in self.rows]
        self.covariates = [row.covariates for row in self.rows]
        self._cache: dict[int, np.ndarray] = {}
        self._cache_holds = int(cache_bytes // (2 * np.prod(self.grid.shape_XYZ)))
        self._uncompressed: UncompressedImages | None = None
        self._proven: set[int] = set()
        self._warned = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fits_in_memory(self) -> bool:
        """Whether all images are kept in memory once they were read."""
        return len(self) <= self._cache_holds

    def keep_uncompressed(self, folder: Path, progress: Progress = Quiet()) -> None:
        """From now on images come from one uncompressed file in `folder` (cohort/uncompressed), written first if it is
        not there: the operating system keeps as much of it in memory as there is room for. Each image is compared with
        its checksum the first time it is read, and read from the cohort again where it differs. UsageError where the
        folder holds other things, EnvironmentProblem where the disk has no room."""
        self._uncompressed = write_uncompressed(
            folder,
            self.split or "all",
            self.cohort.digest,
            self.grid.shape_XYZ,
            [row.sha256 for row in self.rows],
            lambda index: self._read(self.rows[index]),
            progress,
        )

    def image_XYZ(self, index: int) -> np.ndarray:
        """float32 in 0..1 on the cohort's grid, an array of the caller's own."""
        return self._stored_XYZ(index).astype(np.float32) / np.float32(_INT16_UNIT)

    def _stored_XYZ(self, index: int) -> np.ndarray:
        if self._uncompressed is not None:
            stored = self._uncompressed.stored_XYZ(index)
            if index not in self._proven:
                if not self._uncompressed.proves(index, stored):
                    return self._mended(self._uncompressed, index)
                self._proven.add(index)
            return stored
        found = self._cache.get(index)
        if found is None:
            found = self._read(self.rows[index])
            if len(self._cache) < self._cache_holds:
                self._cache[index] = found
        return found

    def _mended(self, damaged: UncompressedImages, index: int) -> np.ndarray:
        """The image from the cohort, put back into the file whose copy of it is damaged."""
        if not self._warned:
            warn(
                f"{damaged.path}: image {index} differs from its checksum; it, and any other that does, is "
                "read from the cohort again. Look at the disk."
            )
            self._warned = True
        stored = self._read(self.rows[index])
        damaged.mend(index, stored)
        return stored

    def _read(self, row: PreparedRow) -> np.ndarray:
        remedy = "Restore the file, or delete it and run brainldm prepare again."
        if not row.path.is_file() or sha256_of(row.path) != row.sha256:
            what = "differs from its checksum in manifest.jsonl" if row.path.is_file() else "is gone"
            raise BadInput(f"the image {what}.", remedy=remedy, path=row.path, reason="checksum")
        volume = read_nifti(row.path)
        if not same_voxels(volume, self.grid):
            raise BadInput(
                f"the image of shape {volume.shape_XYZ} does not lie on the grid {self.grid.name!r} "
                f"{self.grid.shape_XYZ}.",
                remedy=remedy,
                path=row.path,
                reason="grid",
            )
        return np.rint(volume.data_XYZ * _INT16_UNIT).astype(np.int16)


def data_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which `epoch` goes through n images: a permutation that those three numbers fix."""
    return stream(seed, "data order", epoch).permutation(n)


def warn_of_flagged(dataset: VolumeDataset) -> None:
    """Says on stderr whom of these people preparing has flagged: nobody is left out of a training in silence, nor is a
    failed scan trained on in silence."""
    flagged = [f"{row.participant_id}: {', '.join(row.flags)}" for row in dataset.rows if row.flags]
    if flagged:
        told = "; ".join(flagged[:3]) + (f"; {len(flagged) - 3} more" if len(flagged) > 3 else "")
        warn(
            f"{len(flagged)} of {len(dataset)} images to train on should be looked at ({told}; see the "
            "cohort's quality.tsv). To do without them: prepare ... --leave-out ID."
        )


def check_trainable(dataset: VolumeDataset, batch: int) -> None:
    """UsageError when these images cannot make one batch of a training: fewer than 2, or fewer than `batch`."""
    n = len(dataset)
    split = dataset.split or "whole"
    if n < 2:
        raise UsageError(
            f"the {split} split holds {n} image{'' if n == 1 else 's'}; at least 2 are needed.",
            remedy="Prepare more people, or a smaller --holdout.",
            path=dataset.cohort.folder,
            reason="no_training_images",
        )
    if batch > n:
        raise UsageError(
            f"a batch of {batch} was asked for, and the {split} split holds {n} images.",
            remedy=f"Use a batch of at most {n}, or prepare more people.",
            path=dataset.cohort.folder,
            reason="batch_too_large",
        )
