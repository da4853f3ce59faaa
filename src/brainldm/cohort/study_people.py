"""The people of a BIDS study: what participants.tsv and sub-<id>_sessions.tsv say of each, in the words they use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brainldm.base.covariates import FEMALE, MALE, implausible, sex_code
from brainldm.base.errors import BadInput
from brainldm.base.files import read_json
from brainldm.base.tables import Table, number_in, read_table
from brainldm.cohort.study_images import Image, composed, label_of

# Columns that hold an age in years; the first that has one counts: a plain age may be that at enrolment, years before.
# Compared without case, - or _.
AGE_COLUMNS = ("age_at_scan", "age_at_imaging", "age_at_session", "age_years", "age")
SEX_COLUMNS = ("sex", "gender")
_SEX_WORDS = {"woman": FEMALE, "girl": FEMALE, "man": MALE, "boy": MALE}  # beside those of `sex_code`
_NEGATIONS = {"no", "non", "not", "neither"}
_UNIT_OF_TIME = re.compile(r"\b(year|yr|y|month|mo|week|wk|day|d|hour)s?\b", re.IGNORECASE)


def read_participants(root: Path) -> Table:
    """participants.tsv; BadInput where there is none."""
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


def meanings_in(*paths: Path) -> dict[str, Any]:
    """What the JSON files beside a table say of its columns; a later file's word counts more."""
    meanings: dict[str, Any] = {}
    for path in paths:
        content = read_json(path) if path.exists() else {}
        meanings |= content if isinstance(content, dict) else {}
    return meanings


@dataclass(frozen=True)
class Visit:
    """The row of a scan's session in sub-<id>_sessions.tsv."""

    table: Table
    row: int
    session: str
    meanings: Mapping[str, Any]


def visit_of(root: Path, scan: Image) -> Visit | None:
    """None where the person has no such table, or it does not name the session."""
    folder = root / Path(scan.file).parts[0]
    path = folder / f"{folder.name}_sessions.tsv"
    if not scan.session or not path.exists():
        return None
    table = read_table(path)
    rows = _of_session(_sessions(table, _column(table, ("session_id",)), range(len(table))), scan.session)
    if len(rows) > 1:
        raise table.fault(rows[1], _column(table, ("session_id",)), "is a second row of one session.", "Keep one.")
    meanings = meanings_in(root / "sessions.json", path.with_suffix(".json"))
    return Visit(table, rows[0], scan.session, meanings) if rows else None


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
class Person:
    """What the study says of one person; `others` are the table's other columns."""

    sex: int
    age_years: float
    others: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class People:
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
    def read(cls, table: Table, meanings: Mapping[str, Any], used_columns: Sequence[str]) -> People:
        id_column, sex_column = _column(table, ("participant_id",)), _column(table, SEX_COLUMNS)
        meanings = {column: about for column in table.columns if (about := _about(column, meanings)) is not None}
        age_columns = _age_columns(table, meanings)
        if not age_columns and not any(table.path.parent.glob("sub-*/sub-*_sessions.tsv")):
            _column(table, AGE_COLUMNS)
        by_label: dict[str, list[int]] = {}
        by_bare_label: dict[str, list[int]] = {}
        for row, cells in enumerate(table.rows):
            label = label_of(cells[id_column])
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
        return f"sub-{label_of(self.table.rows[row][self.id_column])}"

    def rows_of(self, participant_id: str, session: str, folders: Mapping[str, int]) -> list[int]:
        """The person's rows; of those that name sessions, the ones of this session.

        Ids agree when they are equal without `sub-`; where nobody's is, when they are equal without leading zeros and
        no other folder is: `folders` counts those that agree so.
        """
        label = label_of(participant_id)
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
        labels = {label_of(self.table.rows[r][self.id_column]) for r in rows}
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

    def person(self, row: int, visit: Visit | None) -> Person:
        """What the study says of the person in this row, at the visit where that has a word on it; BadInput where age
        or sex cannot be told."""
        cells = self._cells(row)
        notes = () if visit is None else self._put_visit(cells, visit)
        sex, age_years = self._sex(cells[self.sex_column]), _age_years(cells[self.age_column])
        notes += tuple(cell.note for cell in cells.values() if cell.note)
        return Person(sex, age_years, {c: cells[c].text for c in self.other_columns}, notes)

    def _put_visit(self, cells: dict[str, _Cell], visit: Visit) -> tuple[str, ...]:
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
    return {r: label_of(table.rows[r][column], "ses-") for r in rows if not table.is_missing(r, column)}


def _of_session(named: Mapping[int, str], session: str) -> list[int]:
    """The rows that name this session; where none does, those that name it with other leading zeros."""
    wanted = label_of(session, "ses-")
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
