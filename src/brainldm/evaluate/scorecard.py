"""The scorecard of a folder of images: every figure with its count, its interval, its seed and its reference.

OUT/scorecard.json              all of it, for machines          OUT/scorecard.tsv, scorecard.md   for people
OUT/measured.tsv                asked and measured, an image a row
OUT/measured_reference.tsv      the same of the real people: recorded and measured
OUT/gate.tsv                    every image: keep or reject, and why
OUT/regions.tsv                 every region's volumes in both sets, with Cohen's d
OUT/suspects.tsv                brains nearer to a training image than anybody unseen, and to whose
OUT/measured.jsonl              what the instrument found, by image hash: a rerun measures only what is new
OUT/failures.tsv                images that could not be judged, or not in every way, and why (only where there are any)
OUT/features/                   features of every image, by its hash: a rerun computes only what is new
OUT/figures/                    middle slices, all in one grey scale
OUT/learning_curves.json        of the training run, where one was named
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy

import brainldm
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import check_output_apart, locked_folder, make_folder, write_json, write_text
from brainldm.base.pool import check_workers, kept_processes, usable_cpus
from brainldm.base.progress import Progress, Quiet
from brainldm.base.tables import write_table
from brainldm.evaluate import gradient_ssim, printed
from brainldm.evaluate.caveats import caveats
from brainldm.evaluate.curves import learning_curves
from brainldm.evaluate.diversity import KERNEL, scale_weights
from brainldm.evaluate.features import FeatureSpace
from brainldm.evaluate.images import Failure, ImageFolder, open_images
from brainldm.evaluate.judge import Findings, Judge
from brainldm.evaluate.measuring import Instrument, inert
from brainldm.evaluate.rows import Row

SCHEMA = "brainldm scorecard"
SCHEMA_VERSION = 1
OURS = {"scorecard.json", "measured.jsonl", "measured.tsv"}  # one of them is wherever an evaluation began


@dataclass(frozen=True)
class Side:
    """One of the two folders: `planned` rows, `judged` images and `failed` ones (those in failures.tsv: an image that
    only an instrument failed in is judged too), and what it says of itself.

    `sampled` is less than the number of images where only a random part was looked at.
    """

    folder: str
    from_here: str
    kind: str
    planned: int
    sampled: int
    judged: int
    failed: int
    training: int
    held_out: int
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Scorecard:
    """What was found. `settings` and `seed` say how to get the same numbers again; `versions` with what they came."""

    synthetic: Side
    real: Side | None
    seed: int
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    failures: tuple[Failure, ...]
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    schema: str = SCHEMA
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Scorecard:
        """The scorecard in scorecard.json; BadInput when it is of another kind or a newer program."""
        if content.get("schema") != SCHEMA or content.get("schema_version") != SCHEMA_VERSION:
            raise BadInput(
                f"is a {content.get('schema')!r} of version {content.get('schema_version')!r}; this program reads "
                f"{SCHEMA!r} of version {SCHEMA_VERSION}.",
                remedy="Use the version of brainldm that wrote it, or evaluate again.",
                reason="version",
            )
        parts = dict(content)
        parts["synthetic"] = Side(**parts["synthetic"])
        parts["real"] = None if parts["real"] is None else Side(**parts["real"])
        parts["rows"] = tuple(Row.from_json(row) for row in parts["rows"])
        parts["warnings"] = tuple(parts["warnings"])
        parts["failures"] = tuple(Failure(**failure) for failure in parts["failures"])
        return cls(**parts)

    @property
    def failed(self) -> int:
        """How many images stand in failures.tsv."""
        return self.synthetic.failed + (0 if self.real is None else self.real.failed)

    def row(self, key: str, group: str = "all") -> Row:
        """The row of that key; KeyError when there is none."""
        for row in self.rows:
            if (row.key, row.group) == (key, group):
                return row
        raise KeyError(f"{key} ({group})")

    def as_text(self) -> str:
        """A table for the terminal, warnings and failures below it."""
        return printed.as_text(self.rows, self.warnings, self.failures)


def evaluate_dataset(
    synth: str | Path | ImageFolder,
    real: str | Path | ImageFolder | None,
    out: str | Path,
    *,
    instrument: Instrument | None = None,
    pairs: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    max_real: int = 200,
    runs: str | Path | None = None,
    predictors: Sequence[str | Path] = (),
    features: Sequence[str] = ("random",),
    volumes: tuple[str | Path | None, str | Path | None] | None = None,
    show_made: bool = True,
    show_real: bool = True,
    held_out_only: bool = False,
    cache: Path | None = None,
    progress: Progress = Quiet(),
) -> Scorecard:
    """Judges the images in `synth` against those in `real`, writes everything below `out` and returns the scorecard.
    Either is a folder, or images listed already.

    `instrument` finds volumes in images (by default the one without trained weights). At most `max_real` real images,
    drawn at random, are measured and compared as a set (with `held_out_only` among those that the folder marks as held
    out); the search for copies looks at every training image. `runs` is a training run whose curves go along;
    `predictors` are folders of trained predictors of age and sex; `features` name the spaces in which sets are compared
    (networks.space_named). `volumes` are tables of SynthSeg or FreeSurfer for the synthetic and the real images,
    instead of `instrument`. `show_made` and `show_real` say of whom there are pictures. What is found in single images
    is kept in `cache` (default: `out`), which several evaluations may share, one after the other.

    Images that cannot be judged are listed in failures.tsv (and in `.failures`) and the rest is judged; BadInput when
    there is nothing to judge.
    """
    if pairs < 1 or max_real < 1:
        raise UsageError(
            f"{pairs} pairs and {max_real} real images were asked for.", remedy="Ask for 1 of each or more."
        )
    workers = usable_cpus() if workers is None else workers
    check_workers(workers)
    out = Path(out)
    made = synth if isinstance(synth, ImageFolder) else open_images(synth, "synthetic")
    people = real if real is None or isinstance(real, ImageFolder) else open_images(real, "real")
    _check_output(out, [side.folder for side in (made, people) if side is not None])
    curves = None if runs is None else learning_curves(Path(runs))
    judge = Judge(
        made,
        people,
        out,
        cache or out,
        instrument or _default_instrument(),
        pairs,
        seed,
        workers,
        max_real,
        progress,
        _read_predictors(predictors),
        feature_spaces(features),
        _volume_tables(volumes, people is not None),
        held_out_only,
    )
    with locked_folder(out), kept_processes():
        found = judge.run(shown=[side for side, shows in (("synthetic", show_made), ("real", show_real)) if shows])
        card = _scorecard(judge, found)
        if curves is not None:
            write_json(out / "learning_curves.json", curves)
        _write(out, card)
    return card


def _scorecard(judge: Judge, found: Findings) -> Scorecard:
    weights = scale_weights(found.grid.shape_XYZ)
    settings = {
        "judging_grid": {
            "shape_XYZ": list(found.grid.shape_XYZ),
            "voxel_mm": [round(float(v), 4) for v in found.grid.voxel_mm],
            "rule": "the coarser of the two folders' most common grids",
        },
        "instrument": found.instruments["synthetic"],
        "instruments": dict(found.instruments),
        "recorded_volumes_were_measured": judge.people is not None and judge.people.volumes_were_measured,
        "predictors": {name: predictor.name for name, predictor in judge.predictors.items()},
        "features": [space.name for space in judge.spaces],
        "pairs": judge.pairs,
        "max_real": judge.max_real,
        "held_out_only": judge.held_out_only,
        "ms_ssim": {
            "kernel": KERNEL,
            "sigma_voxels": gradient_ssim.SIGMA_VOXELS,
            "data_range": 1,
            "scales": len(weights),
            "weights": list(weights),
        },
        "4_g_r_ssim": {
            "kernel": gradient_ssim.KERNEL,
            "sigma_voxels": gradient_ssim.SIGMA_VOXELS,
            "data_range": 1,
            "exponents": list(gradient_ssim.STRUCTURE),
            "thresholds": [gradient_ssim.EDGE, gradient_ssim.SMOOTH],
        },
    }
    versions = {
        "brainldm": brainldm.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
    return Scorecard(
        _side("synthetic", judge.made, judge.out, len(judge.made.images), found),
        None if judge.people is None else _side("real", judge.people, judge.out, found.sampled, found),
        judge.seed,
        settings,
        found.rows,
        caveats(judge.made, judge.people, found),
        found.failures,
        versions,
        found.seconds,
    )


def _side(side: str, folder: ImageFolder, out: Path, sampled: int, found: Findings) -> Side:
    judged = found.synthetic if side == "synthetic" else found.real
    return Side(
        folder.folder.resolve().name,
        os.path.relpath(folder.folder.resolve(), out.resolve()),
        folder.kind,
        folder.planned,
        sampled,
        len(judged.images),
        len({failure.file for failure in found.failures if failure.side == side}),
        len(folder.training),
        len(folder.held_out),
        dict(folder.provenance),
    )


def _check_output(out: Path, inputs: Sequence[Path]) -> None:
    check_output_apart(out, *inputs)
    if out.is_dir():
        there = {path.name for path in out.iterdir() if not path.name.startswith(".")}
        if there and not there & OURS:
            raise UsageError(
                f"the folder holds other things ({', '.join(sorted(there)[:3])}) and no evaluation.",
                remedy="Choose an empty or new folder.",
                path=out,
            )
    make_folder(out)


def _write(out: Path, card: Scorecard) -> None:
    if card.failures:
        columns = ("side", "participant_id", "file", "reason", "message", "remedy")
        rows = (asdict(f) | {"participant_id": inert(f.participant_id), "file": inert(f.file)} for f in card.failures)
        write_table(out / "failures.tsv", columns, rows)
    write_table(out / "scorecard.tsv", printed.TSV_COLUMNS, printed.tsv_rows(card.rows))
    write_text(out / "scorecard.md", printed.as_markdown(card.rows, card.warnings, card.failures))
    write_json(out / "scorecard.json", card.to_json())  # last: it is what says that the evaluation is whole


def _read_predictors(folders: Sequence[str | Path]) -> dict[str, Instrument]:
    if not folders:
        return {}
    from brainldm.cohort.predictor import read_predictor  # imports torch, which takes a second

    found: dict[str, Instrument] = {}
    for folder in folders:
        predictor = read_predictor(Path(folder))
        if predictor.target in found:
            raise UsageError(
                f"predicts {predictor.target}, as another predictor that was named does.",
                remedy="Name one of each.",
                path=folder,
            )
        found[predictor.target] = predictor
    return found


def _volume_tables(volumes: tuple[str | Path | None, str | Path | None] | None, has_real: bool) -> dict[str, Path]:
    if volumes is None:
        return {}
    synthetic, of_real = volumes
    if synthetic is None or (of_real is None) == has_real:
        raise UsageError(
            "volumes of one side only: the two would be measured by different instruments.",
            remedy="Give --volumes and, where there is a --real, --real-volumes, both by the same program.",
        )
    tables = {"synthetic": Path(synthetic)} | ({} if of_real is None else {"real": Path(of_real)})
    from brainldm.cohort.measure import measured_from_tables

    for table in tables.values():
        measured_from_tables(table)  # what is wrong with them is said before images are read
    return tables


def feature_spaces(names: Sequence[str]) -> list[FeatureSpace]:
    """The spaces of those names; no space for none or `none`."""
    if not names or tuple(names) == ("none",):
        return []
    from brainldm.evaluate.networks import space_named  # imports torch, which takes a second

    return [space_named(name) for name in names]


def _default_instrument() -> Instrument:
    from brainldm.cohort.measure import TemplateMeasure

    return TemplateMeasure()
