"""A BIDS study as people write it: who is found, which scan, whose row, and what is said of everybody else."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.base.files import write_json
from brainldm.cohort.bids import Study, read_study

HEADER = "participant_id\tage\tsex"


def study(folder: Path, table: str | None, *files: str) -> Path:
    """A study of empty files: `read_study` looks at names and tables only."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"x")
    if table is not None:
        (folder / "participants.tsv").write_text(table, encoding="utf-8")
    return folder


def scan_of(*participants: str) -> tuple[str, ...]:
    return tuple(f"{p}/anat/{p}_T1w.nii.gz" for p in participants)


def who(found: Study) -> dict[str, tuple[int, float]]:
    return {s.participant_id: (s.sex, s.age_years) for s in found.scans}


def reasons(found: Study) -> dict[str, str]:
    return {f.participant_id: f.reason for f in found.failures}


def test_a_plain_study(tmp_path: Path) -> None:
    folder = study(
        tmp_path / "oasis", f"{HEADER}\tgroup\nsub-01\t20\tF\ta\nsub-02\t61.5\tM\tb\n", *scan_of("sub-01", "sub-02")
    )
    found = read_study(folder)
    assert who(found) == {"sub-01": (0, 20.0), "sub-02": (1, 61.5)}
    assert found.failures == [] and found.name == "oasis" and found.columns == ("group",)
    assert found.scans[1].others == {"group": "b"}
    assert found.scans[0].file == "sub-01/anat/sub-01_T1w.nii.gz" and found.scans[0].path.is_file()


def test_the_real_study(real_data: Path) -> None:
    found = read_study(real_data / "oasis17")
    assert len(found.scans) == 17 and found.failures == []
    assert all(19 <= s.age_years <= 83 for s in found.scans)
    assert "manual_ventricles_mm3" in found.columns
    assert all(s.mask is None for s in found.scans), "a segmentation is no brain mask"


# -------------------------------------------------------------------------------------------------------- which scan


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["anat/sub-1_run-10_T1w.nii.gz", "anat/sub-1_run-2_T1w.nii.gz"], "anat/sub-1_run-2_T1w.nii.gz"),
        (["ses-b/anat/sub-1_ses-b_T1w.nii", "ses-a/anat/sub-1_ses-a_T1w.nii"], "ses-a/anat/sub-1_ses-a_T1w.nii"),
        (["ses-10/anat/sub-1_ses-10_T1w.nii", "ses-9/anat/sub-1_ses-9_T1w.nii"], "ses-9/anat/sub-1_ses-9_T1w.nii"),
        (["anat/sub-1_acq-x_T1w.nii.gz", "anat/sub-1_T1w.nii.gz"], "anat/sub-1_T1w.nii.gz"),
        (
            ["anat/sub-1_space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz", "anat/sub-1_desc-preproc_T1w.nii.gz"],
            "anat/sub-1_desc-preproc_T1w.nii.gz",
        ),
        (
            ["anat/sub-1_part-phase_T1w.nii.gz", "anat/sub-1_run-1_part-mag_T1w.nii.gz"],
            "anat/sub-1_run-1_part-mag_T1w.nii.gz",
        ),
        (["anat/sub-1_ce-gad_T1w.nii.gz", "anat/sub-1_run-1_T1w.nii.gz"], "anat/sub-1_run-1_T1w.nii.gz"),
    ],
)
def test_one_scan_a_person_by_rule_and_the_others_are_named(files: list[str], chosen: str, tmp_path: Path) -> None:
    others = ["anat/sub-1_T2w.nii.gz", "anat/sub-1_T1w.json", "func/sub-1_task-rest_bold.nii.gz"]
    folder = study(tmp_path, f"{HEADER}\nsub-1\t20\tF\n", *(f"sub-1/{f}" for f in files + others))
    (scan,) = read_study(folder).scans
    assert scan.file == f"sub-1/{chosen}"
    if "part-phase" not in files[0]:
        (note,) = scan.notes
        assert all(f in note for f in files if f != chosen) and "not used" in note


def test_the_space_of_a_derivative_is_known(tmp_path: Path) -> None:
    file = "sub-1/anat/sub-1_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz"
    (scan,) = read_study(study(tmp_path, f"{HEADER}\nsub-1\t20\tF\n", file)).scans
    assert scan.space == "MNI152NLin2009cAsym"


def test_a_scan_in_the_wrong_folder_is_mislabelled(tmp_path: Path) -> None:
    files = (*scan_of("sub-1"), "sub-2/anat/sub-3_T1w.nii.gz", "sub-4/ses-a/anat/sub-4_ses-b_T1w.nii.gz")
    found = read_study(study(tmp_path, f"{HEADER}\nsub-1\t20\tF\nsub-2\t30\tM\nsub-4\t30\tM\n", *files))
    assert list(who(found)) == ["sub-1"]
    assert reasons(found) == {"sub-2": "mislabelled", "sub-4": "mislabelled"}
    assert "sub-3" in found.failures[0].message


def test_an_underscore_in_an_id_is_named_as_what_is_wrong(tmp_path: Path) -> None:
    found = read_study(study(tmp_path, f"{HEADER}\nsub-1\t20\tF\n", *scan_of("sub-1", "sub-crop_top")))
    (failure,) = found.failures
    assert "'crop_top' holds an underscore" in failure.message and "sub-croptop" in failure.remedy


def test_masks_are_found_beside_and_among_the_derivatives(tmp_path: Path) -> None:
    table = f"{HEADER}\n" + "".join(f"sub-{i}\t{20 + i}\tF\n" for i in range(1, 5))
    folder = study(
        tmp_path,
        table,
        *scan_of("sub-1", "sub-2", "sub-3", "sub-4"),
        "derivatives/x/sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        "sub-2/anat/sub-2_desc-brain_mask.nii.gz",
        "derivatives/x/sub-3/anat/sub-3_desc-lesion_mask.nii.gz",
        "derivatives/x/sub-4/anat/sub-4_space-MNI152_desc-brain_mask.nii.gz",
    )
    masks = {s.participant_id: s.mask for s in read_study(folder).scans}
    assert masks["sub-1"] is not None and masks["sub-2"] is not None
    assert masks["sub-3"] is None, "a lesion is no brain"
    assert masks["sub-4"] is None, "that mask lies in another space than the scan"
    runs = study(
        tmp_path / "runs",
        f"{HEADER}\nsub-1\t20\tF\nsub-2\t20\tF\nsub-3\t20\tF\n",
        *(f"sub-{i}/anat/sub-{i}_run-{run}_T1w.nii.gz" for i in (1, 2) for run in (1, 2)),
        "sub-1/anat/sub-1_run-2_desc-brain_mask.nii.gz",
        "sub-2/anat/sub-2_desc-brain_mask.nii.gz",
        "sub-2/anat/sub-2_run-1_desc-brain_mask.nii.gz",
        "sub-3/ses-a/anat/sub-3_ses-a_T1w.nii.gz",
        "sub-3/ses-a/anat/sub-3_desc-brain_mask.nii.gz",
    )
    of_runs = {s.participant_id: s.mask for s in read_study(runs).scans}
    assert of_runs["sub-1"] is None, "that mask is of the run that is not used"
    assert of_runs["sub-2"] is not None and of_runs["sub-2"].name == "sub-2_run-1_desc-brain_mask.nii.gz"
    assert of_runs["sub-3"] is not None, "the folder names the session"
    given_masks = study(tmp_path / "m", None, "sub-1_mask.nii.gz", "sub-3/anat/sub-3_desc-brain_mask.nii.gz")
    assert len(read_study(folder, masks=given_masks).scans) == 4
    found = read_study(folder, masks=given_masks, need_masks=True)
    assert {s.participant_id for s in found.scans} == {"sub-1", "sub-3"}
    assert reasons(found) == {"sub-2": "missing_mask", "sub-4": "missing_mask"}
    with pytest.raises(BadInput, match="folder of masks"):
        read_study(folder, masks=tmp_path / "none")


# -------------------------------------------------------------------------------------------------------------- people


@pytest.mark.parametrize(
    ("in_table", "on_disk"),
    [
        ("01", "sub-01"),
        ("sub-01", "sub-01"),
        ("1", "sub-01"),
        ("001", "sub-1"),
        ("sub-1", "sub-0001"),
        ("SUB-01", "sub-01"),
        ("a7", "sub-a7"),
    ],
)
def test_ids_are_matched_without_prefix_and_padding(in_table: str, on_disk: str, tmp_path: Path) -> None:
    """Fault 30"""
    found = read_study(study(tmp_path, f"{HEADER}\n{in_table}\t20\tF\n", *scan_of(on_disk)))
    assert who(found) == {on_disk: (0, 20.0)}
    assert found.failures == []
    exact = in_table in (on_disk, on_disk[4:])
    assert any("matched to" in n for n in found.scans[0].notes) is not exact


def test_an_exact_id_comes_before_a_padded_one_and_doubt_is_no_match(tmp_path: Path) -> None:
    """Fault 30"""
    table = f"{HEADER}\nsub-1\t20\tF\nsub-01\t30\tM\n"
    found = read_study(study(tmp_path / "a", table, *scan_of("sub-1", "sub-01")))
    assert who(found) == {"sub-1": (0, 20.0), "sub-01": (1, 30.0)}
    found = read_study(study(tmp_path / "b", f"{table}sub-2\t40\tF\n", *scan_of("sub-001", "sub-2")))
    assert list(who(found)) == ["sub-2"]
    assert reasons(found)["sub-001"] == "ambiguous_id"


def test_one_accent_written_in_two_ways_is_one_person(tmp_path: Path) -> None:
    name = "sub-é"
    folder = study(tmp_path, f"{HEADER}\n{unicodedata.normalize('NFD', name)}\t20\tF\n", *scan_of(name))
    assert len(read_study(folder).scans) == 1


def test_doubled_rows(tmp_path: Path) -> None:
    """Fault 30"""
    table = f"{HEADER}\nsub-1\t20\t0\nsub-1\t20.0\t0.0\nsub-2\t20\tF\nsub-2\t21\tF\nsub-3\t50\tM\n"
    found = read_study(study(tmp_path, table, *scan_of("sub-1", "sub-2", "sub-3")))
    assert set(who(found)) == {"sub-1", "sub-3"}
    assert any("lines 2, 3" in n for n in found.scans[0].notes)
    (failure,) = found.failures
    assert failure.reason == "duplicate_rows" and "lines 4, 5" in failure.message


def test_doubled_rows_say_the_same_only_where_they_do(tmp_path: Path) -> None:
    rows = f"{HEADER}\tgroup\tventricles_mm3\nsub-1\t20\tF\ta\t20000\nsub-1\t20\tF\tA\t30000\nsub-2\t30\tM\tb\t1\n"
    folder = study(tmp_path, rows, *scan_of("sub-1", "sub-2"))
    found = read_study(folder)
    assert found.scans[0].notes == ("lines 2, 3 of the table differ in ventricles_mm3: taken from line 2",)
    found = read_study(folder, used_columns=["ventricles_mm3"])
    assert list(who(found)) == ["sub-2"] and reasons(found) == {"sub-1": "duplicate_rows"}
    assert "different values of ventricles_mm3" in found.failures[0].message


def test_rows_of_sessions_belong_to_their_session(tmp_path: Path) -> None:
    table = "participant_id\tsession_id\tage\tsex\nsub-1\tses-a\t60\tF\nsub-1\tses-b\t65\tF\n"
    found = read_study(study(tmp_path, table, "sub-1/ses-b/anat/sub-1_ses-b_T1w.nii.gz"))
    assert who(found) == {"sub-1": (0, 65.0)} and found.failures == []
    padded = table.replace("ses-b", "2")
    found = read_study(study(tmp_path / "padded", padded, "sub-1/ses-02/anat/sub-1_ses-02_T1w.nii.gz"))
    assert who(found) == {"sub-1": (0, 65.0)}
    found = read_study(
        study(
            tmp_path / "other",
            table + "sub-2\tn/a\t50\tM\n",
            "sub-1/ses-c/anat/sub-1_ses-c_T1w.nii.gz",
            "sub-2/ses-c/anat/sub-2_ses-c_T1w.nii.gz",
        )
    )
    assert who(found) == {"sub-2": (1, 50.0)} and reasons(found) == {"sub-1": "not_in_table"}
    assert "no row for session ses-c; rows name ses-a, ses-b" in found.failures[0].message


def test_a_session_with_a_row_is_preferred(tmp_path: Path) -> None:
    table = "participant_id\tsession_id\tage\tsex\nsub-2\tses-2\t60\tF\n"
    files = [f"sub-2/ses-{s}/anat/sub-2_ses-{s}_T1w.nii.gz" for s in (1, 2, 3)]
    (scan,) = read_study(study(tmp_path, table, *files)).scans
    assert (scan.file, scan.age_years) == (files[1], 60)


def test_the_age_at_a_session_is_that_of_its_own_table(tmp_path: Path) -> None:
    people = "".join(f"sub-{i}\t60\tF\tg\n" for i in range(1, 7))
    files = [f"sub-{i}/ses-2/anat/sub-{i}_ses-2_T1w.nii.gz" for i in range(1, 7)]
    folder = study(tmp_path, f"{HEADER}\tgroup\n{people}", *files)
    rows = {
        1: "session_id\tAge\tgroup\nses-1\t60\tg\nses-2\t65.5\th\n",
        2: "session_id\tage\n02\t650\n",
        3: "session_id\tage\nses-2\tn/a\n",
        4: "session_id\tage\nses-1\t61\n",
        5: "session_id\tage_years\nses-2\t780\n",
    }
    for index, content in rows.items():
        (folder / f"sub-{index}" / f"sub-{index}_sessions.tsv").write_text(content)
    write_json(folder / "sub-5" / "sub-5_sessions.json", {"age_years": {"Units": "months"}})
    found = read_study(folder)
    assert who(found) == {"sub-1": (0, 65.5), "sub-3": (0, 60), "sub-4": (0, 60), "sub-6": (0, 60)}
    assert reasons(found) == {"sub-2": "bad_cell", "sub-5": "bad_unit"}
    assert "sub-2_sessions.tsv" in found.failures[0].message and "'650'" in found.failures[0].message
    notes = {s.participant_id: s.notes for s in found.scans}
    assert notes["sub-1"] == ("sub-1_sessions.tsv gives age, group of ses-2",)
    assert notes["sub-3"] == ("sub-3_sessions.tsv has no age: taken from participants.tsv",)
    assert notes["sub-4"] == notes["sub-6"] == () and found.scans[0].others == {"group": "h"}


def test_ages_may_be_in_the_tables_of_sessions_alone(tmp_path: Path) -> None:
    files = [f"sub-{i}/ses-2/anat/sub-{i}_ses-2_T1w.nii.gz" for i in (1, 2)]
    folder = study(tmp_path, "participant_id\tsex\nsub-1\tF\nsub-2\tM\n", *files)
    (folder / "sub-1" / "sub-1_sessions.tsv").write_text("session_id\tage\nses-2\t65\n")
    found = read_study(folder)
    assert who(found) == {"sub-1": (0, 65)} and reasons(found) == {"sub-2": "missing_age"}


def test_people_without_a_scan_or_without_a_row_are_listed(tmp_path: Path) -> None:
    """Fault 30"""
    table = f"{HEADER}\nsub-1\t20\tF\nsub-2\t30\tM\n"
    found = read_study(study(tmp_path, table, *scan_of("sub-1", "sub-3")))
    assert list(who(found)) == ["sub-1"]
    assert reasons(found) == {"sub-2": "no_scan", "sub-3": "not_in_table"}
    assert all(f.message and f.remedy for f in found.failures)


@pytest.mark.parametrize("column", ["age", "Age", "age_years", "AGE", "age_at_scan", "Age at scan"])
@pytest.mark.parametrize("sex_column", ["sex", "Sex", "gender"])
@pytest.mark.parametrize("id_column", ["participant_id", "Participant_ID"])
def test_columns_have_many_names(column: str, sex_column: str, id_column: str, tmp_path: Path) -> None:
    table = f"{id_column}\t{column}\t{sex_column}\textra\nsub-1\t20\tF\tx\n"
    found = read_study(study(tmp_path, table, *scan_of("sub-1")))
    assert who(found) == {"sub-1": (0, 20.0)}
    assert found.columns == ("extra",)


def test_the_age_at_the_scan_counts_more_than_one_at_enrolment(tmp_path: Path) -> None:
    columns = "participant_id\tage\tage_years\tsex\tAge_at_scan"
    rows = ["sub-1\t60\t60\tF\t65.5", "sub-2\t60\t60\tF\t60.0", "sub-3\t60\t61\tF\tn/a", "sub-4\tn/a\tn/a\tF\tn/a"]
    folder = study(tmp_path, "\n".join([columns, *rows]) + "\n", *scan_of(*(f"sub-{i}" for i in range(1, 5))))
    found = read_study(folder)
    assert who(found) == {"sub-1": (0, 65.5), "sub-2": (0, 60), "sub-3": (0, 61)}
    assert [s.notes for s in found.scans] == [
        ("took Age_at_scan, 65.5 (age_years is 60, age is 60)",),
        (),
        ("took age_years, 61 (Age_at_scan is n/a, age is 60)",),
    ]
    assert reasons(found) == {"sub-4": "missing_age"}
    write_json(folder / "participants.json", {"age_at_scan": {"Units": "months"}, "age": {"Units": "weeks"}})
    assert who(read_study(folder)) == {"sub-1": (0, 60), "sub-2": (0, 60), "sub-3": (0, 61)}


def test_of_columns_alike_the_exact_name_counts_and_two_that_differ_are_refused(tmp_path: Path) -> None:
    people = study(tmp_path / "a", "participant_id\tAGE\tage\tsex\nsub-1\t240\t20\tF\n", *scan_of("sub-1"))
    assert who(read_study(people)) == {"sub-1": (0, 20.0)}
    people = study(tmp_path / "b", "participant_id\tAGE\tAge\tsex\nsub-1\t20\t20.0\tF\n", *scan_of("sub-1"))
    assert who(read_study(people)) == {"sub-1": (0, 20.0)}
    people = study(tmp_path / "c", "participant_id\tAGE\tAge\tsex\nsub-1\t20\t21\tF\n", *scan_of("sub-1"))
    with pytest.raises(BadInput, match=r"line 2, column 'Age': '21' differs from column 'AGE': '20'"):
        read_study(people)


@pytest.mark.parametrize(
    ("cell", "sex"),
    [
        *(("F", 0), ("f", 0), ("female", 0), ("Female", 0), ("0", 0), ("0.0", 0), ("woman", 0)),
        *(("M", 1), ("m", 1), ("MALE", 1), ("1", 1), ("1.0", 1), ("Boy", 1)),
    ],
)
def test_codes_of_sex(cell: str, sex: int, tmp_path: Path) -> None:
    found = read_study(study(tmp_path, f"{HEADER}\nsub-1\t20\t{cell}\n", *scan_of("sub-1")))
    assert who(found)["sub-1"][0] == sex


def test_the_studys_own_levels_explain_its_codes(tmp_path: Path) -> None:
    folder = study(tmp_path, f"{HEADER}\nsub-1\t20\t1\nsub-2\t30\t2\n", *scan_of("sub-1", "sub-2"))
    with pytest.raises(BadInput, match="2 of 3 people") as unexplained:  # 1 and 2 mean either, to somebody
        read_study(folder_with_third(folder))
    assert "Levels" in unexplained.value.remedy
    for levels in (
        {"1": "Male participant", "2": "female"},
        {"1": {"Description": "male"}, "2": {"Description": "Sex: female"}},
        {"1": "Man", "2": "Woman"},
        {"1": "boy", "2": "girl"},
    ):
        for key in ("sex", "Sex"):
            write_json(folder / "participants.json", {key: {"Levels": levels}})
            found = who(read_study(folder))
            assert (found["sub-1"][0], found["sub-2"][0]) == (1, 0)
    for levels in ({"1": "Mann", "2": "Frau"}, {"1": "not female", "2": "non-male"}, {"1": "male or female", "2": ""}):
        write_json(folder / "participants.json", {"sex": {"Levels": levels}})
        with pytest.raises(BadInput, match="cannot be read"):
            read_study(folder)


def test_levels_are_found_under_the_column_s_name_in_any_case(tmp_path: Path) -> None:
    """1 alone would be read as male."""
    folder = study(tmp_path, f"{HEADER}\nsub-1\t20\t1\n", *scan_of("sub-1"))
    write_json(folder / "participants.json", {"Sex": {"Levels": {"1": "female", "2": "male"}}})
    assert who(read_study(folder)) == {"sub-1": (0, 20.0)}


def test_a_zero_that_the_study_calls_something_unknown_is_nobody_s_sex(tmp_path: Path) -> None:
    people = f"{HEADER}\nsub-1\t20\t0\nsub-2\t20\tF\nsub-3\t20\tM\n"
    folder = study(tmp_path, people, *scan_of("sub-1", "sub-2", "sub-3"))
    write_json(folder / "participants.json", {"sex": {"Levels": {"0": "Mann", "F": "Frau", "M": "Mann"}}})
    found = read_study(folder)
    assert who(found) == {"sub-2": (0, 20.0), "sub-3": (1, 20.0)} and reasons(found) == {"sub-1": "bad_cell"}


def test_one_row_is_not_two_people_s(tmp_path: Path) -> None:
    found = read_study(study(tmp_path / "a", f"{HEADER}\n1\t20\tF\n", *scan_of("sub-1", "sub-01")))
    assert list(who(found)) == ["sub-1"] and reasons(found) == {"sub-01": "not_in_table"}


def test_a_folder_that_cannot_be_read_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = study(tmp_path, f"{HEADER}\nsub-1\t20\tF\n", *scan_of("sub-1"))

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("brainldm.cohort.bids.find_images", denied)
    with pytest.raises(EnvironmentProblem, match="Permission denied"):
        read_study(folder)


def folder_with_third(folder: Path) -> Path:
    """One more good person, so that one bad cell of three is a person's fault and not the table's."""
    table = (folder / "participants.tsv").read_text() + "sub-3\t30\tF\n"
    return study(folder, table, *scan_of("sub-3"))


GOOD_PEOPLE = "".join(f"sub-{i}\t{20 + i}\tF\n" for i in range(1, 8))


@pytest.mark.parametrize(
    ("row", "reason", "parts"),
    [
        ("n/a\tF", "missing_age", ["line 9", "'age'"]),
        ("\tF", "missing_age", ["line 9", "'age'"]),
        ("33\tn/a", "missing_sex", ["line 9", "'sex'"]),
        ("61,5\tF", "bad_cell", ["line 9", "'age'", "'61,5'"]),
        ("old\tF", "bad_cell", ["line 9", "'age'", "'old'"]),
        ("1e400\tF", "bad_cell", ["line 9", "'age'", "'1e400'"]),
        ("-3\tF", "bad_cell", ["line 9", "'age'", "'-3'"]),
        ("410\tF", "bad_cell", ["line 9", "'age'", "'410'"]),
        ("89+\tF", "bad_cell", ["line 9", "'age'", "'89+'"]),
        ("33\tX", "bad_cell", ["line 9", "'sex'", "'X'"]),
        ("33\t2", "bad_cell", ["line 9", "'sex'", "'2'"]),
    ],
)
@pytest.mark.parametrize("saved", ["plain", "BOM and CRLF"])
def test_a_bad_cell_costs_its_person_and_is_located(
    row: str, reason: str, parts: list[str], saved: str, tmp_path: Path
) -> None:
    """Faults 31 and 32"""
    table = f"{HEADER}\n{GOOD_PEOPLE}sub-8\t{row}\n"
    folder = study(tmp_path, table, *scan_of(*(f"sub-{i}" for i in range(1, 9))))
    if saved != "plain":
        (folder / "participants.tsv").write_bytes(b"\xef\xbb\xbf" + table.replace("\n", "\r\n").encode())
    found = read_study(folder)
    assert len(found.scans) == 7
    (failure,) = found.failures
    assert (failure.participant_id, failure.reason) == ("sub-8", reason)
    assert all(part in failure.message for part in (*parts, "participants.tsv"))
    assert str(tmp_path) not in failure.message, "where the study lies is not written into the cohort"
    assert failure.remedy


def test_a_table_wrong_throughout_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    """Everybody's decimal comma is the table's fault: better said in a second than after a night."""
    table = HEADER + "\n" + "".join(f"sub-{i}\t{20 + i},5\tF\n" for i in range(1, 6))
    with pytest.raises(BadInput, match=r"5 of 5 people.*line 2.*'21,5'") as caught:
        read_study(study(tmp_path, table, *scan_of(*(f"sub-{i}" for i in range(1, 6)))))
    assert caught.value.remedy and caught.value.exit_code == 3


def test_nobody_usable_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none of 2 people.*sub-1.*'age'") as caught:
        read_study(study(tmp_path, f"{HEADER}\nsub-1\tn/a\tF\nsub-2\tn/a\tF\n", *scan_of("sub-1", "sub-2")))
    assert caught.value.reason == "missing_age"


@pytest.mark.parametrize("column", ["participant_id", "age", "sex"])
def test_a_missing_column_is_named_with_those_present(column: str, tmp_path: Path) -> None:
    """Fault 29"""
    table = f"{HEADER}\nsub-1\t20\tF\n".replace(column, "renamed")
    with pytest.raises(BadInput, match=r"its columns are: .*renamed") as caught:
        read_study(study(tmp_path, table, *scan_of("sub-1")))
    assert column in str(caught.value) and caught.value.reason == "missing_column"


@pytest.mark.parametrize("key", ["age", "Age"])
@pytest.mark.parametrize("unit", ["months", "in months", "Age in months", "months (at scan)", "Weeks", "d"])
def test_ages_in_months_are_refused(key: str, unit: str, tmp_path: Path) -> None:
    """Fault 29: the unit."""
    folder = study(tmp_path, f"{HEADER}\nsub-1\t20\tF\n", *scan_of("sub-1"))
    write_json(folder / "participants.json", {key: {"Units": unit}})
    with pytest.raises(BadInput, match=unit.split()[0]):
        read_study(folder)


@pytest.mark.parametrize("unit", ["years", "yr", "year, rounded to months", "", "age at scan"])
def test_ages_in_years_are_not(unit: str, tmp_path: Path) -> None:
    folder = study(tmp_path, f"{HEADER}\nsub-1\t20\tF\n", *scan_of("sub-1"))
    write_json(folder / "participants.json", {"age": {"Units": unit}})
    assert who(read_study(folder)) == {"sub-1": (0, 20.0)}


# --------------------------------------------------------------------------------------------------------- not a study


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["sub-*/anat/*_T1w.nii", "empty"]),
        (["a.nii.gz", "b.nii.gz"], ["sub-*/anat/*_T1w.nii", "a.nii.gz"]),
        (["sub-1/anat/sub-1_T2w.nii.gz"], ["sub-1_T2w"]),
        (["x/IM001.dcm"], ["DICOM", "dcm2niix"]),
        (["study.zip"], ["Unpack", "dcm2niix"]),
        (["sub-1/anat/sub-1_T1w.NII.GZ"], ["sub-1/anat/sub-1_T1w.NII.GZ", "rename"]),
        (["sub-1/anat/sub-1_T1w.mgz", "a.mgz"], ["2 other images", "sub-1/anat/sub-1_T1w.mgz", "mri_convert"]),
        (["derivatives/fmriprep/sub-1/anat/sub-1_desc-preproc_T1w.nii.gz"], ["derivatives/fmriprep"]),
    ],
)
def test_what_is_no_study_is_told_what_was_looked_for(files: list[str], words: list[str], tmp_path: Path) -> None:
    folder = study(tmp_path / "s", f"{HEADER}\nsub-1\t20\tF\n" if files else None, *files)
    folder.mkdir(exist_ok=True)
    with pytest.raises(BadInput) as caught:
        read_study(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.exit_code == 3


def test_dicom_without_a_suffix_is_known_by_its_content(tmp_path: Path) -> None:
    """Fault 27"""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "IM0001").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 100)
    for path in (tmp_path / "s", tmp_path / "s" / "IM0001"):
        with pytest.raises(BadInput, match="dcm2niix"):
            read_study(path)


@pytest.mark.parametrize(
    ("name", "word"), [("none", "no such folder"), ("a.zip", "dcm2niix"), ("a.nii.gz", "BIDS folder")]
)
def test_what_is_no_folder_is_refused(name: str, word: str, tmp_path: Path) -> None:
    if name != "none":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match=word):
        read_study(tmp_path / name)


def test_a_study_without_its_table_is_refused(tmp_path: Path) -> None:
    """Fault 29"""
    folder = study(tmp_path, None, *scan_of("sub-1"), "people.csv")
    with pytest.raises(BadInput, match=r"participants\.tsv.*people\.csv"):
        read_study(folder)


def test_links_that_loop_and_folders_named_as_scans_do_no_harm(tmp_path: Path) -> None:
    """Fault 26"""
    folder = study(tmp_path, f"{HEADER}\nsub-1\t20\tF\nsub-2\t20\tF\n", *scan_of("sub-1"))
    (folder / "sub-2" / "anat" / "sub-2_T1w.nii.gz").mkdir(parents=True)
    (folder / "sub-3").symlink_to(folder, target_is_directory=True)
    (folder / "sub-4").symlink_to(folder / "sub-4")
    found = read_study(folder)
    assert list(who(found)) == ["sub-1", "sub-2"]  # reading sub-2 will say what it is


cell = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n"), max_size=8)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.sampled_from(["sub-1", "1", "01", "sub-2", "", "x"]), cell, cell), max_size=5))
def test_any_table_gives_people_or_reasons(rows: list[tuple[str, str, str]], tmp_path: Path) -> None:
    study(tmp_path, None, *scan_of("sub-1", "sub-2"))
    lines = ["\t".join(row) for row in rows]
    (tmp_path / "participants.tsv").write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    try:
        found = read_study(tmp_path)
    except BadInput as error:
        assert str(error)
        return
    assert {s.participant_id for s in found.scans} | set(reasons(found)) >= {"sub-1", "sub-2"}
    assert all(0 <= s.age_years <= 125 and s.sex in (0, 1) for s in found.scans)
