"""A model whose answer is measured is told what makes it show what is asked."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from brainldm.base.covariates import Covariates
from brainldm.base.errors import BadInput, EnvironmentProblem, UsageError
from brainldm.base.files import read_json
from brainldm.base.nifti import read_nifti
from brainldm.base.streams import stream
from brainldm.base.volume import Volume
from brainldm.cohort.measure import Measured
from brainldm.generate.plan import make_plan
from brainldm.generate.run import GenerateSettings, generate, row_noise
from brainldm.generate.start import start
from brainldm.model.description import ResponseDescription
from brainldm.model.folder import load_latent_diffusion, read_description
from brainldm.model.response import fitted_lines, own_slopes, told_for
from brainldm.recipes.calibrate import calibrate

# Ventricles are shown in nine tenths, brains in six, less in the old and with wide ventricles.
INTERCEPTS = np.array([2e3, 6e5])
SLOPES = np.array([[100.0, 5.0, 0.9, 0.0], [-400.0, -30.0, -0.3, 0.6]])


def people(count: int) -> list[Covariates]:
    draws = stream(0, "people")
    return [Covariates(i % 2, *draws.uniform((44, 7e3, 1.1e6), (82, 9e4, 1.7e6)).tolist()) for i in range(count)]


def shown(rows: list[Covariates]) -> np.ndarray:
    return INTERCEPTS + np.array([row.as_array() for row in rows]) @ SLOPES.T


def test_the_lines_are_found_and_undone() -> None:
    rows = people(60)
    noise = stream(0, "scatter").normal(0, (300.0, 8e3), (60, 2))
    intercepts, slopes, scatter = fitted_lines(rows, shown(rows))
    np.testing.assert_allclose(intercepts, INTERCEPTS, rtol=1e-6)
    np.testing.assert_allclose(slopes, SLOPES, rtol=1e-6, atol=1e-9)
    assert scatter == pytest.approx([0, 0], abs=1e-3)
    assert fitted_lines(rows, shown(rows) + noise)[2] == pytest.approx([300, 8e3], rel=0.25)
    told = told_for(rows, intercepts, slopes)
    np.testing.assert_allclose(shown(told), [[row.ventricles_mm3, row.brain_mm3] for row in rows], rtol=1e-9)
    assert [(row.sex, row.age_years) for row in told] == [(row.sex, row.age_years) for row in rows]


def test_what_all_share_gets_no_slope() -> None:
    women = [Covariates(0, row.age_years, row.ventricles_mm3, row.brain_mm3) for row in people(30)]
    intercepts, slopes, _ = fitted_lines(women, shown(women))
    assert slopes[:, 0].tolist() == [0, 0]
    np.testing.assert_allclose(own_slopes(slopes)["brain_mm3"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(intercepts, INTERCEPTS, rtol=1e-6)


def test_a_model_that_does_not_follow_cannot_be_described_as_one_that_does() -> None:
    flat = [SLOPES[0].tolist(), [0.0, 0.0, 0.0, 0.1]]
    with pytest.raises(ValidationError, match=r"brain_mm3 is shown with a slope of 0\.10"):
        ResponseDescription.model_validate(
            {"intercepts_mm3": [0, 0], "slopes": flat, "brains": 50, "seed": 1, "instrument": "x"}
        )


class Lookup:
    """An instrument that shows, of each image, what the lines and a bit of scatter say."""

    name = "lookup"

    def __init__(self, by_digest: dict[str, tuple[float, float]]) -> None:
        self.by_digest = by_digest

    def __call__(self, image: Volume) -> Measured:
        ventricles, brain = self.by_digest[digest(image.data_XYZ)]
        return Measured(ventricles, brain, brain, 1.0)


class Blind:
    name = "blind"

    def __call__(self, image: Volume) -> Measured:
        raise BadInput("there is no brain.")


def digest(image_XYZ: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image_XYZ, np.float32).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def brains(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lookup]:
    """40 brains where a calibration will look for them, and what an instrument finds in them."""
    out = tmp_path_factory.mktemp("calibration") / "out"
    model = load_latent_diffusion(tiny_run)
    rows = make_plan({}, n=40, seed=1, ranges=model.ranges, joint=model.joint)
    ready = start(tiny_run, rows, GenerateSettings(seed=1))  # in the arithmetic that calibrate will choose
    generate(ready.load(), out / "brains", rows, ready.settings)
    scatter = stream(0, "scatter").normal(0, (300.0, 8e3), (40, 2))
    found = shown([row.covariates for row in rows]) + scatter
    files = sorted((out / "brains").rglob("*_T1w.nii.gz"))
    return out, Lookup({digest(read_nifti(f).data_XYZ): tuple(v) for f, v in zip(files, found.tolist(), strict=True)})


def test_a_calibrated_model_is_told_what_makes_it_show_what_is_asked(
    tiny_run: Path, brains: tuple[Path, Lookup], tmp_path: Path
) -> None:
    out, instrument = brains
    found = calibrate(tiny_run, out, n=40, instrument=instrument)
    assert found.before["brain_mm3"]["slope"]["value"] < 0.8
    assert found.after["brain_mm3"]["slope"]["value"] == pytest.approx(1, abs=0.1)
    assert found.after["ventricles_mm3"]["slope"]["value"] == pytest.approx(1, abs=0.02)
    assert abs(found.after["brain_mm3"]["bias"]["value"]) < 2e3
    assert read_json(out / "calibration.json")["response"]["instrument"] == "lookup"
    assert "expected from now on" in found.as_text()

    plain, calibrated = load_latent_diffusion(tiny_run), load_latent_diffusion(out / "model")
    asked = [plain.joint.draw(stream(0, "asked", i)) for i in range(3)]
    told = calibrated.description.covariates.response.told_for(asked)
    wanted = [[row.ventricles_mm3, row.brain_mm3] for row in asked]
    np.testing.assert_allclose(shown(told), wanted, rtol=0.05)
    noise = [row_noise(0, i) for i in range(3)]
    np.testing.assert_array_equal(calibrated.sample(asked, noise, steps=2), plain.sample(told, noise, steps=2))

    assert calibrated.description.identity != plain.description.identity  # the same weights, other brains
    renamed = plain.description.model_copy(update={"name": "another", "licence": "CC0-1.0"})
    assert renamed.identity == plain.description.identity

    # A dataset says how its model was told, and is not mixed with one of the same weights untold.
    rows = make_plan({}, n=1, seed=0, ranges=plain.ranges, joint=plain.joint)
    generate(calibrated, tmp_path / "made", rows, GenerateSettings())
    assert read_json(tmp_path / "made" / "generation.json")["model"]["response"]["brains"] == 40
    with pytest.raises(UsageError, match="holds another dataset"):
        generate(plain, tmp_path / "made", rows, GenerateSettings())

    # Calibrated anew, not further.
    again = calibrate(out / "model", out, n=40, instrument=instrument)
    assert again.response == found.response
    assert read_description(tiny_run).covariates.response is None


class NotHere:
    name = "not here"

    def __call__(self, image: Volume) -> Measured:
        raise EnvironmentProblem("the instrument is not installed here.", remedy="Install it.")


def test_what_cannot_be_calibrated_is_refused(tiny_run: Path, brains: tuple[Path, Lookup], tmp_path: Path) -> None:
    out, instrument = brains
    before = (tiny_run / "model" / "model.json").read_bytes()
    for folder in (tiny_run, Path(shutil.copytree(tiny_run, tmp_path / "another"))):
        with pytest.raises(UsageError, match="a model that is no calibration of this one"):
            calibrate(tiny_run, folder, n=40, instrument=instrument)
        assert (folder / "model" / "model.json").read_bytes() == before
    with pytest.raises(EnvironmentProblem, match="not installed here"):
        calibrate(tiny_run, out, n=40, instrument=NotHere())
    with pytest.raises(UsageError, match="12 brains are too few"):
        calibrate(tiny_run, out, n=12, instrument=instrument)
    brain = 1.4e6
    deaf = Lookup({key: (ventricles, brain) for key, (ventricles, _) in instrument.by_digest.items()})
    deaf.name = "deaf"
    with pytest.raises(UsageError, match=r"asked for 10 ml more of brain_mm3, this model shows -?0.0 ml more"):
        calibrate(tiny_run, out, n=40, instrument=deaf)
    with pytest.raises(UsageError, match="not fit to be calibrated"):
        calibrate(tiny_run, out, n=40, instrument=Blind())
