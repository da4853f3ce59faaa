"""A training that was killed and resumed is the one that never stopped."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import sha256_of
from brainldm.base.streams import stream
from brainldm.generate.run import row_noise
from brainldm.model.description import POPULATION_NAME
from brainldm.model.folder import load_latent_diffusion, load_model
from brainldm.nets.atlas import AtlasAutoencoder
from brainldm.train.autoencoder_stage import AutoencoderStage
from brainldm.train.checkpoint import Checkpoint, load_newest, save_checkpoint
from brainldm.train.config import Augmentation, GanStageConfig, Recipe
from brainldm.train.diffusion_stage import DiffusionStage, draw_timesteps
from brainldm.train.gan_run import train_gan
from brainldm.train.loop import Terminated, run_stage
from brainldm.train.run import train
from conftest import TINY_ATLASES, tiny_recipe, write_tiny_cohort

WEIGHTS = ("model/autoencoder.safetensors", "model/unet.safetensors", "autoencoder/log.jsonl", "diffusion/log.jsonl")


def fingerprints(run: Path) -> dict[str, str]:
    return {name: sha256_of(run / name) for name in WEIGHTS}


def test_two_runs_of_one_recipe_are_equal_to_the_bit(tiny_run: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    train(tiny_recipe(), tiny_cohort, tmp_path / "again")
    assert fingerprints(tmp_path / "again") == fingerprints(tiny_run)


def test_another_seed_is_another_run(tiny_run: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    train(tiny_recipe(seed=1), tiny_cohort, tmp_path / "other")
    assert (
        fingerprints(tmp_path / "other")["model/unet.safetensors"] != fingerprints(tiny_run)["model/unet.safetensors"]
    )


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_stopped_and_resumed_equals_unbroken(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path, stop_after: int
) -> None:
    """Stops both stages early (the adversarial term starts at step 2), then goes on to the end."""
    train(tiny_recipe(), tiny_cohort, tmp_path, stage="autoencoder", steps=stop_after)
    train(tiny_recipe(), tiny_cohort, tmp_path, stage="autoencoder")
    train(tiny_recipe(), tiny_cohort, tmp_path, stage="diffusion", steps=stop_after)
    train(tiny_recipe(), tiny_cohort, tmp_path)
    assert fingerprints(tmp_path) == fingerprints(tiny_run)


def everything_on() -> Recipe:
    """The tiny recipe with all that the paper's has not: rectified flow, population latents, views, dropout."""
    recipe, changes = tiny_recipe(), Augmentation(flip_probability=0.5, affine_probability=0.5)
    diffusion = replace(
        recipe.diffusion,
        target="flow",
        schedule="rectified",
        timestep_draw="logit_normal",
        timestep_shift=3.0,
        latent_population=True,
        latent_views=2,
        augmentation=changes,
        covariate_scaling="equalised",
        covariates_in_time=True,
        condition_dropout=0.3,
    )
    return replace(recipe, autoencoder=replace(recipe.autoencoder, augmentation=changes), diffusion=diffusion)


@pytest.fixture(scope="session")
def run_with_everything(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("everything") / "run"
    train(everything_on(), tiny_cohort, out)
    return out


def test_with_everything_on_a_resumed_run_equals_the_unbroken_one(
    run_with_everything: Path, tiny_cohort: Path, tmp_path: Path
) -> None:
    train(everything_on(), tiny_cohort, tmp_path, stage="autoencoder")
    train(everything_on(), tiny_cohort, tmp_path, stage="diffusion", steps=2)
    train(everything_on(), tiny_cohort, tmp_path)
    assert fingerprints(tmp_path) == fingerprints(run_with_everything)
    facts = json.loads((tmp_path / "latents" / "latents.json").read_text())
    assert facts["made_by"]["views"] == 2


def test_a_model_on_population_latents_is_whole_only_with_its_population(
    run_with_everything: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_with_everything / "model", tmp_path / "model")
    model = load_latent_diffusion(tmp_path / "model")
    person = model.joint.draw(stream(0, "somebody"))
    image_XYZ = model.sample([person], [row_noise(0, 0)], steps=3)[0]
    assert image_XYZ.shape == model.grid.shape_XYZ and np.isfinite(image_XYZ).all()
    (tmp_path / "model" / POPULATION_NAME).unlink()
    with pytest.raises(BadInput, match="weights are missing"):
        load_latent_diffusion(tmp_path / "model")


@pytest.mark.parametrize("draw", ["uniform", "logit_normal"])
def test_a_shift_draws_the_middle_from_more_noise(draw: str) -> None:
    config = replace(tiny_recipe().diffusion, timestep_draw=draw, schedule_steps=1000)
    drawn = {
        shift: draw_timesteps(stream(0, "draw"), replace(config, timestep_shift=shift), 20_000) for shift in (1.0, 4.0)
    }
    assert np.median(drawn[1.0]) == pytest.approx(500, abs=15)
    assert np.median(drawn[4.0]) == pytest.approx(800, abs=15)
    assert all(steps.min() >= 0 and steps.max() < 1000 for steps in drawn.values())


def test_guidance_goes_along_the_line_from_the_untold_to_the_told(run_with_everything: Path) -> None:
    model = load_latent_diffusion(run_with_everything)
    people = [model.joint.draw(stream(0, "somebody", i)) for i in range(2)]
    x = torch.from_numpy(stream(0, "x").standard_normal((2, *model.description.latent.shape_CXYZ), np.float32))
    at = torch.tensor([400, 400])
    with torch.no_grad():
        blind, told, twice = (replace(model, guidance=g).denoiser(people)(x, at) for g in (0.0, 1.0, 2.0))
    assert not torch.equal(blind, told)
    torch.testing.assert_close(twice, 2 * told - blind, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(blind[0], replace(model, guidance=0.0).denoiser(people[::-1])(x, at)[0])


def test_a_recipe_of_registered_images_is_for_one_grid(tiny_cohort: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    net = replace(TINY_ATLASES, grid_XYZ=(32, 24, 16))
    recipe = replace(recipe, autoencoder=replace(recipe.autoencoder, net=net))
    with pytest.raises(UsageError, match=r"images of \(32, 24, 16\) voxels, and the cohort's have \(16, 24, 16\)"):
        train(recipe, tiny_cohort, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_too_few_people_show_no_population(tmp_path: Path) -> None:
    write_tiny_cohort(tmp_path / "few", people=6)
    with pytest.raises(UsageError, match="4 people to train on do not show how latents follow"):
        train(everything_on(), tmp_path / "few", tmp_path / "run")


def test_an_autoencoder_of_atlases_trains_and_generates(tiny_cohort: Path, tmp_path: Path) -> None:
    recipe = everything_on()
    recipe = replace(
        recipe,
        autoencoder=replace(recipe.autoencoder, net=TINY_ATLASES, initial_log_variance=-5.0),
        diffusion=replace(recipe.diffusion, channels=(16,), attention=(True,), head_channels=(16,), fold=2),
    )
    train(recipe, tiny_cohort, tmp_path / "run")
    model = load_latent_diffusion(tmp_path / "run")
    assert isinstance(model.autoencoder, AtlasAutoencoder)
    assert float(model.autoencoder.atlases[0, 0].detach().max()) > 0.5
    person = model.joint.draw(stream(0, "somebody"))
    assert model.sample([person], [row_noise(0, 0)])[0].shape == (16, 24, 16)


RUN_AND_DIE = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from conftest import tiny_recipe
from pathlib import Path
from dataclasses import replace
import brainldm.train.loop as loop, brainldm.train.checkpoint as checkpoint, brainldm.base.files as files
from brainldm.train.run import train
loop.FIRST_CHECKPOINT_SECONDS = 0.0
saves = 0
whole = files.os.fsync
def dying_fsync(handle):
    global saves
    saves += 1
    if saves == {die_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(handle)
files.os.fsync = dying_fsync
train(replace(tiny_recipe(), checkpoint_minutes=0.0), Path({cohort!r}), Path({out!r}))
"""


@pytest.mark.parametrize("die_at", [9, 16, 22])
def test_killed_in_the_middle_of_a_write_then_resumed(
    tiny_cohort: Path, tmp_path: Path, tiny_run: Path, die_at: int
) -> None:
    """SIGKILL at some fsync, so during the write of a checkpoint, a manifest line or a summary."""
    script = RUN_AND_DIE.format(
        tests=str(Path(__file__).parent), die_at=die_at, cohort=str(tiny_cohort), out=str(tmp_path / "run")
    )
    died = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=240)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    recipe = tiny_recipe(checkpoint_minutes=0.0)
    train(recipe, tiny_cohort, tmp_path / "run")
    assert fingerprints(tmp_path / "run") == fingerprints(tiny_run)
    assert not list((tmp_path / "run").rglob(".part-*"))


def test_sigterm_saves_and_exits_143(tiny_cohort: Path, tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import brainldm.recipes as recipes, brainldm.cli as cli
from conftest import tiny_recipe
recipes.recipe_named = lambda name: tiny_recipe()
sys.argv = ["brainldm", "train", "tiny", "--data", {str(tiny_cohort)!r}]
sys.argv += ["--out", {str(tmp_path / "run")!r}, "--steps", "100000"]
cli.main()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    log = tmp_path / "run" / "autoencoder" / "timing.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, errors.decode()[-2000:]
    assert b"the state is saved" in errors
    checkpoint = load_newest(tmp_path / "run" / "autoencoder" / "checkpoints", warn=pytest.fail)
    assert checkpoint is not None
    assert checkpoint.step > 0


def test_damaged_newest_checkpoint_falls_back_with_a_warning(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, Checkpoint(step, 1.0, {"w": torch.full((3,), float(step))}, {}))
    assert len(list(tmp_path.glob("step-*"))) == 2
    newest = tmp_path / "step-00000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    warnings: list[str] = []
    found = load_newest(tmp_path, warn=warnings.append)
    assert found is not None
    assert found.step == 2
    assert found.tensors["w"].tolist() == [2.0] * 3
    assert "step-00000003" in warnings[0]
    (tmp_path / "step-00000002.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="every checkpoint"):
        load_newest(tmp_path, warn=warnings.append)


class LossGoesWrong:
    """A stage whose third step is not a number."""

    name, steps = "wrong", 5

    def step(self, step: int) -> dict[str, float]:
        return {"loss": float("nan") if step == 2 else 1.0}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(1)}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None: ...

    def batch_names(self, step: int) -> list[str]:
        return ["sub-culprit"]

    def preview(self, path: Path) -> None: ...


def test_loss_that_is_not_finite_stops_and_names_the_scan(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"step 3 .*sub-culprit"):
        run_stage(LossGoesWrong(), tmp_path)
    kept = json.loads((tmp_path / "not_finite.json").read_text())
    assert kept["participants"] == ["sub-culprit"]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] in ([], [1, 2])


def test_another_recipe_in_the_same_folder_is_refused_by_field(tiny_run: Path, tiny_cohort: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe\.seed: 0 there, 7 now"):
        train(tiny_recipe(seed=7), tiny_cohort, tiny_run)


def test_minutes_bound_the_time(tiny_cohort: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    train(tiny_recipe(), tiny_cohort, tmp_path / "run", steps=10**6, minutes=0.05)
    assert time.monotonic() - begun < 60
    assert load_model(tmp_path / "run").description.training["diffusion"]["steps"] < 10**6


@pytest.mark.parametrize("asked", [{"minutes": 0.0}, {"minutes": -1.0}, {"minutes": float("nan")}, {"steps": 0}])
def test_no_time_and_no_steps_are_refused(tiny_cohort: Path, tmp_path: Path, asked: dict[str, float]) -> None:
    for begin, what in (
        (train, tiny_recipe()),
        (train_gan, GanStageConfig("lsgan", (8, 8), steps=1, norm_groups=4)),
    ):
        with pytest.raises(UsageError, match="were asked for"):
            begin(what, tiny_cohort, tmp_path / "run", **asked)
    assert not (tmp_path / "run").exists()


def test_stage_1_is_not_trained_on_under_a_finished_stage_2(tiny_run: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = (run / "autoencoder" / "summary.json").read_bytes()
    with pytest.raises(UsageError, match="stage 1 ended after 6 steps and would go on, and stage 2 has learnt"):
        train(tiny_recipe(), tiny_cohort, run, steps=8)
    assert (run / "autoencoder" / "summary.json").read_bytes() == before
    train(tiny_recipe(), tiny_cohort, run, stage="diffusion", steps=8)


def test_average_follows_the_weights(tiny_run: Path) -> None:
    newest = sorted((tiny_run / "diffusion" / "checkpoints").glob("step-*"))[-1]
    tensors = load_file(newest)
    name = "conv_in.conv.weight"
    assert torch.equal(tensors[f"average/{name}"], load_file(tiny_run / "model" / "unet.safetensors")[name])
    assert not torch.equal(tensors[f"average/{name}"], tensors[f"unet/{name}"])


def test_a_second_stage_is_not_gone_on_with_after_the_autoencoder_changed(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    train(tiny_recipe(), tiny_cohort, run, stage="autoencoder", steps=7)
    kept = {path: path.stat().st_mtime_ns for path in (run / "latents").iterdir()}
    model = sha256_of(run / "model" / "model.json")
    with pytest.raises(UsageError, match="diffusion in this folder was trained on other latents"):
        train(tiny_recipe(), tiny_cohort, run, stage="diffusion", steps=7)
    assert sha256_of(run / "model" / "model.json") == model
    # Refused before everybody was encoded anew: what the U-Net has learnt is still there.
    assert {path: path.stat().st_mtime_ns for path in (run / "latents").iterdir()} == kept
    shutil.rmtree(run / "diffusion")
    train(tiny_recipe(), tiny_cohort, run, stage="diffusion", steps=7)


def test_fewer_steps_than_were_made_are_refused_and_not_recorded(tiny_run: Path, tiny_cohort: Path) -> None:
    before = (tiny_run / "run.json").read_bytes()
    for stage in ("autoencoder", "diffusion"):
        with pytest.raises(UsageError, match="5 steps were asked for, and this run has made 6"):
            train(tiny_recipe(), tiny_cohort, tiny_run, stage=stage, steps=5)
    assert (tiny_run / "run.json").read_bytes() == before


def test_a_stage_1_without_its_adversarial_loss_says_so(
    tiny_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = tiny_recipe(autoencoder=replace(tiny_recipe().autoencoder, adversarial_from_step=4, steps=4))
    train(late, tiny_cohort, tmp_path / "late")
    told = capsys.readouterr().err
    assert told.count("adversarial") == 2 and "--set autoencoder.adversarial_from_step=1." in told  # one warning
    training = load_model(tmp_path / "late").description.training
    assert training["adversarial"] == "from step 4, never reached"
    with_time = tiny_recipe(autoencoder=replace(late.autoencoder, steps=10**6, adversarial_from_step=10**5))
    train(with_time, tiny_cohort, tmp_path / "time", stage="autoencoder", minutes=0.01)
    assert "time ended stage 1" in capsys.readouterr().err


def test_a_finished_stage_is_not_kept_in_memory(
    tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its networks and moments would lie on the GPU beside the next stage's."""
    made: list[weakref.ref[AutoencoderStage]] = []
    begin = AutoencoderStage.begin
    monkeypatch.setattr(AutoencoderStage, "begin", lambda self: (made.append(weakref.ref(self)), begin(self))[1])
    gc.collect()
    gc.disable()
    try:
        train(tiny_recipe(), tiny_cohort, tmp_path, stage="autoencoder", steps=2)
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


def test_a_second_stage_needs_the_last_checkpoint_of_the_first(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    facts = json.loads((run / "autoencoder" / "summary.json").read_text())
    (run / "autoencoder" / "summary.json").write_text(json.dumps({**facts, "steps": 5}))
    with pytest.raises(UsageError, match="stage 1 ended after 5 steps, and its newest checkpoint is of 6"):
        train(tiny_recipe(), tiny_cohort, run, stage="diffusion")


def test_held_out_people_are_looked_at_once(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    summary = run / "autoencoder" / "summary.json"
    before = json.loads(summary.read_text())["validation"]
    monkeypatch.setattr("brainldm.train.autoencoder_stage.reconstruction_report", None)
    train(tiny_recipe(), tiny_cohort, run)
    assert json.loads(summary.read_text())["validation"] == before


def test_stage_2_decodes_no_image_whole(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole decode at 1 mm takes more memory than its training: neither previews nor the volume reader's images."""

    def reads_none(*args: Any, **named: Any) -> tuple[None, dict[str, Any]]:
        _, _, _, decoded_XYZ, *_ = args
        shapes.append(decoded_XYZ(0).shape)
        return None, {"people": 1, "explained": {}}

    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr("brainldm.train.second_stage.find_volume_reader", reads_none)
    monkeypatch.setattr("brainldm.nets.autoencoder.Autoencoder.decode", None)
    recipe = tiny_recipe()
    recipe = replace(recipe, diffusion=replace(recipe.diffusion, volume_reader=True))
    train(recipe, tiny_cohort, tmp_path, stage="diffusion", steps=1, start_from=tiny_run)
    assert shapes == [(16, 24, 16)] and list(tmp_path.glob("diffusion/previews/*.png"))


def test_sigterm_between_the_steps_ends_the_run_and_keeps_what_is_finished(
    tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_recipe(), tiny_cohort, tmp_path, stage="autoencoder")

    class SignalledAtTheThird:
        what, done = "", 0

        def start(self, what: str, total: int, done: int = 0) -> None:
            self.what, self.done = what, done

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.done += steps
            if self.what == "encoding latents" and self.done == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("brainldm.train.parts.PART_LENGTH", 2)
    with pytest.raises(Terminated, match="what is finished is kept"):
        train(tiny_recipe(), tiny_cohort, tmp_path, progress=SignalledAtTheThird())
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 1
    train(tiny_recipe(), tiny_cohort, tmp_path)
    assert (tmp_path / "model" / "model.json").is_file()


def test_a_gradient_that_is_no_number_stops_before_it_is_saved(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss that is one, and in a recipe that clips nothing."""
    recipe = tiny_recipe()
    unclipped = replace(recipe, diffusion=replace(recipe.diffusion, gradient_clip=None))
    whole = DiffusionStage.step

    def spoilt(self: DiffusionStage, step: int) -> dict[str, float]:
        for parameter in self.unet.parameters():
            parameter.register_hook(lambda gradient: gradient * torch.nan)
        return whole(self, step)

    monkeypatch.setattr(DiffusionStage, "step", spoilt)
    with pytest.raises(BadInput, match="not a finite number at step 1"):
        train(unclipped, tiny_cohort, tmp_path, start_from=tiny_run, stage="diffusion")
    assert not list(tmp_path.rglob("step-*.safetensors"))
