"""Small folders of made-up brains for the tests of evaluate and report: blobs whose "ventricle" has a known size."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from brainldm.base.files import write_json
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import write_nifti
from brainldm.base.streams import stream
from brainldm.base.tables import write_table
from brainldm.base.volume import Grid, Volume

# The paper's box at 8 mm: small, and still one scale of MS-SSIM.
TINY = Grid("8mm", (20, 28, 20), 8.0, (-75.0, -122.0, -57.0))
CALLS: list[str] = []


@dataclass(frozen=True)
class Found:
    ventricles_mm3: float
    brain_mm3: float
    quality: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BlobMeasure:
    """Measures `blob` exactly (up to voxels) by counting; `error` adds what an instrument would get wrong."""

    name: str = "blob counter 1"
    error: float = 0.0

    def __call__(self, image: Volume) -> Found:
        CALLS.append("measured")
        scale = 1.0 if image.data_XYZ.max() <= 1.5 else float(image.data_XYZ.max())
        unit_XYZ = image.data_XYZ / scale
        inside = unit_XYZ[unit_XYZ > 0.1]
        core = inside[inside < 0.6]  # darker than any texture
        dark = float(np.clip((0.8 - core) / 0.6, 0, 1).sum()) * image.voxel_mm3
        return Found(
            dark * (1 + self.error), float(inside.size * image.voxel_mm3) - dark, {"voxels": float(inside.size)}
        )


def blob(ventricles_mm3: float, person: int, grid: Grid = TINY) -> np.ndarray:
    """A bright ellipsoid (about a brain) with a dark core of the wanted volume, and a texture of this person's own."""
    voxels = np.indices(grid.shape_XYZ).reshape(3, -1).T * grid.voxel_mm + np.array(grid.origin_mm)
    centre, radii = np.array([0.0, -15.0, 20.0]), np.array([60.0, 80.0, 55.0])
    apart = np.sqrt((((voxels - centre) / radii) ** 2).sum(axis=1)).reshape(grid.shape_XYZ)
    image = np.where(apart < 1, 0.8, 0.0)
    brain = image > 0
    coarse = stream(7, "test/texture", person).standard_normal((5, 7, 5))
    texture = np.kron(coarse, np.ones([n // m for n, m in zip(grid.shape_XYZ, (5, 7, 5))]))
    image[brain] += 0.04 * texture[brain]
    # Voxels from the centre outwards are darkened until the volume is reached; the last one in part.
    order = np.argsort(apart, axis=None)
    left = ventricles_mm3 / grid.voxel_mm3
    for index in order:
        if left <= 0:
            break
        image.flat[index] = 0.8 - 0.6 * min(left, 1.0)
        left -= 1
    return np.clip(image, 0, 1).astype(np.float32)


def write_synthetic(
    folder: Path,
    ventricles_mm3: list[float],
    *,
    ids: list[str] | None = None,
    ages: list[float] | None = None,
    asked: list[float] | None = None,
    extrapolated: list[str | None] | None = None,
    first_person: int = 1000,
    grid: Grid = TINY,
) -> Path:
    """A synthetic dataset as `brainldm generate` leaves it."""
    n = len(ventricles_mm3)
    ids = ids or [f"sub-{i:06d}" for i in range(n)]
    rows = []
    manifest = Manifest(folder / "manifest.jsonl")
    for i in range(n):
        file = f"sub-{i:06d}/anat/sub-{i:06d}_space-MNI152rigid_desc-synth_T1w.nii.gz"
        written = write_nifti(
            folder / file, blob(ventricles_mm3[i], first_person + i, grid), grid.affine, dtype="int16_unit"
        )
        manifest.append(index=i, participant_id=ids[i], file=file, bytes=written.bytes, sha256=written.sha256)
        rows.append(
            {
                "index": i,
                "participant_id": ids[i],
                "sex": "FM"[i % 2],
                "age_years": (ages or [60.0 + i for i in range(n)])[i],
                "ventricles_mm3": (asked or ventricles_mm3)[i],
                "brain_mm3": 1_100_000.0,
                "extrapolated": (extrapolated or [None] * n)[i],
            }
        )
    write_table(folder / "plan.tsv", list(rows[0]), rows)
    write_json(folder / "dataset_description.json", {"Name": "Synthetic brains of blobs", "BIDSVersion": "1.10.0"})
    write_json(
        folder / "generation.json",
        {
            "model": {"name": "blob model", "training_images": 6, "id": "0123456789ab", "cohort": "blobs"},
            "sampler": "ddim",
            "steps": 50,
            "seed": 3,
            "precision": "fp32",
            "software": {"brainldm": "0", "torch": "0"},
        },
    )
    return folder


def write_cohort(
    folder: Path,
    ventricles_mm3: list[float],
    *,
    splits: list[str] | None = None,
    first_person: int = 0,
    grid: Grid = TINY,
) -> Path:
    """A prepared cohort as `brainldm prepare` leaves it."""
    n = len(ventricles_mm3)
    splits = splits or ["train"] * (n - n // 3) + ["test"] * (n // 3)
    manifest = Manifest(folder / "manifest.jsonl")
    rows = []
    for i in range(n):
        file = f"sub-{i:02d}/anat/sub-{i:02d}_space-MNI152rigid_T1w.nii.gz"
        written = write_nifti(
            folder / file, blob(ventricles_mm3[i], first_person + i, grid), grid.affine, dtype="int16_unit"
        )
        manifest.append(index=i, participant_id=f"sub-{i:02d}", file=file, bytes=written.bytes, sha256=written.sha256)
        rows.append(
            {
                "participant_id": f"sub-{i:02d}",
                "age_years": 50.0 + i,
                "sex": "MF"[i % 2],
                "ventricles_mm3": ventricles_mm3[i],
                "brain_mm3": 1_100_000.0 + 1000 * i,
                "split": splits[i],
                "diagnosis": "none",
            }
        )
    write_table(folder / "participants.tsv", list(rows[0]), rows)
    write_json(folder / "prepared.json", {"kind": "brainldm prepared cohort", "name": "blobs", "finished": True})
    return folder
