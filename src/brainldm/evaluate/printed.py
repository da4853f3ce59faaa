"""The scorecard for people: a table on the terminal, in Markdown and as TSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from brainldm.evaluate.estimate import Estimate
from brainldm.evaluate.images import Failure
from brainldm.evaluate.rows import SECTIONS, Row, Unit

_SIDES = ("synthetic", "reference", "difference")
TSV_COLUMNS = (
    *("section", "key", "group", "unit", "best", "reference_is"),
    *(f"{side}{part}" for side in _SIDES for part in ("", "_low", "_high", "_n")),
    *("interval", "reason"),
)


def shown(estimate: Estimate | None, unit: Unit) -> str:
    """A value with its interval as people read it; a dash where there is none.

    >>> shown(Estimate(0.97234, 0.95, 0.984, 16), Unit("", "", 1, 3))
    '0.972 (0.950 to 0.984)'
    """
    if estimate is None or estimate.value is None:
        return "-"
    value = f"{estimate.value * unit.factor:.{unit.decimals}f}"
    if estimate.low is None or estimate.high is None:
        return value
    low, high = (f"{bound * unit.factor:.{unit.decimals}f}" for bound in (estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def _titled(row: Row) -> str:
    unit = f" [{row.unit.shown}]" if row.unit.shown else ""
    group = f", {row.group}" if row.group != "all" else ""
    return f"{row.title}{unit}{group}"


def _counts(row: Row) -> str:
    parts = [str(e.n) for e in (row.synthetic, row.reference) if e is not None and e.value is not None]
    return " / ".join(parts) or "-"


def as_text(rows: Sequence[Row], warnings: Sequence[str], failures: Sequence[Failure]) -> str:
    """The table as rich draws it, without colours, at most 150 columns wide."""
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="Scorecard (95 % intervals)", title_justify="left")
    for column in ("", "synthetic", "reference", "difference", "n", "best"):
        table.add_column(column, justify="left" if column in ("", "best") else "right")
    for section, title in SECTIONS.items():
        members = [row for row in rows if row.section == section]
        if not members:
            continue
        table.add_section()
        table.add_row(title)
        for row in members:
            cells = [shown(e, row.unit) for e in (row.synthetic, row.reference, row.difference)]
            table.add_row(f"  {_titled(row)}", *cells, _counts(row), row.best)
    sheet = StringIO()
    console = Console(file=sheet, width=150, no_color=True, force_terminal=False, emoji=False, markup=False)
    console.print(table)
    for row in rows:
        if row.synthetic is not None and row.synthetic.value is None:
            console.print(f"no value for {_titled(row)}: {row.synthetic.reason}", markup=False)
    for warning in warnings:
        console.print(f"! {warning}", markup=False)
    for failure in failures:
        console.print(f"x {failure.side} {failure.file}: {failure.message}", markup=False)
    return "\n".join(line.rstrip() for line in sheet.getvalue().splitlines())


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
            "| figure | synthetic | reference | difference | n | best |",
            "|---|---|---|---|---|---|",
        ]
        for row in members:
            cells = [shown(e, row.unit) for e in (row.synthetic, row.reference, row.difference)]
            lines.append(f"| {_titled(row)} | " + " | ".join([*cells, _counts(row), row.best]) + " |")
        lines.append("")
    if warnings:
        lines += ["## To be known", "", *(f"- {_inert(warning)}" for warning in warnings), ""]
    if failures:
        lines += ["## Errors", "", *(f"- {_inert(f'{f.side} {f.file}: {f.message}')}" for f in failures), ""]
    return "\n".join(lines)


def _inert(text: str) -> str:
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
