"""A BIDS study as people write it: the T1w scans, who they are of, and everybody who cannot be used, with the reason.

One scan a person is used. Which one is a rule and no guess: of a session that the table has a row for, an image in its
own space before one with a `space-` entity, one without a contrast agent (`ce-`), then the first session, the first
run, the first name. The others are named in the person's notes. What sub-<id>_sessions.tsv says of the session counts
more than participants.tsv, and an age at the scan more than one of which nobody says when it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brainldm.base.derivative import SPACE
from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.cohort.study_images import (
    Failure,
    check_is_a_study,
    find_images,
    find_masks,
    label_of,
    mask_of,
    no_images,
    preference,
)
from brainldm.cohort.study_people import People, meanings_in, read_participants, visit_of

# When this share of the table's people have cells that are no ages or sexes at all, the table is wrong, not people.
_SYSTEMATIC = 0.5


@dataclass(frozen=True)
class Scan:
    """One person's T1w image and what the study's table says of them."""

    participant_id: str
    path: Path
    file: str
    space: str
    sex: int
    age_years: float
    others: Mapping[str, str]
    mask: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_warped(self) -> bool:
        """Whether its name says that it was brought to a template's size; our own MNI label says that it was not."""
        return self.space.startswith("MNI") and self.space != SPACE


@dataclass(frozen=True)
class Study:
    """What `read_study` found. `columns` are those of the study's table that are neither id, age nor sex."""

    root: Path
    name: str
    scans: list[Scan]
    failures: list[Failure]
    columns: tuple[str, ...]
    column_meanings: Mapping[str, Any] = field(default_factory=dict)


def read_study(
    folder: str | Path,
    *,
    masks: str | Path | None = None,
    need_masks: bool = False,
    used_columns: Sequence[str] = (),
) -> Study:
    """The scans of a BIDS folder (raw or derivative), each with its row of participants.tsv.

    `masks` is a folder of brain masks, BIDS-named; without it they are looked for beside the scans and under
    derivatives/. With `need_masks`, people without one are failures. `used_columns` count as age and sex do: nobody may
    have several rows that differ in them. Nothing of an image is read here.
    """
    root = Path(folder)
    check_is_a_study(root)
    try:
        images, failures = find_images(root)
    except OSError as error:
        raise EnvironmentProblem(
            f"the study cannot be read: {error.strerror}.",
            remedy="Check its permissions.",
            path=root,
            reason="unreadable",
        ) from error
    if not images:
        raise no_images(root, failures)
    table = read_participants(root)
    people = People.read(table, meanings_in(root / "participants.json"), used_columns)
    faults = list(failures)
    found_masks = find_masks(root if masks is None else Path(masks), given=masks is not None)

    scans: list[Scan] = []
    met: set[int] = set()
    malformed: list[Failure] = []
    folders = Counter(label_of(participant_id).lstrip("0") for participant_id in images)
    for participant_id, found in sorted(images.items()):
        of_person = people.rows_of(participant_id, "", folders)
        met.update(of_person)
        of_session = {i.session: people.rows_of(participant_id, i.session, folders) for i in found}
        chosen = min(found, key=lambda i: (not of_session[i.session], preference(i)))
        try:
            row, notes = people.one_row(participant_id, chosen.session, of_session[chosen.session], of_person)
            person = people.person(row, visit_of(root, chosen))
        except BadInput as error:
            fault = Failure(participant_id, chosen.file, error.reason, _located(error, root), error.remedy)
            (malformed if error.reason == "bad_cell" else faults).append(fault)
            continue
        if len(found) > 1:
            others = ", ".join(sorted(i.file for i in found if i is not chosen))
            notes = (*notes, f"used the first of {len(found)} scans; not used: {others}")
        scans.append(
            Scan(
                participant_id,
                chosen.path,
                chosen.file,
                chosen.space,
                person.sex,
                person.age_years,
                person.others,
                mask_of(participant_id, chosen, found_masks),
                (*notes, *person.notes),
            )
        )
    if malformed and (len(malformed) >= _SYSTEMATIC * len(images) or not scans):
        raise BadInput(
            f"{len(malformed)} of {len(images)} people have an age or a sex that cannot be read. "
            + " ".join(m.message for m in malformed[:3]),
            remedy=malformed[0].remedy,
            path=table.path,
            reason="bad_cell",
        )
    if need_masks:
        faults += [_without_mask(s, root if masks is None else Path(masks)) for s in scans if s.mask is None]
        scans = [s for s in scans if s.mask is not None]
    faults += malformed
    failed_already = {f.participant_id for f in faults}
    for row in sorted(set(range(len(table))) - met):
        participant_id = people.id_of(row)
        if participant_id not in failed_already:
            message = (
                f"line {table.lines[row]} of {table.path.name} names this person, and there is no T1w scan of them."
            )
            faults.append(
                Failure(participant_id, "", "no_scan", message, "Add the scan, or leave the row: it does no harm.")
            )
    if not scans:
        raise BadInput(
            f"none of {len(images)} people can be used. {faults[0].participant_id}: {faults[0].message}",
            remedy=faults[0].remedy,
            path=root,
            reason=faults[0].reason,
        )
    faults.sort(key=lambda f: (f.participant_id, f.file))
    return Study(root, root.resolve().name, scans, faults, people.other_columns, people.meanings)


def _without_mask(scan: Scan, place: Path) -> Failure:
    message = f"there is no brain mask of this person in {place.resolve().name}."
    remedy = f"Add {scan.participant_id}_desc-brain_mask.nii.gz, or strip without masks: --strip-with template."
    return Failure(scan.participant_id, scan.file, "missing_mask", message, remedy)


def _located(error: BadInput, root: Path) -> str:
    if error.path is None:
        return error.message
    place = error.path.relative_to(root) if error.path.is_relative_to(root) else error.path.name
    return f"{place}: {error.message}"
