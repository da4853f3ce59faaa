"""The judge judged: copies planted among people are found, and nobody innocent is accused more often than stated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from brainldm.base.errors import BadInput
from brainldm.base.nifti import write_nifti
from brainldm.base.streams import stream
from brainldm.evaluate.grids import JudgingGrid
from brainldm.evaluate.images import open_images
from brainldm.evaluate.validation import ALTERATIONS, _alter_one, _planted, validate
from judged_folders import TINY, BlobMeasure, write_cohort

GRID = JudgingGrid.of(TINY.shape_XYZ, TINY.affine)


def rows(people: int, features: int = 60) -> dict[str, np.ndarray]:
    """Features of people and of their copies: each alteration adds a little, and only mirroring exchanges the ways."""
    drawn = stream(0, "test/planted")
    original = drawn.normal(size=(people, 2, features))
    return {
        kind: original[:, ::-1] if kind == "mirrored" else original + 0.05 * i * drawn.normal(size=original.shape)
        for i, kind in enumerate(ALTERATIONS)
    }


def test_all_copies_are_found_among_200_and_the_innocent_are_left_alone() -> None:
    planted = _planted("test", rows(80), 0)
    assert planted.training == 40 and planted.held_out == 20
    assert sum(estimate.n for estimate in planted.found.values()) == 200
    assert all(estimate.value == 1 for estimate in planted.found.values())
    assert planted.false_positive_rate == pytest.approx(1 / 21) and planted.reference_is == "held-out people"
    assert planted.accused.low <= planted.false_positive_rate


def test_people_who_look_nothing_like_their_copies_are_not_found() -> None:
    altered = rows(80)
    altered["warped"] = stream(1, "test/planted").normal(size=altered["warped"].shape)
    planted = _planted("test", altered, 0)
    assert planted.found["warped"].value < 0.2 and planted.found["noisy"].value == 1


def test_of_few_people_the_rate_is_the_one_that_the_search_states() -> None:
    """Two held out are too few: training people stand in for them, and two of those make the closest pair."""
    planted = _planted("test", rows(8), 0)
    assert (planted.training, planted.held_out) == (4, 2)
    assert planted.false_positive_rate == pytest.approx(2 / 5)
    assert planted.reference_is.startswith("training people")


@dataclass(frozen=True)
class _Sum:
    """A space of one feature, and as many names as one likes for the same title."""

    name: str
    factor: float
    title: str = "sum"

    def __call__(self, image_XYZ: np.ndarray) -> np.ndarray:
        return np.array([self.factor * image_XYZ.sum()], dtype=np.float32)


def test_spaces_of_one_title_are_kept_apart(tmp_path: Path) -> None:
    people = open_images(write_cohort(tmp_path / "people", [2e4]), "real")
    spaces = (_Sum("one", 1.0), _Sum("ten", 10.0))
    found = _alter_one((0, people.images[0]), GRID, spaces, np.ones((20, 28, 20), bool), 0)
    assert found["ten"]["exact"][0] == pytest.approx(10 * found["one"]["exact"][0])


def test_alterations_change_a_little() -> None:
    ball = np.zeros(TINY.shape_XYZ, dtype=np.float32)
    middle = tuple(n // 2 for n in TINY.shape_XYZ)
    ball[tuple(slice(m - 3, m + 4) for m in middle)] = 0.7
    ball[2, 9, 9] = 1.0
    for kind, alter in ALTERATIONS.items():
        changed = alter(ball, GRID, stream(0, "test/alter"))
        assert changed.shape == ball.shape and changed.min() >= 0 and changed.max() <= 1
        difference = float(np.abs(changed - ball).mean())
        assert (difference == 0) if kind == "exact" else (0 < difference < 0.1), kind


def test_a_folder_is_validated_and_too_small_a_one_refused(tmp_path: Path) -> None:
    people = write_cohort(tmp_path / "people", [2e4 + 3e3 * i for i in range(12)])
    found = validate(people, tmp_path / "out", instrument=BlobMeasure(), pairs=10)
    written = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert written["people"] == 12 and set(written["nearer"]) == {"voxels at 4 mm", "random-3d-0"}
    assert found.nearer["voxels at 4 mm"]["noisy"].n == 12
    assert (tmp_path / "out" / "real_against_real" / "scorecard.json").exists()
    assert found.real_against_real.row("mean_image_rmse").synthetic.n == 6
    assert "12 people" in found.as_text() and "  random: mirrored" in found.as_text()
    # Real people are shown nowhere, and least of all as synthetic brains.
    assert not list((tmp_path / "out").rglob("*.png"))
    assert "sha256" not in (tmp_path / "out" / "real_against_real" / "figures" / "figures.json").read_text()
    few = tmp_path / "few"
    for i in range(3):
        write_nifti(few / f"sub-{i}_T1w.nii.gz", np.random.default_rng(i).random(TINY.shape_XYZ), TINY.affine)
    with pytest.raises(BadInput, match="3 people who can be judged; 8 are needed"):
        validate(few, tmp_path / "none")


def test_images_that_cannot_be_judged_are_said(tmp_path: Path) -> None:
    people = write_cohort(tmp_path / "people", [2e4 + 3e3 * i for i in range(9)])
    next(people.rglob("*_T1w.nii.gz")).write_bytes(b"")
    found = validate(people, tmp_path / "out", instrument=BlobMeasure(), pairs=10)
    assert [failure.reason for failure in found.failures] == ["empty"]
    assert "the file is empty" in found.as_text()
    assert len(json.loads((tmp_path / "out" / "validation.json").read_text())["failures"]) == 1
