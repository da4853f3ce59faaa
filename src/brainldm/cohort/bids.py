"""A BIDS study as people write it: the T1w scans, who they are of, and everybody who cannot be used, with the reason.

One scan a person is used. Which one is a rule and no guess: images in their own space before images with a `space-`
entity, then the first session, the first run, the first name. The others are named in the person's notes.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brainldm.base.covariates import implausible, sex_code
from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.base.files import read_json
from brainldm.base.tables import Table, read_table

_T1W = re.compile(r"^(sub-[^_]+)(?:_.+)?_T1w\.nii(?:\.gz)?$", re.DOTALL)
# Columns that hold an age in years; the first that is there counts. Compared without case, - or _.
AGE_COLUMNS = ("age_years", "age", "age_at_scan", "age_at_imaging", "age_at_session")
SEX_COLUMNS = ("sex", "gender")
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


@dataclass(frozen=True)
class Study:
    """What `read_study` found. `columns` are those of the study's table that are neither id, age nor sex."""

    root: Path
    name: str
    scans: list[Scan]
    failures: list[Failure]
    columns: tuple[str, ...]
    column_meanings: Mapping[str, Any] = field(default_factory=dict)


def read_study(folder: str | Path, *, masks: str | Path | None = None, need_masks: bool = False) -> Study:
    """The scans of a BIDS folder (raw or derivative), each with its row of participants.tsv.

    `masks` is a folder of brain masks, BIDS-named; without it they are looked for beside the scans and under
    derivatives/. With `need_masks`, people without one are failures. Nothing of an image is read here.
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
    people, faults = _People.read(table, _column_meanings(root)), list(failures)
    found_masks = _find_masks(root if masks is None else Path(masks), given=masks is not None)

    scans: list[Scan] = []
    met: set[int] = set()
    malformed: list[Failure] = []
    folders = Counter(_label(participant_id).lstrip("0") for participant_id in images)
    for participant_id, found in sorted(images.items()):
        chosen = min(found, key=_preference)
        rows = people.rows_of(participant_id, chosen.session, folders)
        met.update(people.rows_of(participant_id, "", folders))
        try:
            row, notes = people.one_row(participant_id, rows)
            sex, age_years = people.sex(row), people.age_years(row)
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
                sex,
                age_years,
                people.others(row),
                _mask_of(participant_id, chosen, found_masks),
                notes,
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
_DICOM_REMEDY = "Convert the series to NIfTI with dcm2niix (https://github.com/rordenlab/dcm2niix), then to BIDS."


def _find_images(root: Path) -> tuple[dict[str, list[_Image]], list[Failure]]:
    images: dict[str, list[_Image]] = {}
    failures: list[Failure] = []
    for participant in _folders(root, "sub-"):
        participant_id = _normal(participant.name)
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
            if _normal(named.group(1)) != participant_id or entities.get("ses", session[4:]) != session[4:]:
                place = "/".join(filter(None, (participant.name, session)))
                message = f"the file is named for {named.group(1)} and lies in the folder of {place}."
                failures.append(
                    Failure(participant_id, file, "mislabelled", message, "Find out whose scan it is, and name it so.")
                )
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
    return image.space != "", _natural(image.session), _natural(entities.get("run", "")), _natural(image.path.name)


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
        loose = [path for path in below if path.name.endswith((".nii", ".nii.gz"))]
        if derivatives:
            found = f"; there are some in derivatives/{derivatives[0]}"
            remedy = "Give that folder instead, with a participants.tsv in it."
        elif loose:
            found = f"; there are other NIfTI files, such as {loose[0].relative_to(root)}"
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
        key = _normal(f"sub-{entities.get('sub', '')}"), session, entities.get("space", "")
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


def _column_meanings(root: Path) -> Mapping[str, Any]:
    path = root / "participants.json"
    content = read_json(path) if path.exists() else {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class _People:
    """participants.tsv, asked by person."""

    table: Table
    age_column: str
    sex_column: str
    by_label: Mapping[str, list[int]]
    by_bare_label: Mapping[str, list[int]]
    sex_levels: Mapping[str, str]
    codes_from_one: bool
    meanings: Mapping[str, Any]

    @classmethod
    def read(cls, table: Table, meanings: Mapping[str, Any]) -> _People:
        table.require("participant_id")
        age_column, sex_column = _column(table, AGE_COLUMNS, "age"), _column(table, SEX_COLUMNS, "sex")
        _check_age_unit(table, meanings, age_column)
        by_label: dict[str, list[int]] = {}
        by_bare_label: dict[str, list[int]] = {}
        for row, cells in enumerate(table.rows):
            label = _label(cells["participant_id"])
            if not label:
                raise table.fault(row, "participant_id", "is no id.", "Every row needs the id of its person.")
            by_label.setdefault(label, []).append(row)
            by_bare_label.setdefault(label.lstrip("0"), []).append(row)
        levels = meanings.get(sex_column)
        levels = levels.get("Levels") if isinstance(levels, dict) else None
        sex_levels = {_code(k): _meaning(v) for k, v in levels.items()} if isinstance(levels, dict) else {}
        codes_from_one = any(cells[sex_column].strip() in ("2", "2.0") for cells in table.rows)
        return cls(table, age_column, sex_column, by_label, by_bare_label, sex_levels, codes_from_one, meanings)

    @property
    def other_columns(self) -> tuple[str, ...]:
        used = ("participant_id", self.age_column, self.sex_column)
        return tuple(c for c in self.table.columns if c not in used)

    def id_of(self, row: int) -> str:
        return f"sub-{_label(self.table.rows[row]['participant_id'])}"

    def others(self, row: int) -> dict[str, str]:
        return {c: self.table.rows[row][c] for c in self.other_columns}

    def rows_of(self, participant_id: str, session: str, folders: Mapping[str, int]) -> list[int]:
        """The person's rows; of those that name sessions, the ones of this session.

        Ids agree when they are equal without `sub-`; where nobody's is, when they are equal without leading zeros and
        no other folder is: `folders` counts those that agree so.
        """
        label = _label(participant_id)
        bare = label.lstrip("0")
        rows = self.by_label.get(label) or (self.by_bare_label.get(bare, []) if folders[bare] == 1 else [])
        if session and "session_id" in self.table.columns:
            sessions = {r: _label(self.table.rows[r]["session_id"], "ses-") for r in rows}
            named = {r: label for r, label in sessions.items() if label and not self.table.is_missing(r, "session_id")}
            wanted = session.removeprefix("ses-")
            of_session = [r for r, label in named.items() if label == wanted]
            of_session = of_session or [r for r, label in named.items() if label.lstrip("0") == wanted.lstrip("0")]
            return of_session if named else rows
        return rows

    def one_row(self, participant_id: str, rows: list[int]) -> tuple[int, tuple[str, ...]]:
        if not rows:
            raise BadInput(
                f"{self.table.path.name} has no row for this person.",
                remedy=f"Add a row for {participant_id} with age and sex.",
                reason="not_in_table",
            )
        lines = ", ".join(str(self.table.lines[r]) for r in rows)
        labels = {_label(self.table.rows[r]["participant_id"]) for r in rows}
        if len(labels) > 1:
            raise BadInput(
                f"lines {lines} of {self.table.path.name} could all be this person: {', '.join(sorted(labels))}.",
                remedy=f"Write {participant_id} in the row that is theirs.",
                reason="ambiguous_id",
            )
        said = {tuple(self.table.rows[r][c].lower() for c in (self.age_column, self.sex_column)) for r in rows}
        if len(said) > 1:
            raise BadInput(
                f"lines {lines} of {self.table.path.name} give this person different ages or sexes.",
                remedy="Keep one row a person (or add a session_id column).",
                reason="duplicate_rows",
            )
        written = self.table.rows[rows[0]]["participant_id"]
        notes = [] if _normal(written) in (participant_id, participant_id[4:]) else [f"matched to the row of {written}"]
        return rows[0], (*notes, *([f"lines {lines} of the table say the same"] if len(rows) > 1 else []))

    def age_years(self, row: int) -> float:
        age = self.table.number(row, self.age_column)
        if age is None:
            raise self._missing(row, self.age_column)
        fault = implausible("age_years", age)
        if fault:
            raise self.table.fault(
                row, self.age_column, f"{fault}: no age in years.", "Write the age in years, or n/a."
            )
        return age

    def sex(self, row: int) -> int:
        if self.table.is_missing(row, self.sex_column):
            raise self._missing(row, self.sex_column)
        text = self.table.rows[row][self.sex_column].strip().lower()
        # A number is what the study says it is, in a word known here.
        level = self.sex_levels.get(_code(text))
        understood = [c for word in _words(level or "") if (c := sex_code(word)) is not None]
        code = understood[0] if understood else sex_code(text)
        if not understood and _code(text).isdigit() and (level is not None or self.codes_from_one):
            code = None  # 1 and 2 are female and male to some, male and female to others
        if code is None:
            raise self.table.fault(
                row,
                self.sex_column,
                "is not a sex known here.",
                "Write F or M (female, male; 0 is female, 1 male), or explain it under Levels in participants.json.",
            )
        return code

    def _missing(self, row: int, column: str) -> BadInput:
        return BadInput(
            f"line {self.table.lines[row]} of {self.table.path.name}, column {column!r}: there is no value.",
            remedy=f"Fill in the {column} of this person to include them.",
            reason=f"missing_{'age' if column == self.age_column else 'sex'}",
        )


def _code(text: object) -> str:
    return str(text).strip().lower().removesuffix(".0")


def _meaning(level: object) -> str:
    """A level of participants.json: its text, or what it says under Description."""
    return str(level.get("Description", "") if isinstance(level, dict) else level)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


def _column(table: Table, names: Iterable[str], what: str) -> str:
    by_plain_name = {_plain(c): c for c in reversed(table.columns)}
    for name in names:
        if _plain(name) in by_plain_name:
            return by_plain_name[_plain(name)]
    raise BadInput(
        f"has no column for {what}; its columns are: {', '.join(table.columns)}.",
        remedy=f"Name the column that holds it {what!r}.",
        path=table.path,
        reason="missing_column",
    )


def _plain(column: str) -> str:
    return re.sub(r"[\s_.-]", "", column).lower()


def _check_age_unit(table: Table, meanings: Mapping[str, Any], column: str) -> None:
    about = meanings.get(column)
    unit = str(about.get("Units", "")) if isinstance(about, dict) else ""
    if unit.strip().lower().rstrip("s") in ("month", "week", "day", "hour", "mo", "wk", "d"):
        raise BadInput(
            f"column {column!r} is in {unit} (participants.json says so); ages must be in years.",
            remedy="Add a column age_years.",
            path=table.path,
            reason="bad_unit",
        )


def _label(text: str, prefix: str = "sub-") -> str:
    return _normal(text).removeprefix(prefix)


def _normal(text: str) -> str:
    """File systems and editors write one accented letter in two ways; both are the same person."""
    return unicodedata.normalize("NFC", text.strip())


def _located(error: BadInput, root: Path) -> str:
    if error.path is None:
        return error.message
    place = error.path.relative_to(root) if error.path.is_relative_to(root) else error.path.name
    return f"{place}: {error.message}"
