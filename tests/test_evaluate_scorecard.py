"""The whole evaluation: what it writes, what it survives, and that it never measures twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

import judged_folders
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import read_json, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import write_nifti
from brainldm.base.progress import Quiet
from brainldm.base.streams import stream
from brainldm.base.tables import read_table
from brainldm.base.volume import GRIDS, Grid, Volume
from brainldm.evaluate import images as judged_images
from brainldm.evaluate import measuring
from brainldm.evaluate.caveats import _of_a_sweep, caveats
from brainldm.evaluate.examine import Examination, Examined, examine
from brainldm.evaluate.grids import JudgingGrid
from brainldm.evaluate.images import JudgedImage
from brainldm.evaluate.judge import Judge
from brainldm.evaluate.scorecard import Scorecard, evaluate_dataset
from judged_folders import TINY, BlobMeasure, Found, blob, write_cohort, write_synthetic

ASKED = [float(v) for v in np.repeat([15e3, 25e3, 35e3, 45e3], 3)]
RECORDED = [float(v) for v in np.linspace(12e3, 60e3, 15)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("judged")
    synthetic = write_synthetic(
        root / "brains",
        ASKED,
        ages=[50.0, 60, 70] * 4,
        extrapolated=[None] * 9 + ["ventricles_mm3"] * 3,
    )
    return synthetic, write_cohort(root / "cohort", RECORDED)


@pytest.fixture
def mine(folders: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """Copies that a test may spoil, and an output folder."""
    return shutil.copytree(folders[0], tmp_path / "s"), shutil.copytree(folders[1], tmp_path / "r"), tmp_path / "out"


def judge(synth: Path, real: Path | None, out: Path, **more: object) -> Scorecard:
    settings = {"instrument": BlobMeasure(), "workers": 1, "pairs": 40} | more
    return evaluate_dataset(synth, real, out, **settings)  # type: ignore[arg-type]


def test_everything_is_written_and_is_json(folders: tuple[Path, Path], tmp_path: Path) -> None:
    card = judge(*folders, tmp_path)
    ventricles = card.row("ventricles_mm3.pearson_r")
    assert ventricles.synthetic.value > 0.98 and ventricles.synthetic.n == 12
    assert ventricles.reference.value > 0.98 and ventricles.reference.n == 15
    assert card.row("ventricles_mm3.slope").synthetic.value == pytest.approx(1, abs=0.1)
    assert card.row("ventricles_mm3.absolute_error", "outside the training range").synthetic.n == 3
    assert card.row("ventricles_mm3.absolute_error", "inside the training range").synthetic.n == 9
    assert card.row("ms_ssim").difference.value is not None
    assert card.row("brain_mm3.pearson_r").synthetic.value is None  # all were asked for the same
    assert card.failures == () and not (tmp_path / "failures.tsv").exists()

    text = (tmp_path / "scorecard.json").read_text()
    assert Scorecard.from_json(json.loads(text)) == card
    assert "NaN" not in text and "Infinity" not in text
    assert read_json(tmp_path / "scorecard.json")["settings"]["ms_ssim"]["scales"] == 2
    table = read_table(tmp_path / "scorecard.tsv")
    assert len(table) == len(card.rows)
    assert "| MS-SSIM between pairs |" in (tmp_path / "scorecard.md").read_text()
    for words in ("Does it obey?", "Trained on 6 images", "grid of values", "2 of its 5 scales"):
        assert words in card.as_text()
    assert any("6 images" in warning and "10 training people" in warning for warning in card.warnings)


def test_asked_and_measured_stand_in_columns_of_their_own(folders: tuple[Path, Path], tmp_path: Path) -> None:
    judge(*folders, tmp_path)
    table = read_table(tmp_path / "measured.tsv")
    assert [table.number(row, "ventricles_mm3_asked") for row in range(12)] == ASKED
    measured = [table.number(row, "ventricles_mm3_measured") for row in range(12)]
    assert measured != ASKED and np.allclose(measured, ASKED, rtol=0.15)
    assert table.rows[11]["extrapolated"] == "ventricles_mm3" and table.rows[0]["extrapolated"] == "n/a"
    reference = read_table(tmp_path / "measured_reference.tsv")
    assert reference.number(3, "ventricles_mm3_recorded") == pytest.approx(RECORDED[3])
    assert reference.rows[0]["split"] == "train"


def test_the_same_again_gives_the_same_and_measures_nothing(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    first = judge(synth, real, out)
    judged_folders.CALLS.clear()
    again = judge(synth, real, out)
    assert judged_folders.CALLS == []
    assert again.rows == first.rows and again.warnings == first.warnings

    # A changed image is measured again, another instrument measures everything.
    image = next((real / "sub-03").rglob("*.nii.gz"))
    image.unlink()
    (real / "manifest.jsonl").write_text("")
    write_cohort(real, [v + 500 * (k == 3) for k, v in enumerate(RECORDED)])
    judge(synth, real, out)
    assert len(judged_folders.CALLS) == 1
    judged_folders.CALLS.clear()
    judge(synth, real, out, instrument=BlobMeasure("blob counter 2"))
    assert len(judged_folders.CALLS) == 27


def test_a_killed_run_goes_on_where_it_stopped(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine

    class Killed(BaseException):
        pass

    class Killer:
        left = 30  # 12 and 15 images are read, then the third is being counted as measured

        def start(self, what: str, total: int, done: int = 0) -> None: ...

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.left -= steps
            if self.left == 0:
                raise Killed

    with pytest.raises(Killed):
        judge(synth, real, out, progress=Killer())
    assert not (out / "scorecard.json").exists()
    judged_folders.CALLS.clear()
    card = judge(synth, real, out)
    assert len(judged_folders.CALLS) == 25
    assert card.rows == judge(synth, real, out.parent / "fresh").rows


def test_processes_give_the_same_numbers(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, features and pairs too, which images so small are not handed out for otherwise."""
    alone = judge(*folders, tmp_path / "alone")
    monkeypatch.setattr("brainldm.evaluate.examine.VOXELS_WORTH_A_PROCESS", 0)
    monkeypatch.setattr("brainldm.evaluate.features.VOXELS_WORTH_A_PROCESS", 0)
    monkeypatch.setattr("brainldm.evaluate.diversity.VOXEL_PAIRS_WORTH_A_PROCESS", 0)
    together = judge(*folders, tmp_path / "together", workers=2)
    assert alone.rows == together.rows


def test_order_of_rows_does_not_matter(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    first = judge(synth, real, out, pairs=1000)
    lines = (real / "participants.tsv").read_text().splitlines()
    (real / "participants.tsv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    records = (real / "manifest.jsonl").read_text().splitlines()
    (real / "manifest.jsonl").write_text("\n".join(records[::-1]) + "\n")
    assert judge(synth, real, out.parent / "two", pairs=1000).rows == first.rows


def test_what_an_earlier_state_or_another_grid_measured_is_not_taken(
    mine: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    synth, real, out = mine
    judge(synth, real, out)
    judged_folders.CALLS.clear()
    monkeypatch.setattr(measuring, "PREPARATION", measuring.PREPARATION + 1)
    judge(synth, real, out)
    assert len(judged_folders.CALLS) == 27

    origin = np.zeros((4, 4))
    origin[0, 3] = 8.0
    first, moved = JudgingGrid.of((18, 26, 18), TINY.affine), JudgingGrid.of((18, 26, 18), TINY.affine + origin)
    assert moved.describe() == first.describe() and moved != first
    images, judged_folders.CALLS[:] = judged_images.open_images(real, "real").images[:1], []
    for grid in (first, moved, first):
        look = examine(images, "real", grid, sketched=(), workers=1, progress=Quiet())
        cache = Manifest(out / "elsewhere.jsonl")
        measuring.measure(look.images, "real", BlobMeasure(), cache, grid=grid, workers=1, progress=Quiet())
    assert len(judged_folders.CALLS) == 2


def test_another_brain_at_the_same_path_is_compared_as_it_is(mine: tuple[Path, Path, Path]) -> None:
    """As in a notebook, which goes on in one process."""
    made, _, out = mine
    before = judge(made, None, out, features=())
    shutil.rmtree(made)
    write_synthetic(made, ASKED, first_person=3000)
    after = judge(made, None, out, features=())
    assert after.row("ms_ssim").synthetic.value != before.row("ms_ssim").synthetic.value


# ---------------------------------------------------------------------------------------------------------- bad input


def test_broken_files_are_listed_and_the_rest_is_judged(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    images = sorted(synth.rglob("*.nii.gz"))
    images[0].write_bytes(images[0].read_bytes()[:-40])
    images[1].write_bytes(b"")
    images[2].unlink()
    images[3].write_bytes(b"<!DOCTYPE html><p>404")
    shutil.copy(images[5], images[4])  # whole, but not what the manifest states
    people = sorted(real.rglob("*.nii.gz"))
    people[0].write_bytes(b"x" * 400)
    card = judge(synth, real, out)
    assert [failure.reason for failure in card.failures] == [
        "truncated",
        "empty",
        "missing",
        "not_nifti",
        "checksum",
        "not_nifti",
    ]
    assert card.synthetic.judged == 7 and card.synthetic.failed == 5 and card.real.judged == 14
    assert card.row("ventricles_mm3.pearson_r").synthetic.n == 7
    table = read_table(out / "failures.tsv")
    assert [row["side"] for row in table.rows] == ["synthetic"] * 5 + ["real"]
    assert table.rows[3]["file"].startswith("sub-000003/")
    assert "HTML" in card.as_text() and card.failed == len(card.failures) == 6


def test_people_who_are_first_read_in_the_search_for_copies_fail_as_real_ones(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    cards = [judge(synth, real, out, max_real=3)]
    looked_at = {row["file"] for row in read_table(out / "measured_reference.tsv").rows}
    unseen = [image for image in sorted(real.rglob("*.nii.gz")) if image.relative_to(real).as_posix() not in looked_at]
    for image in (unseen[0], unseen[-1]):  # one trained on, one held out
        image.write_bytes(b"")
    cards.append(judge(synth, real, out, max_real=3))
    assert [card.real.failed for card in cards] == [0, 2]
    assert [failure.side for failure in cards[1].failures] == ["real", "real"]
    assert [row["side"] for row in read_table(out / "failures.tsv").rows] == ["real", "real"]


def test_nothing_to_judge_is_a_clear_refusal(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    for image in synth.rglob("*.nii.gz"):
        image.write_bytes(b"")
    with pytest.raises(BadInput, match=r"not one of its 12 images can be judged.*empty"):
        judge(synth, real, out)
    assert not (out / "scorecard.json").exists()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_sets_get_an_answer_or_a_reason(folders: tuple[Path, Path], tmp_path: Path, n: int) -> None:
    few = write_synthetic(tmp_path / "few", ASKED[::4][:n])
    card = judge(few, folders[1], tmp_path / "out")
    r, ms_ssim = card.row("ventricles_mm3.pearson_r"), card.row("ms_ssim")
    assert (r.synthetic.value is None) == (n < 3) and r.synthetic.low is None and r.synthetic.reason
    assert (ms_ssim.synthetic.value is None) == (n < 2) and ms_ssim.synthetic.low is None
    assert (card.row("mean_image_rmse").synthetic.value is None) == (n < 2)
    assert card.row("nearest_training_rmse").synthetic.value is not None
    assert any(f"Only {n} synthetic image" in warning for warning in card.warnings)
    json.dumps(card.to_json(), allow_nan=False)
    reverse = judge(folders[0], few, tmp_path / "reverse")
    assert (reverse.row("ms_ssim").difference.value is None) == (n < 2)


def test_identical_folders_are_called_copies(folders: tuple[Path, Path], tmp_path: Path) -> None:
    card = judge(folders[1], folders[1], tmp_path, pairs=1000)
    assert any("15 synthetic images equal a real one" in warning for warning in card.warnings)
    assert card.row("mean_image_rmse").synthetic.value == pytest.approx(0, abs=1e-7)
    both = card.row("ms_ssim")  # of every pair there is, so of the same pairs
    assert both.synthetic.value == pytest.approx(both.reference.value, abs=1e-9) and both.synthetic.n == 15
    assert card.row("nearest_training_rmse").synthetic.value < 0.06


def test_volumes_that_were_measured_are_no_truth(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    write_json(real / "prepared.json", {"config": {"volumes": "measure"}})
    assert any("not how far it is from the truth" in warning for warning in judge(synth, real, out).warnings)
    write_json(real / "prepared.json", {"config": {"volumes": "table"}})
    assert not any("from the truth" in warning for warning in judge(synth, real, out).warnings)


def test_whose_error_is_in_a_figure_is_said_as_it_is(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    for volumes, told in (("measure", "two measurements of one person"), ("table", "The instrument's own error")):
        write_json(real / "prepared.json", {"config": {"volumes": volumes}})
        card = judge(synth, real, out)
        assert told in card.row("ventricles_mm3.absolute_error").meaning
        assert card.settings["recorded_volumes_were_measured"] is (volumes == "measure")
        assert card.settings["instruments"] == {"synthetic": "blob counter 1", "real": "blob counter 1"}
    assert judge(synth, None, out).settings["instruments"] == {"synthetic": "blob counter 1"}


def looks_of_ages(ages: Sequence[float]) -> Examination:
    images = [JudgedImage(str(i), Path(str(i)), str(i), {"age_years": float(age)}) for i, age in enumerate(ages)]
    return Examination(tuple(Examined(image, image.file, False, False, (), None) for image in images), ())


def test_whole_years_are_no_grid_of_values() -> None:
    assert not list(_of_a_sweep(looks_of_ages(stream(0, "test/ages").integers(45, 80, 200).tolist())))
    assert list(_of_a_sweep(looks_of_ages([50, 60, 70] * 4)))
    assert list(_of_a_sweep(looks_of_ages(([50, 60, 70] * 4)[:-1])))  # one of them could not be made


def test_few_training_images_are_a_danger_whoever_they_are_compared_with(mine: tuple[Path, Path, Path]) -> None:
    """Only the model's own record says that they were phantoms, and not the cohort that it is judged against."""
    synth, real, out = mine
    write_json(real / "prepared.json", {"name": "phantoms"})
    said = "Trained on 6 images: a model that has seen so few makes copies and blends of them."
    warning = next(warning for warning in judge(synth, real, out).warnings if warning.startswith(said))
    assert "Do not take its brains for nobody's" in warning
    record = read_json(synth / "generation.json")
    write_json(synth / "generation.json", record | {"model": record["model"] | {"cohort": "Phantoms 2 mm"}})
    assert said in judge(synth, real, out).warnings


def test_the_same_file_many_times_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for i in range(5):
        write_nifti(tmp_path / "same" / f"{i}.nii.gz", blob(2e4, 1), TINY.affine)
    card = judge(tmp_path / "same", folders[1], tmp_path / "out")
    assert any("4 of 5 synthetic images are the same file" in warning for warning in card.warnings)
    assert card.row("ms_ssim").synthetic.value == pytest.approx(1)
    assert card.row("ventricles_mm3.pearson_r").synthetic.value is None  # nothing was asked of them


def test_mixed_grids_and_intensities_are_brought_together_and_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fine = GRIDS["4mm"]
    for i in range(6):
        write_nifti(tmp_path / "mixed" / f"{i}.nii.gz", blob(2e4 + 3e3 * i, 50 + i), TINY.affine)
    write_nifti(tmp_path / "mixed" / "fine.nii.gz", blob(3e4, 60, fine), fine.affine)
    write_nifti(tmp_path / "mixed" / "counts.nii.gz", blob(3e4, 61) * 900, TINY.affine, dtype="int16")
    moved = TINY.affine.copy()
    moved[:3, 3] += 200
    write_nifti(tmp_path / "mixed" / "elsewhere.nii.gz", blob(3e4, 62), moved)
    card = judge(tmp_path / "mixed", folders[1], tmp_path / "out")
    assert [failure.reason for failure in card.failures] == ["grid"]
    assert card.synthetic.judged == 8
    assert card.settings["judging_grid"]["shape_XYZ"] == list(TINY.shape_XYZ)
    assert any("1 of 8 synthetic images lie on another grid" in warning for warning in card.warnings)
    assert any("1 of 8 synthetic images had intensities outside 0..1" in warning for warning in card.warnings)


@dataclass(frozen=True)
class Crashing:
    name: str = "crashing"
    only_below: float = 0.0

    def __call__(self, image: Volume) -> Found:
        if image.data_XYZ[10, 13, 10] >= self.only_below:
            raise RuntimeError("segmentation fault, in a manner of speaking")
        return Found(float("nan"), 1.0)


@pytest.mark.parametrize("below", [0.0, 1.0])
def test_an_instrument_that_fails_leaves_the_rest_standing(
    folders: tuple[Path, Path], tmp_path: Path, below: float
) -> None:
    card = judge(*folders, tmp_path, instrument=Crashing(only_below=below))
    assert card.row("ventricles_mm3.pearson_r").synthetic.value is None
    assert card.row("ms_ssim").synthetic.value is not None
    assert len(card.failures) == 27
    expected = "no finite number for ventricles_mm3" if below else "in a manner of speaking"
    assert all(expected in failure.message for failure in card.failures)


@dataclass(frozen=True)
class Doubtful(BlobMeasure):
    """Does not believe what it finds in large ventricles."""

    def __call__(self, image: Volume) -> Found:
        found = super().__call__(image)
        return replace(found, quality={"poor": float(found.ventricles_mm3 > 30_000)})


def test_what_the_instrument_does_not_believe_and_small_sets_are_said(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    card = judge(*folders, tmp_path, instrument=Doubtful())
    table = read_table(tmp_path / "measured.tsv")
    doubted = sum(float(row["quality_poor"]) for row in table.rows)
    assert 0 < doubted < len(table)
    said = " ".join(card.warnings)
    assert f"{doubted:.0f} synthetic images look so unlike a brain" in said
    assert "Frechet, all images (random): fewer images than the 1152 features" in said


def test_without_a_reference_what_needs_none_is_judged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    card = judge(folders[0], None, tmp_path)
    assert card.real is None and card.row("ms_ssim").reference is None
    assert {row.section for row in card.rows} == {"conditioning", "diversity", "distribution"}


def test_ranges_come_from_the_training_people_where_no_plan_says(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    text = (synth / "plan.tsv").read_text().splitlines()
    (synth / "plan.tsv").write_text("\n".join(line.rsplit("\t", 1)[0] for line in text) + "\n")
    write_cohort(real / "narrow", [16e3, 30e3, 40e3], splits=["train", "train", "test"])
    card = judge(synth, real / "narrow", out)
    assert card.row("ventricles_mm3.bias", "outside the training range").synthetic.n == 9
    assert card.row("ventricles_mm3.bias", "inside the training range").synthetic.n == 3


def test_output_folders_are_not_mistaken(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    for inside in (real, synth / "judged"):
        with pytest.raises(UsageError, match="over or in"):
            judge(synth, real, inside)
    with pytest.raises(UsageError, match="0 workers"):
        judge(synth, real, out, workers=0)
    out.mkdir()
    (out / "thesis.docx").write_text("precious")
    with pytest.raises(UsageError, match=r"thesis.docx"):
        judge(synth, real, out)
    with pytest.raises(BadInput, match="no training log"):
        judge(synth, real, out.parent / "o", runs=real)


def test_a_missing_table_of_volumes_is_told_before_images_are_read(
    mine: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    synth, _, out = mine
    monkeypatch.setattr(Judge, "run", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(BadInput, match="no such table"):
        judge(synth, None, out, volumes=(out.parent / "nope.csv", None))


def test_a_scorecard_of_another_version_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    content = judge(*folders, tmp_path).to_json()
    with pytest.raises(BadInput, match="version"):
        Scorecard.from_json(content | {"schema_version": 99})


def test_names_that_could_be_formulas_or_markup_are_inert(mine: tuple[Path, Path, Path]) -> None:
    _, real, out = mine
    folder = out.parent / "hostile"
    for name in ('=cmd|"calc"!A1', "<b>bold|cell", "@sum", "x"):
        write_nifti(folder / f"{name}.nii.gz", blob(2e4, len(name)), TINY.affine)
    (folder / "-[click](x)\n.nii.gz").write_bytes(b"")
    judge(folder, real, out)
    cells = [cell for line in (out / "measured.tsv").read_text().splitlines() for cell in line.split("\t")]
    assert not any(cell.startswith(("=", "@", "-[")) for cell in cells)
    markdown = (out / "scorecard.md").read_text()
    assert "<b>" not in markdown and "\\[click]" in markdown


def test_what_an_interrupted_evaluation_left_is_ours(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """With a cache elsewhere the first file there is this table."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "measured.tsv").write_text("participant_id\n")
    judge(*folders, tmp_path / "out", cache=tmp_path / "cache")
    (tmp_path / "out" / "index.html").write_text("<p>slices of real people</p>")
    judge(*folders, tmp_path / "out", cache=tmp_path / "cache", show_real=False)
    assert not (tmp_path / "out" / "index.html").exists()


def test_learning_curves_are_thinned(folders: tuple[Path, Path], tmp_path: Path) -> None:
    log = tmp_path / "run" / "diffusion" / "log.jsonl"
    log.parent.mkdir(parents=True)
    lines = [json.dumps({"step": k + 1, "loss": 1 / (k + 1), "rate": 0.1}) for k in range(1000)]
    log.write_text("\n".join([*lines, '{"step": 1001, "lo']))
    judge(*folders, tmp_path / "out", runs=tmp_path / "run")
    curve = read_json(tmp_path / "out" / "learning_curves.json")["diffusion"]
    assert len(curve["step"]) == 300 and curve["step"][-1] == 1000
    assert curve["loss"][-1] == pytest.approx(np.mean([1 / k for k in (998, 999, 1000)]))
    judge(*folders, tmp_path / "out")
    assert not (tmp_path / "out" / "learning_curves.json").exists()  # of an evaluation that named no run


def test_only_a_drawn_part_of_many_real_images_is_measured(folders: tuple[Path, Path], tmp_path: Path) -> None:
    judged_folders.CALLS.clear()
    card = judge(*folders, tmp_path, max_real=5)
    assert card.real.sampled == 5 and card.real.training == 10 and len(judged_folders.CALLS) == 17
    assert card.row("nearest_is_training").reference.n == 15  # the search for copies looks at everybody
    assert any("5 of 15 real images" in warning for warning in card.warnings)


def test_pictures_of_an_earlier_call_go(folders: tuple[Path, Path], tmp_path: Path) -> None:
    judge(*folders, tmp_path)
    index = read_json(tmp_path / "figures" / "figures.json")
    assert len(index["synthetic"]) == 12 and len(index["real"]) == 15
    assert "sha256" in index["synthetic"][0] and "sha256" not in index["real"][0]
    judge(*folders, tmp_path, show_real=False)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["figures.json", "synthetic.png"]


def test_held_out_people_alone_can_be_compared_with(tmp_path: Path) -> None:
    """The two sets are compared without the training people, who stay those among whom copies are looked for."""
    volumes = [20_000.0 + 1_000 * i for i in range(9)]
    made = write_synthetic(tmp_path / "made", volumes)
    people = write_cohort(tmp_path / "people", volumes, splits=["train"] * 4 + ["validation"] * 3 + ["test"] * 2)
    card = evaluate_dataset(
        made, people, tmp_path / "out", instrument=BlobMeasure(), features=(), pairs=10, workers=1, held_out_only=True
    )
    assert (card.real.sampled, card.real.training, card.real.held_out) == (5, 4, 5)
    assert {cells["split"] for cells in read_table(tmp_path / "out" / "measured_reference.tsv").rows} == {
        "validation",
        "test",
    }
    assert any("are 5 of the 5 held out" in warning for warning in card.warnings)
    assert card.row("nearest_training_rmse").synthetic.n == 9
    seen = write_cohort(tmp_path / "seen", volumes, splits=["train"] * 9)
    with pytest.raises(BadInput, match="marked as held out"):
        evaluate_dataset(
            made, seen, tmp_path / "no", instrument=BlobMeasure(), features=(), pairs=10, workers=1, held_out_only=True
        )


def test_an_instrument_sees_every_image_on_one_grid(tmp_path: Path) -> None:
    """Brains of 8 mm beside people of 4 mm: the people are brought to 8 mm before they are measured."""
    fine = Grid("4mm", tuple(2 * n for n in TINY.shape_XYZ), 4.0, tuple(o - 2 for o in TINY.origin_mm))
    made = write_synthetic(tmp_path / "brains", ASKED[:4])
    people = write_cohort(tmp_path / "cohort", RECORDED[:6], grid=fine)
    card = judge(made, people, tmp_path / "out", instrument=_Voxels())
    assert card.row("brain_mm3.mean").reference.value == card.row("brain_mm3.mean").synthetic.value == 8.0
    again = judge(made, people, tmp_path / "out", instrument=_Voxels())
    assert again.row("brain_mm3.mean").reference.value == 8.0
    assert len((tmp_path / "out" / "measured.jsonl").read_text().splitlines()) == 10


@dataclass(frozen=True)
class _Voxels:
    """Finds the side of a voxel."""

    name: str = "voxels"

    def __call__(self, image: Volume) -> Found:
        return Found(1.0, round(float(image.voxel_mm[0]), 3))


def test_what_others_put_into_a_folder_is_not_deleted(mine: tuple[Path, Path, Path]) -> None:
    made, people, out = mine
    out.mkdir()
    for name in ("index.html", "failures.tsv"):
        (out / name).write_text("mine")
    with pytest.raises(UsageError, match="holds other things"):
        judge(made, people, out)
    assert all((out / name).read_text() == "mine" for name in ("index.html", "failures.tsv"))


def test_an_evaluation_that_has_nothing_to_judge_leaves_the_one_before_it(mine: tuple[Path, Path, Path]) -> None:
    made, people, out = mine
    judge(made, people, out)
    before = (out / "scorecard.json").read_text()
    for image in made.rglob("*.nii.gz"):
        image.write_bytes(b"none")
    with pytest.raises(BadInput):
        judge(made, people, out)
    assert (out / "scorecard.json").read_text() == before and (out / "scorecard.md").exists()


def test_suspects_are_named_with_whom_they_resemble(mine: tuple[Path, Path, Path]) -> None:
    made, people, out = mine
    images = [sorted(folder.rglob("*_T1w.nii.gz")) for folder in (made, people)]
    shutil.copyfile(images[1][2], images[0][5])
    (made / "manifest.jsonl").unlink()  # it states another file
    judge(made, people, out, features=("none",))
    named = read_table(out / "suspects.tsv").rows
    assert (named[0]["space"], named[0]["nearest_participant_id"]) == ("voxels", "sub-02")
    assert named[0]["file"].endswith(images[0][5].name) and float(named[0]["rmse"]) < 1e-3


def test_a_predictor_that_may_have_learnt_from_the_people_is_said(mine: tuple[Path, Path, Path]) -> None:
    made, people, out = mine
    known = {"holdout": 0.2, "seed": 5}
    prepared = read_json(people / "prepared.json")
    write_json(people / "prepared.json", prepared | {"config": known})
    for split_by, told in ((known, False), ({"holdout": 0.2, "seed": 6}, True)):
        judging = with_predictor(made, people, out, _Learnt(training={"split_by": split_by}))
        found = caveats(judging.made, judging.people, judging.run(shown=()))
        assert any("predictor of age may have learnt" in sentence for sentence in found) is told


def with_predictor(synth: Path, real: Path, out: Path, predictor: _Learnt) -> Judge:
    """A judge of those folders who asks that predictor of age."""
    made, people = judged_images.open_images(synth, "synthetic"), judged_images.open_images(real, "real")
    out.mkdir(exist_ok=True)
    return Judge(made, people, out, out, BlobMeasure(), 4, 0, 1, 200, Quiet(), {"age_years": predictor})


def test_what_a_predictor_says_stands_beside_what_was_asked(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    with_predictor(synth, real, out, _Learnt()).run(shown=())
    ages = [row["age_years_measured"] for row in read_table(out / "measured.tsv").rows]
    assert {float(age) for age in ages} == {60.0}
    for row in read_table(out / "measured_reference.tsv").rows:  # it has learnt from those trained on
        assert (row["age_years_measured"] == "n/a") == (row["split"] == "train")
        assert row["ventricles_mm3_measured"] != "n/a"


def test_an_image_that_a_predictor_fails_in_is_said(mine: tuple[Path, Path, Path]) -> None:
    synth, real, out = mine
    found = with_predictor(synth, real, out, _Learnt(says=float("nan"))).run(shown=())
    assert len(found.failures) == 12 + 5  # every brain, and everybody held out
    assert {failure.side for failure in found.failures} == {"synthetic", "real"}
    assert all("no finite number for age_years" in failure.message for failure in found.failures)


def test_a_predictor_of_another_grid_is_refused_before_anything_is_read(
    mine: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "examined", lambda *_: pytest.fail("images were read"))
    judging = with_predictor(*mine, _Learnt(grid=GRIDS["4mm"]))
    with pytest.raises(UsageError, match=r"learnt takes images of 40 x 56 x 40 voxels of 4 x 4 x 4 mm .* 8 x 8 x 8 mm"):
        judging.run(shown=())


@dataclass(frozen=True)
class _Learnt:
    training: dict = field(default_factory=dict)
    name: str = "learnt"
    says: float = 60.0
    grid: Grid = TINY

    def __call__(self, image: Volume) -> _Age:
        return _Age(self.says)


@dataclass(frozen=True)
class _Age:
    age_years: float
