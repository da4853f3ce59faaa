"""Tables: every fault has a line and a column; what is written is read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brainldm.base.errors import BadInput
from brainldm.base.tables import read_table, write_table

GOOD = "participant_id\tage\tsex\nsub-01\t20\tF\nsub-02\t61.5\tM\n"


def table_of(tmp_path: Path, content: str | bytes, name: str = "participants.tsv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD.replace("\n", "\r\n"),
        GOOD.rstrip("\n"),
        GOOD + "\n\n\t\t\n",
        GOOD.replace("\t", " \t "),
        GOOD.replace("\n", "\t\t \n"),
    ],
    ids=["plain", "BOM", "CRLF", "BOM and CRLF", "no last newline", "empty lines", "spaces around cells", "last tabs"],
)
def test_the_usual_ways_of_saving_a_table_read_the_same(content: str, tmp_path: Path) -> None:
    table = read_table(table_of(tmp_path, content))
    assert table.columns == ("participant_id", "age", "sex")
    assert table.rows == [
        {"participant_id": "sub-01", "age": "20", "sex": "F"},
        {"participant_id": "sub-02", "age": "61.5", "sex": "M"},
    ]
    assert table.number(1, "age") == 61.5
    assert table.lines == [2, 3]


def test_a_csv_may_quote_its_cells(tmp_path: Path) -> None:
    table = read_table(table_of(tmp_path, 'id,note\n1,"a, b"\n', "t.csv"))
    assert table.rows == [{"id": "1", "note": "a, b"}]


def test_a_quote_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    table = read_table(table_of(tmp_path, 'id\tnote\n1\t5" coil\n2\t"x\n'))
    assert [row["note"] for row in table.rows] == ['5" coil', '"x']


@pytest.mark.parametrize("cell", ["n/a", "", "N/A", "NA", "nan", "null"])
def test_a_missing_number_is_none(cell: str, tmp_path: Path) -> None:
    table = read_table(table_of(tmp_path, f"participant_id\tage\nsub-01\t{cell}\n"))
    assert table.number(0, "age") is None
    assert table.is_missing(0, "age")


@pytest.mark.parametrize("cell", ["61,5", "old", "1e400", "-inf", "12 y", "0x10", "1;2", "1_0", "\uff12\uff10", "."])
def test_a_number_that_is_none_is_located(cell: str, tmp_path: Path) -> None:
    path = table_of(tmp_path, f"participant_id\tage\nsub-01\t20\n\nsub-02\t{cell}\n")
    table = read_table(path)
    with pytest.raises(BadInput) as caught:
        table.number(1, "age")
    for part in ("line 4", "'age'", repr(cell), str(path)):
        assert part in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(("cell", "value"), [("7", 7), ("+.5", 0.5), ("7.", 7), ("-1.5E-2", -0.015), (" 20 ", 20)])
def test_a_number_is_written_plainly(cell: str, value: float, tmp_path: Path) -> None:
    assert read_table(table_of(tmp_path, f"id\tage\ni\t{cell}\n")).number(0, "age") == value


@pytest.mark.parametrize(
    ("name", "content", "told", "remedy"),
    [
        ("p.tsv", GOOD.replace("\t", ","), "separated by commas", "with tabs"),
        ("p.tsv", GOOD.replace("\t", ";"), "separated by semicolons", "with tabs"),
        ("p.tsv", '"id"\t"age"\n"1"\t20\n', "in quotes", "unquoted"),
        ("p.tsv", '"id","age"\n"1",20\n', "separated by commas", "with tabs"),
        ("p.csv", GOOD.replace("\t", ";"), "separated by semicolons", "with commas"),
        ("p.csv", GOOD, "separated by tabs", "with commas"),
    ],
)
def test_cells_that_are_separated_otherwise_than_named_are_told(
    name: str, content: str, told: str, remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=told) as caught:
        read_table(table_of(tmp_path, content, name))
    assert caught.value.reason == "separator" and remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "reason", "word"),
    [
        (b"", "empty", "empty"),
        (b"\n\n", "empty", "empty"),
        (b"a\tb\ta\n1\t2\t3\n", "duplicate_column", "'a'"),
        (b"a\tb\n1\t2\n1\n", "ragged", "line 3"),
        (b"a\tb\n1\t2\t3\n", "ragged", "line 2"),
        (b"a\tb\t\t\n1\t2\t\t\n1\t2\t\tsix\n", "nameless_column", "line 3 has 'six'"),
        (b"a\tb\n\xff\xfe\t2\n", "encoding", "UTF-8"),
        ("a\tb\n1\t2\n".encode("utf-16"), "encoding", "UTF-8"),
    ],
)
def test_a_broken_table_is_refused(content: bytes, reason: str, word: str, tmp_path: Path) -> None:
    path = table_of(tmp_path, content)
    with pytest.raises(BadInput, match=word) as caught:
        read_table(path)
    assert caught.value.reason == reason
    assert caught.value.path == path


def test_a_table_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.tsv", tmp_path):
        with pytest.raises(BadInput) as caught:
            read_table(path)
        assert caught.value.remedy


def test_a_missing_column_is_named_with_those_present(tmp_path: Path) -> None:
    """Fault 29"""
    table = read_table(table_of(tmp_path, GOOD))
    with pytest.raises(BadInput, match=r"'weight'.*participant_id, age, sex"):
        table.require("age", "weight")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    rows = [
        {"id": "sub-1", "a": 1.0, "b": 0.1, "c": None, "d": "tab\there\nand a line"},
        {"id": "sub-2", "a": 40000.0, "b": float("nan"), "c": 7, "d": ""},
    ]
    write_table(path, ("id", "a", "b", "c", "d"), rows)
    assert path.read_text() == "id\ta\tb\tc\td\nsub-1\t1\t0.1\tn/a\ttab here and a line\nsub-2\t40000\tn/a\t7\tn/a\n"
    table = read_table(path)
    assert table.number(0, "b") == 0.1 and table.number(1, "b") is None


# Line separators that str.splitlines knows and the csv module does not are part of the fuzz on purpose.
cells = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(cells, cells), max_size=5))
def test_any_text_survives_but_for_its_white_space(rows: list[tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    write_table(path, ("id", "a", "b"), [{"id": f"i{i}", "a": a, "b": b} for i, (a, b) in enumerate(rows)])
    table = read_table(path)
    told = [tuple(" ".join(cell.split()) or "n/a" for cell in pair) for pair in rows]
    assert [(row["a"], row["b"]) for row in table.rows] == told


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.text('a1\t\n\r",;\ufeff.-', max_size=80).map(str.encode)))
def test_any_file_is_a_table_or_refused(content: bytes, tmp_path: Path) -> None:
    path = table_of(tmp_path, content)
    try:
        table = read_table(path)
    except BadInput as error:
        assert error.path == path
        return
    assert all(set(row) == set(table.columns) for row in table.rows)
    assert len(table.lines) == len(table.rows)
