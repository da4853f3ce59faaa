"""What is this folder? Told from the files that brainldm leaves in everything it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brainldm.base.errors import BadInput
from brainldm.base.files import lock_holder, read_json_object, sha256_of
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import read_nifti
from brainldm.base.shipped import shipped_folder, shipped_name
from brainldm.base.tables import read_table
from brainldm.base.watch import told, watch_stages


def describe(path: Path) -> dict[str, Any]:
    """The kind of thing at `path` and its main facts, as plain JSON content; or of the shipped model of that name.
    BadInput when it is nothing we know."""
    if path.is_file():
        return _scan(path)
    for marker, teller in _TELLERS.items():
        if (path / marker).is_file():
            return teller(path)
    named = shipped_name(path)
    if named is not None:
        return _model(shipped_folder(named))
    if not path.exists():
        raise BadInput("there is no such file or folder.", remedy="Check the path.", path=path, reason="missing")
    raise BadInput(
        f"is nothing that brainldm makes or reads (none of {', '.join(_TELLERS)} is in it).",
        remedy="Name a scan, a BIDS study, or the very folder that a command of brainldm wrote.",
        path=path,
        reason="unknown_kind",
    )


def _scan(path: Path) -> dict[str, Any]:
    volume = read_nifti(path)
    low, high = float(volume.data_XYZ.min()), float(volume.data_XYZ.max())
    return {
        "kind": "scan",
        "shape_XYZ": list(volume.shape_XYZ),
        "voxel_mm": [round(float(v), 4) for v in volume.voxel_mm],
        "affine": volume.affine.round(4).tolist(),
        "values": [low, high],
        "notes": list(volume.notes),
        "sha256": sha256_of(path),
    }


def _model(path: Path) -> dict[str, Any]:
    content = read_json_object(path / "model.json", weights=dict)
    weights = {
        name: "whole"
        if isinstance(facts, dict) and (path / name).is_file() and sha256_of(path / name) == facts.get("sha256")
        else "missing or changed"
        for name, facts in content["weights"].items()
    }
    shown = ("name", "format_version", "target", "latent", "grid", "covariates", "training", "licence", "weights_dtype")
    return {"kind": f"model ({content.get('kind')})", "weights": weights} | {k: content.get(k) for k in shown}


def _cohort(path: Path) -> dict[str, Any]:
    table = path / "participants.tsv"  # written at the end; until then the manifest knows who is done
    if table.is_file():
        people = len(read_table(table))
    else:
        people = len({record.get("index") for record in Manifest(path / "manifest.jsonl").records()})
    return {"kind": "prepared cohort", "images": people} | read_json_object(path / "prepared.json")


def _run(path: Path) -> dict[str, Any]:
    content = read_json_object(path / "run.json")
    stages = watch_stages(path, content)
    holder = lock_holder(path)
    return {
        "kind": "training run",
        "training_now": holder if holder is not None else "no: nobody holds this folder",
        **{f"stage {name}": told(state) for name, state in stages.items()},
        "has_model": (path / "model" / "model.json").is_file(),
        "stages": stages,
    } | content


def _synthetic(path: Path) -> dict[str, Any]:
    content = read_json_object(path / "generation.json", n=int)
    done = len(Manifest(path / "manifest.jsonl").proven(path))
    return {"kind": "synthetic dataset", "done": done, "missing": content["n"] - done} | content


def _scorecard(path: Path) -> dict[str, Any]:
    return {"kind": "scorecard"} | read_json_object(path / "scorecard.json")


def _bids(path: Path) -> dict[str, Any]:
    scans = sum(1 for _ in path.glob("sub-*/**/anat/*_T1w.nii*"))
    return {"kind": "BIDS dataset", "t1w_images": scans} | read_json_object(path / "dataset_description.json")


# The most telling file first: everything of ours that holds images is a BIDS dataset too.
_TELLERS = {
    "model.json": _model,
    "run.json": _run,
    "prepared.json": _cohort,
    "generation.json": _synthetic,
    "scorecard.json": _scorecard,
    "dataset_description.json": _bids,
}
