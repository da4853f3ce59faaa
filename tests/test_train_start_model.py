"""A run that begins with a trained model's weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from brainldm.base.describe import describe
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import read_json, sha256_of, write_json
from brainldm.base.volume import Grid
from brainldm.model.folder import load_latent_diffusion
from brainldm.train.checkpoint import load_newest
from brainldm.train.run import train
from brainldm.train.settings import with_settings
from brainldm.train.start_model import start_model
from conftest import TINY_ATLASES, tiny_recipe, write_tiny_cohort


def test_a_step_that_learns_nothing_leaves_the_other_model_s_weights(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(seed=7)
    still = replace(
        recipe,
        autoencoder=replace(recipe.autoencoder, learning_rate=0.0),
        diffusion=replace(recipe.diffusion, learning_rate=0.0),
    )
    out = tmp_path / "run"
    train(still, tiny_cohort, out, steps=1, start_from=tiny_run)
    for name in ("autoencoder", "unet"):
        file = f"model/{name}.safetensors"
        assert sha256_of(out / file) == sha256_of(tiny_run / file)
    identity = load_latent_diffusion(tiny_run).description.identity
    assert read_json(out / "run.json")["started_from"]["id"] == identity
    assert load_latent_diffusion(out).description.training["started_from"]["id"] == identity
    with pytest.raises(UsageError, match="started_from"):
        train(still, tiny_cohort, out, steps=1)


def test_stage_2_alone_keeps_the_autoencoder_and_goes_on_to_the_bit(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path
) -> None:
    for out, steps in ((tmp_path / "at-once", (4,)), (tmp_path / "in-two", (2, 4))):
        for count in steps:
            train(tiny_recipe(), tiny_cohort, out, stage="diffusion", steps=count, start_from=tiny_run)
    files = [f"model/{name}.safetensors" for name in ("autoencoder", "unet")]
    assert [sha256_of(tmp_path / "at-once" / f) for f in files] == [sha256_of(tmp_path / "in-two" / f) for f in files]
    assert sha256_of(tmp_path / "in-two" / files[0]) == sha256_of(tiny_run / files[0])
    assert sha256_of(tmp_path / "in-two" / files[1]) != sha256_of(tiny_run / files[1])
    assert not (tmp_path / "in-two" / "autoencoder").exists()
    assert describe(tmp_path / "in-two")
    # It is still near the weights it began with: four steps of Adam move none by much more than four rates.
    newest = load_newest(tmp_path / "at-once" / "diffusion" / "checkpoints", warn=lambda _: None)
    assert newest is not None
    begun_with = load_latent_diffusion(tiny_run).unet.state_dict()
    moved = max(float((newest.tensors[f"unet/{name}"] - value).abs().max()) for name, value in begun_with.items())
    assert 0 < moved < 5 * tiny_recipe().diffusion.learning_rate


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    wider = replace(recipe, name="wider", diffusion=replace(recipe.diffusion, channels=(16, 48), head_channels=(0, 48)))
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"U-Net .*channels: \(16, 32\) there, \(16, 48\) in the recipe") as refused:
        train(wider, tiny_cohort, out, start_from=tiny_run)
    assert "recipe tiny" in str(refused.value)
    atlas = replace(recipe.autoencoder, net=TINY_ATLASES)
    with pytest.raises(UsageError, match="AutoencoderConfig there, AtlasAutoencoderConfig in the recipe"):
        train(replace(recipe, autoencoder=atlas), tiny_cohort, out, start_from=tiny_run)
    for change, told in (
        ({"target": "flow"}, "learnt with target eps, recipe 'tiny' has flow"),
        ({"schedule_steps": 100}, "learnt with schedule .*steps=1000, .*steps=100"),
        ({"covariate_scaling": "equalised"}, "learnt with covariate_scaling min_max"),
    ):
        other = replace(recipe, diffusion=replace(recipe.diffusion, **change))
        with pytest.raises(UsageError, match=told):
            train(other, tiny_cohort, out, start_from=tiny_run)
    grid = load_latent_diffusion(tiny_run).grid
    write_tiny_cohort(tmp_path / "longer", people=12, grid=Grid("longer", (16, 32, 16), grid.voxel_mm, grid.origin_mm))
    with pytest.raises(UsageError, match=r"have \(16, 24, 16\) voxels"):
        train(recipe, tmp_path / "longer", out, start_from=tiny_run)
    shutil.copytree(tiny_run / "model", tmp_path / "broken")
    (tmp_path / "broken" / "unet.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="SHA-256"):
        train(recipe, tiny_cohort, out, start_from=tmp_path / "broken")
    assert not (out / "run.json").exists()


def test_a_model_that_reads_latents_otherwise_is_refused_and_mirrored_images_are_said(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the published model does: images from right to left, and latents as they are."""
    recipe, model = tiny_recipe(), Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    unscaled = replace(recipe, diffusion=replace(recipe.diffusion, latent_scale=1.0))
    described = read_json(model / "model.json")
    grid = load_latent_diffusion(model).grid
    measured = described["latent"]["scale"]
    with pytest.raises(UsageError, match="takes 1: it would be shown other latents") as refused:
        start_model(model, unscaled, grid)
    as_told = with_settings(recipe, [refused.value.remedy.removeprefix("Add --set ").removesuffix(".")])
    assert start_model(model, as_told, grid).description.latent.scale == measured
    described["latent"]["scale"] = 1.0
    write_json(model / "model.json", described)
    with pytest.raises(UsageError, match="measures its own") as refused:
        start_model(model, recipe, grid)
    assert refused.value.remedy == "Add --set diffusion.latent_scale=1."
    assert start_model(model, unscaled, grid).description.latent.scale == 1
    described["grid"]["network_x"] = "right_to_left"
    write_json(model / "model.json", described)
    assert "right to left" not in capsys.readouterr().err
    start_model(model, unscaled, grid)
    assert "right to left" in capsys.readouterr().err
