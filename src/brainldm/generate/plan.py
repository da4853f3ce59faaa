"""The plan: every brain's covariates fixed before the first one is made.

What is asked is held, what is swept is spread, and what is left open is drawn from the training people's joint
distribution given the rest, each row from a stream of its own, so that row i is the same whatever the number of rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainldm.base.covariates import COVARIATES, CovariateRanges, Covariates, implausible
from brainldm.base.errors import UsageError
from brainldm.base.joint import CovariateModel
from brainldm.base.quantities import parse_sex
from brainldm.base.streams import stream
from brainldm.base.tables import Table, read_table, write_table

COLUMNS = ("index", "participant_id", "sex", "age_years", "ventricles_mm3", "brain_mm3", "extrapolated")
MOST_BRAINS = 1_000_000  # of one dataset: its ids have six digits


@dataclass(frozen=True)
class Sweep:
    """`count` values from `start` to `stop`, both included, evenly spaced; one value is a fixed covariate."""

    start: float
    stop: float
    count: int

    def values(self) -> list[float]:
        return [float(value) for value in np.linspace(self.start, self.stop, self.count)]


@dataclass(frozen=True)
class PlanRow:
    """One brain to make. `extrapolated` names the covariates that lie outside the training ranges."""

    index: int
    covariates: Covariates
    extrapolated: tuple[str, ...] = ()

    @property
    def participant_id(self) -> str:
        return f"sub-{self.index:06d}"


def make_plan(
    asked: Mapping[str, Sweep],
    *,
    n: int | None,
    seed: int,
    ranges: CovariateRanges,
    joint: CovariateModel | None,
    allow_extrapolation: bool = False,
) -> list[PlanRow]:
    """Rows for the covariates asked: the product of all sweeps, repeated to fill `n` rows (by default once, or 16 rows
    when nothing is swept). UsageError for a value outside the training ranges, unless extrapolation is allowed, for a
    covariate left open with a model that does not know its people's distribution, and for more than MOST_BRAINS."""
    unknown = set(asked) - set(COVARIATES)
    if unknown:
        raise UsageError(f"unknown covariate {sorted(unknown)[0]!r}.", remedy=f"Known: {', '.join(COVARIATES)}.")
    names = [name for name in COVARIATES if name in asked]
    combinations = math.prod(asked[name].count for name in names)
    if n is None:
        n = combinations if combinations > 1 else 16
    if n < 1:
        raise UsageError(f"{n} brains were asked for.", remedy="Ask for at least 1.")
    _check_most(max(n, combinations))
    if len(names) < len(COVARIATES) and joint is None:
        missing = [name for name in COVARIATES if name not in names]
        raise UsageError(
            f"this model does not know how {', '.join(missing)} is distributed in its training people.",
            remedy="Give a value for every covariate.",
        )
    grid = list(itertools.product(*(asked[name].values() for name in names)))
    rows = []
    for index in range(n):
        given = dict(zip(names, grid[index % len(grid)]))
        if len(given) == len(COVARIATES):
            covariates = Covariates.from_array(np.array([given[name] for name in COVARIATES]))
        else:
            assert joint is not None
            covariates = joint.draw(stream(seed, "plan", index), given)
        rows.append(PlanRow(index, covariates))
    return check_ranges(rows, ranges, allow_extrapolation=allow_extrapolation)


def _check_most(brains: int) -> None:
    if brains > MOST_BRAINS:
        raise UsageError(
            f"{brains} brains were asked for, and a dataset holds at most {MOST_BRAINS}.",
            remedy="Make several datasets, each with a seed of its own.",
        )


def check_ranges(rows: list[PlanRow], ranges: CovariateRanges, *, allow_extrapolation: bool) -> list[PlanRow]:
    """The rows with their extrapolated covariates marked; UsageError for the first one that may not be."""
    checked = []
    for row in rows:
        outside = tuple(name for name, inside in ranges.inside(row.covariates).items() if not inside)
        if outside and not allow_extrapolation:
            raise UsageError(
                f"row {row.index} of the plan: {ranges.outside_of(row.covariates)}, the model's training range.",
                remedy="Ask within it, or pass --allow-extrapolation to try and have the row marked.",
            )
        checked.append(PlanRow(row.index, row.covariates, outside))
    return checked


def write_plan(path: Path, rows: list[PlanRow]) -> None:
    """plan.tsv: physical units, one row a brain."""
    write_table(
        path,
        COLUMNS,
        (
            {
                "index": row.index,
                "participant_id": row.participant_id,
                "sex": row.covariates.sex_letter,
                "age_years": row.covariates.age_years,
                "ventricles_mm3": row.covariates.ventricles_mm3,
                "brain_mm3": row.covariates.brain_mm3,
                "extrapolated": ",".join(row.extrapolated) or None,
            }
            for row in rows
        ),
    )


def as_text(rows: list[PlanRow]) -> str:
    """The plan for the terminal: a line a brain, volumes in ml."""
    lines = [f"{'participant_id':<14}  sex    age  ventricles ml  brain ml  extrapolated"]
    for row in rows:
        asked = row.covariates
        volumes = f"{asked.ventricles_mm3 / 1000:13.1f}  {asked.brain_mm3 / 1000:8.1f}"
        line = f"{row.participant_id:<14}  {asked.sex_letter:<3}  {asked.age_years:5.1f}  {volumes}"
        lines.append(f"{line}  {', '.join(row.extrapolated)}".rstrip())
    return "\n".join(lines)


def read_plan(path: Path) -> list[PlanRow]:
    """The plan in a TSV: the covariates in physical units by their names, `index` optional (else counted from 0).

    BadInput by line and column for what is missing or no number, an age that nobody has, and a volume that only as
    millilitres is somebody's (unless the column `extrapolated` names it); the indices must be 0, 1, 2, ...
    """
    table = read_table(path)
    table.require(*COVARIATES)
    _check_most(len(table))
    rows = []
    for position in range(len(table)):
        index = position
        if "index" in table.columns:
            number = table.number(position, "index")
            if number != position:
                raise table.fault(position, "index", f"must be {position}: rows are numbered from 0 in order.")
        values = {}
        for name in COVARIATES[1:]:
            number = table.number(position, name)
            if number is None:
                raise table.fault(position, name, "is missing.", "Every covariate of a plan has a value.")
            _check_unit(table, position, name, number)
            values[name] = number
        try:
            sex = parse_sex(table.rows[position]["sex"])
        except UsageError as error:
            raise table.fault(position, "sex", "is no sex.", "Write F or M.") from error
        rows.append(PlanRow(index, Covariates(sex=sex, **values)))
    if not rows:
        raise UsageError("the plan has no rows.", path=path)
    return rows


def _check_unit(table: Table, row: int, name: str, value: float) -> None:
    """BadInput for a slip of the unit. Volumes beyond people's, below 0 too, may be asked for: the paper does."""
    fault = implausible(name, value)
    if name == "age_years" and fault:
        raise table.fault(row, name, f"{fault}.", "Write the age in years.")
    marked = table.rows[row].get("extrapolated", "").split(",")
    if fault and value > 0 and not implausible(name, 1000 * value) and name not in marked:
        raise table.fault(row, name, f"{fault}.", "Write volumes in mm^3.")
