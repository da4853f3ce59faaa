"""What an instrument finds in the images: once per image and instrument, kept on disk, never mixed with what was asked.

An instrument is any callable from a Volume to a dataclass of numbers, such as cohort.measure.TemplateMeasure. What it
found is kept in a manifest under the image's SHA-256, the instrument's name, the grid that the image was brought to and
the state of the measuring code, so that a killed run goes on where it stopped and a changed image is measured again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from brainldm.base.covariates import CONTINUOUS, COVARIATES, VOLUMES
from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import read_nifti
from brainldm.base.progress import Progress
from brainldm.base.tables import write_table
from brainldm.base.volume import Volume
from brainldm.cohort.source import PREPARATION
from brainldm.evaluate.examine import Examined
from brainldm.evaluate.grids import JudgingGrid, on_grid
from brainldm.evaluate.images import Failure, JudgedImage
from brainldm.evaluate.pool import each

# What a measurement is kept under.
_KEY = ("sha256", "instrument", "preparation", "grid")


class Instrument(Protocol):
    """Finds numbers in an image; `name` also stands for its version and settings. Must be picklable."""

    @property
    def name(self) -> str: ...

    def __call__(self, image: Volume) -> Any:
        """A dataclass whose float fields are what was found; a field `quality` may map names to further figures, and
        a field `regions` names of regions to volumes in mm^3."""


@dataclass(frozen=True)
class Measurement:
    """What the instrument found in one image: `values` by name, figures of its own `quality`, volumes of `regions`."""

    values: Mapping[str, float]
    quality: Mapping[str, float]
    regions: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurements:
    """By the image's SHA-256; `failures` are the images in which the instrument found nothing."""

    instrument: str
    by_sha256: Mapping[str, Measurement]
    failures: tuple[Failure, ...]

    def value(self, examined: Examined, name: str) -> float | None:
        found = self.by_sha256.get(examined.sha256)
        return None if found is None else found.values.get(name)

    def poor(self, images: Sequence[Examined]) -> int:
        """How many of the images the instrument found its own numbers not to be believed in."""
        found = (self.by_sha256.get(look.sha256) for look in images)
        return sum(one is not None and one.quality.get("poor", 0) > 0 for one in found)


def measure_one(image: JudgedImage, instrument: Instrument, grid: JudgingGrid | None = None) -> Measurement:
    """What the instrument finds in the file with its own intensities, on its own grid or brought to `grid`."""
    volume = read_nifti(image.path)
    found = instrument(volume if grid is None else Volume(on_grid(volume, grid), grid.affine))
    values = {
        field.name: float(value)
        for field in dataclasses.fields(found)
        if isinstance(value := getattr(found, field.name), int | float)
    }
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise BadInput(
            f"the instrument {instrument.name} found no finite number for {', '.join(wrong)}.",
            remedy="Look at this image: it may not show a brain.",
            path=image.path,
            reason="not_measurable",
        )
    quality, regions = (
        {k: float(v) for k, v in getattr(found, name, {}).items() if math.isfinite(float(v))}
        for name in ("quality", "regions")
    )
    return Measurement(values, quality, regions)


def _measure_request(request: tuple[JudgedImage, JudgingGrid | None], instrument: Instrument) -> Measurement:
    image, grid = request
    return measure_one(image, instrument, grid)


def measure(
    images: Sequence[Examined],
    side: str,
    instrument: Instrument,
    cache: Manifest,
    *,
    grid: JudgingGrid | None = None,
    workers: int,
    progress: Progress,
) -> Measurements:
    """Measures what the cache does not hold yet; each result is on disk before the next is counted. Images that lie on
    another grid than `grid` are brought to it first: an instrument errs otherwise on another grid (docs/measuring.md).
    EnvironmentProblem where the instrument cannot be used here."""

    def key(look: Examined) -> dict[str, Any]:
        return {
            "sha256": look.sha256,
            "instrument": instrument.name,
            # The built-in measure keeps its name, which cohorts and models state, when a mend changes what it finds;
            # this number is raised then.
            "preparation": PREPARATION,
            "grid": grid.key if grid is not None and look.resampled else None,
        }

    known_before = {
        tuple(record[name] for name in _KEY): Measurement(
            record["values"], record["quality"], record.get("regions", {})
        )
        for record in cache.records()
        if {*_KEY, "values", "quality"} <= record.keys()
    }
    found = {look.sha256: known_before[of] for look in images if (of := tuple(key(look).values())) in known_before}
    # One of each: byte-identical images need one measurement.
    waiting = list({look.sha256: look for look in images if look.sha256 not in found}.values())
    known = len(images) - len(waiting)
    work = partial(_measure_request, instrument=instrument)
    failures = []
    for position, outcome in each(
        work,
        [(look.image, grid if look.resampled else None) for look in waiting],
        workers=workers,
        progress=progress,
        what=f"measuring {side} images",
        done_before=known,
    ):
        look = waiting[position]
        if isinstance(outcome, EnvironmentProblem):
            raise outcome  # it says nothing of the image
        if isinstance(outcome, Exception):
            failures.append((position, Failure.of(side, look.image, outcome)))
            continue
        found[look.sha256] = outcome
        cache.append(
            **key(look),
            values=dict(outcome.values),
            quality=dict(outcome.quality),
            regions={name: round(volume, 1) for name, volume in outcome.regions.items()},
        )
    wanted = {look.sha256 for look in images}
    return Measurements(
        instrument.name,
        {sha256: measurement for sha256, measurement in found.items() if sha256 in wanted},
        tuple(failure for _, failure in sorted(failures, key=lambda pair: pair[0])),
    )


def measured_in_table(images: Sequence[Examined], side: str, path: Path) -> Measurements:
    """The images' volumes from a table that SynthSeg or FreeSurfer wrote, by participant, session and run; images that
    it lacks become failures."""
    from brainldm.cohort.measure import by_participant, measured_from_tables, participant_of, volumes_of_scan

    table = by_participant(measured_from_tables(path))
    found, failures = {}, []
    for look in images:
        of_participant = table.get(look.image.participant_id) or table.get(participant_of(look.image.file))
        try:
            if of_participant is None:
                raise BadInput(
                    f"has no row in {path.name}.",
                    remedy="Segment this image too, or leave the image out.",
                    reason="not_in_table",
                )
            measured = volumes_of_scan(of_participant, look.image.file)
        except BadInput as error:
            failures.append(Failure.of(side, look.image, error))
            continue
        values = {name: float(getattr(measured, name)) for name in VOLUMES}
        found[look.sha256] = Measurement(values, {}, measured.regions)
    return Measurements(f"table:{path.name}", found, tuple(failures))


def write_measured(
    path: Path,
    images: Sequence[Examined],
    measured: Sequence[Measurements],
    *,
    known_as: Literal["asked", "recorded"],
    outside: Callable[[Examined], tuple[str, ...] | None] | None = None,
) -> None:
    """One row an image: what was `asked` of it, or `recorded` of a person, and in columns of their own what each
    instrument measured. `outside` names an image's covariates that lie outside the training range."""
    names = sorted({name for by in measured for m in by.by_sha256.values() for name in m.values})
    quality = sorted({name for by in measured for m in by.by_sha256.values() for name in m.quality})
    columns = ["participant_id", "file", "sha256", *(f"{name}_{known_as}" for name in COVARIATES)]
    columns += ["split"] if outside is None else ["extrapolated"]
    columns += [f"{name}_measured" for name in names] + [f"quality_{name}" for name in quality]
    rows = []
    for look in images:
        image = look.image
        row: dict[str, object] = {
            "participant_id": inert(image.participant_id),
            "file": inert(image.file),
            "sha256": look.sha256,
            f"sex_{known_as}": image.sex,
            "split": image.split,
        }
        if outside is not None:
            row["extrapolated"] = ",".join(outside(look) or ()) or None
        row |= {f"{name}_{known_as}": image.covariates.get(name) for name in CONTINUOUS}
        for found in (by.by_sha256[look.sha256] for by in measured if look.sha256 in by.by_sha256):
            row |= {f"{name}_measured": value for name, value in found.values.items()}
            row |= {f"quality_{name}": value for name, value in found.quality.items()}
        rows.append(row)
    write_table(path, columns, rows)


def inert(name: str) -> str:
    """A name that a spreadsheet takes as text: one that could be a formula gets an apostrophe before it."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name
