"""Table 1 and its figures, small: every way makes brains, is judged, and stands in the table beside the real."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from brainldm.base.errors import PartialFailure, UsageError
from brainldm.base.volume import Volume
from brainldm.cohort.measure import Measured
from brainldm.generate import run
from brainldm.recipes.table1 import REAL, WAYS, as_markdown, make_table1

SHORT = tuple(replace(way, sampler="ddim", steps=4) if way.sampler else way for way in WAYS)


@dataclass(frozen=True)
class Darkness:
    """A stand-in for the measure of brains, which ellipsoids are not."""

    name: str = "darkness"

    def __call__(self, image: Volume) -> Measured:
        dark = float((image.data_XYZ < 0.3).sum())
        return Measured(dark, 2 * dark + float(image.data_XYZ.sum()), 1.0, 1.0)


def fail_some_brains(monkeypatch: pytest.MonkeyPatch, which: Collection[int]) -> None:
    """Generation finds nothing sound in the brains that it makes, say, first and third (1, 3), counted over all calls.
    It draws each once."""
    numbers, judge = itertools.count(1), run.objection_to

    def objection_to(*about: object) -> str:
        return "it is blank" if next(numbers) in which else judge(*about)

    monkeypatch.setattr(run, "ATTEMPTS", 1)
    monkeypatch.setattr(run, "objection_to", objection_to)


@pytest.fixture(scope="module")
def made(tiny_cohort: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("table1") / "out"
    make_table1(
        tiny_cohort, out, models={"ldm": tiny_run}, minutes=0.02, n=5, pairs=6, ways=SHORT, instrument=Darkness()
    )
    return out


def test_every_way_stands_in_the_table_beside_the_real(made: Path) -> None:
    table = json.loads((made / "table1.json").read_text())
    assert [line["title"] for line in table["lines"]] == [*(way.title for way in WAYS), REAL]
    assert table["n"] == 5
    assert table["minutes_of_training"].keys() == {"ldm", "lsgan", "vaegan"}
    assert all(0 < minutes < 5 for minutes in table["minutes_of_training"].values())
    for line in table["lines"]:
        assert line["figures"]["MS-SSIM"]["value"] is not None, line["title"]
    for line in table["lines"][:-1]:
        assert line["seconds_an_image"] > 0
        card = json.loads((made / "judged" / line["way"] / "scorecard.json").read_text())
        assert line["figures"]["MS-SSIM"] == next(r for r in card["rows"] if r["key"] == "ms_ssim")["synthetic"]
        recall = next(r for r in card["rows"] if r["key"] == "manifold.recall")
        assert line["scorecard"]["manifold.recall"]["synthetic"]["value"] == recall["synthetic"]["value"]
    text = (made / "table1.md").read_text()
    assert text == as_markdown(table) and text.count("\n|") == len(WAYS) + 2
    assert "Images judged: LSGAN 5, " in text and f"{REAL} 10." in text and "could not be" not in text
    # Once, what is to be known of all; a warning of a way alone stands in the JSON.
    assert text.count("- The model says") <= 1 and text.count("- Only 5 synthetic images could be judged") == 1
    assert all(line["failures"] == {"synthetic": 0, "real": 0} and line["warnings"] for line in table["lines"][:-1])


def test_the_four_figures_are_drawn(made: Path) -> None:
    figures = [made / "figures" / name for name in ("figure1.png", "figure3.png")]
    figures += [made / "figures" / f"figure{number}" / "figure.png" for number in (2, 4)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)


def test_the_same_command_again_makes_nothing_anew(made: Path, tiny_cohort: Path, tiny_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.nii.gz")}
    models = {path: path.stat().st_mtime_ns for path in (made / "models").rglob("*.safetensors")}
    make_table1(
        tiny_cohort, made, models={"ldm": tiny_run}, minutes=0.02, n=5, pairs=6, ways=SHORT, instrument=Darkness()
    )
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*.nii.gz")}
    assert models == {path: path.stat().st_mtime_ns for path in (made / "models").rglob("*.safetensors")}


def test_a_time_that_an_interrupted_run_took_along_is_left_out(
    made: Path, tiny_cohort: Path, tiny_run: Path, tmp_path: Path
) -> None:
    again = Path(shutil.copytree(made, tmp_path / "again"))
    (again / "brains" / "lsgan.timing.json").unlink()
    models = {"ldm": tiny_run}
    make_table1(tiny_cohort, again, models=models, minutes=0.02, n=5, pairs=6, ways=SHORT, instrument=Darkness())
    line = json.loads((again / "table1.json").read_text())["lines"][0]
    assert line["way"] == "lsgan" and line["seconds_an_image"] is None


def test_brains_that_cannot_be_made_stop_neither_table_nor_figures(
    made: Path, tiny_cohort: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the LSGAN, all of the VAE-GAN and one of Figure 4."""
    again, said = Path(shutil.copytree(made, tmp_path / "again")), list[str]()
    for name in ("brains/lsgan", "brains/vaegan", "figures"):
        shutil.rmtree(again / name)
    (again / "table1.json").unlink()
    fail_some_brains(monkeypatch, {1, *range(6, 11), 21})
    with pytest.raises(PartialFailure, match=r"LSGAN: 1 of 5 brains .*; VAE-GAN: 5 of 5 brains .*; figure 4: 1 of 6"):
        make_table1(
            tiny_cohort,
            again,
            models={"ldm": tiny_run},
            minutes=0.02,
            n=5,
            pairs=6,
            ways=SHORT,
            instrument=Darkness(),
            say=said.append,
        )
    table = json.loads((again / "table1.json").read_text())
    lsgan, vaegan = table["lines"][:2]
    assert (lsgan["not_made"], lsgan["judged"], lsgan["figures"]["MS-SSIM"]["n"]) == (1, 4, 4)
    assert lsgan["seconds_an_image"] > 0
    assert (vaegan["not_made"], vaegan["judged"], vaegan["figures"]) == (5, 0, {})
    assert as_markdown(table) in said and "LSGAN 4, VAE-GAN 0, " in said[-1]
    assert "LSGAN: 1 of 5 brains could not be made." in said[-1]
    assert {path.name for path in (again / "figures").rglob("*.png")} >= {"figure1.png", "figure3.png", "figure.png"}


def test_images_that_could_not_be_judged_are_said(made: Path) -> None:
    table = json.loads((made / "table1.json").read_text())
    table["lines"][0]["failures"] = {"synthetic": 2, "real": 1}
    text = as_markdown(table)
    assert "LSGAN: 2 brains could not be judged, or not in every way. 1 real image could not be judged" in text


def test_a_model_of_another_grid_is_refused(tiny_cohort: Path, tiny_run: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "model", tmp_path / "model")
    content = json.loads((tmp_path / "model" / "model.json").read_text())
    content["grid"]["shape_XYZ"] = [2 * n for n in content["grid"]["shape_XYZ"]]
    content["latent"]["shape_CXYZ"][1:] = [2 * n for n in content["latent"]["shape_CXYZ"][1:]]
    (tmp_path / "model" / "model.json").write_text(json.dumps(content))
    models = {"ldm": tmp_path / "model"} | {name: made / "models" / name for name in ("lsgan", "vaegan", "age", "sex")}
    with pytest.raises(UsageError, match="the ldm model is of images of"):
        make_table1(tiny_cohort, tmp_path / "out", models=models)
    assert not (tmp_path / "out").exists()


def test_what_is_asked_is_checked_before_anything_is_trained(
    made: Path, tiny_cohort: Path, tiny_run: Path, tmp_path: Path
) -> None:
    models = {name: made / "models" / name for name in ("lsgan", "vaegan", "age", "sex")} | {"ldm": tiny_run}
    with pytest.raises(UsageError, match="feature space 'none'"):
        make_table1(tiny_cohort, tmp_path / "out", models=models, feature_space="none")
    with pytest.raises(UsageError, match="0 brains"):
        make_table1(tiny_cohort, tmp_path / "out", models=models, n=0)
    with pytest.raises(UsageError, match="predicts sex, not age_years"):
        make_table1(tiny_cohort, tmp_path / "out", models={**models, "age": models["sex"]})
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="trained with another minutes and seed"):
        make_table1(tiny_cohort, made, models={"ldm": tiny_run}, minutes=3, seed=1)


def test_a_slip_does_not_spoil_the_folder(tiny_cohort: Path, tmp_path: Path) -> None:
    for wrong in ({"minutes": 0.0}, {"minutes": float("inf")}, {"recipe": "none"}):
        with pytest.raises(UsageError):
            make_table1(tiny_cohort, tmp_path / "out", n=4, **wrong)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="over or in"):
        make_table1(tiny_cohort, tiny_cohort / "out", n=4)


def test_models_that_may_have_seen_the_held_out_people_are_refused(
    tiny_cohort: Path, tiny_run: Path, tmp_path: Path
) -> None:
    split_anew = Path(shutil.copytree(tiny_cohort, tmp_path / "split anew"))
    prepared = json.loads((split_anew / "prepared.json").read_text())
    prepared["config"]["seed"] = 77
    (split_anew / "prepared.json").write_text(json.dumps(prepared))
    with pytest.raises(UsageError, match="the ldm model was trained on a cohort split with"):
        make_table1(split_anew, tmp_path / "out", models={"ldm": tiny_run}, n=4)
    assert not (tmp_path / "out").exists()
