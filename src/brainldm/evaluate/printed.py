"""The scorecard for people: a table on the terminal, in Markdown and as TSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from brainldm.evaluate.estimate import Estimate
from brainldm.evaluate.images import Failure
from brainldm.evaluate.rows import SECTIONS, Row, Unit

_SIDES = ("synthetic", "reference", "difference")
_COLUMNS = (*_SIDES, "n", "best")  # of the terminal's table, after the names
_FEWEST_COLUMNS, _NAME_WIDTH, _GAP = 2, 28, 2
TSV_COLUMNS = (
    *("section", "key", "group", "unit", "best", "reference_is"),
    *(f"{side}{part}" for side in _SIDES for part in ("", "_low", "_high", "_n")),
    *("interval", "reason"),
)


def shown(estimate: Estimate | None, unit: Unit) -> str:
    """A value with its interval as people read it; a dash where there is none.

    >>> shown(Estimate(0.97234, 0.95, 0.984, 16), Unit("", "", 1, 3))
    '0.972 (0.950..0.984)'
    """
    if estimate is None or estimate.value is None:
        return "-"
    value = f"{estimate.value * unit.factor:.{unit.decimals}f}"
    if estimate.low is None or estimate.high is None:
        return value
    low, high = (f"{bound * unit.factor:.{unit.decimals}f}" for bound in (estimate.low, estimate.high))
    return f"{value} ({low}..{high})"


def _titled(row: Row) -> str:
    unit = f" [{row.unit.shown}]" if row.unit.shown else ""
    return f"{row.title}{unit}"


def _counts(row: Row) -> str:
    parts = [str(e.n) for e in (row.synthetic, row.reference) if e is not None and e.value is not None]
    return " / ".join(parts) or "-"


def as_text(rows: Sequence[Row], warnings: Sequence[str], failures: Sequence[Failure]) -> str:
    """The scorecard for a terminal, in plain characters and no wider than it (80 to 140 columns). Where there is no
    room for all figures, the last ones are left out, and it says so."""
    import shutil
    from io import StringIO

    from rich.console import Console

    sheet = StringIO()
    width = min(max(shutil.get_terminal_size((140, 24)).columns, 80), 140)
    console = Console(file=sheet, width=width, no_color=True, force_terminal=False, emoji=False, markup=False)
    cells = [(row, _cells(row)) for row in rows if row.group == "all"]
    widths = _widths(cells)
    needed = list(accumulate((_GAP + each for each in widths), initial=_NAME_WIDTH))  # of no column, one, two ...
    fitting = [kept for kept in range(_FEWEST_COLUMNS, len(needed)) if needed[kept] <= width]
    kept = max(fitting, default=_FEWEST_COLUMNS)
    console.print(_table(cells, widths[:kept] if fitting else [None] * kept))
    if left_out := _COLUMNS[kept:]:
        console.print(f"\n{width} columns have no room for {', '.join(left_out)}: see scorecard.md.")
    console.print()
    for line in _of_parts(rows):
        console.print(line)
    for line in _without_value(rows):
        console.print(line)
    for warning in warnings:
        console.print(f"! {warning}")
    for failure in failures:
        console.print(f"x {failure.side} {failure.file}: {failure.message}")
    return "\n".join(line.rstrip() for line in sheet.getvalue().splitlines())


def _table(cells: Sequence[tuple[Row, list[str]]], widths: Sequence[int | None]) -> Any:
    """A row a figure, with as many of _COLUMNS as there are least widths; without them figures break over lines."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    table.add_column("95 % intervals", min_width=None if None in widths else _NAME_WIDTH)
    for column, width in zip(_COLUMNS, widths):
        table.add_column(column, justify="left" if column == "best" else "right", min_width=width)
    for section, title in SECTIONS.items():
        members = [(row, figures) for row, figures in cells if row.section == section]
        if members:
            table.add_row()
            table.add_row(title)
        for row, figures in members:
            table.add_row(f"  {_titled(row)}", *figures[: len(widths)])
    return table


def _widths(cells: Sequence[tuple[Row, list[str]]]) -> list[int]:
    """What each of _COLUMNS needs at least: its longest figure; of `best`, which is words, its longest word."""
    columns = dict(zip(_COLUMNS, zip(_COLUMNS, *(figures for _, figures in cells))))
    columns["best"] = tuple(" ".join(columns["best"]).split())
    return [max(map(len, parts)) for parts in columns.values()]


def _cells(row: Row) -> list[str]:
    """One for each of _COLUMNS."""
    return [*(shown(e, row.unit) for e in (row.synthetic, row.reference, row.difference)), _counts(row), row.best]


def _of_parts(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each part of the images (inside, outside the training range) and covariate."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.group != "all":
            parts.setdefault((row.title.split(":")[0], row.group), []).append(row)
    for (name, group), members in parts.items():
        known = [row for row in members if row.synthetic is not None and row.synthetic.value is not None]
        figures = ", ".join(f"{_titled(row).split(': ')[1]} {shown(row.synthetic, row.unit)}" for row in known)
        yield f"{name}, {group} (n {max((row.synthetic.n for row in members if row.synthetic), default=0)}): {figures}."


def _without_value(rows: Sequence[Row]) -> Iterator[str]:
    """Why a figure of all images has no value, a line each."""
    for row in rows:
        if row.group == "all" and row.synthetic is not None and row.synthetic.value is None:
            yield f"No value for {_titled(row)}: {row.synthetic.reason}."


def as_markdown(rows: Sequence[Row], warnings: Sequence[str], failures: Sequence[Failure]) -> str:
    """The same as a document."""
    lines = ["# Scorecard", "", "Values with 95 % intervals; n counts images (synthetic / reference).", ""]
    for section, title in SECTIONS.items():
        members = [row for row in rows if row.section == section]
        if not members:
            continue
        lines += [
            f"## {title}",
            "",
            "| figure | synthetic | reference | reference is | difference | n | best |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in members:
            if row.group != "all":
                continue
            synthetic, reference, difference, *rest = _cells(row)
            reference_is = "-" if row.reference is None else row.reference_is
            cells = [_titled(row), synthetic, reference, reference_is, difference, *rest]
            lines.append(f"| {' | '.join(map(inert, cells))} |")
        told = [*_of_parts(members), *_without_value(members)]
        lines += ["", *(f"- {inert(line)}" for line in told), ""] if told else [""]
    if warnings:
        lines += ["## To be known", "", *(f"- {inert(warning)}" for warning in warnings), ""]
    if failures:
        lines += ["## Errors", "", *(f"- {inert(f'{f.side} {f.file}: {f.message}')}" for f in failures), ""]
    return "\n".join(lines)


def inert(text: str) -> str:
    """Text of others that Markdown and HTML take as text."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[")


def tsv_rows(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """One flat row a figure, in stored units."""
    for row in rows:
        cells: dict[str, Any] = {
            "section": row.section,
            "key": row.key,
            "group": row.group,
            "unit": row.unit.stored or None,
            "best": row.best,
            "reference_is": row.reference_is,
        }
        for side in _SIDES:
            estimate = getattr(row, side)
            if estimate is not None:
                cells |= {side: estimate.value, f"{side}_low": estimate.low, f"{side}_high": estimate.high}
                cells[f"{side}_n"] = estimate.n
        if row.synthetic is not None:
            cells |= {"interval": row.synthetic.interval or None, "reason": row.synthetic.reason or None}
        yield cells
