"""Tables of text: read so that every fault has a line and a column, written whole.

Cells stay text until somebody asks for a number, so that nothing is guessed and nothing of a study's table is lost.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from brainldm.base.errors import BadInput
from brainldm.base.files import unreadable, write_text

MISSING_CELLS = ("", "n/a", "na", "nan", "null", "none")
# Narrower than float(), which reads 1_0 and the digits of every script.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}


@dataclass(frozen=True)
class Table:
    """Rows of text by column name; `lines` holds each row's line number in the file."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def require(self, *columns: str) -> None:
        """BadInput naming the first column that is not there and those that are."""
        for column in columns:
            if column not in self.columns:
                raise BadInput(
                    f"has no column {column!r}; its columns are: {', '.join(self.columns)}.",
                    remedy=f"Add the column {column!r}, or rename the one that holds it.",
                    path=self.path,
                    reason="missing_column",
                )

    def fault(self, row: int, column: str, rule: str, remedy: str = "") -> BadInput:
        """The error for one cell, located by line and column, to be raised by the caller."""
        value = self.rows[row].get(column, "")
        return BadInput(
            f"line {self.lines[row]}, column {column!r}: {value!r} {rule}",
            remedy=remedy,
            path=self.path,
            reason="bad_cell",
        )

    def is_missing(self, row: int, column: str) -> bool:
        return self.rows[row].get(column, "").strip().lower() in MISSING_CELLS

    def number(self, row: int, column: str) -> float | None:
        """The cell as a finite number, None where it is n/a or empty, BadInput where it is anything else."""
        if self.is_missing(row, column):
            return None
        value = number_in(self.rows[row][column])
        if value is None:
            remedy = "Write numbers with a decimal point, and n/a where there is none."
            raise self.fault(row, column, "is not a number.", remedy)
        if not math.isfinite(value):
            raise self.fault(row, column, "is not a finite number.", "Write n/a where there is none.")
        return value


def number_in(text: str) -> float | None:
    """The number a cell holds, in plain digits with a decimal point; None where it is anything else."""
    return float(text) if _NUMBER.fullmatch(text.strip()) else None


def read_table(path: str | Path) -> Table:
    """The table in a TSV file (or CSV, by its suffix). BOM and CRLF are understood, and columns with neither a name nor
    a value left out (a spreadsheet's last tab); ragged rows, doubled and missing names of columns are BadInput."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise BadInput("there is no such table.", remedy="Check the path.", path=path, reason="missing") from error
    except UnicodeDecodeError as error:
        raise BadInput("is not text in UTF-8.", remedy="Save it as UTF-8.", path=path, reason="encoding") from error
    except OSError as error:
        raise unreadable(error, path) from error
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    # BIDS tables have no quoting; a stray quote in a TSV is a character like any other.
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting)
    try:
        numbered = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise BadInput(
            f"line {reader.line_num}: {error}.",
            remedy="Save it as plain text.",
            path=path,
            reason="bad_table",
        ) from error
    if not numbered:
        raise BadInput("the table is empty.", remedy="It needs a header line and rows.", path=path, reason="empty")
    columns = tuple(cell.strip() for cell in numbered[0][1])
    _check_separated(path, columns, separator)
    doubled = sorted({c for c in columns if c and columns.count(c) > 1})
    if doubled:
        raise BadInput(
            f"has the column {doubled[0]!r} more than once.",
            remedy="Give every column a name of its own.",
            path=path,
            reason="duplicate_column",
        )
    rows, lines = [], []
    for line, cells in numbered[1:]:
        if len(cells) != len(columns):
            raise BadInput(
                f"line {line} has {len(cells)} cells, the header has {len(columns)}.",
                remedy="Separate cells by one tab (CSV: comma) each, and write n/a for a missing value.",
                path=path,
                reason="ragged",
            )
        nameless = [cell.strip() for column, cell in zip(columns, cells) if not column]
        if any(nameless):
            raise BadInput(
                f"line {line} has {next(filter(None, nameless))!r} in a column without a name.",
                remedy="Give every column a name in the header line.",
                path=path,
                reason="nameless_column",
            )
        rows.append({column: cell.strip() for column, cell in zip(columns, cells) if column})
        lines.append(line)
    return Table(path, tuple(filter(None, columns)), rows, lines)


def _check_separated(path: Path, header: Sequence[str], separator: str) -> None:
    """BadInput where the header line is of cells that are separated in another way, or in quotes that count as text."""
    other = next((s for s in _SEPARATORS if s in header[0]), "") if len(header) == 1 else ""
    quoted = all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in header)
    if other or quoted:
        told = f"separated by {_SEPARATORS[other]}" if other else "in quotes"
        raise BadInput(
            f"its cells are {told}; this table needs plain cells with {_SEPARATORS[separator]} between them.",
            remedy=f"Save it with {_SEPARATORS[separator]}{'' if separator == ',' else ' and unquoted'}.",
            path=path,
            reason="separator",
        )


def write_table(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Writes a TSV as BIDS wants it: a header, n/a for None, atomically. Tabs and newlines in text become spaces."""
    lines = ["\t".join(columns)]
    lines += ["\t".join(_cell(row.get(column)) for column in columns) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "n/a"
    if isinstance(value, float):
        return repr(float(value)).removesuffix(".0")
    return " ".join(str(value).split()) or "n/a"
