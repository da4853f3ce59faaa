"""The synthetic dataset on disk: a BIDS derivative whose every brain is listed, described and hashed.

OUT/plan.tsv  generation.json  manifest.jsonl  participants.tsv  participants.json  dataset_description.json
OUT/space-MNI152rigid_desc-synth_T1w.json      the sidecar that all images inherit
OUT/sub-000000/anat/sub-000000_space-MNI152rigid_desc-synth_T1w.nii.gz
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import brainldm
from brainldm.base.derivative import SPACE, dataset_description, t1w_sidecar
from brainldm.base.errors import UsageError
from brainldm.base.files import write_json, write_text
from brainldm.base.nifti import Dtype, Written, write_nifti
from brainldm.base.tables import write_table
from brainldm.base.volume import GRIDS, Grid
from brainldm.generate.plan import PlanRow

_PARTICIPANTS = {
    "age": {"Description": "Age given to the model", "Units": "year"},
    "sex": {"Description": "Sex given to the model", "Levels": {"F": "female", "M": "male"}},
    "ventricular_volume": {
        "Description": "Volume of the lateral ventricles given to the model, not normalised for head size",
        "Units": "mm^3",
    },
    "brain_volume": {
        "Description": "Grey plus white matter volume, normalised for head size, given to the model",
        "Units": "mm^3",
    },
    "extrapolated": {"Description": "Covariates that lie outside the range the model was trained on"},
    "seed": {"Description": "Root seed; this row's noise is the stream (seed, purpose, index)"},
    "model_id": {"Description": "First 12 hexadecimal digits of the SHA-256 of the weights that generate"},
}

MAKERS = {"latent_diffusion": "a latent diffusion model", "lsgan": "an LSGAN", "vaegan": "a VAE-GAN"}  # by model kind

_README = """\
# {name}

{n} synthetic T1-weighted brain images. They belong to nobody: {maker} made each from noise and
the covariates in `participants.tsv`.

Not for clinical use. The covariates are what the model was asked for, not what an image shows; `brainldm evaluate`
measures that. Rows marked in the column `extrapolated` were asked for outside the model's training range.

Every image is listed with its SHA-256 in `manifest.jsonl`; the command that made them makes what is missing.
"""


_BUNDLE_CROP = ((5, 5), (5, 5), (0, 15))  # voxels cut off at the low and the high end of each axis


def bundle_grid(grid: Grid) -> Grid:
    """The grid of the published bundle's files, 150 x 214 x 145 at 1 mm, cut out of the paper's.

    The bundle writes the affine of the uncropped scan into them (off by 21 mm and more); this one is right.
    """
    if grid.shape_XYZ != GRIDS["paper"].shape_XYZ:
        shape = " x ".join(map(str, grid.shape_XYZ))
        raise UsageError(
            f"--as-bundle cuts the paper's 160 x 224 x 160 grid, and this model's is {shape}.",
            remedy="Leave --as-bundle out.",
        )
    x, y, z = (n - low - high for n, (low, high) in zip(grid.shape_XYZ, _BUNDLE_CROP))
    ox, oy, oz = (o + grid.voxel_mm * low for o, (low, _) in zip(grid.origin_mm, _BUNDLE_CROP))
    return Grid(f"{grid.name}-bundle", (x, y, z), grid.voxel_mm, (ox, oy, oz))


def as_bundle(image_XYZ: np.ndarray) -> np.ndarray:
    """The image as the bundle writes it: cropped, and stretched so that its darkest voxel is 0 and its brightest 1, in
    steps of 1/255 that are cut off, not rounded. `image_XYZ` is what the decoder gives, beyond 0..1 too."""
    cut = tuple(slice(low, n - high) for n, (low, high) in zip(image_XYZ.shape, _BUNDLE_CROP))
    image_XYZ = image_XYZ[cut]
    darkest, brightest = float(image_XYZ.min()), float(image_XYZ.max())
    stretched_XYZ = (image_XYZ - darkest) / max(brightest - darkest, 1e-12)
    return np.floor(255 * stretched_XYZ) / 255


def image_name(row: PlanRow) -> str:
    """Where a row's image lies below the dataset's root."""
    return f"{row.participant_id}/anat/{row.participant_id}_space-{SPACE}_desc-synth_T1w.nii.gz"


def write_image(out: Path, row: PlanRow, image_XYZ: np.ndarray, grid: Grid, dtype: Dtype) -> Written:
    """Writes one brain, whole, with a header made from nothing.

    A brain asked for beyond the training range gets a sidecar of its own that says so.
    """
    path = out / image_name(row)
    if row.extrapolated:
        sidecar = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
        write_json(sidecar, {"Extrapolated": True, "ExtrapolatedCovariates": list(row.extrapolated)})
    return write_nifti(
        path,
        image_XYZ,
        grid.affine,
        dtype=dtype,
        space="aligned",  # aligned to MNI space by a rigid motion: heads keep their size
        description=f"SYNTHETIC brainldm {brainldm.__version__}",
    )


def write_description(out: Path, facts: dict[str, Any], rows: list[PlanRow]) -> None:
    """Everything but the images: what the dataset is, who is in it, how it came about."""
    model = facts["model"]
    name, maker = f"Synthetic brains of {model['name']}", MAKERS[model["kind"]]
    write_json(
        out / "dataset_description.json",
        dataset_description(name, f"Synthetic images from {maker}", licence=model["licence"]),
    )
    write_text(out / "README.md", _README.format(name=name, n=len(rows), maker=maker))
    write_text(out / ".bidsignore", "plan.tsv\ngeneration.json\nmanifest.jsonl\nfailures.tsv\nindex.html\nfigure.png\n")
    write_json(
        out / f"space-{SPACE}_desc-synth_T1w.json",
        t1w_sidecar(
            "Synthetic T1-weighted image; no person was scanned for it",
            skull_stripped=bool(facts["model"]["skull_stripped"]),
            voxel_mm=facts["grid"]["voxel_mm"],
            SyntheticData=True,
            Generator=facts,
        ),
    )
    write_table(
        out / "participants.tsv",
        ("participant_id", *_PARTICIPANTS),
        (
            {
                "participant_id": row.participant_id,
                "age": row.covariates.age_years,
                "sex": row.covariates.sex_letter,
                "ventricular_volume": row.covariates.ventricles_mm3,
                "brain_volume": row.covariates.brain_mm3,
                "extrapolated": ",".join(row.extrapolated) or None,
                "seed": facts["seed"],
                "model_id": model["id"],
            }
            for row in rows
        ),
    )
    write_json(out / "participants.json", _PARTICIPANTS)
