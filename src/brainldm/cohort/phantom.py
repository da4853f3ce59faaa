"""Phantoms: brains of nobody with a known anatomy, so that every claim can be tested against a known truth.

    person (population) -> deformation of one anatomy (deformation, flow) -> soft labels -> image (appearance)

The volumes that go with an image are measured on its own soft labels at its own resolution. One template anatomy with
smooth sulci: scores on phantoms prove the machinery, not clinical realism.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import brainldm
from brainldm.base.derivative import SPACE
from brainldm.base.errors import UsageError
from brainldm.base.files import locked_folder, read_json, sha256_of, write_json
from brainldm.base.manifest import Manifest, is_intact
from brainldm.base.nifti import Written, write_nifti
from brainldm.base.pool import check_workers, each_in_a_pool
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import stream
from brainldm.base.volume import Grid
from brainldm.cohort.anatomy import LABELS, Anatomy, check_label_map, label_map_anatomy, label_maps_in, template_anatomy
from brainldm.cohort.appearance import Appearance, paint
from brainldm.cohort.deformation import Deformation, Shape, deform, warped_labels
from brainldm.cohort.flow import fields_of
from brainldm.cohort.phantom_bids import write_descriptions
from brainldm.cohort.population import Person, Population, draw_person

__all__ = [
    "LABELS",
    "Person",
    "Phantom",
    "PhantomConfig",
    "Population",
    "draw_person",
    "make_phantom",
    "write_phantom_study",
]


@dataclass(frozen=True)
class PhantomConfig:
    """All constants of the phantoms. `version` changes when equal arguments would give other voxels."""

    population: Population = field(default_factory=Population)
    shape: Shape = field(default_factory=Shape)
    appearance: Appearance = field(default_factory=Appearance)
    version: int = 1


@dataclass(frozen=True)
class Phantom:
    """One person's image with the truth about it.

    `labels_LXYZ` are soft (csf, grey, white, ventricles), sum to 1 inside the head and are 0 outside. `ventricles_mm3`
    is as in the image; `brain_mm3` (grey + white) is normalised to the size of the template's head.
    """

    person: Person
    grid: Grid
    image_XYZ: np.ndarray
    noise_free_XYZ: np.ndarray
    labels_LXYZ: np.ndarray
    deformation: Deformation
    ventricles_mm3: float
    brain_mm3: float
    head_mm3: float
    lesions_mm3: float

    @property
    def hard_labels_XYZ(self) -> np.ndarray:
        """uint8: 0 where there is more air than head, else 1 + the position of the largest label in LABELS."""
        return np.where(self.labels_LXYZ.sum(axis=0) < 0.5, 0, 1 + self.labels_LXYZ.argmax(axis=0)).astype(np.uint8)


def make_phantom(
    person: Person,
    grid: Grid,
    seed: int,
    index: int,
    anatomy: Anatomy | None = None,
    config: PhantomConfig | None = None,
) -> Phantom:
    """The phantom of `person` on one of the GRIDS; shape, look and noise belong to (seed, index)."""
    config = config or PhantomConfig()
    anatomy = anatomy or template_anatomy()
    fields = fields_of(anatomy)
    deformation = deform(person, fields, seed, index, config.shape)
    labels_LXYZ, distance_XYZ = warped_labels(deformation, fields, grid)
    painted = paint(labels_LXYZ, distance_XYZ, grid, person.age_years, seed, index, config.appearance)
    sums = labels_LXYZ.sum(axis=(1, 2, 3), dtype=np.float64)
    csf, grey, white, ventricles = (float(s) * grid.voxel_mm3 for s in sums)
    head_mm3 = csf + grey + white + ventricles
    return Phantom(
        person,
        grid,
        painted.image_XYZ,
        painted.noise_free_XYZ,
        labels_LXYZ,
        deformation,
        ventricles_mm3=ventricles,
        brain_mm3=(grey + white) * template_anatomy().head_mm3 / head_mm3,
        head_mm3=head_mm3,
        lesions_mm3=painted.lesions_mm3,
    )


# ------------------------------------------------------------------------------------------------------ as a BIDS study


@dataclass(frozen=True)
class _Task:
    """One person to make: everything a worker process needs."""

    out: Path
    grid: Grid
    seed: int
    index: int
    label_map: Path | None
    config: PhantomConfig


def write_phantom_study(
    out: Path,
    *,
    n: int,
    grid: Grid,
    seed: int,
    labels: Path | None = None,
    workers: int = 1,
    progress: Progress = Quiet(),
) -> None:
    """Writes phantoms 0 to n - 1 as a BIDS derivative dataset, or makes what is missing of it.

    `labels` is a folder of label maps (FreeSurfer numbers) to use instead of the template. People beyond `n` that the
    folder holds already are kept, and mended. UsageError when it was made with another seed, grid or anatomy, or holds
    anything else.
    """
    check_workers(workers)
    if n < 1:
        raise UsageError(f"{n} people were asked for.", remedy="Ask for at least 1.")
    out = Path(out)
    config = PhantomConfig()
    label_maps = [] if labels is None else label_maps_in(labels)
    with locked_folder(out):
        _record_or_compare(out, _facts(grid, seed, label_maps, config))
        manifest = Manifest(out / "manifest.jsonl")
        done = _proven(out, manifest)
        # Whoever was once here is mended too, or their files would have no row in the table.
        wanted = set(range(n)) | {record["index"] for record in manifest.records() if "index" in record}
        missing = sorted(wanted - set(done))
        tasks = [_Task(out, grid, seed, i, _anatomy_choice(seed, i, label_maps), config) for i in missing]
        # People of one anatomy together: it takes seconds to set up and memory to keep.
        tasks.sort(key=lambda task: (str(task.label_map), task.index))
        for label_map in sorted({task.label_map for task in tasks if task.label_map is not None}):
            check_label_map(label_map)
        progress.start("making phantoms", len(wanted), len(done))
        with contextlib.closing(each_in_a_pool(_make_and_write, tasks, workers=workers)) as outcomes:
            for task, outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
                manifest.append(**outcome)
                done[task.index] = outcome
                progress.advance(1, outcome["participant_id"])
        records = [done[i] for i in sorted(done)]
        manifest.rewrite(records)
        write_descriptions(out, records, grid, seed, from_labels=bool(label_maps))


def _facts(grid: Grid, seed: int, label_maps: list[Path], config: PhantomConfig) -> dict[str, Any]:
    return {
        "kind": "phantom study",
        "seed": seed,
        "grid": {"name": grid.name, "shape": grid.shape_XYZ, "voxel_mm": grid.voxel_mm, "origin_mm": grid.origin_mm},
        "anatomies": {p.name: sha256_of(p) for p in label_maps} or "MNI152",
        "constants": dataclasses.asdict(config),
        "software": {"brainldm": brainldm.__version__, "numpy": np.__version__},
    }


def _record_or_compare(out: Path, facts: dict[str, Any]) -> None:
    path = out / "phantom.json"
    if not path.exists():
        others = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
        if others:
            raise UsageError(
                f"the output folder is in use: it holds {others[0]} and is no phantom study.",
                remedy="Choose an empty or a new folder.",
                path=out,
                reason="in_use",
            )
        write_json(path, facts)
        return
    there, asked = read_json(path), json.loads(json.dumps(facts))
    if not isinstance(there, dict):
        there = {}
    differing = [name for name in asked if name != "software" and there.get(name) != asked[name]]
    if differing:
        said = [f"{name} {_short(there.get(name))} there, {_short(asked[name])} asked" for name in differing]
        raise UsageError(
            f"this folder holds other phantoms ({'; '.join(said)}).",
            remedy="Give the same seed, grid and labels to finish it, or another folder.",
            path=out,
            reason="other_config",
        )


def _short(value: object) -> str:
    return str(value.get("name", f"of {len(value)} entries") if isinstance(value, dict) else value)


def _proven(out: Path, manifest: Manifest) -> dict[int, dict[str, Any]]:
    """The people whose image and labels are both there with the bytes that the manifest states."""
    images = manifest.proven(out, full=True)
    return {i: r for i, r in images.items() if "dseg" in r and is_intact(out, r["dseg"], full=True)}


def _anatomy_choice(seed: int, index: int, label_maps: list[Path]) -> Path | None:
    if not label_maps:
        return None
    return label_maps[int(stream(seed, "phantom anatomy", index).integers(len(label_maps)))]


def _make_and_write(task: _Task) -> dict[str, Any]:
    """Makes one person and writes their files; returns the manifest's record."""
    person = draw_person(task.seed, task.index, task.config.population)
    anatomy = None if task.label_map is None else label_map_anatomy(task.label_map)
    phantom = make_phantom(person, task.grid, task.seed, task.index, anatomy, task.config)
    participant_id = f"sub-{task.index + 1:04d}"
    stem = f"{participant_id}/anat/{participant_id}_space-{SPACE}_desc-phantom"
    about = f"PHANTOM brainldm {brainldm.__version__}"
    hard_XYZ = phantom.hard_labels_XYZ
    dseg = write_nifti(task.out / f"{stem}_dseg.nii.gz", hard_XYZ, task.grid.affine, dtype="uint8", description=about)
    image = write_nifti(
        task.out / f"{stem}_T1w.nii.gz", phantom.image_XYZ, task.grid.affine, dtype="int16_unit", description=about
    )
    return {
        "index": task.index,
        "participant_id": participant_id,
        **_entry(image, f"{stem}_T1w.nii.gz"),
        "dseg": _entry(dseg, f"{stem}_dseg.nii.gz"),
        "anatomy": "MNI152" if task.label_map is None else task.label_map.name,
        "age": person.age_years,
        "sex": person.sex,
        "ventricles_mm3": round(phantom.ventricles_mm3, 1),
        "brain_mm3": round(phantom.brain_mm3, 1),
        "head_mm3": round(phantom.head_mm3, 1),
    }


def _entry(written: Written, file: str) -> dict[str, Any]:
    return {"file": file, "bytes": written.bytes, "sha256": written.sha256}
