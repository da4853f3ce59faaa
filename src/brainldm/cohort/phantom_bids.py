"""What a phantom study says of itself: the BIDS files beside its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brainldm.base.derivative import PHANTOM_STUDY_NAME, SPACE, SPACE_REFERENCE, dataset_description, t1w_sidecar
from brainldm.base.files import write_json, write_text
from brainldm.base.tables import write_table
from brainldm.base.volume import Grid

_COLUMNS = {
    "age": {"Description": "Age given to the phantom", "Units": "year"},
    "sex": {"Description": "Sex given to the phantom", "Levels": {"F": "female", "M": "male"}},
    "ventricles_mm3": {
        "Description": "Volume of the lateral ventricles in the image, from the soft labels at the image's resolution; "
        "not normalised for head size",
        "Units": "mm^3",
    },
    "brain_mm3": {
        "Description": "Volume of grey and white matter, from the soft labels at the image's resolution, times the "
        "MNI152 template's head volume over this head's",
        "Units": "mm^3",
    },
    "head_mm3": {
        "Description": "Volume of everything inside the skull in the image (CSF, grey, white, ventricles)",
        "Units": "mm^3",
    },
}

_README = """\
# {name}

T1-weighted brain images of nobody, with a known anatomy: {source} deformed, aged and painted from random numbers.
They exist to test software against a known truth. **Scores on them prove the machinery, not clinical realism:**
{limits}

`participants.tsv` holds the truth about each image: the volumes are measured on its own soft labels at its own
resolution. `*_dseg.nii.gz` are the same labels made hard (`dseg.tsv` names them), so volumes counted from them differ
by partial voluming. Images are skull-stripped, in 0..1 and rigidly in MNI space: heads have their own size.

Everything follows from the seed: person *i* is the same in a population of any size. `manifest.jsonl` lists each
image with its SHA-256; the command that wrote this folder makes what is missing. `phantom.json` holds all constants.

{notice}
"""
_ONE_ANATOMY = """all share one anatomy, with the smooth sulci of an average brain; folding, pathology and scanners
vary far more in people."""
_SOME_ANATOMIES = """they share the folding of a few label maps; pathology and scanners vary far more in people."""
# The template's terms ask that this notice go with what is made from it.
MNI_NOTICE = """The anatomy is that of the ICBM 152 Nonlinear Symmetric template 2009a (Fonov et al. 2009), as
distributed with nilearn: Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University."""
_LABELS_NOTICE = "The terms of the label maps apply to the images made from them."


def write_descriptions(
    out: Path, records: Sequence[Mapping[str, Any]], grid: Grid, seed: int, *, from_labels: bool
) -> None:
    """Writes everything but the images, after them: a study that was interrupted is not mistaken for a whole one."""
    name = f"{PHANTOM_STUDY_NAME}, seed {seed}, {grid.voxel_mm:g} mm"
    notice = _LABELS_NOTICE if from_labels else MNI_NOTICE
    readme = _README.format(
        name=name,
        source="label maps" if from_labels else "one template",
        limits=_SOME_ANATOMIES if from_labels else _ONE_ANATOMY,
        notice=notice,
    )
    write_text(out / "README.md", readme)
    write_text(out / ".bidsignore", "phantom.json\nmanifest.jsonl\n")
    write_json(out / "dataset_description.json", dataset_description(name, "Phantom population with known anatomy"))
    write_json(
        out / f"space-{SPACE}_desc-phantom_T1w.json",
        t1w_sidecar(
            "Simulated T1-weighted image with a known anatomy; no person was scanned for it",
            skull_stripped=True,
            voxel_mm=grid.voxel_mm,
            SyntheticData=True,
        ),
    )
    write_json(
        out / f"space-{SPACE}_desc-phantom_dseg.json",
        {
            "Description": "The labels that the image was made from, each voxel given to the largest",
            "SpatialReference": SPACE_REFERENCE,
            "Manual": False,
        },
    )
    tissues = ("Background", "Cerebrospinal fluid outside the lateral ventricles", "Grey matter", "White matter")
    names = enumerate((*tissues, "Lateral ventricles"))
    write_table(out / "dseg.tsv", ("index", "name"), ({"index": i, "name": label} for i, label in names))
    write_table(out / "participants.tsv", ("participant_id", *_COLUMNS), records)
    write_json(out / "participants.json", _COLUMNS)
