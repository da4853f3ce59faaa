"""What lies in a folder of results, read once and checked: an evaluation, or a synthetic dataset that nobody judged
yet.
"""

from __future__ import annotations

import base64
import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from brainldm.base.covariates import CONTINUOUS, COVARIATES
from brainldm.base.derivative import are_phantoms
from brainldm.base.errors import BadInput, BrainldmError
from brainldm.base.files import read_json
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import read_nifti
from brainldm.base.slices import VIEWS, Crop, View, grey_png, middle_slice
from brainldm.base.tables import Table, read_table

SCORECARD_VERSION = 1
# How many brains of an unjudged dataset are opened for their pictures.
MAX_PICTURED = 64
MAX_SWEEP = 12

Picture = Mapping[str, str]  # view -> data URI


@dataclass(frozen=True)
class Brain:
    """One synthetic brain: what was asked, what was measured (empty where nobody did), what it looks like."""

    participant_id: str
    sex: str | None
    asked: Mapping[str, float]
    measured: Mapping[str, float]
    extrapolated: tuple[str, ...] = ()
    picture: Picture | None = None


@dataclass(frozen=True)
class Results:
    """Everything a page can show. `scorecard` is empty for a dataset that was not judged."""

    folder: str
    scorecard: Mapping[str, Any]
    provenance: Mapping[str, Any]
    brains: tuple[Brain, ...]
    real_pictures: tuple[Picture, ...]
    real_points: Mapping[str, Sequence[tuple[float, float]]]
    failures: tuple[Mapping[str, str], ...]
    curves: Mapping[str, Mapping[str, Sequence[float | None]]]
    planned: int

    @property
    def phantoms(self) -> bool:
        """Whether the reference people are made up."""
        return are_phantoms((self.scorecard.get("real") or {}).get("provenance", {}))

    @property
    def people(self) -> str:
        """What the reference people are called."""
        return "phantoms" if self.phantoms else "real people"

    @property
    def failed(self) -> int:
        """How many images stand among the failures, which may name one several times."""
        return len({(failure["side"], failure["file"]) for failure in self.failures})


def read_results(folder: Path) -> Results:
    """The results in `folder`; BadInput when it is neither an evaluation nor a synthetic dataset."""
    if not folder.is_dir():
        raise BadInput("there is no such folder.", remedy="Check the path.", path=folder, reason="missing")
    if (folder / "scorecard.json").exists():
        return _evaluation(folder)
    if (folder / "plan.tsv").exists() and (folder / "manifest.jsonl").exists():
        return _dataset(folder)
    raise BadInput(
        "is neither an evaluation (scorecard.json) nor a synthetic dataset (plan.tsv and manifest.jsonl).",
        remedy="Run brainldm evaluate first and name the folder that it wrote.",
        path=folder,
        reason="unknown_kind",
    )


def _evaluation(folder: Path) -> Results:
    card = read_json(folder / "scorecard.json")
    if not isinstance(card, dict) or card.get("schema_version") != SCORECARD_VERSION or "rows" not in card:
        raise BadInput(
            f"is no scorecard of version {SCORECARD_VERSION}, which is what this program shows.",
            remedy="Evaluate again with this version of brainldm.",
            path=folder / "scorecard.json",
            reason="version",
        )
    by_sha256, real = _pictures(folder / "figures")
    failures: tuple[Mapping[str, str], ...] = tuple(card.get("failures", ()))
    curves = read_json(folder / "learning_curves.json") if (folder / "learning_curves.json").exists() else {}
    return Results(
        folder.resolve().name,
        card,
        card["synthetic"]["provenance"],
        tuple(_judged_brains(folder / "measured.tsv", by_sha256)),
        real,
        _recorded_and_measured(folder / "measured_reference.tsv"),
        failures,
        curves,
        int(card["synthetic"]["planned"]),
    )


def _judged_brains(path: Path, pictures: Mapping[str, Picture]) -> list[Brain]:
    if not path.exists():
        return []
    table = read_table(path)
    brains = []
    for row, cells in enumerate(table.rows):
        outside = cells.get("extrapolated", "")
        brains.append(
            Brain(
                cells["participant_id"].removeprefix("'"),
                None if table.is_missing(row, "sex_asked") else cells["sex_asked"],
                _numbers(table, row, {name: f"{name}_asked" for name in CONTINUOUS}),
                _numbers(table, row, {name: f"{name}_measured" for name in CONTINUOUS}),
                () if table.is_missing(row, "extrapolated") else tuple(outside.split(",")),
                pictures.get(cells.get("sha256", "")),
            )
        )
    return brains


def _numbers(table: Table, row: int, columns: Mapping[str, str]) -> dict[str, float]:
    found = {name: table.number(row, column) for name, column in columns.items() if column in table.columns}
    return {name: value for name, value in found.items() if value is not None}


def _recorded_and_measured(path: Path) -> dict[str, list[tuple[float, float]]]:
    """What the instrument found in real people against what is recorded of them, without their names."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTINUOUS}
    if path.exists():
        table = read_table(path)
        for row in range(len(table)):
            recorded = _numbers(table, row, {name: f"{name}_recorded" for name in CONTINUOUS})
            measured = _numbers(table, row, {name: f"{name}_measured" for name in CONTINUOUS})
            for name in recorded.keys() & measured.keys():
                points[name].append((recorded[name], measured[name]))
    return points


def _pictures(folder: Path) -> tuple[dict[str, Picture], tuple[Picture, ...]]:
    """Pictures of synthetic images by hash, and of real ones, cut out of the mosaics."""
    if not (folder / "figures.json").exists():
        return {}, ()
    index = read_json(folder / "figures.json")
    synthetic = {str(entry["sha256"]): picture for entry, picture in _cut_out(folder / "synthetic.png", index)}
    return synthetic, tuple(picture for _, picture in _cut_out(folder / "real.png", index))


def _cut_out(path: Path, index: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Picture]]:
    entries = index.get(path.stem, ())
    if not entries or not path.is_file():
        return
    with Image.open(path) as opened:
        mosaic = np.asarray(opened.convert("L")) / 255
    for entry in entries:
        picture = {}
        for view, (left, top, right, bottom) in entry["boxes"].items():
            picture[view] = _as_uri(grey_png(mosaic[top:bottom, left:right]))
        yield entry, picture


def _as_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _dataset(folder: Path) -> Results:
    plan = read_table(folder / "plan.tsv")
    plan.require("index", "participant_id", *COVARIATES)
    made = {record["index"]: record for record in Manifest(folder / "manifest.jsonl").records() if "index" in record}
    brains: list[Brain] = []
    failures: list[Mapping[str, str]] = []
    slices: dict[int, dict[View, np.ndarray]] = {}
    crop: Crop | None = None
    for row, cells in enumerate(plan.rows):
        record = made.get(int(plan.number(row, "index") or 0))
        file = "" if record is None else str(record.get("file", ""))
        if not file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            continue  # not made yet, or not in this dataset
        if len(slices) < MAX_PICTURED:
            try:
                image_XYZ = np.clip(read_nifti(folder / file).data_XYZ, 0, 1)
                slices[len(brains)] = {view: middle_slice(image_XYZ, view) for view in VIEWS}
                crop = Crop.around(image_XYZ, 0.1) if crop is None else crop.joined(Crop.around(image_XYZ, 0.1))
            except BrainldmError as error:
                failures.append({"side": "synthetic", "file": file, "message": error.message})
        brains.append(
            Brain(
                cells["participant_id"],
                cells["sex"],
                _numbers(plan, row, {name: name for name in CONTINUOUS}),
                {},
                () if plan.is_missing(row, "extrapolated") else tuple(cells["extrapolated"].split(",")),
            )
        )
    for position, planes in slices.items():
        cut = crop or Crop()
        picture = {str(view): _as_uri(grey_png(cut.of(plane, view))) for view, plane in planes.items()}
        brains[position] = replace(brains[position], picture=picture)
    provenance = {}
    for name in ("dataset_description.json", "generation.json"):
        with contextlib.suppress(BadInput):
            provenance[name] = read_json(folder / name)
    return Results(folder.resolve().name, {}, provenance, tuple(brains), (), {}, tuple(failures), {}, len(plan))


# ------------------------------------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True)
class SweepPicture:
    """Brains in rows and columns of what was asked: `cells[r][c]` was asked for `row_values[r]`, `column_values[c]`.

    With one covariate swept, `row` is empty and each row repeats the sweep with other noise.
    """

    row: str
    row_values: Sequence[float]
    column: str
    column_values: Sequence[float]
    cells: Sequence[Sequence[Brain]]


def find_sweep(brains: Sequence[Brain]) -> SweepPicture | None:
    """The sweep that the brains were asked for, if they form one and all have pictures: every combination of evenly
    spaced values of two covariates (or every value of one) equally often."""
    if not brains or any(brain.picture is None for brain in brains):
        return None
    values = {name: _evenly_spaced([brain.asked.get(name) for brain in brains]) for name in CONTINUOUS}
    swept = {name: found for name, found in values.items() if found}
    pairs = [(a, b) for i, a in enumerate(swept) for b in list(swept)[i + 1 :]]
    for row, column in sorted(pairs, key=lambda pair: -len(swept[pair[0]]) * len(swept[pair[1]])):
        cells = _cells(brains, row, swept[row], column, swept[column])
        if cells is not None:
            return SweepPicture(row, swept[row], column, swept[column], cells)
    for column, found in swept.items():
        counts = Counter(brain.asked[column] for brain in brains)
        if len(found) >= 3 and len(set(counts.values())) == 1:
            series = {value: [brain for brain in brains if brain.asked[column] == value] for value in found}
            repeats = min(len(brains) // len(found), 3)
            return SweepPicture("", (), column, found, [[series[v][k] for v in found] for k in range(repeats)])
    return None


def _evenly_spaced(values: Sequence[float | None]) -> list[float]:
    """The different values in rising order; none when they are not spaced evenly, or too many or few for a picture."""
    if any(value is None for value in values):
        return []
    distinct = np.unique(np.array(values, dtype=float))
    if not 2 <= len(distinct) <= MAX_SWEEP:
        return []
    steps = np.diff(distinct)
    return distinct.tolist() if np.ptp(steps) <= 1e-4 * steps.mean() else []


def _cells(
    brains: Sequence[Brain], row: str, row_values: Sequence[float], column: str, column_values: Sequence[float]
) -> list[list[Brain]] | None:
    at: dict[tuple[float, float], list[Brain]] = {}
    for brain in brains:
        at.setdefault((brain.asked[row], brain.asked[column]), []).append(brain)
    complete = len(at) == len(row_values) * len(column_values)
    if not complete or len({len(found) for found in at.values()}) != 1:
        return None
    return [[at[r, c][0] for c in column_values] for r in row_values]
