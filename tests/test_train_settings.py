"""Single values of a recipe changed by name: what is made of text, what is refused, what the run records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from brainldm.base.errors import UsageError
from brainldm.base.files import read_json
from brainldm.cli import app
from brainldm.recipes import recipe_named
from brainldm.recipes.gan import baseline
from brainldm.train.config import PredictorConfig
from brainldm.train.run import train
from brainldm.train.settings import with_settings
from conftest import tiny_recipe


def test_values_are_made_of_their_type() -> None:
    asked = ["autoencoder.learning_rate=0.002", "diffusion.channels=[32, 64, 64]", "diffusion.target=eps"]
    asked += ["autoencoder.net.res_blocks=3", "diffusion.ema_decay=null", "diffusion.volume_reader=true"]
    before = recipe_named("fast")
    recipe = with_settings(before, asked)
    assert recipe.autoencoder.learning_rate == 0.002 and recipe.diffusion.channels == (32, 64, 64)
    assert recipe.diffusion.target == "eps" and recipe.diffusion.ema_decay is None and recipe.diffusion.volume_reader
    assert recipe.autoencoder.net.res_blocks == 3 and type(recipe.autoencoder.net) is type(before.autoencoder.net)
    assert recipe.autoencoder.steps == before.autoencoder.steps
    assert with_settings(baseline("lsgan", (80, 112, 80)), ["batch=2"]).batch == 2
    assert with_settings(PredictorConfig(), ["shift_voxels=0"]).shift_voxels == 0


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("autoencoder.lr=1", "no setting 'autoencoder.lr'"),
        ("autoencoder.steps.more=1", "no setting 'autoencoder.steps.more'"),
        ("autoencoder=1", "a group of settings"),
        ("autoencoder.steps=many", "autoencoder.steps cannot be 'many'"),
        ("diffusion.target=x", "diffusion.target cannot be 'x'"),
        ("autoencoder.net.cell=3", "autoencoder.net.cell cannot be '3'"),
        ("autoencoder.steps", "sets nothing"),
        ("name=mine", "no setting 'name'"),
        ('minutes_share={"autoencoder": 1}', "at least 2 items"),
        ("diffusion.latent_views=0", "diffusion.latent_views cannot be '0': .*greater than or equal to 1"),
        ("diffusion.timestep_shift=0", "greater than 0"),
        ("diffusion.learning_rate=NaN", "diffusion.learning_rate cannot be 'NaN'"),
        ("autoencoder.augmentation.flip_probability=1.5", "less than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_name(asked: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        with_settings(recipe_named("fast"), [asked])


@pytest.mark.parametrize("setting", ["norm_groups=7", "head_channels=[0, 31]", "beta_end=2", "schedule_steps=10"])
def test_a_stage_2_that_cannot_be_is_refused_before_stage_1(tiny_cohort: Path, tmp_path: Path, setting: str) -> None:
    recipe = with_settings(tiny_recipe(), [f"diffusion.{setting}"])
    with pytest.raises(UsageError, match="no stage 2 can be made of recipe 'tiny'"):
        train(recipe, tiny_cohort, tmp_path / "run")
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_a_run_records_them_and_is_gone_on_with_by_the_same_alone(tiny_cohort: Path, tmp_path: Path) -> None:
    command = ["train", "age", "--data", str(tiny_cohort), "--out", str(tmp_path / "run"), "--steps", "1"]
    app([*command, "--set", "batch=2"], result_action="return_value")
    assert read_json(tmp_path / "run" / "run.json")["config"]["batch"] == 2
    with pytest.raises(UsageError, match=r"config\.batch: 2 there, 3 now"):
        app([*command, "--set", "batch=3"], result_action="return_value")


def test_a_run_goes_on_with_what_leaves_its_result(
    tiny_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def go_on(*settings: str) -> None:
        recipe = with_settings(tiny_recipe(), ["autoencoder.cosine_decay=true", *settings])
        train(replace(recipe, settings=settings), tiny_cohort, tmp_path, stage="autoencoder")

    go_on("autoencoder.steps=2")
    go_on("autoencoder.checkpointing=true", "checkpoint_minutes=9", "autoencoder.steps=2")
    assert "learning rate" not in capsys.readouterr().err
    go_on("autoencoder.steps=3")
    assert "the autoencoder's learning rate was falling over 2 steps" in capsys.readouterr().err
    with pytest.raises(UsageError, match="2 steps were asked for, and this run has made 3"):
        go_on("autoencoder.steps=2")
    with pytest.raises(UsageError, match="another run"):
        go_on("autoencoder.learning_rate=0.1")


def test_a_recipes_settings_are_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["--set", "diffusion.batch=3", "--dry-run"]
    app(
        ["train", "fast", "--data", str(tmp_path / "cohort"), "--out", str(tmp_path / "out"), *given],
        result_action="return_value",
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"] == ["diffusion.batch=3"] and printed["diffusion"]["batch"] == 3
