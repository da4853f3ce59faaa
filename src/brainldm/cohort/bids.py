"""A BIDS study as people write it: the T1w scans, who they are of, and everybody who cannot be used, with the reason.

One scan a person is used. Which one is a rule and no guess: of a session that the table has a row for, an image in its
own space before one with a `space-` entity, one without a contrast agent (`ce-`), then the first session, the first
run, the first name. The others are named in the person's notes. What sub-<id>_sessions.tsv says of the session counts
more than participants.tsv, and an age at the scan more than one of which nobody says when it was.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from brainldm.base.covariates import FEMALE, MALE, implausible, sex_code
from brainldm.base.derivative import SPACE
from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.base.files import read_json
from brainldm.base.tables import Table, number_in, read_table

_T1W = re.compile(r"^(sub-[^_]+)(?:_.+)?_T1w\.nii(?:\.gz)?$", re.DOTALL)
# Columns that hold an age in years; the first that has one counts: a plain age may be that at enrolment, years before.
# Compared without case, - or _.
AGE_COLUMNS = ("age_at_scan", "age_at_imaging", "age_at_session", "age_years", "age")
SEX_COLUMNS = ("sex", "gender")
_SEX_WORDS = {"woman": FEMALE, "girl": FEMALE, "man": MALE, "boy": MALE}  # beside those of `sex_code`
_NEGATIONS = {"no", "non", "not", "neither"}
_UNIT_OF_TIME = re.compile(r"\b(year|yr|y|month|mo|week|wk|day|d|hour)s?\b", re.IGNORECASE)
# When this share of the table's people have cells that are no ages or sexes at all, the table is wrong, not people.
_SYSTEMATIC = 0.5


@dataclass(frozen=True)
class Failure:
    """Somebody who did not make it into the cohort: one row of failures.tsv."""

    participant_id: str
    file: str
    reason: str
    message: str
    remedy: str = ""


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
    _check_is_a_study(root)
    try:
        images, failures = _find_images(root)
    except OSError as error:
        raise EnvironmentProblem(
            f"the study cannot be read: {error.strerror}.",
            remedy="Check its permissions.",
            path=root,
            reason="unreadable",
        ) from error
    if not images:
        raise _no_images(root, failures)
    table = _read_participants(root)
    people = _People.read(table, _meanings(root / "participants.json"), used_columns)
    faults = list(failures)
    found_masks = _find_masks(root if masks is None else Path(masks), given=masks is not None)

    scans: list[Scan] = []
    met: set[int] = set()
    malformed: list[Failure] = []
    folders = Counter(_label(participant_id).lstrip("0") for participant_id in images)
    for participant_id, found in sorted(images.items()):
        of_person = people.rows_of(participant_id, "", folders)
        met.update(of_person)
        of_session = {i.session: people.rows_of(participant_id, i.session, folders) for i in found}
        chosen = min(found, key=lambda i: (not of_session[i.session], _preference(i)))
        try:
            row, notes = people.one_row(participant_id, chosen.session, of_session[chosen.session], of_person)
            person = people.person(row, _visit(root, chosen))
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
                _mask_of(participant_id, chosen, found_masks),
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


# ---------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class _Image:
    path: Path
    file: str
    session: str
    space: str


def _check_is_a_study(root: Path) -> None:
    if not root.exists():
        raise BadInput("there is no such folder.", remedy="Check the path.", path=root, reason="missing")
    if root.is_dir():
        return
    if root.suffix.lower() in (".zip", ".tar", ".tgz", ".gz") and not root.name.lower().endswith(".nii.gz"):
        told, remedy = "is an archive; a BIDS folder is needed.", "Unpack it; DICOM is converted with dcm2niix."
    elif _is_dicom(root):
        told, remedy = "is a DICOM file; a BIDS folder is needed.", _DICOM_REMEDY
    else:
        told, remedy = "is a file; a BIDS folder is needed.", _LAYOUT_REMEDY
    raise BadInput(told, remedy=remedy, path=root, reason="not_bids")


_LAYOUT_REMEDY = (
    "Put each scan at sub-<id>/anat/sub-<id>_T1w.nii.gz (or sub-<id>/ses-<session>/anat/...), and age and sex into "
    "participants.tsv with the columns participant_id, age, sex."
)
_IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh", ".img", ".mnc", ".nrrd")
_DICOM_REMEDY = "Convert the series to NIfTI with dcm2niix (https://github.com/rordenlab/dcm2niix), then to BIDS."


def _find_images(root: Path) -> tuple[dict[str, list[_Image]], list[Failure]]:
    images: dict[str, list[_Image]] = {}
    failures: list[Failure] = []
    for participant in _folders(root, "sub-"):
        participant_id = composed(participant.name)
        try:
            places = [("", participant / "anat")]
            places += [(s.name, s / "anat") for s in _folders(participant, "ses-")]
            entries = [(session, entry) for session, anat in places for entry in _entries(anat)]
        except OSError as error:
            message = f"the folder cannot be read: {error.strerror}."
            failures.append(Failure(participant_id, participant.name, "unreadable", message, "Check its permissions."))
            continue
        for session, path in entries:
            entities = _entities(path.name)
            named = _T1W.match(path.name)
            if not named or entities.get("part", "mag") != "mag":
                continue
            file = path.relative_to(root).as_posix()
            if composed(named.group(1)) != participant_id or entities.get("ses", session[4:]) != session[4:]:
                place = "/".join(filter(None, (participant.name, session)))
                message = f"the file is named for {named.group(1)} and lies in the folder of {place}."
                remedy = "Find out whose scan it is, and name it so."
                if "_" in participant.name:
                    message = (
                        f"the id {_label(participant_id)!r} holds an underscore, which ends an id in a file's name."
                    )
                    remedy = f"Rename folder and files to {participant_id.replace('_', '')}, and the row of the table."
                failures.append(Failure(participant_id, file, "mislabelled", message, remedy))
                continue
            images.setdefault(participant_id, []).append(_Image(path, file, session, entities.get("space", "")))
    return images, failures


def _folders(folder: Path, prefix: str) -> list[Path]:
    return [e for e in _entries(folder) if e.name.startswith(prefix) and e.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _entities(file_name: str) -> dict[str, str]:
    return dict(part.split("-", 1) for part in file_name.split("_") if "-" in part)


def _preference(image: _Image) -> tuple:
    entities = _entities(image.path.name)
    rank = (image.space != "", "ce" in entities)
    return *rank, _natural(image.session), _natural(entities.get("run", "")), _natural(image.path.name)


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key in which run-2 comes before run-10."""
    return [(0, int(p), "") if p.isdigit() and p.isascii() else (1, 0, p) for p in re.split(r"([0-9]+)", text) if p]


def _no_images(root: Path, failures: list[Failure]) -> BadInput:
    looked_for = "no T1w scan was found; looked for sub-*/anat/*_T1w.nii[.gz] and sub-*/ses-*/anat/*_T1w.nii[.gz]"
    if failures:
        first = failures[0]
        return BadInput(
            f"{looked_for}. {first.file}: {first.message}", remedy=first.remedy, path=root, reason=first.reason
        )
    found, remedy = "", _LAYOUT_REMEDY
    below = _some_files_below(root)
    if any(_is_dicom(path) for path in below[:50]):
        found, remedy = "; what is there is DICOM", _DICOM_REMEDY
    elif any(path.suffix.lower() == ".zip" for path in below):
        found, remedy = "; what is there is zipped", "Unpack it; DICOM is converted with dcm2niix."
    else:
        derivatives = [d.name for d in _folders(root / "derivatives", "") if _find_images(d)[0]]
        loose = [path for path in below if path.name.lower().endswith(_IMAGE_SUFFIXES)]
        if derivatives:
            found = f"; there are some in derivatives/{derivatives[0]}"
            remedy = "Give that folder instead, with a participants.tsv in it."
        elif loose:
            some = ", ".join(path.relative_to(root).as_posix() for path in loose[:3])
            found = f"; there are {len(loose)} other images, such as {some}"
            if not all(path.name.endswith((".nii", ".nii.gz")) for path in loose):
                remedy = f"Convert what is no .nii or .nii.gz (FreeSurfer's mri_convert), rename .NII.GZ. {remedy}"
        elif not below:
            found = "; the folder is empty"
    return BadInput(f"{looked_for}{found}.", remedy=remedy, path=root, reason="not_bids")


def _some_files_below(root: Path, limit: int = 2000) -> list[Path]:
    found: list[Path] = []
    for folder, _, names in os.walk(root):  # does not follow links, so a loop cannot catch it
        found += [Path(folder) / name for name in sorted(names)]
        if len(found) >= limit:
            break
    return found


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _mask_of(participant_id: str, scan: _Image, masks: Mapping[tuple[str, str, str], Sequence[Path]]) -> Path | None:
    """The brain mask that names the scan most closely, and nothing that the scan is not: a mask of run 2 is none of
    run 1. The first by path where several do."""
    wanted = _entities(scan.path.name)

    def named(path: Path) -> dict[str, str]:
        return {name: value for name, value in _entities(path.name).items() if name in ("run", "acq", "rec", "ce")}

    fitting = [
        path
        for path in masks.get((participant_id, scan.session, scan.space), ())
        if all(wanted.get(name) == value for name, value in named(path).items())
    ]
    return max(fitting, key=lambda path: len(named(path)), default=None)


def _find_masks(root: Path, *, given: bool) -> dict[tuple[str, str, str], list[Path]]:
    """Brain masks by participant, session (of the name, or of the folder) and space, in the order of their paths."""
    if given and not root.is_dir():
        raise BadInput("there is no such folder of masks.", remedy="Check the path.", path=root, reason="missing")
    patterns = ["sub-*/anat/*_mask.nii*", "sub-*/ses-*/anat/*_mask.nii*"]
    patterns += [f"derivatives/*/{p}" for p in patterns] + (["*_mask.nii*"] if given else [])
    masks: dict[tuple[str, str, str], list[Path]] = {}
    for path in sorted({p for pattern in patterns for p in root.glob(pattern)}):
        entities = _entities(path.name)
        if entities.get("desc", "brain") != "brain" or entities.get("label", "brain") != "brain":
            continue
        folder = next((part for part in path.relative_to(root).parts[:-1] if part.startswith("ses-")), "")
        session = f"ses-{entities['ses']}" if "ses" in entities else folder
        key = composed(f"sub-{entities.get('sub', '')}"), session, entities.get("space", "")
        masks.setdefault(key, []).append(path)
    return masks


def _without_mask(scan: Scan, place: Path) -> Failure:
    message = f"there is no brain mask of this person in {place.resolve().name}."
    remedy = f"Add {scan.participant_id}_desc-brain_mask.nii.gz, or strip without masks: --strip-with template."
    return Failure(scan.participant_id, scan.file, "missing_mask", message, remedy)


# ---------------------------------------------------------------------------------------------------------- people


def _read_participants(root: Path) -> Table:
    path = root / "participants.tsv"
    if not path.exists():
        others = sorted(p.name for p in root.iterdir() if p.suffix.lower() in (".tsv", ".csv"))
        raise BadInput(
            "there is no participants.tsv, which says each person's age and sex "
            f"(tables there: {', '.join(others) or 'none'}).",
            remedy="Write one with the columns participant_id, age and sex, separated by tabs.",
            path=root,
            reason="missing",
        )
    return read_table(path)


def _meanings(*paths: Path) -> dict[str, Any]:
    """What the JSON files beside a table say of its columns; a later file's word counts more."""
    meanings: dict[str, Any] = {}
    for path in paths:
        content = read_json(path) if path.exists() else {}
        meanings |= content if isinstance(content, dict) else {}
    return meanings


@dataclass(frozen=True)
class _Visit:
    """The row of a scan's session in sub-<id>_sessions.tsv."""

    table: Table
    row: int
    session: str
    meanings: Mapping[str, Any]


def _visit(root: Path, scan: _Image) -> _Visit | None:
    """None where the person has no such table, or it does not name the session."""
    folder = root / Path(scan.file).parts[0]
    path = folder / f"{folder.name}_sessions.tsv"
    if not scan.session or not path.exists():
        return None
    table = read_table(path)
    rows = _of_session(_sessions(table, _column(table, ("session_id",)), range(len(table))), scan.session)
    if len(rows) > 1:
        raise table.fault(rows[1], _column(table, ("session_id",)), "is a second row of one session.", "Keep one.")
    meanings = _meanings(root / "sessions.json", path.with_suffix(".json"))
    return _Visit(table, rows[0], scan.session, meanings) if rows else None


@dataclass(frozen=True)
class _Cell:
    table: Table
    row: int
    column: str
    note: str = ""

    @property
    def text(self) -> str:
        return self.table.rows[self.row].get(self.column, "")

    @property
    def is_missing(self) -> bool:
        return self.table.is_missing(self.row, self.column)

    def fault(self, rule: str, remedy: str) -> BadInput:
        return self.table.fault(self.row, self.column, rule, remedy)

    def missing(self, what: str) -> BadInput:
        return BadInput(
            f"line {self.table.lines[self.row]} of {self.table.path.name}, column {self.column!r}: there is no value.",
            remedy=f"Fill in the {self.column} of this person to include them.",
            reason=f"missing_{what}",
        )


@dataclass(frozen=True)
class _Person:
    sex: int
    age_years: float
    others: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _People:
    """participants.tsv, asked by person. `session_column` is empty where there is none."""

    table: Table
    id_column: str
    session_column: str
    age_columns: tuple[str, ...]
    sex_column: str
    used_columns: tuple[str, ...]
    by_label: Mapping[str, list[int]]
    by_bare_label: Mapping[str, list[int]]
    sex_levels: Mapping[str, str]
    codes_from_one: bool
    meanings: Mapping[str, Any]

    @classmethod
    def read(cls, table: Table, meanings: Mapping[str, Any], used_columns: Sequence[str]) -> _People:
        id_column, sex_column = _column(table, ("participant_id",)), _column(table, SEX_COLUMNS)
        meanings = {column: about for column in table.columns if (about := _about(column, meanings)) is not None}
        age_columns = _age_columns(table, meanings)
        if not age_columns and not any(table.path.parent.glob("sub-*/sub-*_sessions.tsv")):
            _column(table, AGE_COLUMNS)
        by_label: dict[str, list[int]] = {}
        by_bare_label: dict[str, list[int]] = {}
        for row, cells in enumerate(table.rows):
            label = _label(cells[id_column])
            if not label:
                raise table.fault(row, id_column, "is no id.", "Every row needs the id of its person.")
            by_label.setdefault(label, []).append(row)
            by_bare_label.setdefault(label.lstrip("0"), []).append(row)
        levels = meanings.get(sex_column)
        levels = levels.get("Levels") if isinstance(levels, dict) else None
        sex_levels = {_code(k): _meaning(v) for k, v in levels.items()} if isinstance(levels, dict) else {}
        return cls(
            table,
            id_column,
            _find_column(table, ("session_id",)),
            age_columns or ("age",),
            sex_column,
            tuple(used_columns),
            by_label,
            by_bare_label,
            sex_levels,
            any(_code(cells[sex_column]) == "2" for cells in table.rows),
            meanings,
        )

    @property
    def age_column(self) -> str:
        return self.age_columns[0]

    @property
    def other_columns(self) -> tuple[str, ...]:
        used = (self.id_column, self.age_column, self.sex_column)
        return tuple(c for c in self.table.columns if c not in used)

    def id_of(self, row: int) -> str:
        return f"sub-{_label(self.table.rows[row][self.id_column])}"

    def rows_of(self, participant_id: str, session: str, folders: Mapping[str, int]) -> list[int]:
        """The person's rows; of those that name sessions, the ones of this session.

        Ids agree when they are equal without `sub-`; where nobody's is, when they are equal without leading zeros and
        no other folder is: `folders` counts those that agree so.
        """
        label = _label(participant_id)
        bare = label.lstrip("0")
        rows = self.by_label.get(label) or (self.by_bare_label.get(bare, []) if folders[bare] == 1 else [])
        named = _sessions(self.table, self.session_column, rows)
        return _of_session(named, session) if session and named else rows

    def one_row(
        self, participant_id: str, session: str, rows: list[int], of_person: list[int]
    ) -> tuple[int, tuple[str, ...]]:
        """The row to take of the `rows` of a session, or of all rows `of_person`, and what to note of it."""
        if not rows and of_person:
            named = sorted({f"ses-{s}" for s in _sessions(self.table, self.session_column, of_person).values()})
            raise BadInput(
                f"{self.table.path.name} has no row for session {session}; rows name {', '.join(named)}.",
                remedy=f"Add a row for {participant_id}, {session}, with age and sex.",
                reason="not_in_table",
            )
        if not rows:
            raise BadInput(
                f"{self.table.path.name} has no row for this person.",
                remedy=f"Add a row for {participant_id} with age and sex.",
                reason="not_in_table",
            )
        lines = ", ".join(str(self.table.lines[r]) for r in rows)
        labels = {_label(self.table.rows[r][self.id_column]) for r in rows}
        if len(labels) > 1:
            raise BadInput(
                f"lines {lines} of {self.table.path.name} could all be this person: {', '.join(sorted(labels))}.",
                remedy=f"Write {participant_id} in the row that is theirs.",
                reason="ambiguous_id",
            )
        told = [self._cells(row) for row in rows]
        differing = [c for c in told[0] if len({_comparable(cells[c].text) for cells in told}) > 1]
        if used := [c for c in differing if c in (self.age_column, self.sex_column, *self.used_columns)]:
            raise BadInput(
                f"lines {lines} of {self.table.path.name} give this person different values of {', '.join(used)}.",
                remedy="Keep one row a person (or add a session_id column).",
                reason="duplicate_rows",
            )
        written = self.table.rows[rows[0]][self.id_column]
        same = composed(written) in (participant_id, participant_id[4:])
        notes = [] if same else [f"matched to the row of {written}"]
        if differing:
            first = self.table.lines[rows[0]]
            notes.append(f"lines {lines} of the table differ in {', '.join(differing)}: taken from line {first}")
        elif len(rows) > 1:
            notes.append(f"lines {lines} of the table say the same")
        return rows[0], tuple(notes)

    def _cells(self, row: int) -> dict[str, _Cell]:
        """The cells of a row by column; that of the age may be of another column than it stands under."""
        cells = {c: _Cell(self.table, row, c) for c in (self.sex_column, *self.other_columns)}
        return {self.age_column: _first_given(self.table, row, self.age_columns)} | cells

    def person(self, row: int, visit: _Visit | None) -> _Person:
        """What the study says of the person in this row, at the visit where that has a word on it; BadInput where age
        or sex cannot be told."""
        cells = self._cells(row)
        notes = () if visit is None else self._put_visit(cells, visit)
        sex, age_years = self._sex(cells[self.sex_column]), _age_years(cells[self.age_column])
        notes += tuple(cell.note for cell in cells.values() if cell.note)
        return _Person(sex, age_years, {c: cells[c].text for c in self.other_columns}, notes)

    def _put_visit(self, cells: dict[str, _Cell], visit: _Visit) -> tuple[str, ...]:
        """Puts what the visit says in the place of what participants.tsv does; returns notes on it."""
        taken: list[str] = []
        missing: list[str] = []
        for column in cells:
            if column == self.age_column:
                found = _age_columns(visit.table, visit.meanings)
            else:
                found = tuple(filter(None, [_find_column(visit.table, (column,))]))
            if not found or column == self.session_column:
                continue
            cell = _first_given(visit.table, visit.row, found)
            (missing if cell.is_missing else taken).append(column)
            cells[column] = cells[column] if cell.is_missing else cell
        where = visit.table.path.name
        notes = [f"{where} gives {', '.join(taken)} of {visit.session}"] if taken else []
        if missing:
            notes.append(f"{where} has no {', '.join(missing)}: taken from {self.table.path.name}")
        return tuple(notes)

    def _sex(self, cell: _Cell) -> int:
        if cell.is_missing:
            raise cell.missing("sex")
        # A number is what the study says it is, in a word known here.
        code = _code(cell.text)
        level = self.sex_levels.get(code)
        sex = None if level is None else _sex_in(level)
        # 1 and 2 are female and male to some, male and female to others
        if sex is None and not (code.isdigit() and (level is not None or self.codes_from_one)):
            sex = _sex_word(code)
        if sex is None:
            raise cell.fault(
                "is not a sex known here.",
                "Write F or M (female, male; 0 is female, 1 male), or explain it under Levels in participants.json.",
            )
        return sex


def _first_given(table: Table, row: int, columns: Sequence[str]) -> _Cell:
    """Of columns that mean the same, the first that has a value in this row, with a note where others say otherwise;
    the first of all where none has."""
    cells = [_Cell(table, row, column) for column in columns]
    at = next((i for i, cell in enumerate(cells) if not cell.is_missing), 0)
    taken = cells[at]
    others = cells[:at]  # which have no value
    others += [c for c in cells[at + 1 :] if not c.is_missing and _comparable(c.text) != _comparable(taken.text)]
    said = ", ".join(f"{cell.column} is {cell.text or 'n/a'}" for cell in others)
    return replace(taken, note=f"took {taken.column}, {taken.text} ({said})") if others else taken


def _age_years(cell: _Cell) -> float:
    age = cell.table.number(cell.row, cell.column)
    if age is None:
        raise cell.missing("age")
    if fault := implausible("age_years", age):
        raise cell.fault(f"{fault}: no age in years.", "Write the age in years, or n/a.")
    return age


def _sessions(table: Table, column: str, rows: Sequence[int]) -> dict[int, str]:
    """The sessions that rows name, without `ses-`; rows that name none are left out."""
    return {r: _label(table.rows[r][column], "ses-") for r in rows if not table.is_missing(r, column)}


def _of_session(named: Mapping[int, str], session: str) -> list[int]:
    """The rows that name this session; where none does, those that name it with other leading zeros."""
    wanted = _label(session, "ses-")
    exact = [row for row, label in named.items() if label == wanted]
    return exact or [row for row, label in named.items() if label.lstrip("0") == wanted.lstrip("0")]


def _code(text: object) -> str:
    return str(text).strip().lower().removesuffix(".0")


def _comparable(text: str) -> float | str:
    number = number_in(text)
    return text.lower() if number is None else number


def _meaning(level: object) -> str:
    """A level of participants.json: its text, or what it says under Description."""
    return str(level.get("Description", "") if isinstance(level, dict) else level)


def _sex_word(text: str) -> int | None:
    code = sex_code(text)
    return _SEX_WORDS.get(text.lower()) if code is None else code


def _sex_in(level: str) -> int | None:
    """The one sex that a level's words name; None where they name none or both, or deny it."""
    words = re.findall(r"[^\W\d_]+", level.lower())
    named = {code for word in words if (code := _sex_word(word)) is not None}
    return named.pop() if len(named) == 1 and not _NEGATIONS & set(words) else None


def _find_column(table: Table, names: Sequence[str]) -> str:
    """The column of the first of these names that is there, compared without case and punctuation; empty where none
    is. A name that is written exactly so comes first; of others that are alike, each must hold the same."""
    for name in names:
        alike = [c for c in table.columns if _plain(c) == _plain(name)]
        if name in alike:
            return name
        for column in alike[1:]:
            for row, cells in enumerate(table.rows):
                if _comparable(cells[column]) != _comparable(cells[alike[0]]):
                    raise table.fault(
                        row, column, f"differs from column {alike[0]!r}: {cells[alike[0]]!r}.", "Keep one of them."
                    )
        if alike:
            return alike[0]
    return ""


def _column(table: Table, names: Sequence[str]) -> str:
    """`_find_column`, or BadInput."""
    if found := _find_column(table, names):
        return found
    what = "age" if names == AGE_COLUMNS else names[0]
    raise BadInput(
        f"has no column for {what}; its columns are: {', '.join(table.columns)}.",
        remedy=f"Name the column that holds it {what!r}.",
        path=table.path,
        reason="missing_column",
    )


def _plain(column: str) -> str:
    return re.sub(r"[\s_.-]", "", column).lower()


def _about(column: str, meanings: Mapping[str, Any]) -> Any:
    """What a JSON file says of a column: under its name, or one that differs in case and punctuation."""
    alike = [about for name, about in meanings.items() if _plain(name) == _plain(column)]
    return meanings.get(column, alike[0] if alike else None)


def _age_columns(table: Table, meanings: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of AGE_COLUMNS that are there, without those of another unit; BadInput where none is left."""
    found = [column for name in AGE_COLUMNS if (column := _find_column(table, (name,)))]
    units = {column: _foreign_unit(column, meanings) for column in found}
    in_years = tuple(column for column in found if not units[column])
    if found and not in_years:
        raise BadInput(
            f"column {found[0]!r} has the unit {units[found[0]]!r} (the JSON file beside it says so); ages must be in "
            "years.",
            remedy="Add a column age_years.",
            path=table.path,
            reason="bad_unit",
        )
    return in_years


def _foreign_unit(column: str, meanings: Mapping[str, Any]) -> str:
    """What a JSON file says under Units where the first unit of time among its words is not the year; else empty."""
    about = _about(column, meanings)
    unit = str(about.get("Units", "")) if isinstance(about, dict) else ""
    named = _UNIT_OF_TIME.search(unit)
    return unit if named and not named.group(1).lower().startswith("y") else ""


def _label(text: str, prefix: str = "sub-") -> str:
    text = composed(text)
    return text[len(prefix) :] if text.lower().startswith(prefix) else text


def composed(text: str) -> str:
    """File systems and editors write one accented letter in two ways; both are the same person."""
    return unicodedata.normalize("NFC", text.strip())


def _located(error: BadInput, root: Path) -> str:
    if error.path is None:
        return error.message
    place = error.path.relative_to(root) if error.path.is_relative_to(root) else error.path.name
    return f"{place}: {error.message}"
