"""How good is the instrument? Volumes measured in scans, against volumes that somebody else found in the same scans.

OUT/measured.tsv      a row a scan: measured, and known where the study's table says
OUT/instrument.json   agreement with its intervals, counts and what could not be measured
OUT/measured.jsonl    by image hash: a rerun measures only what is new
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import brainldm
from brainldm.base.errors import PartialFailure, UsageError
from brainldm.base.files import locked_folder, sha256_of, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.progress import Progress, Quiet
from brainldm.base.tables import read_table, write_table
from brainldm.evaluate.conditioning import Agreement, agreement
from brainldm.evaluate.examine import Examined
from brainldm.evaluate.images import Failure, open_images
from brainldm.evaluate.measuring import Instrument, measure


@dataclass(frozen=True)
class InstrumentCheck:
    """`agreement` of what was measured with what was known; None where nothing was to be compared."""

    instrument: str
    measured: int
    agreement: Agreement | None
    failures: tuple[Failure, ...]

    def as_text(self) -> str:
        lines = [f"{self.measured} scans measured by {self.instrument}."]
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
    covariate: str = "ventricles_mm3",
    instrument: Instrument | None = None,
    workers: int = 1,
    progress: Progress = Quiet(),  # noqa: B008  # stateless
) -> InstrumentCheck:
    """Measures every scan in `study` and compares `covariate` with the column `against` of its participants.tsv.

    UsageError for a column that is not there; PartialFailure, after all is written, when scans could not be measured.
    """
    from brainldm.cohort.measure import TemplateMeasure

    folder = open_images(study, "scans")
    known = {} if against is None else _known(study, against)
    instrument = TemplateMeasure() if instrument is None else instrument
    looks = [Examined(image, sha256_of(image.path), False, False, (), None) for image in folder.images]
    with locked_folder(out):
        cache = Manifest(out / "measured.jsonl")
        found = measure(looks, "scans", instrument, cache, workers=workers, progress=progress)
        names = sorted({name for measurement in found.by_sha256.values() for name in measurement.values})
        rows: list[dict[str, Any]] = [
            {"participant_id": look.image.participant_id, "file": look.image.file}
            | {name: found.value(look, name) for name in names}
            | ({} if against is None else {against: known.get(look.image.participant_id)})
            for look in looks
        ]
        write_table(out / "measured.tsv", ["participant_id", "file", *names, *([against] if against else [])], rows)
        compared = None
        if against is not None:
            compared = agreement([row[against] for row in rows], [row.get(covariate) for row in rows])
        check = InstrumentCheck(instrument.name, len(found.by_sha256), compared, found.failures)
        content = {"software": {"brainldm": brainldm.__version__}, "covariate": covariate, "against": against}
        write_json(out / "instrument.json", content | asdict(check))
    if found.failures:
        raise PartialFailure(
            f"{len(found.failures)} of {len(looks)} scans could not be measured; the first: "
            f"{found.failures[0].file} {found.failures[0].message}",
            path=out,
        )
    return check


def _known(study: Path, column: str) -> dict[str, float | None]:
    table = read_table(study / "participants.tsv")
    if column not in table.columns:
        raise UsageError(
            f"participants.tsv has no column {column!r}.",
            remedy=f"Name one of: {', '.join(table.columns)}.",
            path=study,
        )
    return {cells["participant_id"]: table.number(row, column) for row, cells in enumerate(table.rows)}
