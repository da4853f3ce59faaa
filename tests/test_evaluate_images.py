"""Folders of images by anybody: what is found in them, and on which grid it is compared."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from brainldm.base.errors import BadInput
from brainldm.base.files import write_json, write_text
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import read_nifti, write_nifti
from brainldm.base.tables import write_table
from brainldm.base.volume import GRIDS, Grid, Volume
from brainldm.cohort.normalise import to_unit
from brainldm.evaluate.grids import JudgingGrid, grid_of_file, judging_grid, on_grid
from brainldm.evaluate.images import open_images
from judged_folders import TINY, blob, write_cohort, write_synthetic


def test_a_synthetic_dataset_is_what_plan_and_manifest_say(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path, [2e4, 3e4, 4e4], extrapolated=[None, "ventricles_mm3", "age_years,brain_mm3"])
    text = (folder / "manifest.jsonl").read_text().splitlines()
    (folder / "manifest.jsonl").write_text("\n".join([*text[:2], text[2][:20]]))  # the last line was torn
    found = open_images(folder, "synthetic")
    assert found.kind == "synthetic" and found.planned == 3
    assert [image.participant_id for image in found.images] == ["sub-000000", "sub-000001"]
    assert found.images[0].extrapolated == () and found.images[1].extrapolated == ("ventricles_mm3",)
    assert found.images[1].covariates == {"age_years": 61, "ventricles_mm3": 3e4, "brain_mm3": 1.1e6}
    assert [image.sex for image in found.images] == ["F", "M"]
    assert "1 of 3 planned" in found.warnings[0]
    assert found.provenance["generation.json"]["steps"] == 50


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path, [2e4, 3e4])
    Manifest(folder / "manifest.jsonl").append(index=1, file="../../secret.nii.gz", bytes=1, sha256="0")
    found = open_images(folder, "synthetic")
    assert len(found.images) == 1
    assert found.failures[0].reason == "bad_manifest" and "outside" in found.failures[0].message


def test_a_prepared_cohort_has_splits(tmp_path: Path) -> None:
    found = open_images(write_cohort(tmp_path, [1e4, 2e4, 3e4], splits=["train", "validation", "test"]), "real")
    assert found.kind == "prepared"
    assert [image.participant_id for image in found.training] == ["sub-00"]
    assert [image.participant_id for image in found.held_out] == ["sub-01", "sub-02"]
    assert found.images[2].covariates["ventricles_mm3"] == 3e4


def test_any_folder_is_matched_to_its_table_by_rule(tmp_path: Path) -> None:
    affine = TINY.affine
    for name in (
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-2/ses-a/anat/sub-2_ses-a_T1w.nii.gz",
        "sub-2/ses-b/anat/sub-2_ses-b_T1w.nii.gz",
        "sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        "sub-1/anat/sub-1_T2w.nii.gz",
        "sub-1/anat/.part-9-sub-1_T1w.nii.gz",
    ):
        write_nifti(tmp_path / name, blob(2e4, 1), affine)
    write_text(
        tmp_path / "participants.tsv",
        "participant_id\tsex\tage\tventricular_volume\n1\tfemale\t61,5\t20000\nsub-2\tM\tn/a\t30000\n",
    )
    found = open_images(tmp_path, "synthetic")
    assert [image.participant_id for image in found.images] == [
        "sub-1",
        "sub-2/ses-a/anat/sub-2_ses-a_T1w",
        "sub-2/ses-b/anat/sub-2_ses-b_T1w",
    ]
    assert found.images[0].sex == "F" and found.images[0].covariates == {"ventricles_mm3": 20000}
    assert found.images[1].sex == "M" and found.images[2].covariates == {"ventricles_mm3": 30000}
    assert any("61,5" in warning and "line 2" in warning for warning in found.warnings)
    assert any("not named _T1w" in warning for warning in found.warnings)


def test_of_several_rows_that_differ_none_is_taken(tmp_path: Path) -> None:
    for name in ("sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz"):
        write_nifti(tmp_path / name, blob(2e4, 1), TINY.affine)
    rows = "sub-1\tF\t61\nsub-2\tM\t70\n1\tF\t64\nsub-2\tM\t70\n"  # sub-1 came twice, sub-2 is only said twice
    write_text(tmp_path / "participants.tsv", "participant_id\tsex\tage\n" + rows)
    found = open_images(tmp_path, "synthetic")
    assert found.images[0].covariates == {} and found.images[0].sex is None
    assert found.images[1].covariates == {"age_years": 70} and found.images[1].sex == "M"
    assert any("several rows that differ" in warning for warning in found.warnings)


def test_a_flat_folder_without_a_table_is_judged_by_names(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a name with spaces.nii", "c.NII.GZ"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "directory.nii.gz").mkdir()
    assert [image.file for image in open_images(tmp_path, "real").images] == [
        "a name with spaces.nii",
        "b.nii.gz",
        "c.NII.GZ",
        "directory.nii.gz",
    ]


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.nii.gz")
    try:
        odd.write_bytes(b"")
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    image = open_images(tmp_path, "real").images[0]
    assert image.path == odd and image.path.exists()
    assert (image.participant_id, image.file) == ("caf\\udce9", "caf\\udce9.nii.gz")
    write_table(tmp_path / "names.tsv", ("file",), [{"file": image.file}])


def test_what_cannot_be_judged_says_what_it_may_be(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        open_images(tmp_path / "nowhere", "real")
    with pytest.raises(BadInput, match=r"holds no image .* folder of .nii.gz"):
        open_images(tmp_path, "real")
    write_json(tmp_path / "model.json", {})
    with pytest.raises(BadInput, match="model folder"):
        open_images(tmp_path, "real")
    write_text(tmp_path / "plan.tsv", "index\tparticipant_id\nzero\tsub-0\n")
    write_text(tmp_path / "manifest.jsonl", "")
    with pytest.raises(BadInput, match="line 2, column 'index'"):
        open_images(tmp_path, "synthetic")


# ------------------------------------------------------------------------------------------------------------- grids


def test_an_image_on_the_grid_is_taken_as_it_is() -> None:
    grid = JudgingGrid.of(TINY.shape_XYZ, TINY.affine)
    image = Volume(blob(2e4, 1), TINY.affine)
    assert on_grid(image, grid) is image.data_XYZ


def test_the_same_box_in_larger_voxels_is_the_mean_of_the_small_ones() -> None:
    fine, coarse = GRIDS["4mm"], TINY
    image = stream_image(fine.shape_XYZ)
    grid = JudgingGrid.of(fine.shape_XYZ, fine.affine)
    found = on_grid(Volume(image, fine.affine), JudgingGrid.of(coarse.shape_XYZ, Grid8().affine))
    assert found.shape == coarse.shape_XYZ
    assert found[3, 4, 5] == pytest.approx(image[6:8, 8:10, 10:12].mean(), rel=1e-5)
    assert found.mean() == pytest.approx(image.mean(), rel=1e-5)
    assert grid.coarse() == grid
    two = GRIDS["2mm"]
    assert JudgingGrid.of(two.shape_XYZ, two.affine).coarse() == grid


def Grid8() -> Grid:
    ox, oy, oz = (o + 2.0 for o in GRIDS["4mm"].origin_mm)
    return Grid("8mm of the box", (20, 28, 20), 8.0, (ox, oy, oz))


def stream_image(shape: tuple[int, int, int]) -> np.ndarray:
    ramps = [np.linspace(0, 1, n, dtype=np.float32) for n in shape]
    return (ramps[0][:, None, None] + ramps[1][None, :, None] * ramps[2][None, None, :]) / 2


def test_another_grid_is_reached_through_millimetres() -> None:
    """A ramp over millimetres stays the same ramp, whatever the voxels."""
    other = Grid("odd", (67, 93, 66), 2.5, (-80.0, -127.0, -62.0))
    x, y, z = (
        other.origin_mm[a]
        + other.voxel_mm * np.arange(other.shape_XYZ[a]).reshape([-1 if b == a else 1 for b in range(3)])
        for a in range(3)
    )
    ramp = (x + 2 * y - z).astype(np.float32)
    found = on_grid(Volume(ramp, other.affine), JudgingGrid.of(TINY.shape_XYZ, TINY.affine))
    i, j, k = 10, 14, 10
    mm = TINY.affine @ [i, j, k, 1]
    assert found[i, j, k] == pytest.approx(mm[0] + 2 * mm[1] - mm[2], abs=0.5)


def test_an_image_that_lies_elsewhere_is_refused() -> None:
    moved = TINY.affine.copy()
    moved[0, 3] += 90
    with pytest.raises(BadInput, match=r"lies elsewhere .* 44%") as caught:
        on_grid(Volume(blob(2e4, 1), moved), JudgingGrid.of(TINY.shape_XYZ, TINY.affine))
    assert caught.value.reason == "grid"


def test_the_coarser_of_the_commonest_grids_judges(tmp_path: Path) -> None:
    fine = GRIDS["4mm"]
    paths = {"fine": [], "tiny": []}
    for i in range(3):
        for name, grid in (("fine", fine), ("tiny", TINY)):
            path = tmp_path / f"{name}{i}.nii.gz"
            write_nifti(path, blob(2e4, i, grid), grid.affine)
            paths[name].append(path)
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"<html>")
    assert grid_of_file(broken) is None
    mixed = [broken, *paths["fine"], paths["tiny"][0]]
    assert judging_grid([mixed, paths["fine"]]) == JudgingGrid.of(fine.shape_XYZ, fine.affine)
    assert judging_grid([mixed, paths["tiny"]]) == JudgingGrid.of(TINY.shape_XYZ, TINY.affine)
    assert judging_grid([[broken]]) is None


def test_storage_order_does_not_change_the_grid(tmp_path: Path) -> None:
    flipped = TINY.affine.copy()
    flipped[0, 0] *= -1
    flipped[0, 3] = TINY.affine[0, 3] + 8 * (TINY.shape_XYZ[0] - 1)
    image = blob(2e4, 1)
    write_nifti(tmp_path / "las.nii.gz", image[::-1], flipped)
    assert grid_of_file(tmp_path / "las.nii.gz") == JudgingGrid.of(TINY.shape_XYZ, TINY.affine)
    (tmp_path / "plain.nii.gz").write_bytes(gzip.decompress((tmp_path / "las.nii.gz").read_bytes()))
    assert grid_of_file(tmp_path / "plain.nii.gz") == JudgingGrid.of(TINY.shape_XYZ, TINY.affine)
    grid = JudgingGrid.of(TINY.shape_XYZ, TINY.affine)
    assert np.allclose(on_grid(read_nifti(tmp_path / "las.nii.gz"), grid), image)


def test_intensities_in_0_to_1_are_left_alone_and_others_scaled() -> None:
    image = blob(2e4, 1)
    same, scaled = to_unit(image * 0.7 + 0.02)
    assert not scaled and np.allclose(same, image * 0.7 + 0.02)
    overshoot, scaled = to_unit(image * 1.2 - 0.05)
    assert not scaled and overshoot.min() == 0 and overshoot.max() <= 1
    counts, scaled = to_unit(image * 3000 - 1000)
    assert scaled and counts.min() == 0 and counts.max() == 1
