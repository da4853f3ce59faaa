"""The card of a model: every figure is there, judged against held-out people alone, and said plainly."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from brainldm.base.errors import BadInput, PartialFailure, UsageError
from brainldm.base.files import read_json, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.volume import GRIDS
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.cohort.phantom import PhantomConfig, write_phantom_study
from brainldm.evaluate.estimate import Estimate
from brainldm.model.folder import read_description
from brainldm.recipes import card_figures, reconstruction
from brainldm.recipes.card_facts import commands
from brainldm.recipes.card_figures import BOUNDS, _without_sign, is_monotone, targeted
from brainldm.recipes.card_text import _told_together, card_text
from brainldm.recipes.model_card import make_card
from brainldm.recipes.reconstruction import Painting, PhantomStudy, likeness, painted, psnr_db
from brainldm.train.predictor_run import train_predictor
from test_table1 import Darkness, fail_some_brains

TARGETED = ("ventricles", "brain", "age", "sex", "ms_ssim", "reconstruction", "extrapolation")


@pytest.fixture(scope="module")
def predictors(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("predictors")
    for what in ("age", "sex"):
        train_predictor(what, tiny_cohort, folder / what, steps=2)
    return {what: folder / what for what in ("age", "sex")}


@pytest.fixture
def ellipsoids(tiny_cohort: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the phantom study of the tiny cohort: its images are the scans, and smoother ones the truth."""
    cohort = PreparedCohort.open(tiny_cohort)
    everybody = VolumeDataset(cohort)
    study = PhantomStudy(tiny_cohort, 3, cohort.grid, {name: i for i, name in enumerate(everybody.names)})

    def again(task: Painting) -> tuple[np.ndarray, np.ndarray]:
        assert task.seed == 3
        image = everybody.image_XYZ(task.index)
        return image, ndimage.gaussian_filter(image, 0.5)

    monkeypatch.setattr(PhantomStudy, "open", classmethod(lambda cls, folder: study))
    monkeypatch.setattr(reconstruction, "painted", again)
    return tiny_cohort


def test_the_card_holds_every_figure_and_is_gone_on_with(
    tiny_run: Path,
    tiny_cohort: Path,
    predictors: dict[str, Path],
    ellipsoids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(card_figures, "NOISES", 2)

    def make() -> dict:
        return make_card(
            tiny_run,
            tiny_cohort,
            tmp_path / "card",
            **predictors,
            phantoms=ellipsoids,
            n=4,
            pairs=4,
            instrument=Darkness(),
        )

    made = make()
    out = tmp_path / "card"
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(made))
    for key in TARGETED:
        assert {"value", "n", "interval_95", "seed", "target", "met", "verdict", "paper"} <= results[key].keys(), key
    assert results["ventricles"]["n"] == 4 and results["reconstruction"]["n"] == 2
    assert results["model"]["id"] == read_description(tiny_run).identity
    assert results["ms_ssim"]["held_out"]["value"] is not None
    assert results["gate"]["value"] is None and "real images to say what is usual" in results["gate"]["reason"]
    assert results["settings"]["held_out"] == 2 and results["speed"]["brains_timed"] == 4
    assert results["extrapolation"]["marked"] and len(results["extrapolation"]["noises"]) == 2
    for name in ("mosaic.png", "extrapolation.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    card = (out / "README.md").read_text()
    assert card == card_text(results)
    assert "**missed**" in card and "Missed: " in card and "Not for clinical use" in card
    assert "Louis Collins" in card and "brainldm card MODEL COHORT CARD" in card
    slopes = [[0, 0, 0.91, 0], [0, 0, 0, 0.58]]
    response = {"intercepts_mm3": [0, 0], "slopes": slopes, "brains": 50, "seed": 1, "instrument": "one"}
    begun = {**results["training"], "started_from": {"name": "another", "id": "0123"}}
    assert "The model began as another (0123); whom that" in card_text({**results, "training": begun})
    told = card_text({**results, "model": {**results["model"], "response": response}})
    every = {**results["extrapolation"], "value": 1.0, "interval_95": [0.57, 1.0]}
    beyond = targeted(every, BOUNDS["extrapolation"], target=every["target"])
    lines = card_text({**results, "extrapolation": beyond}).splitlines()
    assert "| met |" in next(line for line in lines if line.startswith("| Figure 4"))
    assert "](extrapolation.png)" in card
    assert "![Beyond" not in card_text({**results, "extrapolation": {**beyond, "picture": None}})
    assert "could not be" not in card
    failing = card_text({**results, "settings": results["settings"] | {"not_made": 1, "not_judged": 2}})
    assert "- 1 image could not be made" in failing and "- 2 images could not be judged" in failing
    unasked = {**results["age"], "value": None, "n": 0, "interval_95": None, "reason": "no predictor of age was given"}
    unasked = targeted(unasked, BOUNDS["age"])
    unjudged = card_text({**results, "age": unasked}).splitlines()
    assert "| not judged |" in next(line for line in unjudged if line.startswith("| Age"))
    assert "Age, asked and predicted: r" in next(line for line in unjudged if "Not judged: " in line)
    assert "| calibration |" not in card
    assert "| calibration | on 50 brains of its own (seed 1, one), which showed ventricles with a slope of 0.91" in told
    assert [line for line in told.splitlines() if "| calibration |" not in line] == card.splitlines()
    judged = json.loads((out / "judged" / "scorecard.json").read_text())
    assert judged["settings"]["held_out_only"] and judged["real"]["sampled"] == 2

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    monkeypatch.setattr(reconstruction, "painted", None)  # nobody is painted again
    again = make()
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    assert {key: again[key] for key in (*TARGETED, "speed")} == {key: made[key] for key in (*TARGETED, "speed")}


@pytest.mark.parametrize(
    ("value", "interval", "key", "verdict"),
    [
        (0.99, [0.985, 0.995], "ventricles", "met"),
        (0.99, [0.97, 0.995], "ventricles", "uncertain"),
        (0.97, [0.95, 0.99], "ventricles", "missed"),
        (None, None, "ventricles", "not judged"),
        (1.0, [0.57, 1.0], "extrapolation", "met"),  # no interval of a share lies at 1
        (0.8, [0.4, 0.96], "extrapolation", "missed"),
    ],
)
def test_card_and_terminal_tell_one_verdict(
    value: float | None, interval: list[float] | None, key: str, verdict: str
) -> None:
    found = targeted({"value": value, "interval_95": interval}, BOUNDS[key])
    assert (found["verdict"], found["met"]) == (verdict, verdict in ("met", "uncertain"))
    assert targeted(found, BOUNDS[key], holds=False)["verdict"] == ("missed" if value is not None else "not judged")
    told = _told_together([{"what": "it", "verdict": "met"}, {"what": "this", "verdict": verdict}])
    assert told == ("Every target is met." if verdict == "met" else f"{verdict.capitalize()}: this.")


def test_a_card_whose_brains_cannot_all_be_made_is_whole(
    tiny_run: Path, tiny_cohort: Path, ellipsoids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_figures, "NOISES", 1)
    fail_some_brains(monkeypatch, {2})
    said: list[str] = []
    with pytest.raises(PartialFailure, match="1 image could not be made"):
        make_card(
            tiny_run,
            tiny_cohort,
            tmp_path / "card",
            age=None,
            sex=None,
            phantoms=ellipsoids,
            n=4,
            pairs=4,
            instrument=Darkness(),
            say=said.append,
        )
    results = read_json(tmp_path / "card" / "results.json")
    assert results["settings"]["not_made"] == 1 and results["speed"]["brains_timed"] == 3
    assert results["ventricles"]["n"] == 3
    assert "1 image could not be made" in (tmp_path / "card" / "README.md").read_text()
    assert any(line.startswith("Age, asked and predicted") and line.endswith(": not judged") for line in said)


def test_what_does_not_belong_together_is_refused_before_the_first_brain(
    tiny_run: Path,
    tiny_cohort: Path,
    predictors: dict[str, Path],
    ellipsoids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = PhantomStudy.open(ellipsoids)
    swapped = {"age": predictors["sex"], "sex": predictors["age"]}
    with pytest.raises(UsageError, match="predicts sex, and --age needs age_years"):
        make_card(tiny_run, tiny_cohort, tmp_path / "card", **swapped, phantoms=ellipsoids)
    for change, told in (
        ({"grid": GRIDS["4mm"]}, "the phantom study is of"),
        ({"index_of": {}}, r"lacks sub-08, sub-09 of the cohort"),
    ):
        wrong = dataclasses.replace(study, **change)
        monkeypatch.setattr(PhantomStudy, "open", classmethod(lambda cls, folder, wrong=wrong: wrong))
        with pytest.raises((UsageError, BadInput), match=told):
            make_card(tiny_run, tiny_cohort, tmp_path / "card", **predictors, phantoms=ellipsoids)
    monkeypatch.setattr(PhantomStudy, "open", classmethod(lambda cls, folder: study))
    split_anew = Path(shutil.copytree(tiny_cohort, tmp_path / "split anew"))
    facts = read_json(split_anew / "prepared.json")
    facts["config"]["seed"] += 1
    write_json(split_anew / "prepared.json", facts)
    with pytest.raises(UsageError, match="who is held out here may have been trained on") as refused:
        make_card(tiny_run, split_anew, tmp_path / "card", **predictors, phantoms=ellipsoids)
    assert f"--seed {facts['config']['seed'] - 1}" in refused.value.remedy
    calibrated = Path(shutil.copytree(tiny_run / "model", tmp_path / "calibrated"))
    description = read_json(calibrated / "model.json")
    slopes = [[0, 0, 0.9, 0], [0, 0, 0, 0.6]]
    response = {"intercepts_mm3": [0, 0], "slopes": slopes, "brains": 50, "seed": 7, "instrument": "one"}
    description["covariates"]["response"] = response
    write_json(calibrated / "model.json", description)
    with pytest.raises(UsageError, match="calibrated on the brains of seed 7"):
        make_card(calibrated, tiny_cohort, tmp_path / "card", **predictors, phantoms=ellipsoids, seed=7)
    assert not (tmp_path / "card").exists()


def test_a_study_painted_by_other_rules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no phantom study"):
        PhantomStudy.open(tmp_path)
    facts = {"kind": "phantom study", "seed": 5, "grid": {"name": "4mm"}, "anatomies": "MNI152"}
    constants = json.loads(json.dumps(dataclasses.asdict(PhantomConfig())))
    write_json(tmp_path / "phantom.json", facts | {"constants": constants})
    Manifest(tmp_path / "manifest.jsonl").append(index=7, participant_id="sub-0008")
    study = PhantomStudy.open(tmp_path)
    assert (study.seed, study.grid, study.index_of) == (5, GRIDS["4mm"], {"sub-0008": 7})
    constants["appearance"]["grey"] = 0.5
    write_json(tmp_path / "phantom.json", facts | {"constants": constants})
    with pytest.raises(BadInput, match="other constants"):
        PhantomStudy.open(tmp_path)
    write_json(tmp_path / "phantom.json", facts | {"anatomies": {"a.nii": "0"}})
    with pytest.raises(BadInput, match="not made from the template"):
        PhantomStudy.open(tmp_path)


def test_painting_again_gives_the_image_of_the_study_and_the_truth_behind_it(tmp_path: Path) -> None:
    from brainldm.base.nifti import read_nifti

    write_phantom_study(tmp_path / "study", n=1, grid=GRIDS["4mm"], seed=11)
    study = PhantomStudy.open(tmp_path / "study")
    image, truth = painted(Painting(study.grid, study.seed, study.index_of["sub-0001"]))
    kept = read_nifti(next((tmp_path / "study").glob("sub-0001/anat/*_T1w.nii.gz"))).data_XYZ
    assert np.abs(kept - image).max() < 1e-4
    assert 25 < psnr_db(image, truth) < 80


def test_the_commands_train_with_the_seeds_that_were(tiny_cohort: Path) -> None:
    training = {"recipe": "quick", "seed": 5, "settings": ["seed=5", "diffusion.batch=2"], "diffusion": {}}
    description = SimpleNamespace(training=training, licence="", covariates=SimpleNamespace(response=None))
    of_age, of_sex = (SimpleNamespace(training={"steps": 2, "seed": seed}, averaging=1) for seed in (7, 0))
    parts = SimpleNamespace(
        study=SimpleNamespace(index_of={}, grid=GRIDS["4mm"], seed=1),
        loaded=SimpleNamespace(description=description),
        predictors={"age": of_age, "sex": of_sex},
    )
    told = [line for line in commands(parts, tiny_cohort, 4, 2, 4, 0) if line.startswith("brainldm train")]  # type: ignore[arg-type]
    assert told == [
        "brainldm train quick --data COHORT --out RUN --stage diffusion --set diffusion.batch=2 --set seed=5",
        "brainldm train age --data COHORT --out AGE --steps 2 --set seed=7",
        "brainldm train sex --data COHORT --out SEX --steps 2",
    ]


def test_figures_of_likeness_have_their_closed_forms() -> None:
    truth = np.random.default_rng(0).random((16, 16, 16), dtype=np.float32)
    assert psnr_db(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-4)
    same = likeness(truth, truth)
    assert same["ssim"] == pytest.approx(1.0, abs=1e-5) and same["psnr_db"] == 120
    assert is_monotone([1.5, 1.9, -0.5], [7.0, 9.0, 2.0])
    assert not is_monotone([1.5, 1.9, -0.5], [9.0, 9.0, 2.0])
    assert not is_monotone([1.5, 1.9, -0.5], [7.0, 9.0, None])
    crossing = _without_sign(Estimate(-0.002, -0.01, 0.006, 9))
    assert (crossing.value, crossing.low, crossing.high) == (0.002, 0.0, 0.01)
    apart = _without_sign(Estimate(-0.02, -0.03, -0.01, 9))
    assert (apart.value, apart.low, apart.high) == (0.02, 0.01, 0.03)
