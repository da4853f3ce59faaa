"""How good is the instrument? Volumes measured in scans, against volumes that somebody else found in the same scans.

OUT/measured.tsv      a row a scan: measured, and known (under its column's name, or NAME_known where that is taken)
OUT/instrument.json   agreement with its intervals, counts and what could not be measured
OUT/measured.jsonl    by image hash: a rerun measures only what is new
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import brainldm
from brainldm.base.counts import counted
from brainldm.base.errors import BadInput, PartialFailure, UsageError
from brainldm.base.files import check_output_apart, locked_folder, sha256_of, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import check_is_regular_file
from brainldm.base.pool import check_workers
from brainldm.base.progress import Progress, Quiet
from brainldm.base.tables import read_table, write_table
from brainldm.evaluate.conditioning import Agreement, agreement
from brainldm.evaluate.examine import Examined
from brainldm.evaluate.images import Failure, JudgedImage, bare, open_images, subject_of
from brainldm.evaluate.measuring import Instrument, inert, measure

# What somebody else found, by person and session ("" where the table names none).
Known = dict[str, dict[str, float | None]]

_COMPARED = "ventricles_mm3"


@dataclass(frozen=True)
class InstrumentCheck:
    """`agreement` of what was measured with what was known; None where nothing was to be compared."""

    instrument: str
    measured: int
    agreement: Agreement | None
    failures: tuple[Failure, ...]

    def as_text(self) -> str:
        lines = [f"{counted(self.measured, 'scan')} measured by {self.instrument}."]
        if self.agreement is not None:
            for name, estimate in asdict(self.agreement).items():
                if estimate["value"] is None:
                    lines.append(f"{name}: none ({estimate['reason']})")
                    continue
                interval = "" if estimate["low"] is None else f" ({estimate['low']:.4g} to {estimate['high']:.4g})"
                lines.append(f"{name}: {estimate['value']:.4g}{interval}, n {estimate['n']}")
        return "\n".join(lines)


def check_instrument(
    study: Path,
    out: Path,
    *,
    against: str | None = None,
    instrument: Instrument | None = None,
    workers: int = 1,
    progress: Progress = Quiet(),
) -> InstrumentCheck:
    """Measures every scan in `study` and compares the ventricles with the column `against` of its participants.tsv.

    UsageError for a column that is not there, BadInput for two values of one person (and session); PartialFailure,
    after all is written, when scans could not be measured.
    """
    from brainldm.cohort.measure import TemplateMeasure

    check_workers(workers)
    check_output_apart(out, study)
    folder = open_images(study, "scans")
    known = {} if against is None else _known(study, against)
    instrument = TemplateMeasure() if instrument is None else instrument
    looks, failures = [], list(folder.failures)
    for image in folder.images:
        try:
            looks.append(Examined(image, _hash_of(image), False, False, (), None))
        except BadInput as error:
            failures.append(Failure.of("scans", image, error))
    with locked_folder(out):
        cache = Manifest(out / "measured.jsonl")
        found = measure(looks, "scans", instrument, cache, workers=workers, progress=progress)
        failures += found.failures
        names = sorted({name for measurement in found.by_sha256.values() for name in measurement.values})
        columns = ["participant_id", "file", *names]
        rows: list[dict[str, Any]] = [
            {"participant_id": inert(look.image.participant_id), "file": inert(look.image.file)}
            | {name: found.value(look, name) for name in names}
            for look in looks
        ]
        compared = None
        if against is not None:
            theirs = [_of_person(known, look.image) for look in looks]
            compared = agreement(theirs, [found.value(look, _COMPARED) for look in looks])
            columns.append(f"{against}_known" if against in (*columns, _COMPARED) else against)
            for row, value in zip(rows, theirs):
                row[columns[-1]] = value
        write_table(out / "measured.tsv", columns, rows)
        measured = sum(look.sha256 in found.by_sha256 for look in looks)
        check = InstrumentCheck(instrument.name, measured, compared, tuple(failures))
        content = {"software": {"brainldm": brainldm.__version__}, "covariate": _COMPARED, "against": against}
        write_json(out / "instrument.json", content | asdict(check))
    if failures:
        raise PartialFailure(
            f"{len(failures)} of {counted(len(folder.images), 'scan')} could not be measured; the first: "
            f"{failures[0].file} {failures[0].message}",
            remedy="All of them are listed in instrument.json.",
            path=out,
        )
    return check


def _hash_of(image: JudgedImage) -> str:
    check_is_regular_file(image.path)
    try:
        return sha256_of(image.path)
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}.", path=image.path, reason="unreadable") from error


def _of_person(known: Known, image: JudgedImage) -> float | None:
    """The person's value, of the scan's session where the table names sessions; an image of several that a person has
    is named by its path."""
    values = known.get(bare(image.participant_id)) or known.get(bare(subject_of(image.file))) or {}
    named = re.search(r"(?:^|[/_])ses-([^/_]+)", image.file)
    if named is None and len(values) == 1:
        return next(iter(values.values()))
    return values.get("" if named is None else named[1], values.get(""))


def _known(study: Path, column: str) -> Known:
    """What the study's table holds in that column, by participant, with or without its sub-."""
    table = read_table(study / "participants.tsv")
    table.require("participant_id")
    if column not in table.columns:
        raise UsageError(
            f"participants.tsv has no column {column!r}.",
            remedy=f"Name one of: {', '.join(table.columns)}.",
            path=study,
        )
    known: Known = {}
    first_line: dict[tuple[str, str], int] = {}
    for row, cells in enumerate(table.rows):
        person = bare(cells["participant_id"])
        session = "" if table.is_missing(row, "session_id") else cells["session_id"].removeprefix("ses-")
        value = table.number(row, column)
        line = first_line.setdefault((person, session), table.lines[row])
        if known.setdefault(person, {}).setdefault(session, value) != value:
            raise table.fault(
                row,
                column,
                f"is not what line {line} says of the same person.",
                "Keep one row a person, or name the sessions in a column session_id.",
            )
    return known
