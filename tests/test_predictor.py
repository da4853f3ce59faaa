"""Age and sex from a brain: the net, its training, its folder, and what the judge makes of it."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.nifti import read_nifti
from brainldm.base.volume import Volume
from brainldm.cli import app
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.cohort.predictor import Predictor, read_predictor
from brainldm.evaluate.conditioning import sex_told
from brainldm.evaluate.estimate import area_under_curve
from brainldm.evaluate.examine import Examined
from brainldm.evaluate.images import JudgedImage
from brainldm.evaluate.measuring import Measurement, Measurements
from brainldm.nets.cole import ColeConfig, ColeNet
from brainldm.train.config import PredictorConfig
from brainldm.train.predictor_run import train_predictor

QUICK = PredictorConfig(steps=6, batch=4, warmup_steps=0)


@pytest.fixture(scope="module")
def age(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return train_predictor("age", tiny_cohort, tmp_path_factory.mktemp("age") / "run", config=QUICK)


def test_the_published_widths_and_what_fits() -> None:
    assert ColeConfig.fitting((160, 224, 160)) == ColeConfig((160, 224, 160), (8, 16, 32, 64, 128))
    net = ColeNet(ColeConfig.fitting((160, 224, 160)))
    assert net.last.in_features == 128 * 5 * 7 * 5
    assert ColeConfig.fitting((7, 8, 9)).channels == (8, 16)
    assert ColeNet(ColeConfig.fitting((7, 8, 9)))(torch.zeros(2, 1, 7, 8, 9)).shape == (2,)
    with pytest.raises(ValueError, match="fewer channels"):
        ColeConfig((16, 16, 16))
    with pytest.raises(ValueError, match="was made for"):
        ColeNet(ColeConfig.fitting((7, 8, 9)))(torch.zeros(1, 1, 8, 8, 8))


def test_voxels_can_be_averaged_first(tiny_cohort: Path, tmp_path: Path) -> None:
    config = ColeConfig.fitting((16, 24, 16), averaging=2)
    assert config.averaged_XYZ == (8, 12, 8) and config.channels == (8, 16, 32)
    net, image = ColeNet(config).eval(), torch.rand(1, 1, 16, 24, 16)
    alike = torch.nn.functional.avg_pool3d(image, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(net(image), net(alike.repeat_interleave(2, 4)))
    predictor = train_predictor("age", tiny_cohort, tmp_path / "run", config=replace(QUICK, averaging=2))
    assert read_predictor(tmp_path / "run").averaging == predictor.averaging == 2
    assert predictor(Volume(np.random.default_rng(0).random((16, 24, 16), np.float32), predictor.grid.affine))


def test_it_learns_what_is_there_to_see(tiny_cohort: Path, tmp_path: Path) -> None:
    """The tiny cohort's people differ in a hole; its size, given as their age, can be learnt from eight of them."""
    cohort = Path(shutil.copytree(tiny_cohort, tmp_path / "cohort"))
    table = (cohort / "participants.tsv").read_text().splitlines()
    header = table[0].split("\t")
    lines = [dict(zip(header, line.split("\t"))) for line in table[1:]]
    for line in lines:
        line["age_years"] = f"{20 + float(line['ventricles_mm3']) / 1000:.3f}"
    (cohort / "participants.tsv").write_text(
        "\n".join(["\t".join(header), *("\t".join(r.values()) for r in lines)]) + "\n"
    )
    config = PredictorConfig(steps=150, batch=8, learning_rate=0.02, shift_voxels=0)
    predictor = train_predictor("age", cohort, tmp_path / "run", config=config)
    people = VolumeDataset(PreparedCohort.open(cohort), "train")
    known = [row.age_years for row in people.covariates]
    found = [predictor(read_nifti(row.path)).age_years for row in people.rows]  # type: ignore[union-attr]
    assert np.corrcoef(known, found)[0, 1] > 0.9


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tiny_cohort: Path, tmp_path: Path, age: Predictor) -> None:
    train_predictor("age", tiny_cohort, tmp_path / "run", config=replace(QUICK, steps=6), minutes=1e-9)
    again = train_predictor("age", tiny_cohort, tmp_path / "run", config=QUICK)
    assert again.weights_sha256 == age.weights_sha256
    with pytest.raises(UsageError, match="another run"):
        train_predictor("sex", tiny_cohort, tmp_path / "run", config=QUICK)
    path = tmp_path / "run/run.json"
    there = json.loads(path.read_text())
    path.write_text(json.dumps(there | {"precision": "bf16"}))
    with pytest.raises(UsageError, match="precision: 'bf16' there, 'fp32' now"):
        train_predictor("age", tiny_cohort, tmp_path / "run", config=QUICK)
    del there["precision"]  # as earlier versions wrote it
    path.write_text(json.dumps(there))
    assert train_predictor("age", tiny_cohort, tmp_path / "run", config=QUICK).weights_sha256 == age.weights_sha256


def test_a_seed_is_a_setting(tiny_cohort: Path, tmp_path: Path) -> None:
    command = ["train", "age", "--data", str(tiny_cohort), "--out", str(tmp_path / "run"), "--steps", "1"]
    app([*command, "--set", "seed=3"], result_action="return_value")
    assert read_predictor(tmp_path / "run").training["seed"] == 3
    there = json.loads((tmp_path / "run/run.json").read_text())
    assert there["seed"] == 3 and "seed" not in there["config"]  # as earlier versions wrote it
    with pytest.raises(UsageError, match="seed: 3 there, 0 now"):
        app(command, result_action="return_value")


def test_the_folder_says_how_well_it_does_and_is_proven(age: Predictor, tiny_cohort: Path, tmp_path: Path) -> None:
    content = json.loads((age.folder / "predictor.json").read_text())
    assert content["training"]["held_out"]["n"] == 2
    assert content["training"]["held_out"]["r"] == {
        "value": None,
        "interval_95": None,
    }  # two points always lie on a line
    assert math.isfinite(content["training"]["held_out"]["mae_years"]["value"])
    image = read_nifti(VolumeDataset(PreparedCohort.open(tiny_cohort)).rows[0].path)
    assert read_predictor(age.folder.parent)(image) == age(image) == pickle.loads(pickle.dumps(age))(image)
    elsewhere = replace(image, affine=image.affine + np.eye(4))
    with pytest.raises(BadInput, match="another grid"):
        age(elsewhere)
    copy = Path(shutil.copytree(age.folder, tmp_path / "copy"))
    (copy / "predictor.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(BadInput, match="not those that"):
        read_predictor(copy)(image)
    with pytest.raises(BadInput, match="no predictor"):
        read_predictor(tmp_path)


def test_the_judge_asks_predictors(tiny_run: Path, tiny_cohort: Path, age: Predictor, tmp_path: Path) -> None:
    from brainldm.evaluate.scorecard import evaluate_dataset
    from brainldm.generate.plan import make_plan
    from brainldm.generate.run import GenerateSettings, generate
    from brainldm.model.folder import load_model

    sex = train_predictor("sex", tiny_cohort, tmp_path / "sex", config=QUICK)
    model = load_model(tiny_run)
    rows = make_plan({}, n=6, seed=0, ranges=model.ranges, joint=model.joint)
    generate(model, tmp_path / "brains", rows, GenerateSettings(steps=2))
    card = evaluate_dataset(
        tmp_path / "brains",
        tiny_cohort,
        tmp_path / "out",
        instrument=_Nothing(),
        predictors=[age.folder, sex.folder.parent],
        workers=1,
    )
    assert card.row("age_years.pearson_r").synthetic.n == 6  # type: ignore[union-attr]
    asked: dict[str, list[float]] = {"F": [], "M": []}
    for row in rows:
        image = read_nifti(next((tmp_path / "brains").rglob(f"{row.participant_id}_*T1w.nii.gz")))
        asked[row.covariates.sex_letter].append(sex(image).sex)  # type: ignore[union-attr]
    assert all(asked.values())
    assert card.row("sex.auc").synthetic == area_under_curve(asked["F"], asked["M"])
    assert card.settings["predictors"]["age_years"].startswith("cole2017-age_years-")
    reference = card.row("age_years.absolute_error").reference
    assert reference is not None and reference.n == 2  # only those it has not learnt
    with pytest.raises(UsageError, match="predicts sex, as another"):
        evaluate_dataset(tmp_path / "brains", None, tmp_path / "two", predictors=[sex.folder, sex.folder])


def test_another_intensity_scale_is_another_only_in_name(tiny_cohort: Path, age: Predictor) -> None:
    image = read_nifti(next(tiny_cohort.rglob("*_T1w.nii.gz")))
    counts = Volume(image.data_XYZ * 4095, image.affine)
    assert age(counts).age_years == pytest.approx(age(image).age_years, abs=0.01)  # type: ignore[union-attr]


@pytest.mark.parametrize(("of_a_man", "area"), [(0.9, 1.0), (0.1, 0.0)])
def test_sex_is_told_where_men_are_given_the_higher_probability(of_a_man: float, area: float) -> None:
    looks = [
        Examined(JudgedImage(str(i), Path(str(i)), str(i), sex=sex), str(i), False, False, (), None)
        for i, sex in enumerate(("F", "M", "F", "M", None))
    ]
    probability = {"F": 0.5, "M": of_a_man, None: 0.0}
    found = {look.sha256: Measurement({"sex": probability[look.image.sex]}, {}) for look in looks}
    told = sex_told(looks, Measurements("hand", found, ()))
    assert told.value == area and told.n == 4


class _Nothing:
    name = "nothing"

    def __call__(self, image: object) -> object:
        from brainldm.cohort.measure import Measured

        return Measured(3e4, 1.4e6, 1.2e6, 1.1)


def test_area_under_the_curve() -> None:
    assert area_under_curve([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]).value == 1
    assert area_under_curve([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]).low < 1  # type: ignore[operator]
    assert area_under_curve([], [1.0]).value is None
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    zeros, ones = rng.normal(0, 1, 40), rng.normal(1, 1, 50)
    found = area_under_curve(list(zeros), list(ones))
    assert found.value == pytest.approx(roc_auc_score([0] * 40 + [1] * 50, [*zeros, *ones]))
    assert found.low < found.value < found.high  # type: ignore[operator]
