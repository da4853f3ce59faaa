"""What decoding keeps of volumes is found, kept, and refused where it cannot be found."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from brainldm.base.covariates import Covariates
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import read_json, write_json
from brainldm.base.volume import Grid, Volume, grid_named
from brainldm.cohort.dataset import PreparedRow
from brainldm.cohort.register import resample_to_grid
from brainldm.cohort.template import load_template
from brainldm.train.kept_volumes import _Pair, _Pairs, kept_volumes


def on_grid(volume: Volume) -> np.ndarray:
    return resample_to_grid(volume, np.eye(4), grid_named("4mm")).data_XYZ


@pytest.fixture(scope="module")
def brain_XYZ() -> np.ndarray:
    template = load_template(2)
    brain = np.where(template.brain_mask.data_XYZ, template.t1.data_XYZ, 0).astype(np.float32)
    return on_grid(Volume(brain, template.t1.affine))


@dataclass
class People:
    """As many prepared people as asked for, all alike, whose registration nobody wrote down."""

    image: np.ndarray
    count: int
    grid: Grid = field(default_factory=lambda: grid_named("4mm"))

    def __len__(self) -> int:
        return self.count

    @property
    def rows(self) -> list[PreparedRow]:
        nobody = Covariates(sex=0, age_years=60.0, ventricles_mm3=3e4, brain_mm3=1.4e6)
        return [PreparedRow(f"sub-{i}", nobody, "train", Path("nowhere.nii.gz"), 0, "") for i in range(self.count)]

    def image_XYZ(self, index: int) -> np.ndarray:
        return self.image.copy()


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would have to import everything and read the template."""
    monkeypatch.setattr("brainldm.train.kept_volumes.usable_cpus", lambda: 1)


def test_what_is_filled_is_missed_and_what_is_no_brain_is_counted(brain_XYZ: np.ndarray, tmp_path: Path) -> None:
    ventricles_XYZ = on_grid(load_template(2).ventricles)
    half_full_XYZ = brain_XYZ + 0.2 * ventricles_XYZ * (brain_XYZ.max() - brain_XYZ)
    decoded = [brain_XYZ, half_full_XYZ, np.zeros_like(brain_XYZ)]
    kept = kept_volumes(tmp_path, People(brain_XYZ, 3), decoded.__getitem__, "key")
    assert kept.shares_NV[0] == pytest.approx([1, 1], abs=1e-9)
    assert kept.shares_NV[1, 0] < 0.8 and kept.shares_NV[1, 1] >= 1
    assert kept.shares_NV[2].tolist() == [1, 1] and kept.unmeasured == 1
    pair = _Pairs(People(brain_XYZ, 3), decoded.__getitem__, [2, 1])[1]  # as other processes are handed them
    assert pickle.loads(pickle.dumps(pair)).index == pair.index == 1

    def never(index: int) -> np.ndarray:
        raise AssertionError("measured again")

    again = kept_volumes(tmp_path, People(brain_XYZ, 3), never, "key")
    assert np.array_equal(again.shares_NV, kept.shares_NV) and again.unmeasured == 1
    for other in ("instrument", "key"):
        facts = read_json(tmp_path / "kept.json")
        write_json(tmp_path / "kept.json", {**facts, other: "another"})
        with pytest.raises(AssertionError, match="measured again"):
            kept_volumes(tmp_path, People(brain_XYZ, 3), never, "key")
        write_json(tmp_path / "kept.json", facts)


def test_an_autoencoder_that_shows_no_brains_is_refused(brain_XYZ: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 of 2 decoded images"):
        kept_volumes(tmp_path, People(brain_XYZ, 2), lambda _: np.zeros_like(brain_XYZ), "key")
    assert not (tmp_path / "kept.json").exists()


def test_an_interrupted_measurement_goes_on_with_those_not_yet_measured(
    brain_XYZ: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shares(pair: _Pair) -> tuple[float, float]:
        if not pair.decoded_XYZ.any():
            raise BadInput("there is no brain.")
        return 1.0, float(pair.decoded_XYZ.sum() / pair.image_XYZ.sum())

    monkeypatch.setattr("brainldm.train.kept_volumes._shares", shares)
    decoded = [brain_XYZ, np.zeros_like(brain_XYZ), 0.9 * brain_XYZ, brain_XYZ]
    whole = kept_volumes(tmp_path / "whole", People(brain_XYZ, 4), decoded.__getitem__, "key")
    asked: list[int] = []

    def stopped(index: int) -> np.ndarray:
        asked.append(index)
        if asked == [0, 1, 2]:
            raise KeyboardInterrupt
        return decoded[index]

    with pytest.raises(KeyboardInterrupt):
        kept_volumes(tmp_path / "run", People(brain_XYZ, 4), stopped, "key")
    kept = kept_volumes(tmp_path / "run", People(brain_XYZ, 4), stopped, "key")
    assert asked == [0, 1, 2, 2, 3]
    assert np.array_equal(kept.shares_NV, whole.shares_NV) and kept.unmeasured == whole.unmeasured == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept.json"]
