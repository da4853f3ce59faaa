"""Registration finds known motions, whatever the storage order, and keeps left on the left."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.ndimage as ndi
from scipy.spatial.transform import Rotation

from brainldm.base.errors import BadInput
from brainldm.base.nifti import read_nifti, write_nifti
from brainldm.base.volume import Volume, canonical, grid_named
from brainldm.cohort.register import (
    Registration,
    closest_rigid,
    is_skull_stripped,
    register_to_template,
    resample_to_grid,
    with_black_background,
)
from brainldm.cohort.template import load_template


def motion(turn_degrees: tuple[float, float, float], shift_mm: tuple[float, float, float], scale: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = scale * Rotation.from_euler("xyz", turn_degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def moved_template(scan_from_mni: np.ndarray) -> Volume:
    """The template's brain (2 mm) seen by a scanner in which it lies as `scan_from_mni` says: the header moves it."""
    template = load_template(2)
    data_XYZ = np.where(template.brain_mask.data_XYZ, template.t1.data_XYZ, 0).astype(np.float32)
    return Volume(data_XYZ, scan_from_mni @ template.t1.affine)


def displacement_mm(found: np.ndarray, true: np.ndarray) -> float:
    """Mean distance over the brain between where two motions put a point."""
    mask = load_template(8).brain_mask
    points = np.argwhere(mask.data_XYZ) @ mask.affine[:3, :3].T + mask.affine[:3, 3]
    moved = [(np.linalg.inv(m)[:3, :3] @ points.T).T + np.linalg.inv(m)[:3, 3] for m in (found, true)]
    return float(np.linalg.norm(moved[0] - moved[1], axis=1).mean())


@pytest.mark.parametrize(
    ("turn_degrees", "shift_mm", "scale"),
    [((5, -8, 10), (12, -20, 8), 0.9), ((30, 10, -25), (300, -150, 80), 0.93)],
)
def test_known_motion_is_found(turn_degrees: tuple, shift_mm: tuple, scale: float) -> None:
    scan_from_mni = motion(turn_degrees, shift_mm, scale)
    found = register_to_template(moved_template(scan_from_mni))
    assert displacement_mm(found.mni_from_scan_affine, np.linalg.inv(scan_from_mni)) < 0.5
    assert found.head_scaling == pytest.approx(scale**-3, rel=0.02)
    rotation = found.mni_from_scan[:3, :3]
    assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    assert np.allclose(rotation, scan_from_mni[:3, :3].T / scale, atol=0.02)


def test_same_scan_same_answer() -> None:
    scan = moved_template(motion((3, 2, -4), (5, 5, 5), 0.92))
    first, second = register_to_template(scan), register_to_template(scan)
    assert np.array_equal(first.mni_from_scan_affine, second.mni_from_scan_affine)


def test_closest_rigid_of_a_rigid_motion_is_itself() -> None:
    rigid = motion((10, 20, -15), (4, 5, 6), 1.0)
    assert np.allclose(closest_rigid(rigid), rigid, atol=1e-9)


def test_a_scan_that_is_aligned_stays_where_it_is() -> None:
    smaller = moved_template(motion((0, 0, 0), (0, -1.5, 1.0), 0.93))
    found = register_to_template(smaller, aligned=True)
    assert np.array_equal(found.mni_from_scan, np.eye(4))
    assert found.head_scaling == pytest.approx(0.93**-3, rel=0.02)


def asymmetric_scan() -> Volume:
    """A brain with a bright block in its left frontal lobe."""
    scan = moved_template(motion((4, -3, 6), (2, 3, -4), 0.9))
    data_XYZ = scan.data_XYZ.copy()
    data_XYZ[28:34, 80:88, 50:58] = 1.1
    return Volume(data_XYZ, scan.affine)


def stored_as(volume: Volume, codes: str) -> Volume:
    """The same image in another storage order, as a header says it."""
    start = nibabel.orientations.io_orientation(volume.affine)
    change = nibabel.orientations.ornt_transform(start, nibabel.orientations.axcodes2ornt(codes))
    data_XYZ = nibabel.orientations.apply_orientation(volume.data_XYZ, change)
    return Volume(
        np.ascontiguousarray(data_XYZ),
        volume.affine @ nibabel.orientations.inv_ornt_aff(change, volume.shape_XYZ),
    )


def test_left_is_left_in_every_storage_order(tmp_path: Path) -> None:
    """RAS, LAS, LPI and ASR files of one asymmetric head give the same prepared image, the block on the left."""
    scan, grid = asymmetric_scan(), grid_named("4mm")
    prepared = []
    for codes in ("RAS", "LAS", "LPI", "ASR"):
        stored = stored_as(scan, codes)
        assert "".join(nibabel.aff2axcodes(stored.affine)) == codes
        write_nifti(tmp_path / f"{codes}.nii.gz", stored.data_XYZ, stored.affine, space="aligned")
        read = read_nifti(tmp_path / f"{codes}.nii.gz")
        found = register_to_template(read)
        prepared.append(resample_to_grid(read, found.mni_from_scan, grid).data_XYZ)
    for other in prepared[1:]:
        assert np.abs(other - prepared[0]).max() < 1e-4
    block = np.argwhere(prepared[0] > 1.0)
    x_mm = grid.origin_mm[0] + grid.voxel_mm * block[:, 0].mean()
    assert x_mm < -15


def test_oblique_voxels_give_the_same_image() -> None:
    """The same head sampled on voxels turned by 20 degrees lands on the same place, up to interpolation."""
    scan, grid = asymmetric_scan(), grid_named("4mm")
    oblique_affine = motion((0, 20, 10), (0, 0, 0), 1.0) @ scan.affine
    oblique_affine[:3, 3] += scan.affine[:3, 3] - oblique_affine[:3, 3] + np.array([-30.0, 0, 10])
    matrix = np.linalg.inv(scan.affine) @ oblique_affine
    shape = tuple(n + 20 for n in scan.shape_XYZ)
    data_XYZ = ndi.affine_transform(scan.data_XYZ, matrix[:3, :3], matrix[:3, 3], output_shape=shape, order=1)
    images = []
    for stored in (scan, canonical(Volume(data_XYZ, oblique_affine))):
        found = register_to_template(stored)
        images.append(resample_to_grid(stored, found.mni_from_scan, grid).data_XYZ)
    assert np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1] > 0.99


def test_resampling_keeps_a_smooth_volume_and_is_zero_outside() -> None:
    grid = grid_named("4mm")
    scan = moved_template(np.eye(4))
    resampled = resample_to_grid(scan, np.eye(4), grid)
    inside_box = scan.data_XYZ[10:89, 4:115, 6:95].sum() * scan.voxel_mm3
    assert resampled.data_XYZ.sum() * grid.voxel_mm3 == pytest.approx(inside_box, rel=0.02)
    assert resample_to_grid(scan, motion((0, 0, 0), (1000, 0, 0), 1.0), grid).data_XYZ.max() == 0


def test_nothing_to_register_is_refused() -> None:
    with pytest.raises(BadInput, match="nothing in the image"):
        register_to_template(Volume(np.zeros((20, 20, 20), np.float32), np.eye(4)))


def test_an_image_of_nothing_is_no_head() -> None:
    assert is_skull_stripped(Volume(np.zeros((20, 20, 20), np.float32), np.eye(4)))


def test_a_haze_around_a_brain_is_no_head() -> None:
    brain = moved_template(np.eye(4))
    haze = 0.01 * brain.data_XYZ.max() * np.random.default_rng(0).random(brain.shape_XYZ)
    hazy = Volume((brain.data_XYZ + haze).astype(np.float32), brain.affine)
    assert is_skull_stripped(hazy)
    black = with_black_background(hazy)
    assert (black.data_XYZ[brain.data_XYZ == 0] == 0).all()
    assert (black.data_XYZ > 0).sum() == pytest.approx((brain.data_XYZ > 0).sum(), rel=0.01)


@pytest.mark.parametrize("scale", [0.8, 0.9, 1.0])
@pytest.mark.parametrize("floor_mm", [-200.0, -45.0])
def test_a_head_of_any_size_is_no_brain(scale: float, floor_mm: float) -> None:
    """Skin over bone over the template's brain; cut at the floor it has no more litres than a large brain."""
    template = load_template(2)
    padded = np.pad(template.brain_mask.data_XYZ > 0, 10)
    outside_mm = 2 * ndi.distance_transform_edt(~padded)
    data_XYZ = np.pad(np.where(template.brain_mask.data_XYZ, template.t1.data_XYZ, 0), 10)
    data_XYZ[(outside_mm > 0) & (outside_mm <= 9)] = 0.08
    data_XYZ[(outside_mm > 9) & (outside_mm <= 16)] = 0.9
    affine = template.t1.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, 10.0)
    heights_mm = affine[2, 2] * np.arange(data_XYZ.shape[2]) + affine[2, 3]
    kept = heights_mm > floor_mm
    affine[2, 3] = heights_mm[kept][0]
    head = Volume(data_XYZ[:, :, kept].astype(np.float32), np.diag([scale, scale, scale, 1]) @ affine)
    assert not is_skull_stripped(head)
    assert is_skull_stripped(moved_template(np.diag([scale, scale, scale, 1])))


def test_a_small_real_head_cut_at_the_boxs_floor_is_found(colin: tuple[Volume, Registration]) -> None:
    """Colin's head, made as small as the smallest of women's and cut: no larger than a brain, and found as one that is
    whole."""
    scan, usual = colin
    heights_mm = scan.affine[2, 2] * np.arange(scan.shape_XYZ[2]) + scan.affine[2, 3]
    kept = heights_mm > -55
    affine = scan.affine @ np.diag([2.0, 2, 2, 1])
    affine[2, 3] = heights_mm[kept][0]
    small = Volume(scan.data_XYZ[::2, ::2, kept][:, :, ::2], np.diag([0.85, 0.85, 0.85, 1]) @ affine)
    found = register_to_template(small)
    assert found.quality["correlation"] > usual.quality["correlation"] - 0.1
    assert found.head_scaling * 0.85**3 == pytest.approx(usual.head_scaling, rel=0.05)


def test_real_whole_head_is_known_as_one(colin: tuple[Volume, Registration], real_data: Path) -> None:
    head, found = colin
    brain = read_nifti(real_data / "oasis17" / "sub-1000" / "anat" / "sub-1000_T1w.nii.gz")
    assert not is_skull_stripped(head)
    assert is_skull_stripped(brain)
    # Colin lies in MNI space already.
    assert found.quality["correlation"] > 0.8
    assert found.quality["rotation_degrees"] < 3
    # Told so, it is found the same: the size of a whole head says nothing of its brain's.
    told = register_to_template(head, aligned=True)
    assert told.quality["correlation"] > 0.8
    np.testing.assert_allclose(told.mni_from_scan_affine[:3, :3], found.mni_from_scan_affine[:3, :3], atol=0.05)
