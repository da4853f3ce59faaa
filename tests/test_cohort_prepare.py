"""From a study to a cohort: everybody usable is in it, everybody else is listed, and no interruption leaves a trace.

Registration and measuring have tests of their own; here they are replaced by what they would say of a scan that is in
place already, but for the last tests, which prepare real scans.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import scipy.ndimage as ndi

from brainldm import cli
from brainldm.base.errors import BadInput, EnvironmentProblem, PartialFailure, UsageError
from brainldm.base.files import locked_folder, read_json, write_json, write_text
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import read_nifti, write_nifti
from brainldm.base.progress import Quiet
from brainldm.base.tables import read_table
from brainldm.base.volume import GRIDS
from brainldm.cohort import prepare_scan as one_scan
from brainldm.cohort import unires
from brainldm.cohort.cohort_tables import FLAGS
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset, warn_of_flagged
from brainldm.cohort.overlay import write_overlay
from brainldm.cohort.prepare import PrepareConfig, prepare_study
from brainldm.cohort.register import Registration
from brainldm.cohort.split import split_of

GRID = GRIDS["4mm"]
CONFIG = PrepareConfig(grid="4mm")


def brain(seed: int) -> np.ndarray:
    """A stripped, lopsided ball of noise on the 4 mm grid."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID.shape_XYZ), indexing="ij")
    inside = (x + 0.1) ** 2 + y**2 + z**2 < 0.6
    values = np.random.default_rng(seed).uniform(0.2, 0.75, GRID.shape_XYZ)
    return np.where(inside, values * (1 + 0.3 * x), 0)


def write_study(folder: Path, people: int = 6, space: str = "", first: int = 0, seed: int = 0) -> Path:
    """A BIDS study of such brains, with a table that has a column of its own and one named like ours."""
    rows = ["participant_id\tage\tsex\tgroup\tventricles_mm3\tbrain_mm3"]
    for index in range(people):
        name = f"sub-{index:02d}"
        rows.append(f"{name}\t{30 + index}\t{'FM'[index % 2]}\tg{index % 3}\t{20000 + index}\t{1300000 + index}")
        if index >= first:
            entity = f"_space-{space}" if space else ""
            path = folder / name / "anat" / f"{name}{entity}_T1w.nii.gz"
            write_nifti(path, brain(seed + index), GRID.affine, dtype="int16_unit")
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    write_json(folder / "dataset_description.json", {"Name": "Balls", "BIDSVersion": "1.10.0", "License": "CC0"})
    write_json(folder / "participants.json", {"group": {"Description": "Which group"}})
    return folder


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces registration and measuring by what is true of `brain`; returns the scans that were registered."""
    registered: list[str] = []

    def register(scan, brain_mask=None, *, aligned=False):  # type: ignore[no-untyped-def]
        registered.append("aligned" if aligned else "rigid")
        return Registration(np.eye(4), np.eye(4), {"correlation": 0.9, "cut_brain_fraction": 0.0}, "in place")

    @dataclass
    class Measure:
        name: str = "fake"

        def __call__(self, image, registration=None):  # type: ignore[no-untyped-def]
            volume = min(float((image.data_XYZ > 0).sum()) * image.voxel_mm3, 2e6)  # what a brain can have
            return SimpleNamespace(
                ventricles_mm3=volume / 50,
                brain_mm3=1.25 * volume,
                brain_native_mm3=volume,
                head_scaling=1.25,
                quality={},
            )

    monkeypatch.setattr(one_scan, "register_to_template", register)
    monkeypatch.setattr(one_scan, "TemplateMeasure", Measure)
    monkeypatch.setattr(one_scan, "write_overlay", lambda path, image, *, title: write_text(path, title))
    return registered


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table(folder: Path, name: str = "participants.tsv") -> dict[str, dict[str, str]]:
    return {row["participant_id"]: row for row in read_table(folder / name).rows}


# ------------------------------------------------------------------------------------------------------ the usual way


def test_a_study_becomes_a_cohort(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls"), tmp_path / "out"
    summary = prepare_study(study, out, CONFIG)
    assert (summary.people, summary.failures, summary.newly_prepared) == (6, (), 6)
    assert sum(summary.splits.values()) == 6 and "6 people are prepared" in str(summary)
    assert not (out / "failures.tsv").exists()

    people = read_table(out / "participants.tsv")
    assert people.columns == (
        "participant_id", "age_years", "sex", "ventricles_mm3", "brain_mm3", "split",
        "group", "study_ventricles_mm3", "study_brain_mm3",
    )  # fmt: skip
    row = table(out)["sub-03"]
    assert (row["age_years"], row["sex"], row["group"], row["study_ventricles_mm3"]) == ("33", "M", "g0", "20003")
    native = read_nifti(next(study.glob("sub-03/anat/*.nii.gz")))
    volume = float((native.data_XYZ > 0).sum()) * native.voxel_mm3
    assert float(row["brain_mm3"]) == pytest.approx(1.25 * volume)
    assert read_json(out / "participants.json")["group"] == {"Description": "Which group"}
    assert read_json(out / "participants.json")["ventricles_mm3"]["Units"] == "mm^3"

    cohort = PreparedCohort.open(out)
    assert (cohort.name, cohort.licence, cohort.grid) == ("balls", "CC0", GRID)
    assert cohort.preprocessing["skull_stripped"] is True
    dataset = VolumeDataset(cohort)
    for index in range(6):
        image, told = dataset.image_XYZ(index), brain(index)
        assert image.min() == 0 and image.max() == 1
        np.testing.assert_allclose(image, told / told.max(), atol=2e-4)
    header = nibabel.load(dataset.rows[0].path).header
    assert int(header["sform_code"]) == int(header["qform_code"]) == 2
    quality = table(out, "quality.tsv")
    assert float(quality["sub-00"]["correlation"]) == 0.9 and quality["sub-00"]["flags"] == "n/a"
    transforms = read_json(next(out.glob("sub-00/anat/*_xfm.json")))
    assert transforms["mni_from_scan"] == np.eye(4).tolist() and transforms["head_scaling"] == 1
    assert len(list(out.glob("sub-*/figures/*_overlay.png"))) == 6


def test_nothing_in_the_cohort_says_where_things_lay(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "secretplace" / "balls"), tmp_path / "out"
    (study / "sub-02/anat/sub-02_T1w.nii.gz").write_bytes(b"")
    with pytest.raises(PartialFailure):
        prepare_study(study, out, CONFIG)
    for name, content in contents(out).items():
        assert b"secretplace" not in content, name


def test_the_cohort_is_valid_bids(tmp_path: Path, in_place: list[str]) -> None:
    validator = Path(sys.executable).with_name("bids-validator-deno")
    if not validator.exists():
        pytest.skip("bids-validator-deno is not installed (extra `bids`)")
    study, out = write_study(tmp_path / "balls"), tmp_path / "out"
    # One head with its skull, so that images differ in what they must say of themselves.
    head = np.random.default_rng(0).uniform(0.1, 1, GRID.shape_XYZ)
    write_nifti(study / "sub-02/anat/sub-02_T1w.nii.gz", head, GRID.affine, dtype="int16_unit")
    (study / "sub-03/anat/sub-03_T1w.nii.gz").write_bytes(b"")
    with pytest.raises(PartialFailure):
        prepare_study(study, out, CONFIG)
    prepare_study(study, out, CONFIG, leave_out=["sub-03", "sub-04"])
    done = subprocess.run([validator, out, "--max-rows", "-1", "--format", "json"], capture_output=True, check=False)
    import json

    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [i for i in issues if i["severity"] == "error"] == []
    assert read_json(out / "space-MNI152rigid_T1w.json")["SkullStripped"] is False
    assert read_json(next(out.glob("sub-01/anat/*_T1w.json"))) == {"SkullStripped": True}
    assert not list(out.glob("sub-02/anat/*_T1w.json"))


def test_scans_in_mni_space_are_only_resliced(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 3, space="MNI152NLin2009cAsym")
    prepare_study(study, tmp_path / "out", CONFIG)
    assert in_place == ["aligned"] * 3
    prepare_study(study, tmp_path / "rigid", PrepareConfig(grid="4mm", register="rigid"))
    assert in_place[3:] == ["rigid"] * 3
    own_space = write_study(tmp_path / "own", 3)
    prepare_study(own_space, tmp_path / "none", PrepareConfig(grid="4mm", register="none"))
    assert in_place[6:] == ["aligned"] * 3
    prepare_study(own_space, tmp_path / "table", PrepareConfig(grid="4mm", register="none", volumes="table"))
    assert in_place[9:] == ["aligned"] * 3, "how they go with the template is wanted where nothing is measured, too"
    image = VolumeDataset(PreparedCohort.open(tmp_path / "table")).image_XYZ(1)
    np.testing.assert_allclose(image, brain(1) / brain(1).max(), atol=2e-4)


@pytest.mark.parametrize(("register", "space"), [("none", ""), ("auto", "MNI152rigid")])
def test_a_scan_that_does_not_lie_in_its_place_is_flagged_where_nothing_is_measured(
    register: str, space: str, tmp_path: Path, in_place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = Registration(np.eye(4), np.eye(4), {"correlation": 0.2, "cut_brain_fraction": 0.1}, "none")
    monkeypatch.setattr(one_scan, "register_to_template", lambda *_, **__: poor)
    config = PrepareConfig(grid="4mm", register=register, volumes="table")
    assert prepare_study(write_study(tmp_path / "balls", 1, space=space), tmp_path / "out", config).flagged == 1
    assert table(tmp_path / "out", "quality.tsv")["sub-00"]["flags"] == "poor_registration, brain_outside_box"


def test_heads_of_a_template_s_size_are_flagged_and_not_called_rigid(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 4)
    prepare_study(study, tmp_path / "own", CONFIG)
    assert PreparedCohort.open(tmp_path / "own").preprocessing["space"] == "rigidly aligned to MNI152"
    for index, space in ((0, "MNI152rigid"), (1, "MNI152NLin2009cAsym")):
        path = study / f"sub-{index:02d}/anat/sub-{index:02d}_T1w.nii.gz"
        path.rename(path.with_name(f"sub-{index:02d}_space-{space}_T1w.nii.gz"))
    assert prepare_study(study, tmp_path / "some", CONFIG).flagged == 1
    quality = table(tmp_path / "some", "quality.tsv")
    assert [row["flags"] for row in quality.values()] == ["n/a", "not_own_size", "n/a", "n/a"]
    assert "space-MNI152NLin2009cAsym" in quality["sub-01"]["notes"]
    told = PreparedCohort.open(tmp_path / "some").preprocessing["space"]
    assert told.startswith("rigidly aligned to MNI152; 1 of 4 warped")
    assert told in (tmp_path / "some/README.md").read_text()
    warped = write_study(tmp_path / "warped", 2, space="MNI152NLin2009cAsym")
    prepare_study(warped, tmp_path / "all", CONFIG)
    told = PreparedCohort.open(tmp_path / "all").preprocessing["space"]
    assert told == "warped to the size of a template (space-MNI152NLin2009cAsym)"


def test_every_flag_is_explained_beside_the_table_and_in_the_docs(tmp_path: Path, in_place: list[str]) -> None:
    worst = {"correlation": 0.0, "cut_brain_fraction": 1.0, "unseen_brain_fraction": 1.0, "poor": 1.0}
    worst |= {"ventricle_room_filled": 1.0}
    assert {*one_scan._flags(worst), "not_own_size", "duplicate"} == set(FLAGS)
    prepare_study(write_study(tmp_path / "balls", 1), tmp_path / "out", CONFIG)
    assert set(read_json(tmp_path / "out/quality.json")["flags"]["Levels"]) == set(FLAGS)
    docs = (Path(__file__).parents[1] / "docs/preparing.md").read_text()
    assert all(f"| `{flag}` |" in docs for flag in FLAGS)


def test_a_prepared_cohort_can_be_prepared_again_on_another_grid(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 3, space="MNI152NLin2009cAsym")
    prepare_study(study, tmp_path / "a", CONFIG)
    prepare_study(tmp_path / "a", tmp_path / "b", CONFIG)
    for one, other in zip(PreparedCohort.open(tmp_path / "a").rows(), PreparedCohort.open(tmp_path / "b").rows()):
        assert one.sha256 == other.sha256 and one.covariates == other.covariates


# ------------------------------------------------------------------------------------------------------------ failures


def nifti(data: np.ndarray, **codes: int) -> bytes:
    image = nibabel.Nifti1Image(data, GRID.affine)
    image.set_sform(GRID.affine, codes.get("sform", 1))
    image.set_qform(GRID.affine if codes.get("sform", 1) else None, codes.get("sform", 1))
    return image.to_bytes()


def test_bad_scans_cost_only_themselves(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 11), tmp_path / "out"
    good = next(study.glob("sub-10/anat/*.nii.gz")).read_bytes()
    data = brain(0).astype("float32")
    damaged = {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "not_nifti": b"<html>404</html>" * 40,
        "shape": nifti(np.stack([data, data], axis=-1)),
        "constant": nifti(np.ones_like(data)),
        "nan": nifti(np.where(data > 0.7, np.nan, data)),
        "orientation": nifti(data, sform=0),
        "affine": nifti(data)[:280] + b"\0" * 48 + nifti(data)[328:],
    }
    for index, content in enumerate(damaged.values()):
        next(study.glob(f"sub-{index:02d}/anat/*.nii.gz")).write_bytes(content)
    with pytest.raises(PartialFailure) as caught:
        prepare_study(study, out, CONFIG)
    assert caught.value.exit_code == 4 and "failures.tsv" in str(caught.value)
    failures = table(out, "failures.tsv")
    assert [failures[f"sub-{i:02d}"]["reason"] for i in range(len(damaged))] == list(damaged)
    assert all(f["message"] != "n/a" and f["file"].startswith("sub-") for f in failures.values())
    assert sorted(table(out)) == ["sub-08", "sub-09", "sub-10"]
    assert not any((out / f"sub-{i:02d}").exists() for i in range(len(damaged)))
    assert len(PreparedCohort.open(out).rows()) == 3

    # Mended scans are prepared by the same command; the others are not touched.
    write_study(study, 8)
    shutil.copytree(write_study(tmp_path / "whole", 11), study, dirs_exist_ok=True)
    summary = prepare_study(study, out, CONFIG)
    assert (summary.people, summary.newly_prepared) == (11, 8)
    assert not (out / "failures.tsv").exists()


def test_people_without_age_or_scan_are_listed(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 5, first=1), tmp_path / "out"
    content = (study / "participants.tsv").read_text().replace("\t32\t", "\tn/a\t")
    (study / "participants.tsv").write_text(content)
    with pytest.raises(PartialFailure):
        prepare_study(study, out, CONFIG)
    reasons = {i: row["reason"] for i, row in table(out, "failures.tsv").items()}
    assert reasons == {"sub-00": "no_scan", "sub-02": "missing_age"}
    assert len(in_place) == 3, "a scan of nobody known is not worth the time"


def test_a_study_with_no_usable_scan_is_bad_input(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 1), tmp_path / "out"
    path = study / "sub-00/anat/sub-00_T1w.nii.gz"
    path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"nobody could be prepared.*0 bytes") as caught:
        prepare_study(study, out, CONFIG)
    assert (caught.value.exit_code, caught.value.reason, caught.value.path) == (3, "empty", path)
    with pytest.raises(BadInput):
        PreparedCohort.open(out)
    write_study(study, 1)
    assert prepare_study(study, out, CONFIG).people == 1


def test_a_fault_of_our_own_costs_its_scan_and_is_told(
    tmp_path: Path, in_place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = write_study(tmp_path / "balls", 3), tmp_path / "out"

    def stumble(path: Path, image, *, title: str) -> None:  # type: ignore[no-untyped-def]
        if title == "sub-01":
            raise ZeroDivisionError("what nobody thought of")

    monkeypatch.setattr(one_scan, "write_overlay", stumble)
    with pytest.raises(PartialFailure):
        prepare_study(study, out, CONFIG)
    (failure,) = table(out, "failures.tsv").values()
    assert failure["reason"] == "unforeseen" and "what nobody thought of" in failure["message"]
    assert not (out / "sub-01").exists(), "its image was written already, and must not stay as an orphan"


def test_a_full_disk_stops_and_the_same_command_goes_on(
    tmp_path: Path, in_place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = write_study(tmp_path / "balls", 4), tmp_path / "out"
    real = one_scan.write_nifti

    def full(*arguments, **options):  # type: ignore[no-untyped-def]
        if len(in_place) == 3:
            raise EnvironmentProblem("the disk is full", reason="disk_full")
        return real(*arguments, **options)

    monkeypatch.setattr(one_scan, "write_nifti", full)
    with pytest.raises(EnvironmentProblem) as caught:
        prepare_study(study, out, CONFIG)
    assert caught.value.exit_code == 5
    with pytest.raises(BadInput, match="interrupted"):
        PreparedCohort.open(out)
    monkeypatch.setattr(one_scan, "write_nifti", real)
    assert prepare_study(study, out, CONFIG).newly_prepared == 2


@pytest.mark.parametrize("label", ["with space", "e\u0301", "日本", "=cmd", "a" * 180, "<b>", "$x^{$"])
def test_ids_of_any_kind(label: str, tmp_path: Path, in_place: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 25; the odder ones with the real pictures, whose titles they are."""
    if not label.isascii() or "$" in label:
        monkeypatch.setattr(one_scan, "write_overlay", write_overlay)
    study = write_study(tmp_path / "balls", 2)
    (study / "sub-00/anat/sub-00_T1w.nii.gz").rename(study / f"sub-00/anat/sub-{label}_T1w.nii.gz")
    (study / "sub-00").rename(study / f"sub-{label}")
    (study / "participants.tsv").write_text((study / "participants.tsv").read_text().replace("sub-00", f"sub-{label}"))
    assert prepare_study(study, tmp_path / "out", CONFIG).people == 2
    dataset = VolumeDataset(PreparedCohort.open(tmp_path / "out"))
    assert all(dataset.image_XYZ(i).max() == 1 for i in range(2))


def test_nothing_said_of_a_hostile_study_is_a_formula(tmp_path: Path, in_place: list[str]) -> None:
    """Fault 66: its own cells stay as they are."""
    study = write_study(tmp_path / "balls", 4)
    for index, session in ((0, ""), (1, "ses-1")):
        old = study / f"sub-{index:02d}" / "anat" / f"sub-{index:02d}_T1w.nii.gz"
        folder = study / f"sub-=cmd{index}" / session / "anat"
        folder.mkdir(parents=True)
        old.rename(folder / "_".join(filter(None, (f"sub-=cmd{index}", session, "T1w.nii.gz"))))
        shutil.rmtree(study / f"sub-{index:02d}")
    (study / "sub-=cmd0/anat/sub-=cmd0_T1w.nii.gz").write_bytes(b"")
    (study / "sub-=cmd1/sub-=cmd1_sessions.tsv").write_text("session_id\t=1+1\nses-1\t@SUM(A1)\n")
    rows = (study / "participants.tsv").read_text().replace("group", "=1+1").replace("\tg0\t", "\t=g0\t")
    rows = rows.replace("sub-00", "=cmd0").replace("sub-01", "=cmd1").replace("sub-02", "-02")
    (study / "participants.tsv").write_text(rows)
    with pytest.raises(PartialFailure):
        prepare_study(study, tmp_path / "out", CONFIG)
    people, quality, failures = (
        table(tmp_path / "out", f"{name}.tsv") for name in ("participants", "quality", "failures")
    )
    assert people["sub-=cmd1"]["=1+1"] == "@SUM(A1)"
    assert "=1+1" in quality["sub-=cmd1"]["notes"] and len(failures) == 3
    cells = [text for rows in (quality, failures) for row in rows.values() for text in row.values()]
    assert not [text for text in cells if text.startswith(("=", "+", "-", "@"))]


@pytest.mark.parametrize("label", ["new\nline", "tab\there", "a" * 230])
def test_ids_that_cannot_name_anything_are_listed(label: str, tmp_path: Path, in_place: list[str]) -> None:
    """Fault 25"""
    study = write_study(tmp_path / "balls", 2)
    (study / "sub-00/anat/sub-00_T1w.nii.gz").rename(study / f"sub-00/anat/sub-{label}_T1w.nii.gz")
    (study / "sub-00").rename(study / f"sub-{label}")
    with pytest.raises(PartialFailure):
        prepare_study(study, tmp_path / "out", CONFIG)
    assert len(PreparedCohort.open(tmp_path / "out").rows()) == 1


# ---------------------------------------------------------------------------------------------------- stop and go on


def test_ctrl_c_and_again_is_the_unbroken_run(
    tmp_path: Path, in_place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tmp_path / "balls")
    prepare_study(study, tmp_path / "unbroken", CONFIG)
    real = one_scan.write_overlay

    def interrupted(path: Path, *arguments, **options):  # type: ignore[no-untyped-def]
        if "sub-03" in path.name:
            raise KeyboardInterrupt
        return real(path, *arguments, **options)

    monkeypatch.setattr(one_scan, "write_overlay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_study(study, tmp_path / "broken", CONFIG)
    monkeypatch.setattr(one_scan, "write_overlay", real)
    assert prepare_study(study, tmp_path / "broken", CONFIG).newly_prepared == 3
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_again_with_nothing_to_do_changes_nothing(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls"), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    before, times = contents(out), {p: p.stat().st_mtime_ns for p in out.rglob("*.nii.gz")}
    summary = prepare_study(study, out, CONFIG)
    assert summary.newly_prepared == 0 and len(in_place) == 6
    assert contents(out) == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.nii.gz")} == times


def test_added_people_are_prepared_alone_and_nobody_changes_sides(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 12), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    earlier = {i: row["split"] for i, row in table(out).items()}
    write_study(study, 30)
    summary = prepare_study(study, out, CONFIG)
    assert (summary.people, summary.newly_prepared, len(in_place)) == (30, 18, 30)
    assert {i: row["split"] for i, row in table(out).items() if i in earlier} == earlier
    indices = [record["index"] for record in Manifest(out / "manifest.jsonl").records()]
    assert indices == list(range(30))


def test_a_replaced_scan_is_prepared_again(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 3), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    path = study / "sub-01/anat/sub-01_T1w.nii.gz"
    size = path.stat().st_size
    write_nifti(path, brain(99), GRID.affine, dtype="uint8_unit")
    assert path.stat().st_size != size
    assert prepare_study(study, out, CONFIG).newly_prepared == 1
    np.testing.assert_allclose(
        VolumeDataset(PreparedCohort.open(out)).image_XYZ(1), brain(99) / brain(99).max(), atol=5e-3
    )


def test_a_scan_replaced_by_one_of_the_same_size_is_prepared_again(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 3), tmp_path / "out"
    path = study / "sub-01/anat/sub-01_T1w.nii"
    (study / "sub-01/anat/sub-01_T1w.nii.gz").unlink()
    nibabel.save(nibabel.Nifti1Image(brain(1), GRID.affine), path)
    prepare_study(study, out, CONFIG)
    content = path.read_bytes()
    path.write_bytes(content)  # written again, and the same
    assert prepare_study(study, out, CONFIG).newly_prepared == 0
    nibabel.save(nibabel.Nifti1Image(brain(99), GRID.affine), path)
    assert path.stat().st_size == len(content)
    assert prepare_study(study, out, CONFIG).newly_prepared == 1
    np.testing.assert_allclose(
        VolumeDataset(PreparedCohort.open(out)).image_XYZ(1), brain(99) / brain(99).max(), atol=5e-3
    )


def test_people_whom_an_earlier_version_prepared_otherwise_are_prepared_again(
    tmp_path: Path, in_place: list[str]
) -> None:
    study, out = write_study(tmp_path / "balls", 3), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    manifest = Manifest(out / "manifest.jsonl")
    records = manifest.records()
    manifest.path.unlink()
    for record in records:
        new = ("preparation", "source_sha256", "source_mtime_ns", "mask_sha256")
        earlier = {name: value for name, value in record.items() if name not in new}
        manifest.append(**(earlier if record["index"] == 1 else record))
    assert prepare_study(study, out, CONFIG).newly_prepared == 1
    assert prepare_study(study, out, CONFIG).newly_prepared == 0


def test_nobody_changes_sides_when_their_scan_turns_up_under_another_id(tmp_path: Path, in_place: list[str]) -> None:
    """The split is that of the first id; it stays that of whoever was there before."""
    study, out = write_study(tmp_path / "balls", 30), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    before = {i: row["split"] for i, row in table(out).items()}
    last = max(before)
    twin = next(f"sub-{n:02d}x" for n in range(99) if split_of(f"sub-{n:02d}x", 0, 0.2) != before[last])
    assert min(twin, last) == twin
    scan = study / twin / "anat" / f"{twin}_T1w.nii.gz"
    scan.parent.mkdir(parents=True)
    shutil.copyfile(study / last / "anat" / f"{last}_T1w.nii.gz", scan)
    participants = study / "participants.tsv"
    rows = participants.read_text()
    theirs = next(line for line in rows.splitlines() if line.startswith(f"{last}\t"))
    participants.write_text(rows + theirs.replace(last, twin) + "\n")
    prepare_study(study, out, CONFIG)
    after = {i: row["split"] for i, row in table(out).items()}
    assert {i: after[i] for i in before} == before and after[twin] == before[last]


def test_a_corrected_table_needs_no_scan_again(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 3), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    (study / "participants.tsv").write_text((study / "participants.tsv").read_text().replace("\t31\t", "\t71\t"))
    assert prepare_study(study, out, CONFIG).newly_prepared == 0
    assert table(out)["sub-01"]["age_years"] == "71"


def test_somebody_taken_out_of_the_study_is_taken_out_of_the_tables(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 4), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    shutil.rmtree(study / "sub-01")
    (study / "participants.tsv").write_text(
        "".join(x for x in (study / "participants.tsv").open() if not x.startswith("sub-01"))
    )
    with pytest.raises(PartialFailure):
        prepare_study(study, out, CONFIG)
    assert sorted(table(out)) == ["sub-00", "sub-02", "sub-03"]
    assert table(out, "failures.tsv")["sub-01"]["reason"] == "no_longer_in_study"
    assert len(PreparedCohort.open(out).rows()) == 3


def test_people_to_leave_out_are_neither_in_the_tables_nor_failures(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 6), tmp_path / "out"
    (study / "sub-05/anat/sub-05_T1w.nii.gz").write_bytes(b"no image")
    with pytest.raises(PartialFailure):
        prepare_study(study, out, CONFIG)
    splits = {i: row["split"] for i, row in table(out).items()}
    without = prepare_study(study, out, CONFIG, leave_out=["sub-02", "05"])
    assert without.left_out == ("sub-02", "sub-05") and "2 people were left out" in str(without)
    assert {i: row["split"] for i, row in table(out).items()} == {i: s for i, s in splits.items() if i != "sub-02"}
    assert not (out / "failures.tsv").exists() and read_json(out / "prepared.json")["left_out"] == ["sub-02", "sub-05"]
    assert [row.participant_id for row in PreparedCohort.open(out).rows()] == ["sub-00", "sub-01", "sub-03", "sub-04"]
    assert not (out / "sub-02").exists() and (out / ".left-out/sub-02").is_dir()
    with pytest.raises(PartialFailure):  # and back again, without preparing anything anew
        prepare_study(study, out, CONFIG)
    assert {i: row["split"] for i, row in table(out).items()} == splits
    assert len(in_place) == 5 and not (out / ".left-out").exists()


def test_left_out_is_whom_the_folder_names_however_its_accents_are_written(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 2)
    for path in sorted(study.glob("sub-01/**/*"), reverse=True):
        path.rename(path.with_name(path.name.replace("sub-01", "sub-e\u0301")))
    (study / "sub-01").rename(study / "sub-e\u0301")
    text = (study / "participants.tsv").read_text()
    (study / "participants.tsv").write_text(text.replace("sub-01", "sub-\u00e9"))
    assert prepare_study(study, tmp_path / "out", CONFIG, leave_out=["sub-e\u0301"]).left_out == ("sub-\u00e9",)


def test_what_was_prepared_of_scans_that_are_away_is_kept(tmp_path: Path, in_place: list[str]) -> None:
    """A drive that is not mounted, annexed files that were dropped."""
    study, out = write_study(tmp_path / "balls", 4), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    before = table(out)
    for index in (1, 2):
        scan = study / f"sub-{index:02d}/anat/sub-{index:02d}_T1w.nii.gz"
        scan.unlink()
        scan.symlink_to(tmp_path / "annex" / scan.name)
    summary = prepare_study(study, out, CONFIG, leave_out=["sub-03"])
    assert summary.unread == ("sub-01", "sub-02") and "2 people cannot be read now" in str(summary)
    assert table(out) == {i: row for i, row in before.items() if i != "sub-03"}
    assert len(PreparedCohort.open(out).rows()) == 3 and len(in_place) == 4


def test_a_scan_that_changes_after_its_turn_costs_nobody(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 4), tmp_path / "out"

    class CopiesAgain(Quiet):
        def advance(self, steps: int = 1, note: str = "") -> None:
            if note == "sub-03":
                write_nifti(study / "sub-01/anat/sub-01_T1w.nii.gz", brain(77), GRID.affine, dtype="int16_unit")

    assert prepare_study(study, out, CONFIG, progress=CopiesAgain()).people == 4
    assert prepare_study(study, out, CONFIG).newly_prepared == 1  # the next call sees it


def test_nobody_changes_sides_when_one_of_two_ids_of_a_scan_is_left_out(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 12), tmp_path / "out"
    own = {f"sub-{i:02d}": split_of(f"sub-{i:02d}", 0, 0.2) for i in range(12)}
    second = next(i for i, split in own.items() if split == "test")
    first = next(i for i, split in own.items() if split == "train" and i < second)
    shutil.copyfile(study / f"{first}/anat/{first}_T1w.nii.gz", study / f"{second}/anat/{second}_T1w.nii.gz")
    for left_out in ([], [first, second], [first], [second], [first, second], []):
        prepare_study(study, out, CONFIG, leave_out=left_out)
        assert {table(out)[i]["split"] for i in {first, second} - set(left_out)} <= {"train"}


@pytest.mark.parametrize(
    ("leave_out", "words"), [(["sub-77"], "called 'sub-77'"), (["sub-00", "01"], "everybody in this study")]
)
def test_nobody_unknown_and_not_everybody_is_left_out(leave_out: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        prepare_study(write_study(tmp_path / "balls", 2), tmp_path / "out", CONFIG, leave_out=leave_out)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- before the start


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"grid": "2mm"}, "grid: 4mm there, 2mm asked"),
        ({"seed": 1, "nan": "zero"}, "nan: error there, zero asked; seed"),
    ],
)
def test_another_config_in_the_same_folder_is_refused_field_by_field(
    change: dict, word: str, tmp_path: Path, in_place: list[str]
) -> None:
    study, out = write_study(tmp_path / "balls", 3), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    before = contents(out)
    with pytest.raises(UsageError, match=word) as caught:
        prepare_study(study, out, PrepareConfig(**(vars(CONFIG) | change)))
    assert caught.value.remedy and contents(out) == before


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path, in_place: list[str]) -> None:
    out = tmp_path / "out"
    prepare_study(write_study(tmp_path / "balls", 3), out, CONFIG)
    with pytest.raises(UsageError, match="study: balls there, others asked"):
        prepare_study(write_study(tmp_path / "others", 3), out, CONFIG)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 3)
    for name, content in (("thesis.docx", "years of work"), ("prepared.json", "{}"), ("prepared.json", "broken")):
        out = tmp_path / name / content.split()[0]
        out.mkdir(parents=True)
        (out / name).write_text(content)
        with pytest.raises(UsageError, match="in use"):
            prepare_study(study, out, CONFIG)
        assert contents(out) == {name: content.encode()}
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        prepare_study(study, tmp_path / "file", CONFIG)


def test_an_image_of_other_bytes_is_prepared_again(tmp_path: Path, in_place: list[str]) -> None:
    study, out = write_study(tmp_path / "balls", 3), tmp_path / "out"
    prepare_study(study, out, CONFIG)
    before, path = contents(out), next((out / "sub-01").rglob("*_T1w.nii.gz"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert prepare_study(study, out, CONFIG).newly_prepared == 1
    assert contents(out) == before


def test_the_study_itself_is_no_output(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "a" / "balls", 3)
    before = contents(tmp_path)
    inside = (study / "out", study / "sub-00" / "out", study / "derivatives")
    for out in (study, tmp_path / "a", study / ".." / "balls", *inside):
        with pytest.raises(UsageError, match="over or in"):
            prepare_study(study, out, CONFIG)
    assert contents(tmp_path) == before
    assert prepare_study(study, study / "derivatives" / "brainldm", CONFIG).people == 3


def test_two_runs_into_one_folder_are_one_too_many(tmp_path: Path, in_place: list[str]) -> None:
    """Fault 43"""
    study, out = write_study(tmp_path / "balls", 3), tmp_path / "out"
    with locked_folder(out), pytest.raises(UsageError, match="another run"):
        prepare_study(study, out, CONFIG)
    assert in_place == []


def test_one_hot_vessel_darkens_nothing_where_a_percentile_is_asked_for(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 1)
    hot = brain(0)
    hot[20, 20, 20] = 100
    write_nifti(study / "sub-00/anat/sub-00_T1w.nii.gz", hot, GRID.affine)
    means = []
    for flags in ([], ["--percentile", "99.9"]):
        out = tmp_path / f"out{len(flags)}"
        assert cli._run(["prepare", str(study), str(out), "--grid", "4mm", *flags], debug=True) == 0
        means.append(VolumeDataset(PreparedCohort.open(out)).image_XYZ(0).mean())
    assert means[1] > 50 * means[0]
    assert read_json(tmp_path / "out2" / "prepared.json")["config"]["percentile"] == 99.9
    with pytest.raises(UsageError, match=r"percentile: 99.9 there, None asked"):
        prepare_study(study, tmp_path / "out2", CONFIG)


@pytest.mark.parametrize(
    "fields", [{"grid": "3mm"}, {"holdout": 1.0}, {"percentile": 0.5}, {"masks": Path("m"), "skull": "keep"}]
)
def test_impossible_configs_are_refused_at_once(fields: dict, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        prepare_study(tmp_path / "nothing", tmp_path / "out", PrepareConfig(**fields))
    assert not (tmp_path / "out").exists()


def test_a_bad_study_leaves_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for study in (tmp_path / "nothing", tmp_path / "empty"):
        with pytest.raises(BadInput):
            prepare_study(study, tmp_path / "new" / "out", CONFIG)
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------------- orientation and skulls


def stored_as(axes: str, data: np.ndarray, affine: np.ndarray) -> nibabel.Nifti1Image:
    source = nibabel.Nifti1Image(data.astype("float32"), affine)
    wanted = nibabel.orientations.axcodes2ornt(axes)
    return source.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), wanted))


def test_left_is_left_however_a_scan_is_stored(tmp_path: Path, in_place: list[str]) -> None:
    """Fault 20: one lopsided brain in several storage orders gives one cohort image; an oblique one nearly that."""
    study = write_study(tmp_path / "balls", 4)
    data = ndi.gaussian_filter(brain(0), 2)
    paths = [study / f"sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz" for i in range(4)]
    for axes, path in zip(("RAS", "LAS", "LPI"), paths):
        nibabel.save(stored_as(axes, data, GRID.affine), path)
    angle = np.deg2rad(12)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = turned @ np.diag([-2.0, 2.0, 2.0, 1.0])  # 2 mm voxels, so that reslicing twice costs little
    oblique[:3, 3] = GRID.affine[:3, 3] + [170.0, -20.0, 0.0]
    matrix = np.linalg.inv(GRID.affine) @ oblique
    there = ndi.affine_transform(data, matrix[:3, :3], matrix[:3, 3], output_shape=(110, 130, 80), order=3)
    nibabel.save(stored_as("PIR", there, oblique), paths[3])

    prepare_study(study, tmp_path / "out", CONFIG)
    rows = PreparedCohort.open(tmp_path / "out").rows()
    assert len({row.sha256 for row in rows[:3]}) == 1
    dataset = VolumeDataset(PreparedCohort.open(tmp_path / "out"))
    straight, was_oblique = dataset.image_XYZ(0), dataset.image_XYZ(3)
    assert straight[:20].mean() > 1.05 * straight[20:].mean(), "the fixture must tell left from right"
    assert np.corrcoef(straight.ravel(), was_oblique.ravel())[0, 1] > 0.995
    assert np.corrcoef(straight.ravel(), was_oblique[::-1].ravel())[0, 1] < 0.97


def test_a_skull_is_stripped_with_the_studys_own_mask(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 3)
    inside = brain(0) > 0
    for index in range(3):
        head = np.where(
            inside, 0.5 + 0.5 * brain(index), np.random.default_rng(index).uniform(0.05, 0.4, GRID.shape_XYZ)
        )
        write_nifti(study / f"sub-{index:02d}/anat/sub-{index:02d}_T1w.nii.gz", head, GRID.affine, dtype="int16_unit")
        mask = study / f"derivatives/bet/sub-{index:02d}/anat/sub-{index:02d}_desc-brain_mask.nii.gz"
        if index < 2:
            # The second mask is that of another scan.
            affine = GRID.affine + np.diag([0, 0, 0, 0]) if index == 0 else np.diag([5.0, 5, 5, 1])
            write_nifti(mask, inside, affine, dtype="uint8")
    kept, stripped = tmp_path / "kept", tmp_path / "stripped"
    prepare_study(study, kept, CONFIG)
    assert PreparedCohort.open(kept).preprocessing["skull_stripped"] is False
    with pytest.raises(PartialFailure):
        prepare_study(study, stripped, PrepareConfig(grid="4mm", skull="strip", strip_with="mask"))
    reasons = {i: row["reason"] for i, row in table(stripped, "failures.tsv").items()}
    assert reasons == {"sub-01": "mask_grid", "sub-02": "missing_mask"}
    image = VolumeDataset(PreparedCohort.open(stripped)).image_XYZ(0)
    assert ((image > 0) == inside).all() and image.max() == 1
    assert PreparedCohort.open(stripped).preprocessing["skull_stripped"] is True
    assert (VolumeDataset(PreparedCohort.open(kept)).image_XYZ(0) > 0).mean() > 0.9


# -------------------------------------------------------------------------------------------------------------- UniRes


FAKE_UNIRES = """
import json, nibabel, numpy as np
from pathlib import Path

def preproc(paths, chosen):
    image = nibabel.load(paths[0])
    stored = image.as_reoriented(np.array([[0, -1], [1, 1], [2, 1]]))  # LAS, as the real one stores
    nibabel.save(stored, Path(chosen.dir_out) / (chosen.prefix + Path(paths[0]).name))
    (Path(__file__).parent / "asked.json").write_text(json.dumps(vars(chosen)))
"""


@pytest.fixture
def fake_unires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An interpreter in which `unires` can be imported, and only mirrors what it is given."""
    package = tmp_path / "elsewhere" / "unires"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "run.py").write_text(FAKE_UNIRES)
    (package / "struct.py").write_text("class settings:\n    def __init__(self):\n        self.vx = 99\n")
    cuda = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    (package.parent / "torch.py").write_text(cuda)
    python = tmp_path / "elsewhere" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("BRAINLDM_UNIRES_PYTHON", str(python))
    unires.unires_python.cache_clear()
    yield package
    unires.unires_python.cache_clear()


def test_an_installed_unires_is_driven_with_the_authors_settings(
    tmp_path: Path, in_place: list[str], fake_unires: Path
) -> None:
    study, out = write_study(tmp_path / "balls", 2), tmp_path / "out"
    prepare_study(study, out, PrepareConfig(grid="4mm", register="unires"))
    asked = read_json(fake_unires / "asked.json")
    assert {name: asked[name] for name in unires.SETTINGS} == unires.SETTINGS
    assert (asked["max_iter"], asked["fov"], asked["common_output"], asked["device"]) == (0, "head", True, "cpu")
    image = VolumeDataset(PreparedCohort.open(out)).image_XYZ(1)
    np.testing.assert_allclose(image, brain(1) / brain(1).max(), atol=2e-4)
    transforms = read_json(next(out.glob("sub-00/anat/*_xfm.json")))
    assert transforms["method"] == "unires" and transforms["mni_from_scan"] is None


def test_what_unires_wrote_is_what_is_flagged(
    tmp_path: Path, in_place: list[str], fake_unires: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the scan, which our own registration put in its place."""

    def register(scan, brain_mask=None, *, aligned=False):  # type: ignore[no-untyped-def]
        quality = {"correlation": 0.2, "cut_brain_fraction": 0.1} if aligned else {"correlation": 0.9}
        return Registration(np.eye(4), np.eye(4), {"cut_brain_fraction": 0.0} | quality, "in place")

    monkeypatch.setattr(one_scan, "register_to_template", register)
    prepare_study(write_study(tmp_path / "balls", 1), tmp_path / "out", PrepareConfig(grid="4mm", register="unires"))
    quality = table(tmp_path / "out", "quality.tsv")["sub-00"]
    assert quality["flags"] == "poor_registration, brain_outside_box" and quality["correlation"] == "0.2"


def test_a_unires_that_hangs_is_listed(
    tmp_path: Path, in_place: list[str], fake_unires: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake_unires / "run.py").write_text("import time\ndef preproc(paths, chosen):\n    time.sleep(300)\n")
    monkeypatch.setattr("brainldm.cohort.program.TIMEOUT_SECONDS", 0.5)
    config = PrepareConfig(grid="4mm", register="unires")
    with pytest.raises(BadInput, match="UniRes was still at work") as caught:
        prepare_study(write_study(tmp_path / "balls", 1), tmp_path / "out", config)
    assert caught.value.reason == "timeout" and caught.value.remedy


def test_a_scan_that_unires_cannot_align_is_listed(tmp_path: Path, in_place: list[str], fake_unires: Path) -> None:
    (fake_unires / "run.py").write_text("def preproc(paths, chosen):\n    raise ValueError('too odd')\n")
    with pytest.raises(BadInput, match="too odd") as caught:
        prepare_study(
            write_study(tmp_path / "balls", 1), tmp_path / "out", PrepareConfig(grid="4mm", register="unires")
        )
    assert caught.value.reason == "unires"


def test_without_unires_it_is_said_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRAINLDM_UNIRES_PYTHON", raising=False)
    monkeypatch.setattr(unires.shutil, "which", lambda _: None)
    monkeypatch.setattr(unires, "_can_import_unires", lambda _: False)
    unires.unires_python.cache_clear()
    with pytest.raises(EnvironmentProblem, match=r"pip install.*UniRes") as caught:
        prepare_study(write_study(tmp_path / "balls", 1), tmp_path / "out", PrepareConfig(register="unires"))
    assert caught.value.exit_code == 5 and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- volumes and duplicates


def test_volumes_may_come_from_the_studys_table(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 5)
    path = study / "participants.tsv"
    path.write_text(path.read_text().replace("\t20001\t", "\tn/a\t").replace("\t20002\t", "\t20\t"))
    out = tmp_path / "out"
    with pytest.raises(PartialFailure):
        prepare_study(study, out, PrepareConfig(grid="4mm", volumes="table"))
    assert table(out)["sub-03"]["ventricles_mm3"] == "20003"
    failures = table(out, "failures.tsv")
    assert failures["sub-01"]["reason"] == failures["sub-02"]["reason"] == "bad_volume"
    assert "millilitres" in failures["sub-02"]["message"]
    assert len(in_place) == 3
    path.write_text(path.read_text().replace("ventricles_mm3", "v"))
    with pytest.raises(BadInput, match=r"'ventricles_mm3'.*group, v, brain_mm3"):
        prepare_study(study, tmp_path / "other", PrepareConfig(grid="4mm", volumes="table"))


def test_volumes_of_another_session_are_not_joined(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 3)
    for name in ("sub-00", "sub-01", "sub-02"):
        anat = study / name / "ses-1" / "anat"
        anat.mkdir(parents=True)
        (study / name / "anat" / f"{name}_T1w.nii.gz").rename(anat / f"{name}_ses-1_T1w.nii.gz")
    columns = "Measure:volume Left-Lateral-Ventricle Left-Inf-Lat-Vent Right-Lateral-Ventricle Right-Inf-Lat-Vent"
    columns += " BrainSegVolNotVent EstimatedTotalIntraCranialVol"
    rows = {"sub-00_ses-2": 8000, "sub-01_ses-2": 9000, "sub-01_ses-1": 9100, "sub-02": 9200}
    lines = ["\t".join(f"{name} {first} 0 9000 0 1100000 1480000".split()) for name, first in rows.items()]
    (tmp_path / "aseg.tsv").write_text("\n".join(["\t".join(columns.split()), *lines]) + "\n")
    with pytest.raises(PartialFailure):
        prepare_study(study, tmp_path / "out", PrepareConfig(grid="4mm", volumes=str(tmp_path / "aseg.tsv")))
    people = table(tmp_path / "out")
    assert {i: row["ventricles_mm3"] for i, row in people.items()} == {"sub-01": "18100", "sub-02": "18200"}
    (failure,) = table(tmp_path / "out", "failures.tsv").values()
    assert (failure["participant_id"], failure["reason"]) == ("sub-00", "bad_volume")
    assert "in aseg.tsv, there are volumes of sub-00_ses-2 alone" in failure["message"]
    assert "session" in failure["remedy"]


def test_two_rows_of_other_volumes_are_nobody_s(tmp_path: Path, in_place: list[str]) -> None:
    study = write_study(tmp_path / "balls", 2)
    path = study / "participants.tsv"
    path.write_text(path.read_text() + "sub-00\t30\tF\tg0\t25000\t1300000\n")
    with pytest.raises(PartialFailure):
        prepare_study(study, tmp_path / "out", PrepareConfig(grid="4mm", volumes="table"))
    assert table(tmp_path / "out", "failures.tsv")["sub-00"]["reason"] == "duplicate_rows"
    assert prepare_study(study, tmp_path / "measured", CONFIG).people == 2, "only volumes that are used must agree"


@pytest.mark.parametrize("strict", [False, True])
def test_one_scan_under_two_ids_is_found(strict: bool, tmp_path: Path, in_place: list[str]) -> None:
    """Fault 24: the same voxels, compressed in another way."""
    study, out = write_study(tmp_path / "balls", 12), tmp_path / "out"
    twin = read_nifti(study / "sub-00/anat/sub-00_T1w.nii.gz")
    for index in range(4, 9):  # several twins, so that some would fall on the other side of a split
        path = study / f"sub-{index:02d}/anat/sub-{index:02d}_T1w.nii.gz"
        path.unlink()
        nibabel.save(nibabel.Nifti1Image(twin.data_XYZ, twin.affine), path)
    config = PrepareConfig(grid="4mm", strict=strict)
    if not strict:
        summary = prepare_study(study, out, config)
        assert summary.flagged == 6
        quality, splits = table(out, "quality.tsv"), table(out)
        assert quality["sub-05"]["flags"] == "duplicate" and "same image as sub-00" in quality["sub-05"]["notes"]
        assert len({splits[f"sub-{i:02d}"]["split"] for i in (0, *range(4, 9))}) == 1
        return
    with pytest.raises(PartialFailure):
        prepare_study(study, out, config)
    assert {row["reason"] for row in table(out, "failures.tsv").values()} == {"duplicate"}
    assert sorted(table(out)) == ["sub-01", "sub-02", "sub-03", "sub-09", "sub-10", "sub-11"]


@pytest.mark.parametrize("strict", [False, True])
def test_one_scan_under_two_ids_is_found_however_its_voxels_are_scaled(
    strict: bool, tmp_path: Path, in_place: list[str]
) -> None:
    """The raw voxels differ and the prepared images do not; sub-08 has the voxels of sub-07, elsewhere."""
    study, out = write_study(tmp_path / "balls", 9), tmp_path / "out"
    head = np.rint(1000 * (0.01 + brain(0)))  # no masked one: its background is no 0
    moved = GRID.affine.copy()
    moved[0, 3] += 20
    for index, (data, affine) in enumerate([(head, GRID.affine), (head - 1000, GRID.affine), (2 * head, moved)]):
        for twin in (index,) if index < 2 else (7, 8):
            path = study / f"sub-{twin:02d}/anat/sub-{twin:02d}_T1w.nii.gz"
            write_nifti(path, data, GRID.affine if twin == 7 else affine)
    if strict:
        with pytest.raises(PartialFailure):
            prepare_study(study, out, PrepareConfig(grid="4mm", strict=True))
        assert sorted(table(out, "failures.tsv")) == ["sub-00", "sub-01", "sub-07", "sub-08"]
        return
    assert prepare_study(study, out, CONFIG).flagged == 4
    quality, splits = table(out, "quality.tsv"), table(out)
    assert "same image as sub-00, sub-07, sub-08" in quality["sub-01"]["notes"]
    assert len({splits[f"sub-{i:02d}"]["split"] for i in (0, 1, 7, 8)}) == 1


def test_a_poor_registration_is_flagged(tmp_path: Path, in_place: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    poor = Registration(np.eye(4), np.eye(4), {"correlation": 0.2, "cut_brain_fraction": 0.1}, "in place")
    monkeypatch.setattr(one_scan, "register_to_template", lambda *_, **__: poor)
    assert prepare_study(write_study(tmp_path / "balls", 1), tmp_path / "out", CONFIG).flagged == 1
    assert table(tmp_path / "out", "quality.tsv")["sub-00"]["flags"] == "poor_registration, brain_outside_box"


def test_a_cut_field_of_view_is_flagged_and_training_on_it_is_said(
    tmp_path: Path, in_place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 22"""
    study, out = write_study(tmp_path / "balls", 2), tmp_path / "out"
    affine = GRID.affine.copy()
    affine[2, 3] += 15 * 4
    write_nifti(study / "sub-00/anat/sub-00_T1w.nii.gz", brain(0)[:, :, 15:], affine, dtype="int16_unit")
    assert prepare_study(study, out, CONFIG).flagged == 1
    quality = table(out, "quality.tsv")
    assert quality["sub-00"]["flags"] == "field_of_view_cut" and quality["sub-01"]["flags"] == "n/a"
    warn_of_flagged(VolumeDataset(PreparedCohort.open(out)))
    said = capsys.readouterr().err
    assert "1 of 2 images to train on" in said and "sub-00: field_of_view_cut" in said and "--leave-out" in said
    assert float(quality["sub-00"]["unseen_brain_fraction"]) > 0.1


# ------------------------------------------------------------------------------------------------- real processes


PEOPLE = 12
PREPARE = (
    "import sys\nfrom pathlib import Path\nfrom brainldm.cohort.prepare import PrepareConfig, prepare_study\n"
    "if __name__ == '__main__':\n"
    "    prepare_study(Path(sys.argv[1]), Path(sys.argv[2]), PrepareConfig(grid='4mm', volumes='table'), workers=2)\n"
)


@pytest.fixture
def in_mni(tmp_path: Path) -> Iterator[Path]:
    """A study that needs no measuring and lies in its place, so that real processes are done with it in seconds."""
    yield write_study(tmp_path / "balls", PEOPLE, space="MNI152NLin2009cAsym")


def test_kill_9_with_two_workers_and_again_is_the_unbroken_run_with_one(tmp_path: Path, in_mni: Path) -> None:
    """Promise 2. Workers left without a parent must end, and write nothing any more."""
    config = PrepareConfig(grid="4mm", volumes="table")
    next(in_mni.glob("sub-05/anat/*")).write_bytes(b"")
    with pytest.raises(PartialFailure):
        prepare_study(in_mni, tmp_path / "unbroken", config)
    script, out = tmp_path / "prepare.py", tmp_path / "broken"
    script.write_text(PREPARE)
    run = subprocess.Popen([sys.executable, script, in_mni, out])
    while run.poll() is None and len(Manifest(out / "manifest.jsonl").records()) < 4:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = len(Manifest(out / "manifest.jsonl").records())
    assert 4 <= done < PEOPLE - 1, "killed too late to show anything"
    with pytest.raises(PartialFailure, match=f"{PEOPLE - 1 - done} of them now"):
        prepare_study(in_mni, out, config)
    assert contents(out) == contents(tmp_path / "unbroken")


def test_ctrl_c_ends_the_workers_too(tmp_path: Path, in_mni: Path) -> None:
    script, out = tmp_path / "prepare.py", tmp_path / "out"
    script.write_text(PREPARE)
    run = subprocess.Popen([sys.executable, script, in_mni, out], stderr=subprocess.PIPE, text=True)
    while run.poll() is None and len(Manifest(out / "manifest.jsonl").records()) < 2:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=20)
    assert run.returncode != 0 and said.count("KeyboardInterrupt") == 1, said
    with locked_folder(out):
        pass
    assert prepare_study(in_mni, out, PrepareConfig(grid="4mm", volumes="table"), progress=Quiet()).people == PEOPLE


# ------------------------------------------------------------------------------------------------------- real scans


def prepare_real(study: Path, out: Path, **options) -> dict[str, dict[str, str]]:  # type: ignore[no-untyped-def]
    prepare_study(study, out, PrepareConfig(**options), workers=2)
    assert not (out / "failures.tsv").exists()
    return table(out)


@pytest.mark.slow
def test_real_people_measure_as_experts_labelled_them(tmp_path: Path, real_data: Path) -> None:
    people = prepare_real(real_data / "oasis17", tmp_path / "out")
    assert len(people) == 17
    measured = np.array([float(row["ventricles_mm3"]) for row in people.values()])
    manual = np.array([float(row["manual_ventricles_mm3"]) for row in people.values()])
    assert np.corrcoef(measured, manual)[0, 1] >= 0.98
    assert np.abs(measured - manual).mean() <= 3000
    brains = np.array([float(row["brain_mm3"]) for row in people.values()])
    ages = np.array([float(row["age_years"]) for row in people.values()])
    assert brains.min() > 1.1e6 and brains.max() < 1.85e6
    assert np.corrcoef(brains, ages)[0, 1] < -0.5
    assert all(row["flags"] == "n/a" for row in table(tmp_path / "out", "quality.tsv").values())


@pytest.mark.slow
def test_a_real_head_prepares_with_and_without_its_skull(tmp_path: Path, real_data: Path) -> None:
    study = study_of_colin(tmp_path / "colin", real_data)
    kept = prepare_real(study, tmp_path / "kept", grid="2mm")["sub-colin"]
    stripped = prepare_real(study, tmp_path / "stripped", grid="2mm", skull="strip")["sub-colin"]
    for name in ("ventricles_mm3", "brain_mm3"):
        assert float(stripped[name]) == pytest.approx(float(kept[name]), rel=0.05)
    assert 1.1e6 < float(kept["brain_mm3"]) < 1.9e6 and 8e3 < float(kept["ventricles_mm3"]) < 4e4
    head, brain_alone = (VolumeDataset(PreparedCohort.open(tmp_path / n)).image_XYZ(0) for n in ("kept", "stripped"))
    grid = PreparedCohort.open(tmp_path / "kept").grid
    assert (head > 0.1).sum() > 1.15 * (brain_alone > 0.1).sum()
    assert 1.2e6 < (brain_alone > 0).sum() * grid.voxel_mm3 < 2.2e6


def study_of_colin(folder: Path, real_data: Path) -> Path:
    path = folder / "sub-colin" / "anat" / "sub-colin_T1w.nii.gz"
    path.parent.mkdir(parents=True)
    shutil.copy(real_data / "colin27" / "colin27_T1w.nii.gz", path)
    (folder / "participants.tsv").write_text("participant_id\tage\tsex\nsub-colin\t30\tM\n")
    return folder
