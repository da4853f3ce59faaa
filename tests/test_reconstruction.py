"""Reconstruction reports: the right figures of known errors, intervals, and what a run and the command leave."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from brainldm.base.errors import UsageError
from brainldm.base.files import read_json, write_json
from brainldm.base.streams import stream
from brainldm.base.tables import read_table
from brainldm.cli import app
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.evaluate.diversity import ms_ssim, pyramid
from brainldm.evaluate.diversity import scale_weights as scale_weights_of_the_judge
from brainldm.nets.autoencoder import LatentDistribution
from brainldm.train.autoencoder_stage import AutoencoderStage
from brainldm.train.reconstruction import FIGURES, reconstruct_cohort, reconstruction_report, scale_weights
from conftest import TINY_SHAPE_XYZ, tiny_recipe


class Shifts(torch.nn.Module):
    """An autoencoder whose reconstructions are the image plus a number."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(by))

    def encode(self, image: torch.Tensor) -> LatentDistribution:
        return LatentDistribution(image, torch.zeros_like(image))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent + self.by


def image_XYZ(index: int, shape_XYZ: tuple[int, ...] = (14, 16, 15)) -> np.ndarray:
    return 0.2 + 0.6 * stream(0, "reconstruction test", index).random(shape_XYZ, dtype=np.float32)


def report_of(by: float, people: int = 5, images=image_XYZ, references=image_XYZ):  # type: ignore[no-untyped-def]
    return reconstruction_report(Shifts(by), images, references, [f"sub-{i}" for i in range(people)], 0)  # type: ignore[arg-type]


def test_known_errors_give_known_figures() -> None:
    figures = report_of(0.1).figures()
    assert figures["l1"]["mean"] == pytest.approx(0.1, rel=1e-5)
    assert figures["psnr_db"]["mean"] == pytest.approx(20.0, rel=1e-5)
    assert figures["ssim"]["mean"] < 1
    perfect = report_of(0.0).figures()
    assert [perfect[name]["mean"] for name in FIGURES] == pytest.approx([0, 120, 1, 1])


def test_reconstructions_are_clamped() -> None:
    bright = lambda index: np.full((14, 16, 15), 0.95, dtype=np.float32)  # noqa: E731
    assert report_of(0.5, images=bright, references=bright).figures()["l1"]["mean"] == pytest.approx(0.05, rel=1e-4)


def test_references_of_the_callers_own_are_what_is_compared_with() -> None:
    """As a phantom without its noise: an identity reconstructs the image, and is as far off as the image itself."""
    clean = lambda index: image_XYZ(index) - np.float32(0.05)  # noqa: E731
    report = report_of(0.0, references=clean)
    assert report.figures()["l1"]["mean"] == pytest.approx(0.05, rel=1e-4)
    original, found, difference = report.pictured[0]
    np.testing.assert_array_equal(original, found)
    np.testing.assert_allclose(difference, 0.2, rtol=1e-4)


def test_similarities_are_the_judges(tmp_path: Path) -> None:
    """One scale of MS-SSIM is SSIM; two and more agree with the judge's own computation."""
    for shape_XYZ in ((14, 16, 15), (29, 31, 28)):
        a, b = image_XYZ(0, shape_XYZ), image_XYZ(1, shape_XYZ)
        report = report_of(0.0, 1, images=lambda _, a=a: a, references=lambda _, b=b: b)
        weights = scale_weights(shape_XYZ)
        assert len(weights) == (3 if shape_XYZ[0] == 29 else 2)
        expected = ms_ssim(pyramid(a, len(weights)), pyramid(b, len(weights)), weights)
        assert report.rows[0]["ms_ssim"] == pytest.approx(expected, abs=1e-5)
        single = ms_ssim(pyramid(a, 1), pyramid(b, 1), (1.0,))
        assert report.rows[0]["ssim"] == pytest.approx(single, abs=1e-5)


def test_scales_are_the_judges_where_monai_takes_as_many() -> None:
    for side in range(1, 200):
        ours, judges = scale_weights((side, 300, side + 1)), scale_weights_of_the_judge((side, 300, side + 1))
        assert ours == judges or (56 <= side < 63 and len(ours) == 3)
        assert not ours or sum(ours) == pytest.approx(1, abs=2e-4)


def test_a_grid_too_small_for_the_window_has_null_and_the_reason() -> None:
    small = lambda index: image_XYZ(index, (6, 9, 8))  # noqa: E731
    figures = report_of(0.1, images=small, references=small).figures()
    assert figures["ms_ssim"]["mean"] is None and figures["ssim"]["interval_95"] is None
    assert "7-voxel window" in figures["ms_ssim"]["reason"]
    assert figures["l1"]["interval_95"] is not None


def test_intervals_hold_the_mean_and_are_a_function_of_the_seed() -> None:
    images = lambda index: image_XYZ(index) * np.float32(0.5 + 0.1 * index)  # noqa: E731
    report = report_of(0.0, 6, images=image_XYZ, references=images)
    told = report.figures()["l1"]
    low, high = told["interval_95"]
    assert low < told["mean"] < high and told["n"] == 6
    assert report.figures() == report.figures()
    few = report_of(0.1, 3).figures()["l1"]
    assert few["interval_95"] is None and "at least 4 people" in few["reason"]


def test_stage_1_leaves_its_report(tiny_run: Path) -> None:
    folder = tiny_run / "autoencoder"
    report = read_json(folder / "reconstruction.json")
    assert [row["participant_id"] for row in report["rows"]] == ["sub-08"]
    assert 0 < report["figures"]["l1"]["mean"] < 1 and report["figures"]["l1"]["n"] == 1
    table = read_table(folder / "reconstruction.tsv")
    assert table.number(0, "ms_ssim") == pytest.approx(report["rows"][0]["ms_ssim"], abs=1e-4)
    with Image.open(folder / "reconstruction.png") as picture:
        x, y, z = TINY_SHAPE_XYZ
        assert picture.size == (x + x + y, 3 * max(y, z))
    kept = read_json(tiny_run / "model" / "model.json")["training"]["autoencoder"]["validation"]
    assert kept["people"] == 1 and kept["psnr_db"] == report["figures"]["psnr_db"]["mean"]
    assert kept["interval_95"]["l1"] is None and "sub-" not in str(kept)


def test_of_many_held_out_people_some_are_looked_at(
    tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = VolumeDataset(PreparedCohort.open(tiny_cohort), "train")
    stage = AutoencoderStage(
        tiny_recipe().autoencoder, people, people, seed=0, device=torch.device("cpu"), precision="fp32"
    )
    everybody = stage.validate(tmp_path / "all")
    monkeypatch.setattr("brainldm.train.autoencoder_stage._MOST_VALIDATED", 3)
    some = stage.validate(tmp_path / "some")
    assert [(found["people"], found["people_in_split"]) for found in (everybody, some)] == [(8, 8), (3, 8)]
    all_rows, rows = (read_json(tmp_path / name / "reconstruction.json")["rows"] for name in ("all", "some"))
    assert [row["participant_id"] for row in rows] == ["sub-00", "sub-03", "sub-07"]
    assert rows == [all_rows[0], all_rows[3], all_rows[7]]
    assert read_json(tmp_path / "some" / "reconstruction.json")["people_in_split"] == 8


def test_the_command_writes_a_report(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reconstruct", str(tiny_run), str(tiny_cohort), str(tmp_path / "out"), "--precision", "fp32"]
    app(words, exit_on_error=False, result_action="return_value")
    assert "2 people" in capsys.readouterr().out
    report = read_json(tmp_path / "out" / "reconstruction.json")
    assert [row["participant_id"] for row in report["rows"]] == ["sub-08", "sub-09"] and report["split"] == "held-out"
    everybody = reconstruct_cohort(tiny_run / "model", tiny_cohort, tmp_path / "all", split="all", most=3)
    assert len(everybody.rows) == 5
    assert everybody.figures()["l1"]["interval_95"] is not None
    assert (tmp_path / "all" / "reconstruction.png").is_file()


def test_another_grid_and_an_empty_split_are_refused(tiny_run: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_cohort, tmp_path / "cohort")
    facts = read_json(other / "prepared.json")
    facts["grid"]["shape_XYZ"] = [32, 24, 16]
    write_json(other / "prepared.json", facts)
    with pytest.raises(UsageError, match=r"of the grid \(16, 24, 16\) and the cohort of \(32, 24, 16\)"):
        reconstruct_cohort(tiny_run, other, tmp_path / "out")
    with pytest.raises(UsageError, match="0 people of each split"):
        reconstruct_cohort(tiny_run, tiny_cohort, tmp_path / "out", most=0)
