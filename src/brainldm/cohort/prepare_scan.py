"""One person's scan becomes one prepared image: read, align, measure, reslice once, 0..1, write, draw.

Everything here is a function of the scan and the config alone, so it may run in any process, in any order, twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from brainldm.base.covariates import VOLUMES, implausible
from brainldm.base.derivative import SPACE
from brainldm.base.errors import BadInput
from brainldm.base.files import sha256_of, write_json
from brainldm.base.nifti import check_is_regular_file, read_nifti, write_nifti
from brainldm.base.volume import Volume, grid_named, same_voxels
from brainldm.cohort.measure import MOST_ROOM_FILLED, TemplateMeasure
from brainldm.cohort.normalise import background_at_zero, unit_range
from brainldm.cohort.overlay import write_overlay
from brainldm.cohort.prepare_config import PrepareConfig, ScanTask
from brainldm.cohort.register import (
    POOR_CORRELATION,
    Registration,
    is_skull_stripped,
    register_to_template,
    resample_to_grid,
)
from brainldm.cohort.skull import brain_mask
from brainldm.cohort.source import stamp_of
from brainldm.cohort.template import load_template
from brainldm.cohort.unires import aligned_by_unires

# Flags of quality.tsv: the share of the template's brain that the scan does not reach, and of the person's brain that
# the box cuts off, from which on somebody should look.
MAX_UNSEEN_BRAIN = 0.01
MAX_CUT_BRAIN = 0.005


def image_file(participant_id: str) -> str:
    """Where a person's image lies below the cohort's folder."""
    return f"{participant_id}/anat/{participant_id}_space-{SPACE}_T1w.nii.gz"


def prepare_scan(task: ScanTask) -> dict[str, Any]:
    """Prepares one scan, writes its files and returns its manifest record; BadInput when the scan is unusable."""
    scan, config, grid = task.scan, task.config, grid_named(task.config.grid)
    native, stamp = _read_unchanged(scan.path, config)
    voxels_sha256 = hashlib.sha256(repr(native.shape_XYZ).encode() + native.data_XYZ.tobytes()).hexdigest()
    mask_path = scan.mask if config.uses_masks else None
    mask = None if mask_path is None else _read_mask(mask_path, native)
    unscaled, native = native, Volume(background_at_zero(native.data_XYZ), native.affine, native.notes)

    # A scan that stays in its place is compared with the template as well: nothing else tells whether it lies there.
    in_place = config.register == "none" or (config.register == "auto" and scan.space.startswith("MNI"))
    registration = register_to_template(native, mask, aligned=in_place)
    notes, quality = [*scan.notes, *native.notes], dict(registration.quality)

    placed, placing = native, registration
    if config.register == "unires":
        aligned = aligned_by_unires(unscaled, scan.path)
        placed = Volume(background_at_zero(aligned.data_XYZ), aligned.affine)
        placing = register_to_template(placed, aligned=True)
        # Of the image that is written; size and turn stay those of the scan's head.
        quality |= {name: placing.quality[name] for name in ("correlation", "cut_brain_fraction")}
    stripped = is_skull_stripped(placed)
    if config.skull == "strip" and stripped and mask is None:
        notes.append("the skull was stripped already")
    elif config.skull == "strip":
        mask = mask if mask is not None else brain_mask(placed, placing, method=config.strip_with)
        placed = Volume(background_at_zero(placed.data_XYZ, mask.data_XYZ > 0.5), placed.affine)
        stripped = True

    measured: dict[str, float] | None = None
    if task.measure:
        # What UniRes gives is scaled, and ventricles are wanted as they are in the scan.
        result = TemplateMeasure()(native if config.register == "unires" else placed, registration)
        for name in VOLUMES:
            if fault := implausible(name, getattr(result, name)):
                raise BadInput(
                    f"the {name.removesuffix('_mm3')} measured in it {fault}: {getattr(result, name):.0f} mm^3.",
                    remedy="Look at this scan: it may be no T1-weighted image of a head, or lie askew.",
                    path=scan.path,
                    reason="not_measurable",
                )
        measured = {
            "ventricles_mm3": round(result.ventricles_mm3, 1),
            "brain_mm3": round(result.brain_mm3, 1),
            "brain_native_mm3": round(result.brain_native_mm3, 1),
            "head_scaling": round(result.head_scaling, 6),
        }
        quality = result.quality | quality

    resampled = resample_to_grid(placed, placing.mni_from_scan, grid)
    image_XYZ = unit_range(resampled.data_XYZ, percentile=config.percentile)
    quality["unseen_brain_fraction"] = unseen_brain(native, registration)

    flags = _flags(quality)
    quality.pop("poor", None)  # said by the flag

    file = image_file(scan.participant_id)
    written = write_nifti(task.out / file, image_XYZ, grid.affine, dtype="int16_unit", space="aligned")
    stem = task.out / scan.participant_id / "anat" / scan.participant_id
    write_json(
        stem.with_name(f"{scan.participant_id}_from-T1w_to-{SPACE}_xfm.json"),
        {
            "method": registration.method if config.register != "unires" else "unires",
            "units": "mm, RAS+; columns are (x, y, z, 1)",
            # UniRes keeps its own to itself.
            "mni_from_scan": registration.mni_from_scan.tolist() if config.register != "unires" else None,
            "mni_from_scan_affine": registration.mni_from_scan_affine.tolist(),
            "head_scaling": registration.head_scaling,
        },
    )
    write_overlay(
        task.out / scan.participant_id / "figures" / f"{scan.participant_id}_overlay.png",
        Volume(image_XYZ, grid.affine),
        title=scan.participant_id,
    )
    return {
        "index": task.index,
        "participant_id": scan.participant_id,
        "file": file,
        "bytes": written.bytes,
        "sha256": written.sha256,
        "source": scan.file,
        **stamp,
        "mask_sha256": None if mask_path is None else sha256_of(mask_path),
        "voxels_sha256": voxels_sha256,
        "stripped": stripped,
        "measured": measured,
        "quality": {name: float(f"{value:.6g}") for name, value in sorted(quality.items())},
        "flags": flags,
        "notes": list(dict.fromkeys(notes)),
    }


def _read_unchanged(path: Path, config: PrepareConfig) -> tuple[Volume, dict[str, Any]]:
    """The scan and its stamp; BadInput when somebody wrote to the file meanwhile."""
    check_is_regular_file(path)
    stamp = stamp_of(path)
    volume = read_nifti(
        path, nan=config.nan, volume_index=config.volume_index, assume_orientation=config.assume_orientation
    )
    after = path.stat()
    if (stamp["source_bytes"], stamp["source_mtime_ns"]) != (after.st_size, after.st_mtime_ns):
        raise BadInput(
            "the file changed while it was read.",
            remedy="Wait until it is copied, then run the same command again.",
            path=path,
            reason="changed",
        )
    return volume, stamp


def _read_mask(path: Path, scan: Volume) -> Volume:
    mask = read_nifti(path, assume_orientation=True)
    if not same_voxels(mask, scan):
        raise BadInput(
            f"the brain mask of shape {mask.shape_XYZ} does not lie on its scan, of shape {scan.shape_XYZ}.",
            remedy="Give a mask on the voxels of the scan.",
            path=path,
            reason="mask_grid",
        )
    return mask


def unseen_brain(scan: Volume, registration: Registration) -> float:
    """Which share of the template's brain lies outside the scan's field of view; 0 is perfect."""
    template = load_template(4).brain_mask
    scan_voxel_from_template_voxel = (
        np.linalg.inv(scan.affine) @ np.linalg.inv(registration.mni_from_scan_affine) @ template.affine
    )
    voxels = np.argwhere(template.data_XYZ) @ scan_voxel_from_template_voxel[:3, :3].T
    voxels += scan_voxel_from_template_voxel[:3, 3]
    seen = ((voxels >= -0.5) & (voxels <= np.array(scan.shape_XYZ) - 0.5)).all(axis=1)
    return float(1 - seen.mean())


def _flags(quality: Mapping[str, float]) -> list[str]:
    flags = []
    if quality["correlation"] < POOR_CORRELATION:
        flags.append("poor_registration")
    if quality.get("poor", 0.0) > 0:  # there is none where nothing was measured
        flags.append("poor_measurement")
    if quality.get("ventricle_room_filled", 0.0) > MOST_ROOM_FILLED:
        flags.append("ventricles_at_limit")
    if quality["unseen_brain_fraction"] > MAX_UNSEEN_BRAIN:
        flags.append("field_of_view_cut")
    if quality["cut_brain_fraction"] > MAX_CUT_BRAIN:
        flags.append("brain_outside_box")
    return flags
