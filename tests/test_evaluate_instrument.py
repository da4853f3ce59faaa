"""The instrument against others: on made-up scans, and on real ones where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from brainldm.base.errors import BadInput, PartialFailure, UsageError
from brainldm.base.tables import read_table, write_table
from brainldm.base.volume import Volume
from brainldm.cohort.measure import Measured
from brainldm.evaluate.instrument import check_instrument


class Sum:
    """An instrument whose answers are known: the sum of all voxels."""

    name = "sum"

    def __call__(self, image: Volume) -> Measured:
        return Measured(float(image.data_XYZ.sum()), 1.0, 1.0, 1.0)


def test_measured_against_known(tiny_cohort: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    first = check_instrument(tiny_cohort, tmp_path / "first", instrument=Sum())
    assert first.agreement is None and first.measured == 10
    found = read_table(tmp_path / "first" / "measured.tsv")
    rows = [
        {"participant_id": cells["participant_id"], "known": 2 * (found.number(row, "ventricles_mm3") or 0)}
        for row, cells in enumerate(found.rows)
    ]
    for cells in found.rows:
        (study / cells["participant_id"]).mkdir()
        (study / cells["participant_id"] / Path(cells["file"]).name).symlink_to(tiny_cohort / cells["file"])
    write_table(study / "participants.tsv", ("participant_id", "known"), rows)
    check = check_instrument(study, tmp_path / "out", against="known", instrument=Sum())
    assert check.agreement is not None
    assert check.agreement.pearson_r.value == pytest.approx(1) and check.agreement.slope.value == pytest.approx(0.5)
    assert "pearson_r: 1" in check.as_text()
    assert json.loads((tmp_path / "out" / "instrument.json").read_text())["agreement"]["pearson_r"]["n"] == 10
    with pytest.raises(UsageError, match="no column 'nothing'"):
        check_instrument(study, tmp_path / "out2", against="nothing", instrument=Sum())
    (study / "sub-00" / "sub-00_T1w.nii.gz").write_bytes(b"no image")
    with pytest.raises(PartialFailure, match="1 of 11 scans"):
        check_instrument(study, tmp_path / "out", against="known", instrument=Sum())


def test_what_is_no_scan_is_listed_and_the_rest_measured(tiny_cohort: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    scan = next(tiny_cohort.rglob("*_T1w.nii.gz"))
    for name in ("=one", "two", "three"):
        (study / f"{name}.nii.gz").symlink_to(scan)
    (study / "broken.nii.gz").symlink_to("nowhere")
    (study / "folder.nii.gz").mkdir()
    os.mkfifo(study / "pipe.nii.gz")
    with pytest.raises(PartialFailure, match="3 of 6 scans could not be measured; the first: broken"):
        check_instrument(study, tmp_path / "out", instrument=Sum())
    content = json.loads((tmp_path / "out" / "instrument.json").read_text())
    assert content["measured"] == 3
    assert {failure["reason"] for failure in content["failures"]} == {"broken_link", "not_a_file"}
    names = [cells["participant_id"] for cells in read_table(tmp_path / "out" / "measured.tsv").rows]
    assert names == ["'=one", "three", "two"]  # no spreadsheet takes it for a formula


def test_people_are_matched_with_and_without_sub_and_by_session(tiny_cohort: Path, tmp_path: Path) -> None:
    study, scans = tmp_path / "study", sorted(tiny_cohort.rglob("*_T1w.nii.gz"))
    for i, name in enumerate(("sub-0_ses-1", "sub-0_ses-2", "sub-1", "sub-2")):
        (study / name.split("_")[0]).mkdir(parents=True, exist_ok=True)
        (study / name.split("_")[0] / f"{name}_T1w.nii.gz").symlink_to(scans[i])
    write_table(study / "participants.tsv", ("participant_id", "v"), [{"participant_id": i, "v": i} for i in range(3)])
    check = check_instrument(study, tmp_path / "out", against="v", instrument=Sum())
    assert check.agreement is not None and check.agreement.bias.n == 4
    write_table(study / "participants.tsv", ("id", "v"), [{"id": "0", "v": 1}])
    with pytest.raises(BadInput, match="has no column 'participant_id'"):
        check_instrument(study, tmp_path / "out", against="v", instrument=Sum())


def test_what_is_known_under_the_instrument_s_own_name_is_not_compared_with_itself(
    tiny_cohort: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    study.mkdir()
    for i, scan in enumerate(sorted(tiny_cohort.rglob("*_T1w.nii.gz"))[:4]):
        (study / f"sub-{i}.nii.gz").symlink_to(scan)
    people = [{"participant_id": f"sub-{i}", "ventricles_mm3": 7 * i} for i in range(4)]
    write_table(study / "participants.tsv", ("participant_id", "ventricles_mm3"), people)
    check = check_instrument(study, tmp_path / "out", against="ventricles_mm3", instrument=Sum())
    found = read_table(tmp_path / "out" / "measured.tsv")
    measured, known = (
        [found.number(row, column) or 0.0 for row in range(4)] for column in ("ventricles_mm3", "ventricles_mm3_known")
    )
    assert known == [0, 7, 14, 21] and min(measured) > 100
    assert check.agreement is not None
    assert check.agreement.bias.value == pytest.approx(sum(measured) / 4 - 10.5)


def test_two_values_of_one_person_are_told_by_line_and_sessions_apart(tiny_cohort: Path, tmp_path: Path) -> None:
    study, scans = tmp_path / "study", sorted(tiny_cohort.rglob("*_T1w.nii.gz"))
    for i in (1, 2):
        (study / "sub-0" / f"ses-{i}").mkdir(parents=True)
        (study / "sub-0" / f"ses-{i}" / f"sub-0_ses-{i}_T1w.nii.gz").symlink_to(scans[i])
    rows = [{"participant_id": name, "session_id": i, "v": v} for name, i, v in (("sub-0", 1, 5), ("0", "ses-2", 6))]
    write_table(study / "participants.tsv", ("participant_id", "v"), rows)
    with pytest.raises(BadInput, match=r"line 3, column 'v': '6' is not what line 2 says"):
        check_instrument(study, tmp_path / "out", against="v", instrument=Sum())
    write_table(study / "participants.tsv", ("participant_id", "v"), [rows[0], rows[0]])
    check_instrument(study, tmp_path / "out", against="v", instrument=Sum())
    write_table(study / "participants.tsv", ("participant_id", "session_id", "v"), rows)
    check_instrument(study, tmp_path / "out", against="v", instrument=Sum())
    found = read_table(tmp_path / "out" / "measured.tsv")
    assert [found.number(row, "v") for row in range(2)] == [5, 6]


def test_the_study_is_only_read(tiny_cohort: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    (study / "sub-0").mkdir(parents=True)
    (study / "sub-0" / "sub-0_T1w.nii.gz").symlink_to(next(tiny_cohort.rglob("*_T1w.nii.gz")))
    before = sorted(study.rglob("*"))
    for out in (study, study / "sub-0", study / "out", study / "derivatives", tmp_path):
        with pytest.raises(UsageError, match="only read"):
            check_instrument(study, out, instrument=Sum())
    with pytest.raises(UsageError, match="0 workers"):
        check_instrument(study, tmp_path / "out", instrument=Sum(), workers=0)
    assert sorted(study.rglob("*")) == before
    assert check_instrument(study, study / "derivatives" / "measured", instrument=Sum()).measured == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ventricles_of_real_people_against_manual_labels(real_data: Path, tmp_path: Path) -> None:
    """What docs/measuring.md says of 17 OASIS brains."""
    check = check_instrument(real_data / "oasis17", tmp_path / "out", against="manual_ventricles_mm3", workers=2)
    assert check.agreement is not None and check.agreement.pearson_r.n == 17
    assert (check.agreement.pearson_r.value or 0) > 0.99
    assert (check.agreement.absolute_error.value or 1e9) < 2200
