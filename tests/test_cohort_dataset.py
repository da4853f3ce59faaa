"""A prepared cohort as training sees it, its faults before the first step, and intensities in 0..1."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from brainldm.base.errors import BadInput, EnvironmentProblem, UsageError
from brainldm.base.files import locked_folder, read_json, sha256_of, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import write_nifti
from brainldm.base.tables import write_table
from brainldm.base.volume import Grid
from brainldm.cohort.dataset import (
    FORMAT,
    KIND,
    PreparedCohort,
    VolumeDataset,
    check_trainable,
    data_order,
)
from brainldm.cohort.normalise import background_at_zero, is_masked, unit_range
from brainldm.cohort.split import Split

GRID = Grid("small", (9, 8, 10), 8.0, (-32.0, -28.0, -36.0))


def image_of(index: int) -> np.ndarray:
    return np.rint(np.random.default_rng(index).random(GRID.shape_XYZ) * 32767) / 32767


def write_cohort(folder: Path, people: int = 6) -> Path:
    """A cohort as `prepare` leaves it: four fifths train, then one validation."""
    manifest, rows = Manifest(folder / "manifest.jsonl"), []
    for index in range(people):
        name = f"sub-{index}"
        file = f"{name}/anat/{name}_space-MNI152rigid_T1w.nii.gz"
        written = write_nifti(folder / file, image_of(index), GRID.affine, dtype="int16_unit")
        manifest.append(index=index, participant_id=name, file=file, bytes=written.bytes, sha256=written.sha256)
        rows.append(
            {
                "participant_id": name,
                "age_years": 40.5 + index,
                "sex": "FM"[index % 2],
                "ventricles_mm3": 2e4 + index,
                "brain_mm3": 1.3e6 - index,
                "split": "validation" if index == people - 1 else "train",
            }
        )
    write_table(folder / "participants.tsv", tuple(rows[0]), rows)
    write_json(
        folder / "prepared.json",
        {
            "kind": KIND,
            "format": FORMAT,
            "name": "somebody",
            "licence": "CC0",
            "grid": GRID.to_json(),
            "preprocessing": {"skull_stripped": True},
            "config": {},
            "finished": True,
        },
    )
    return folder


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return write_cohort(tmp_path / "cohort")


def test_a_cohort_gives_rows_and_images(cohort: Path) -> None:
    opened = PreparedCohort.open(cohort)
    assert (opened.name, opened.licence, opened.grid) == ("somebody", "CC0", GRID)
    assert [r.participant_id for r in opened.rows("train")] == [f"sub-{i}" for i in range(5)]
    assert len(opened.rows()) == 6 and len(opened.rows("test")) == 0
    first = opened.rows()[0].covariates
    assert (first.sex, first.age_years, first.ventricles_mm3, first.brain_mm3) == (0, 40.5, 2e4, 1.3e6)
    dataset = VolumeDataset(opened, "train")
    assert len(dataset) == 5 and dataset.names[3] == "sub-3"
    for index in (3, 0, 3):
        image = dataset.image_XYZ(index)
        assert image.dtype == np.float32 and image.shape == GRID.shape_XYZ
        np.testing.assert_allclose(image, image_of(index), atol=1e-7)
        image[:] = 0  # the caller's own array


@pytest.mark.parametrize("cache_bytes", [0, 2 * 9 * 8 * 10 * 2, 1 << 30])
def test_what_is_in_memory_changes_no_voxel(cohort: Path, cache_bytes: int) -> None:
    dataset = VolumeDataset(PreparedCohort.open(cohort), cache_bytes=cache_bytes)
    first = [dataset.image_XYZ(i) for i in range(len(dataset))]
    again = [dataset.image_XYZ(i) for i in range(len(dataset))]
    np.testing.assert_array_equal(first, again)
    assert len(dataset._cache) == min(6, cache_bytes // (2 * 720))


def test_a_cached_image_needs_its_file_no_more(cohort: Path) -> None:
    dataset = VolumeDataset(PreparedCohort.open(cohort))
    before = dataset.image_XYZ(0)
    dataset.rows[0].path.unlink()
    np.testing.assert_array_equal(dataset.image_XYZ(0), before)
    dataset.rows[1].path.unlink()
    with pytest.raises(BadInput, match="gone"):
        dataset.image_XYZ(1)


def test_a_changed_image_is_found_at_first_reading(cohort: Path) -> None:
    """Fault 4"""
    opened = PreparedCohort.open(cohort)
    path = opened.rows()[2].path
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 1  # the time in the gzip header: not one voxel differs
    path.write_bytes(damaged)
    with pytest.raises(BadInput, match="checksum") as caught:
        VolumeDataset(opened).image_XYZ(2)
    assert caught.value.path == path and caught.value.remedy


def test_an_image_on_another_grid_is_refused(cohort: Path) -> None:
    opened = PreparedCohort.open(cohort)
    row = opened.rows()[0]
    written = write_nifti(row.path, image_of(0), GRID.affine + np.eye(4), dtype="int16_unit")
    Manifest(cohort / "manifest.jsonl").append(
        index=0,
        participant_id="sub-0",
        file=str(row.path.relative_to(cohort)),
        bytes=written.bytes,
        sha256=written.sha256,
    )
    with pytest.raises(BadInput, match="grid"):
        VolumeDataset(PreparedCohort.open(cohort)).image_XYZ(0)


def test_the_digest_changes_with_whatever_matters(cohort: Path, tmp_path: Path) -> None:
    digest = PreparedCohort.open(cohort).digest
    assert digest == PreparedCohort.open(shutil.copytree(cohort, tmp_path / "copy")).digest
    table = (cohort / "participants.tsv").read_text()
    for old, new in (("40.5", "41"), ("validation", "train"), ("\tF\t", "\tM\t")):
        (cohort / "participants.tsv").write_text(table.replace(old, new, 1))
        assert PreparedCohort.open(cohort).digest != digest


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda c: shutil.rmtree(c), "no such folder"),
        (lambda c: (c / "prepared.json").unlink(), "no prepared.json"),
        (lambda c: (c / "prepared.json").write_text("{"), "not valid JSON"),
        (lambda c: (c / "prepared.json").write_text("[]"), "does not describe"),
        (lambda c: (c / "prepared.json").write_text('{"kind": "a model"}'), "does not describe"),
        (lambda c: changed(c, format=99), "99"),
        (lambda c: changed(c, finished=False), "interrupted"),
        (lambda c: changed(c, grid={"name": "x"}), "grid"),
        (lambda c: (c / "participants.tsv").unlink(), "no such table"),
        (lambda c: edited(c, "participant_id", "id"), "'participant_id'"),
        (lambda c: edited(c, "ventricles_mm3", "v"), "'ventricles_mm3'"),
        (lambda c: edited(c, "40.5", "40,5"), "line 2.*'age_years'"),
        (lambda c: edited(c, "20000", "n/a"), "line 2.*'ventricles_mm3'"),
        (lambda c: edited(c, "\tF\t", "\tX\t"), "line 2.*'sex'"),
        (lambda c: edited(c, "validation", "holdout"), "line 7.*'split'"),
        (lambda c: edited(c, "40.5", "300"), "line 2.*'age_years'.*0 to 125"),
        (lambda c: edited(c, "20000", "0"), "line 2.*'ventricles_mm3'.*500"),
        (lambda c: edited(c, "1300000", "1300"), "line 2.*'brain_mm3'.*millilitres"),
        (lambda c: edited(c, "sub-4", "sub-1"), "line 6.*'sub-1' is in line 3"),
        (lambda c: changed(c, config=None), "config"),
        (lambda c: changed(c, preprocessing=[]), "preprocessing"),
        (lambda c: Manifest(c / "manifest.jsonl").rewrite([{"participant_id": "sub-0", "sha256": "0"}]), "sub-0.*line"),
        (lambda c: edited(c, "sub-1", "sub-9"), "sub-9.*manifest"),
        (lambda c: next(c.glob("sub-2/anat/*")).unlink(), "sub-2.*lacks its image"),
        (lambda c: next(c.glob("sub-2/anat/*")).write_bytes(b"x"), "sub-2.*lacks its image"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(damage, word: str, cohort: Path) -> None:  # type: ignore[no-untyped-def]
    damage(cohort)
    with pytest.raises(BadInput, match=word):
        PreparedCohort.open(cohort)


def changed(cohort: Path, **fields: object) -> None:
    write_json(cohort / "prepared.json", read_json(cohort / "prepared.json") | fields)


def edited(cohort: Path, old: str, new: str) -> None:
    path = cohort / "participants.tsv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_grids_survive_json() -> None:
    assert Grid.from_json(GRID.to_json()) == GRID


def test_the_order_of_data_is_two_numbers() -> None:
    order = data_order(0, 3, 100)
    assert sorted(order) == list(range(100))
    np.testing.assert_array_equal(order, data_order(0, 3, 100))
    for other in (data_order(0, 4, 100), data_order(1, 3, 100)):
        assert (order != other).any()
    assert data_order(0, 0, 1).tolist() == [0]


@pytest.mark.parametrize(("people", "batch", "word"), [(1, 1, "0 images"), (2, 1, "1 image;"), (6, 6, "batch of 6.*5")])
def test_what_cannot_be_trained_on_is_said_before_the_start(people: int, batch: int, word: str, tmp_path: Path) -> None:
    """Fault 34"""
    dataset = VolumeDataset(PreparedCohort.open(write_cohort(tmp_path / "c", people)), "train")
    with pytest.raises(UsageError, match=word) as caught:
        check_trainable(dataset, batch)
    assert caught.value.remedy
    check_trainable(VolumeDataset(PreparedCohort.open(write_cohort(tmp_path / "d", 6)), "train"), 5)


# ------------------------------------------------------------------------------------------------------- uncompressed


def uncompressed(cohort: Path, folder: Path, split: Split | None = "train") -> VolumeDataset:
    dataset = VolumeDataset(PreparedCohort.open(cohort), split, cache_bytes=0)
    dataset.keep_uncompressed(folder)
    return dataset


def epoch_of(dataset: VolumeDataset) -> list[np.ndarray]:
    return [dataset.image_XYZ(i) for i in range(len(dataset))]


@pytest.mark.parametrize("split", ["train", None])
def test_uncompressed_images_are_the_same_to_the_bit(cohort: Path, tmp_path: Path, split: Split | None) -> None:
    inflated = epoch_of(VolumeDataset(PreparedCohort.open(cohort), split))
    mapped = uncompressed(cohort, tmp_path / "cache", split)
    for _ in range(2):
        for a, b in zip(inflated, epoch_of(mapped), strict=True):
            np.testing.assert_array_equal(a, b)
            b[:] = 0  # an array of the caller's own
    file = tmp_path / "cache" / f"{split or 'all'}.int16"
    assert file.stat().st_size == len(mapped) * 2 * 720


def test_what_is_uncompressed_is_used_again_and_the_scans_are_not_read(cohort: Path, tmp_path: Path) -> None:
    before = epoch_of(uncompressed(cohort, tmp_path / "cache"))
    written = (tmp_path / "cache" / "train.int16").stat().st_mtime_ns
    again = uncompressed(cohort, tmp_path / "cache")
    for row in again.rows:
        row.path.unlink()
    np.testing.assert_array_equal(epoch_of(again), before)
    assert (tmp_path / "cache" / "train.int16").stat().st_mtime_ns == written


def test_another_cohort_in_the_folder_is_removed_and_written_anew(cohort: Path, tmp_path: Path) -> None:
    uncompressed(cohort, tmp_path / "cache")
    edited(cohort, "40.5", "41")  # the digest is another, the images are not
    sha256 = sha256_of(tmp_path / "cache" / "train.int16")
    old = (tmp_path / "cache" / "train.jsonl").read_text()
    assert len(epoch_of(uncompressed(cohort, tmp_path / "cache"))) == 5
    assert sha256_of(tmp_path / "cache" / "train.int16") == sha256
    assert (tmp_path / "cache" / "train.jsonl").read_text() != old
    assert PreparedCohort.open(cohort).digest in (tmp_path / "cache" / "train.jsonl").read_text()


@pytest.mark.parametrize("name", ["train.jsonl", "train.int16"])
@pytest.mark.parametrize("content", ["", '{"text": "years of work"}\n', '{"key": 7}\n'])
def test_what_is_no_cache_is_left_alone(name: str, content: str, cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_text(content)
    with pytest.raises(UsageError, match=f"holds other things: its {name}") as caught:
        uncompressed(cohort, tmp_path / "corpus")
    assert "another folder" in caught.value.remedy
    assert [(p.name, p.read_text()) for p in (tmp_path / "corpus").iterdir()] == [(name, content)]


def test_a_killed_writing_is_gone_on_with(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with two images listed and a third half written: three more are read, none of the first two again."""
    whole = epoch_of(uncompressed(cohort, tmp_path / "cache"))
    data, lines = tmp_path / "cache" / "train.int16", tmp_path / "cache" / "train.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:3]) + '{"index": 2, "sou')
    with data.open("rb+") as file:
        file.truncate(5 * 720)
    read, inflated = VolumeDataset._read, []
    monkeypatch.setattr(VolumeDataset, "_read", lambda self, row: inflated.append(row) or read(self, row))
    np.testing.assert_array_equal(epoch_of(uncompressed(cohort, tmp_path / "cache")), whole)
    assert [row.participant_id for row in inflated] == ["sub-2", "sub-3", "sub-4"]


def test_a_damaged_scan_is_not_made_a_cache_of(cohort: Path, tmp_path: Path) -> None:
    path = PreparedCohort.open(cohort).rows()[2].path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match="checksum") as caught:
        uncompressed(cohort, tmp_path / "cache")
    assert caught.value.path == path


def test_a_damaged_cache_is_read_from_the_cohort_again(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 47"""
    whole = epoch_of(uncompressed(cohort, tmp_path / "cache"))
    data = tmp_path / "cache" / "train.int16"
    sha256, content = sha256_of(data), bytearray(data.read_bytes())
    content[1 * 2 * 720] ^= 1
    content[3 * 2 * 720] ^= 1
    data.write_bytes(content)
    np.testing.assert_array_equal(epoch_of(uncompressed(cohort, tmp_path / "cache")), whole)
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and f"{data}: image 1 differs" in told
    assert sha256_of(data) == sha256
    np.testing.assert_array_equal(epoch_of(uncompressed(cohort, tmp_path / "cache")), whole)
    assert capsys.readouterr().err == ""


def test_no_room_is_said_before_the_first_image(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 2 * 720 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentProblem, match="5 uncompressed images take") as caught:
        uncompressed(cohort, tmp_path / "cache")
    assert caught.value.reason == "disk_full" and "--cache" in caught.value.remedy


def test_a_second_process_waits_for_the_first_and_writes_nothing(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody holds the folder it sleeps; the first writes meanwhile."""
    folder, naps = tmp_path / "cache", []
    with contextlib.ExitStack() as first:
        first.enter_context(locked_folder(folder))

        def nap(seconds: float) -> None:
            naps.append(seconds)
            first.close()

        monkeypatch.setattr("brainldm.cohort.uncompressed.time.sleep", nap)
        assert len(epoch_of(uncompressed(cohort, folder))) == 5
    assert naps == [1.0]


def test_what_fits_in_memory_is_told(cohort: Path) -> None:
    opened = PreparedCohort.open(cohort)
    assert VolumeDataset(opened, cache_bytes=6 * 2 * 720).fits_in_memory
    assert not VolumeDataset(opened, cache_bytes=6 * 2 * 720 - 1).fits_in_memory


# --------------------------------------------------------------------------------------------------------- intensities


def brain_in_air(low: float = 10.0, high: float = 200.0, air: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    image = np.full((12, 12, 12), air, dtype=np.float32)
    mask = np.zeros(image.shape, dtype=bool)
    mask[3:9, 3:9, 3:9] = True
    image[mask] = np.linspace(low, high, int(mask.sum()))
    return image, mask


def test_min_max_is_the_papers() -> None:
    image = np.random.default_rng(0).normal(100, 20, (9, 8, 7)).astype(np.float32)
    told = (image - image.min()) / (image.max() - image.min())
    np.testing.assert_allclose(unit_range(background_at_zero(image)), told, atol=1e-6)
    assert unit_range(image).min() == 0 and unit_range(image).max() == 1


def test_the_background_of_a_stripped_brain_stays_0() -> None:
    image, mask = brain_in_air()
    out = unit_range(background_at_zero(image))
    assert (out[~mask] == 0).all() and out.max() == 1
    np.testing.assert_allclose(out[mask], image[mask] / 200, atol=1e-6)


def test_a_stripped_brain_with_values_below_0_is_lifted_and_not_clipped() -> None:
    image, mask = brain_in_air(-2.5, 3.0)
    out = unit_range(background_at_zero(image))
    assert (out[~mask] == 0).all()
    np.testing.assert_allclose(out[mask], (image[mask] + 2.5) / 5.5, atol=1e-6)
    assert len(np.unique(out[mask])) == mask.sum()


def test_a_mask_takes_the_head_away() -> None:
    image, mask = brain_in_air(air=30.0)
    assert not is_masked(image)
    out = background_at_zero(image, mask)
    assert (out[~mask] == 0).all() and is_masked(out)
    np.testing.assert_array_equal(out[mask], image[mask])
    with pytest.raises(BadInput, match="mask is empty"):
        background_at_zero(image, np.zeros_like(mask))


def test_scale_and_offset_of_a_head_do_not_matter() -> None:
    image = np.random.default_rng(0).random((9, 8, 7)).astype(np.float32)
    reference = unit_range(background_at_zero(image))
    for scale, offset in ((1000, 0), (0.01, 0), (7, -300), (3, 12)):
        np.testing.assert_allclose(unit_range(background_at_zero(scale * image + offset)), reference, atol=1e-4)


def test_a_percentile_is_not_led_by_one_bright_voxel() -> None:
    image, mask = brain_in_air()
    spiked = image.copy()
    spiked[4, 4, 4] = 1e5
    assert np.median(unit_range(spiked)[mask]) < 0.01
    robust = unit_range(spiked, percentile=99.0)
    usual = mask & (spiked < 190)
    np.testing.assert_allclose(robust[usual], unit_range(image)[usual], atol=0.03)
    assert robust.max() == 1 and (robust[~mask] == 0).all()


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(BadInput, match="value 0"):
        unit_range(np.zeros((8, 8, 8)))


def test_the_fixture_is_what_prepare_would_write(cohort: Path) -> None:
    """Guards the tests above: the manifest's hashes are those of the files."""
    for record in Manifest(cohort / "manifest.jsonl").records():
        assert sha256_of(cohort / record["file"]) == record["sha256"]
