"""Is the anatomy that of real people? Volumes of regions: each region's difference, and all of them together.

Together they are compared by the Wasserstein distance of the two clouds of people in the space of regional volumes (the
idea of WASABI, arXiv 2504.21771), from parts of the sets (parts.py). Volumes may come from any
instrument: SynthSeg's and FreeSurfer's tables, or the built-in measure.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import locked_folder, write_json
from brainldm.base.streams import stream
from brainldm.base.tables import Table, read_table, write_table
from brainldm.evaluate.estimate import CONFIDENCE, Estimate
from brainldm.evaluate.measuring import inert
from brainldm.evaluate.parts import Parts, in_parts

MAX_PART = 500  # people of a side in one distance, whose work grows with the cube; as WASABI
MIN_REGIONS = 2
_LEAST_SPREAD = 1e-9  # of the volume: less is rounding, and nobody's difference


@dataclass(frozen=True)
class Region:
    """A region's volumes, mm^3: means and standard deviations of both sides (None where there is one person), and
    Cohen's d (0 is no difference)."""

    name: str
    synthetic_mean: float
    synthetic_sd: float | None
    real_mean: float
    real_sd: float | None
    cohen_d: Estimate


@dataclass(frozen=True)
class Morphometry:
    """`regions`, largest difference first; `parts` are of the Wasserstein distance, in standard deviations a region.
    A set with too little variety lies nearer to real people than they do to each other; what is `beyond` does not."""

    regions: tuple[Region, ...]
    parts: Parts


def morphometry(
    synthetic: Sequence[Mapping[str, float]], real: Sequence[Mapping[str, float]], seed: int
) -> Morphometry | None:
    """Compares volumes by region's name, a mapping a person; only regions that everybody has on both sides count.

    None where there are fewer than MIN_REGIONS regions to compare.
    """
    names = sorted(set.intersection(*(set(person) for person in (*synthetic, *real)))) if synthetic and real else []
    if len(names) < MIN_REGIONS:
        return None
    made, people = (np.array([[person[name] for name in names] for person in side]) for side in (synthetic, real))
    regions = [_region(name, made[:, column], people[:, column]) for column, name in enumerate(names)]
    regions.sort(key=lambda region: -abs(region.cohen_d.value or 0.0))
    return Morphometry(tuple(regions), _together(made, people, seed))


def _region(name: str, made: np.ndarray, people: np.ndarray) -> Region:
    def sd(values: np.ndarray) -> float | None:
        return float(values.std(ddof=1)) if len(values) > 1 else None

    return Region(name, float(made.mean()), sd(made), float(people.mean()), sd(people), cohen_d(made, people))


def cohen_d(made: np.ndarray, people: np.ndarray) -> Estimate:
    """0 is no difference: difference of means in pooled standard deviations, with the normal interval of its large-
    sample variance (Hedges and Olkin 1985)."""
    n, m = len(made), len(people)
    if min(n, m) < 2:
        return Estimate.none(f"a spread needs at least 2 images on each side, one has {min(n, m)}", min(n, m))
    pooled = ((n - 1) * made.var(ddof=1) + (m - 1) * people.var(ddof=1)) / (n + m - 2)
    if pooled <= 0:
        return Estimate.none("the volume is the same everywhere", min(n, m))
    d = float((made.mean() - people.mean()) / math.sqrt(pooled))
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt((n + m) / (n * m) + d**2 / (2 * (n + m)))
    return Estimate(d, d - half, d + half, min(n, m), "Hedges-Olkin")


def _together(made: np.ndarray, people: np.ndarray, seed: int) -> Parts:
    if len(people) < 2:
        return Parts.none("a spread needs at least 2 real people, there is 1", 1)
    spread = people.std(axis=0, ddof=1)
    varied = spread > _LEAST_SPREAD * np.abs(people).max(axis=0)
    if not varied.any():
        return Parts.none("the real people's volumes are all the same", len(people))
    centre = people.mean(axis=0)
    made, people = ((side - centre)[:, varied] / spread[varied] for side in (made, people))
    return in_parts(made, people, wasserstein, stream(seed, "evaluate/morphometry"), most=MAX_PART)


def wasserstein(first_NR: np.ndarray, second_NR: np.ndarray) -> float:
    """Wasserstein-1 distance of two equally large clouds, root-mean-square over regions: exact, by assignment."""
    apart = cdist(first_NR, second_NR) / math.sqrt(first_NR.shape[1])
    return float(apart[linear_sum_assignment(apart)].mean())


def compare_tables(synthetic: Path, real: Path, out: Path, *, head: str | None = None, seed: int = 0) -> Morphometry:
    """Compares any two tables of volumes (first column who, the others mm^3) and writes OUT/regions.tsv and
    morphometry.json. With `head`, a column such as the intracranial volume, each volume is divided by it and multiplied
    by its mean over the real people.

    BadInput where the tables have fewer than MIN_REGIONS columns in common, or a cell that is no number; UsageError
    where one of them would be overwritten.
    """
    regions, figures = out / "regions.tsv", out / "morphometry.json"
    for path in (synthetic, real):
        if os.path.realpath(path) in (os.path.realpath(regions), os.path.realpath(figures)):
            raise UsageError("the output would overwrite this table.", remedy="Choose another folder.", path=path)
    sides = [_volumes(read_table(path), head) for path in (synthetic, real)]
    if head is not None:
        usual = float(np.mean([heads for _, heads in sides[1]]))
        people = [[{k: v / own * usual for k, v in volumes.items()} for volumes, own in side] for side in sides]
    else:
        people = [[volumes for volumes, _ in side] for side in sides]
    found = morphometry(people[0], people[1], seed)
    if found is None:
        raise BadInput(
            f"has fewer than {MIN_REGIONS} regions in common with {real.name}.",
            remedy="Give two tables with the same columns of volumes and at least one person each.",
            path=synthetic,
            reason="no_regions",
        )
    with locked_folder(out):
        write_regions(regions, found)
        write_json(figures, {"seed": seed, "head": head} | asdict(found))
    return found


def _volumes(table: Table, head: str | None) -> list[tuple[dict[str, float], float]]:
    """Each person's volumes by region, and head size."""
    if head is not None:
        table.require(head)
    people = []
    for row in range(len(table)):
        numbers = {column: table.number(row, column) for column in table.columns[1:]}
        own = 1.0 if head is None else numbers.pop(head)
        if own is None or own <= 0:
            raise table.fault(row, str(head), "is no head size.")
        people.append(({name: volume for name, volume in numbers.items() if volume is not None}, own))
    return people


def write_regions(path: Path, found: Morphometry) -> None:
    """A row a region, largest difference first."""
    columns = (
        "region",
        "synthetic_mean_mm3",
        "synthetic_sd_mm3",
        "real_mean_mm3",
        "real_sd_mm3",
        "cohen_d",
        "low",
        "high",
    )
    rows = [
        dict(
            zip(
                columns,
                (
                    inert(region.name),
                    *(
                        None if v is None else round(v, 1)
                        for v in (region.synthetic_mean, region.synthetic_sd, region.real_mean, region.real_sd)
                    ),
                    *(region.cohen_d.value, region.cohen_d.low, region.cohen_d.high),
                ),
            )
        )
        for region in found.regions
    ]
    write_table(path, columns, rows)
