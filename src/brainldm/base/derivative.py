"""What a BIDS derivative dataset of ours says of itself, in one place for every command that writes one.

Ours is the label `space-MNI152rigid`: images aligned to the MNI152 template by a rigid motion, so that heads keep their
size. BIDS lists no such space, therefore every sidecar spells out what it refers to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import brainldm

BIDS_VERSION = "1.10.0"
SPACE = "MNI152rigid"
PHANTOM_STUDY_NAME = "Phantom brains"
SPACE_REFERENCE = (
    "https://nist.mni.mcgill.ca/icbm-152-nonlinear-atlases-2009/"  # the template that rigid alignment aims at
)


def dataset_description(name: str, description: str, *, licence: str = "") -> dict[str, Any]:
    """dataset_description.json of a derivative dataset made by this program."""
    content: dict[str, Any] = {
        "Name": name,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [
            {"Name": "brainldm", "Version": brainldm.__version__, "Description": description},
        ],
        "HEDVersion": "8.3.0",
    }
    if licence:
        content["License"] = licence
    return content


def are_phantoms(provenance: Mapping[str, Any]) -> bool:
    """Whether the people of a folder are made up, by what its own JSON files say (by file name): a phantom study, or a
    cohort prepared from one. Cohorts that do not say so are known by their study's name."""
    prepared, study = (provenance.get(name) for name in ("prepared.json", "dataset_description.json"))
    if isinstance(prepared, Mapping):
        source = prepared.get("source")
        if isinstance(source, Mapping) and "phantoms" in source:
            return bool(source["phantoms"])
        return str(prepared.get("name", "")).lower().startswith("phantom")
    return isinstance(study, Mapping) and str(study.get("Name", "")).startswith(PHANTOM_STUDY_NAME)


def t1w_sidecar(description: str, *, skull_stripped: bool, voxel_mm: float, **more: Any) -> dict[str, Any]:
    """The sidecar that all T1w images of such a dataset inherit from its root."""
    return {
        "Description": description,
        "SkullStripped": skull_stripped,
        "SpatialReference": SPACE_REFERENCE,
        "Units": "arbitrary",
        "VoxelSize_mm": voxel_mm,
        **more,
    }
