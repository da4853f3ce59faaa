"""Phantoms: the truth that goes with them is the truth, and everything follows from the seed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import sha256_of
from brainldm.base.nifti import read_nifti, write_nifti
from brainldm.base.tables import read_table
from brainldm.base.volume import GRIDS, Grid
from brainldm.cohort.anatomy import label_map_anatomy, label_maps_in, template_anatomy
from brainldm.cohort.appearance import Appearance, _interpolated, paint
from brainldm.cohort.bids import read_study
from brainldm.cohort.deformation import LATTICE, _doubled, points_of
from brainldm.cohort.flow import compose, exponential, fields_of, smooth_field
from brainldm.cohort.phantom import (
    Person,
    Phantom,
    Population,
    draw_person,
    make_phantom,
    write_phantom_study,
)

COARSE = GRIDS["4mm"]


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(draw_person(0, i), COARSE, 0, i) for i in range(3)]


# ----------------------------------------------------------------------------------------------------------- population


def test_people_follow_the_constants():
    population = Population()
    people = [draw_person(1, i) for i in range(4000)]
    male = np.array([p.sex == "M" for p in people], dtype=float)
    age = np.array([p.age_years for p in people])
    design = np.stack([np.ones_like(age), age / 10, male], axis=1)

    def fitted(values: list[float]) -> tuple[np.ndarray, float]:
        coefficients, *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
        return coefficients, float(np.std(values - design @ coefficients))

    ventricles, ventricles_sd = fitted([np.log(p.ventricles_mm3 / 1000) for p in people])
    assert ventricles == pytest.approx([2.03, 0.205, 0.357], abs=0.08)
    assert ventricles_sd == pytest.approx(0.47, rel=0.1)  # a little less: the tails are cut
    head, head_sd = fitted([p.head_mm3 / 1000 for p in people])
    assert head[2] == pytest.approx(population.head_male_more_ml, abs=15)
    assert head[1] == pytest.approx(0, abs=7)
    assert head_sd == pytest.approx(population.head_residual_ml, rel=0.1)
    assert np.mean([p.head_mm3 for p in people]) == pytest.approx(1_450_000, rel=0.01)
    brain, _ = fitted([p.brain_fraction for p in people])
    assert brain[1] == pytest.approx(population.brain_fraction_a_decade, abs=0.0015)
    assert male.mean() == pytest.approx(0.47, abs=0.03)
    assert 44 <= age.min() < 45 and 81 < age.max() <= 82


def test_a_person_does_not_depend_on_who_else_is_drawn():
    assert [draw_person(3, i) for i in (7, 2)] == [draw_person(3, i) for i in range(8)][7:1:-5]
    assert draw_person(3, 7) != draw_person(4, 7)


# ---------------------------------------------------------------------------------------------------------- one phantom


def test_stated_volumes_are_those_of_the_labels(phantoms):
    for phantom in phantoms:
        csf, grey, white, ventricles = phantom.labels_LXYZ.sum(axis=(1, 2, 3), dtype=np.float64) * 64.0
        assert phantom.ventricles_mm3 == pytest.approx(ventricles, rel=1e-6)
        assert phantom.head_mm3 == pytest.approx(csf + grey + white + ventricles, rel=1e-6)
        to_template = template_anatomy().head_mm3 / phantom.head_mm3
        assert phantom.brain_mm3 == pytest.approx((grey + white) * to_template, rel=1e-6)
        assert 1_144_000 < phantom.brain_mm3 < 1_794_000  # the paper's cohort


def test_labels_share_out_the_head_and_nothing_else_is_bright(phantoms):
    for phantom in phantoms:
        head = phantom.labels_LXYZ.sum(axis=0)
        assert phantom.labels_LXYZ.min() >= 0 and head.max() <= 1 + 1e-5
        assert (head > 0.999).mean() > 0.1
        assert phantom.image_XYZ.min() == 0 and phantom.image_XYZ.max() == 1
        assert (phantom.image_XYZ[head == 0] == 0).all() and (phantom.noise_free_XYZ[head == 0] == 0).all()
        means = [phantom.noise_free_XYZ[soft > 0.9].mean() for soft in phantom.labels_LXYZ]
        csf, grey, white, ventricles = means
        assert ventricles < csf + 0.1 < grey < white
        assert 0 < np.abs(phantom.image_XYZ - phantom.noise_free_XYZ).max() < 0.1
        hard = phantom.hard_labels_XYZ
        assert hard.dtype == np.uint8 and set(np.unique(hard)) == {0, 1, 2, 3, 4}
        assert (phantom.labels_LXYZ[3][hard == 4] >= 0.25).all()


@pytest.mark.parametrize(
    ("ventricles_ml", "brain_fraction", "head_ml"), [(10, 0.79, 1250), (40, 0.74, 1450), (95, 0.69, 1700)]
)
def test_asked_volumes_are_reached_by_a_smooth_map(ventricles_ml, brain_fraction, head_ml):
    person = Person("F", 70.0, 1000.0 * head_ml, 1000.0 * ventricles_ml, brain_fraction)
    phantom = make_phantom(person, COARSE, 5, 0)
    assert phantom.ventricles_mm3 == pytest.approx(person.ventricles_mm3, rel=0.03)
    assert phantom.head_mm3 == pytest.approx(person.head_mm3, rel=0.01)
    fraction = phantom.labels_LXYZ[1:3].sum() / phantom.labels_LXYZ.sum()
    assert fraction == pytest.approx(brain_fraction, abs=0.012)

    deformation = phantom.deformation
    affine = points_of(LATTICE, deformation.centre_mm, deformation.stretch).reshape(3, *LATTICE.shape_XYZ)
    came_from = affine + deformation.displacement_CXYZ
    jacobian = np.stack([np.stack(np.gradient(component, LATTICE.voxel_mm)) for component in came_from])
    determinant = np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))
    assert determinant[deformation.head_depth_XYZ > -2].min() > 0


def test_equal_arguments_give_equal_bytes_and_others_do_not(phantoms):
    again = make_phantom(draw_person(0, 2), COARSE, 0, 2)  # alone, after others
    for name in ("image_XYZ", "noise_free_XYZ", "labels_LXYZ"):
        assert getattr(again, name).tobytes() == getattr(phantoms[2], name).tobytes()
    other = make_phantom(draw_person(0, 2), COARSE, 0, 3)  # same person on paper, another shape and look
    assert np.corrcoef(other.image_XYZ.ravel(), again.image_XYZ.ravel())[0, 1] < 0.98


def test_brains_are_not_mirror_images_of_themselves(phantoms):
    anatomy = template_anatomy()
    mirrored = anatomy.ventricles_XYZ[::-1]
    assert 2 * np.minimum(mirrored, anatomy.ventricles_XYZ).sum() / (2 * mirrored.sum()) > 0.95
    for phantom in phantoms:
        # The box is nearly centred: mirror about x = 0, to the nearest voxel, and allow one voxel more either way.
        ventricles, overlap = phantom.labels_LXYZ[3], []
        for shift in (-1, 0, 1):
            mirrored = np.roll(ventricles[::-1], shift, axis=0)
            overlap.append(np.minimum(mirrored, ventricles).sum() / ventricles.sum())
        assert max(overlap) < 0.93


def test_a_person_is_the_same_on_every_grid(phantoms):
    finer = make_phantom(draw_person(0, 1), GRIDS["2mm"], 0, 1)
    assert finer.image_XYZ.shape == GRIDS["2mm"].shape_XYZ
    assert finer.ventricles_mm3 == pytest.approx(phantoms[1].ventricles_mm3, rel=0.03)
    assert finer.brain_mm3 == pytest.approx(phantoms[1].brain_mm3, rel=0.02)
    averaged = finer.labels_LXYZ.reshape(4, 40, 2, 56, 2, 40, 2).mean(axis=(2, 4, 6))
    assert np.abs(averaged - phantoms[1].labels_LXYZ).mean() < 0.01
    image = finer.noise_free_XYZ.reshape(40, 2, 56, 2, 40, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(image.ravel(), phantoms[1].noise_free_XYZ.ravel())[0, 1] > 0.99


def test_age_lowers_contrast_and_adds_lesions(phantoms):
    labels = phantoms[0].labels_LXYZ
    distance = np.full(COARSE.shape_XYZ, 5.0, np.float32)
    young, old = (paint(labels, distance, COARSE, age, 0, 0, Appearance(shading=0)) for age in (45, 80))

    def contrast(painted) -> float:  # grey over white; grey is what lesions leave alone
        grey, white = labels[1] > 0.9, labels[2] > 0.95
        return painted.noise_free_XYZ[grey].mean() / np.percentile(painted.noise_free_XYZ[white], 90)

    assert contrast(old) > contrast(young) + 0.02
    assert old.lesions_mm3 > 3 * young.lesions_mm3 > 0


# ----------------------------------------------------------------------------------------------------------------- maps


def test_flows_are_undone_by_their_reverse_and_add_up():
    grid = Grid("small", (24, 26, 28), 2.0, (0.0, 0.0, 0.0))
    draws = np.random.default_rng(0)
    velocity = 2 * np.stack([smooth_field(draws, grid.shape_XYZ, 6.0) for _ in range(3)])
    there, back = exponential(velocity, grid), exponential(-velocity, grid)
    middle = (slice(None), *(slice(6, -6),) * 3)
    assert np.abs(there[middle]).max() > 2
    assert np.abs(compose(there, back, grid)[middle]).max() < 0.2  # mm; linear interpolation's
    half = exponential(velocity / 2, grid)
    np.testing.assert_allclose(compose(half, half, grid)[middle], there[middle], atol=0.1)


def test_ladder_rungs_are_one_flow():
    ladder = fields_of(template_anatomy()).ventricular
    zero, one, two = (round((gain - ladder.first_gain) / ladder.rung) for gain in (0.0, ladder.rung, 2 * ladder.rung))
    assert np.abs(ladder.steps_CKXYZ[:, zero]).max() == 0
    step = ladder.steps_CKXYZ[:, one]
    np.testing.assert_allclose(compose(step, step, ladder.grid), ladder.steps_CKXYZ[:, two], atol=1e-4)


def test_interpolation_is_exact_for_straight_lines():
    x, y, z = (np.arange(n, dtype=np.float32) for n in (7, 8, 9))
    line = 2 * x[:, None, None] - y[:, None] + 0.5 * z
    doubled = _doubled(line)
    fine = [(np.arange(2 * n) - 0.5) / 2 for n in (7, 8, 9)]
    expected = 2 * fine[0][:, None, None] - fine[1][:, None] + 0.5 * fine[2]
    np.testing.assert_allclose(doubled[1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], atol=1e-5)
    coarse_x, fine_x = (g.origin_mm[0] + g.voxel_mm * np.arange(g.shape_XYZ[0]) for g in (COARSE, GRIDS["2mm"]))
    on_coarse = np.broadcast_to(coarse_x[:, None, None], COARSE.shape_XYZ).astype(np.float32)
    on_fine = _interpolated(on_coarse, GRIDS["2mm"])
    np.testing.assert_allclose(on_fine[1:-1, 3, 4], fine_x[1:-1], atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- studies


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "study"
    write_phantom_study(out, n=3, grid=COARSE, seed=0)
    return out


def _hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_study_tells_the_truth_about_its_images(study, phantoms):
    table = read_table(study / "participants.tsv")
    assert table.columns == ("participant_id", "age", "sex", "ventricles_mm3", "brain_mm3", "head_mm3")
    assert [row["participant_id"] for row in table.rows] == ["sub-0001", "sub-0002", "sub-0003"]
    for i, (row, phantom) in enumerate(zip(table.rows, phantoms)):
        assert table.number(i, "ventricles_mm3") == pytest.approx(phantom.ventricles_mm3, abs=0.06)
        assert table.number(i, "brain_mm3") == pytest.approx(phantom.brain_mm3, abs=0.06)
        assert (row["sex"], table.number(i, "age")) == (phantom.person.sex, phantom.person.age_years)
        stem = f"{row['participant_id']}/anat/{row['participant_id']}_space-MNI152rigid_desc-phantom"
        image, labels = read_nifti(study / f"{stem}_T1w.nii.gz"), read_nifti(study / f"{stem}_dseg.nii.gz")
        np.testing.assert_allclose(image.affine, COARSE.affine, atol=1e-5)
        np.testing.assert_allclose(image.data_XYZ, phantom.image_XYZ, atol=2e-5)
        assert (labels.data_XYZ == phantom.hard_labels_XYZ).all()


def test_prepare_can_read_it(study):
    read = read_study(study)
    assert [scan.participant_id for scan in read.scans] == ["sub-0001", "sub-0002", "sub-0003"]
    assert read.failures == []
    assert {scan.space for scan in read.scans} == {"MNI152rigid"}


def test_validator_finds_no_error(study):
    validator = Path(sys.executable).with_name("bids-validator-deno")
    if not validator.exists():
        pytest.skip("bids-validator-deno is not installed beside this Python")
    answer = subprocess.run(
        [validator, "--max-rows", "-1", "--format", "json", study], capture_output=True, text=True, timeout=120
    )
    issues = json.loads(answer.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue.get("severity") == "error"] == []
    assert answer.returncode == 0


def test_a_larger_or_damaged_study_is_completed_without_changing_the_rest(study, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(study, whole)
    before = _hashes(whole)
    first, second = (f"sub-000{i}/anat/sub-000{i}_space-MNI152rigid_desc-phantom" for i in (1, 2))
    (whole / f"{first}_T1w.nii.gz").unlink()
    damaged = whole / f"{second}_dseg.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"123456789")
    with (whole / "manifest.jsonl").open("a") as handle:
        handle.write('{"index": 3, "file": "sub-0')  # killed while it wrote
    write_phantom_study(whole, n=4, grid=COARSE, seed=0)
    after = _hashes(whole)
    grown = {"participants.tsv", "manifest.jsonl"}
    assert {name: h for name, h in after.items() if name in before and name not in grown} == {
        name: h for name, h in before.items() if name not in grown
    }
    assert len(read_table(whole / "participants.tsv")) == 4
    # Asking for fewer keeps whom there is; nothing is made again.
    times = {p: p.stat().st_mtime_ns for p in whole.rglob("*_T1w.nii.gz")}
    write_phantom_study(whole, n=2, grid=COARSE, seed=0)
    assert _hashes(whole) == after
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*_T1w.nii.gz")} == times


def test_what_a_folder_holds_is_never_mixed_with_other_phantoms(study, tmp_path):
    before = _hashes(study)
    with pytest.raises(UsageError, match="seed 0 there, 1 asked"):
        write_phantom_study(study, n=3, grid=COARSE, seed=1)
    with pytest.raises(UsageError, match="grid 4mm there, 2mm asked"):
        write_phantom_study(study, n=3, grid=GRIDS["2mm"], seed=0)
    (tmp_path / "mine.txt").write_text("not a phantom")
    with pytest.raises(UsageError, match=r"holds mine\.txt"):
        write_phantom_study(tmp_path, n=1, grid=COARSE, seed=0)
    with pytest.raises(UsageError, match="0 people"):
        write_phantom_study(tmp_path / "none", n=0, grid=COARSE, seed=0)
    assert _hashes(study) == before


@pytest.mark.slow
def test_workers_change_nothing(study, tmp_path):
    write_phantom_study(tmp_path / "two", n=3, grid=COARSE, seed=0, workers=2)
    assert _hashes(tmp_path / "two") == _hashes(study)


# ------------------------------------------------------------------------------------------------------ other anatomies


def test_label_maps_bring_their_own_folding(real_data, tmp_path):
    maps = label_maps_in(real_data / "labels12")
    assert len(maps) == 12
    anatomy = label_map_anatomy(maps[2])
    assert anatomy.head_mm3 == pytest.approx(template_anatomy().head_mm3, rel=0.15)
    person = draw_person(0, 3)
    phantom = make_phantom(person, COARSE, 0, 3, anatomy)
    assert phantom.ventricles_mm3 == pytest.approx(person.ventricles_mm3, rel=0.05)
    assert phantom.head_mm3 == pytest.approx(person.head_mm3, rel=0.02)
    # The eyes' side is in front and the crown above: the map was turned the right way.
    hard = phantom.hard_labels_XYZ
    where = np.argwhere(hard == 4).mean(axis=0) * COARSE.voxel_mm + COARSE.origin_mm
    assert np.abs(where - (0, -15, 15)).max() < 12


def test_wrong_label_maps_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        label_maps_in(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="no label maps"):
        label_maps_in(tmp_path)
    numbers = np.zeros((9, 10, 11), np.uint8)
    numbers[2:7, 2:7, 2:7] = 3
    write_nifti(tmp_path / "few.nii.gz", numbers, np.diag([4.0, 4, 4, 1]), dtype="uint8")
    with pytest.raises(BadInput, match="FreeSurfer's numbers") as caught:
        label_map_anatomy(tmp_path / "few.nii.gz")
    assert caught.value.exit_code == 3
