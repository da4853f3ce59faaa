"""What stage 2 shows its U-Net, read back from its batches; and that sampling undoes what was done to latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainldm.base.covariates import COVARIATES, NOT_TOLD
from brainldm.base.files import read_json
from brainldm.base.streams import stream
from brainldm.diffusion.schedule import leading_timesteps
from brainldm.diffusion.solvers import Sampler
from brainldm.generate.run import row_noise
from brainldm.model.folder import load_latent_diffusion
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.latent_population import LatentPopulation
from brainldm.train.diffusion_stage import DiffusionStage
from brainldm.train.latents import Latents
from brainldm.train.parts import Parts
from conftest import tiny_recipe

PEOPLE, SHAPE_CXYZ, SCALE = 48, (3, 4, 2, 2), 2.5


def normal(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(stream(0, name).standard_normal(shape, np.float32))


MEAN_NCXYZ = normal("mean", PEOPLE, *SHAPE_CXYZ)
CONDITION_NF = torch.from_numpy(stream(0, "condition").random((PEOPLE, len(COVARIATES)), np.float32))


def population_of(shape_CXYZ: tuple[int, ...]) -> LatentPopulation:
    """One that changes every latent, and differently for everybody."""
    return LatentPopulation(
        normal("mean of all", *shape_CXYZ),
        normal("slopes", len(COVARIATES), *shape_CXYZ),
        normal("deviation", *shape_CXYZ).abs() + 0.5,
    )


def stage(*, population: LatentPopulation | None = None, condition_dropout: float = 0.0) -> DiffusionStage:
    """A stage on latents so certain that a sample of them is their mean, with three quarters of the people a batch."""
    kept = Parts(({"mean": MEAN_NCXYZ, "log_variance": torch.full_like(MEAN_NCXYZ, -60.0)},))
    latents = Latents(kept, torch.ones(PEOPLE), (0.0,) * 3, (1.0,) * 3, 1.0)
    config = replace(tiny_recipe().diffusion, batch=3 * PEOPLE // 4, condition_dropout=condition_dropout)
    names = [f"sub-{index}" for index in range(PEOPLE)]
    return DiffusionStage(
        config,
        latents,
        SCALE,
        population,
        CONDITION_NF.numpy(),
        names,
        seed=0,
        device=torch.device("cpu"),
        precision="fp32",
    )


def clean(of: DiffusionStage, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the noisy latents were made of, told their noise."""
    signal, noise = of.schedule.at(batch["timesteps"], batch["x"])
    return (batch["x"] - noise * batch["target"]) / signal


def assert_equal_but_for_rounding(found: torch.Tensor, true: torch.Tensor) -> None:
    torch.testing.assert_close(found, true, atol=1e-3, rtol=0)  # the last timestep leaves a hundredth of the signal


def test_a_batch_is_of_scaled_latents_each_with_the_covariates_of_its_own_person() -> None:
    trained = stage()
    batch, members = trained.batch_tensors(3), trained.order.members(3)
    assert members != sorted(members)
    assert_equal_but_for_rounding(clean(trained, batch), SCALE * MEAN_NCXYZ[members])
    assert torch.equal(batch["condition"], CONDITION_NF[members])
    assert len(batch["timesteps"].unique()) > len(members) / 2  # each its own


def test_the_noise_is_standard_normal_and_everybodys_own_at_every_step() -> None:
    noise = torch.cat([stage().batch_tensors(step)["target"] for step in (0, 1)])
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.1)
    assert len(noise.flatten(1).unique(dim=0)) == len(noise)


def test_somebody_of_whom_nothing_is_told_keeps_the_image() -> None:
    told, untold = stage(), stage(condition_dropout=1.0)
    batch = untold.batch_tensors(3)
    assert (batch["condition"] == NOT_TOLD).all()
    assert torch.equal(batch["x"], told.batch_tensors(3)["x"])


def test_covariates_are_kept_back_as_often_as_asked_and_never_in_part() -> None:
    trained, kept_back = stage(condition_dropout=0.5), []
    for step in range(6):
        condition_BF, own_BF = trained.batch_tensors(step)["condition"], CONDITION_NF[trained.order.members(step)]
        untold_B = (condition_BF == NOT_TOLD).all(dim=1)
        assert torch.equal(condition_BF[~untold_B], own_BF[~untold_B])
        kept_back += untold_B.tolist()
    assert np.mean(kept_back) == pytest.approx(0.5, abs=0.12)


def test_a_population_is_taken_out_by_the_persons_covariates_even_where_they_are_not_told() -> None:
    population = population_of(SHAPE_CXYZ)
    trained = stage(population=population, condition_dropout=0.5)
    batch, members = trained.batch_tensors(3), trained.order.members(3)
    assert 0 < (batch["condition"] == NOT_TOLD).all(dim=1).sum() < len(members)
    true = population.standardised(MEAN_NCXYZ[members], CONDITION_NF[members])
    assert_equal_but_for_rounding(clean(trained, batch), true)


# ---- back to the autoencoder's units


@pytest.fixture
def model(tiny_run: Path) -> LatentDiffusion:
    return load_latent_diffusion(tiny_run)


GIVES_ITS_NOISE = Sampler(lambda _denoise, step_noise, *_, **__: step_noise(0), leading_timesteps, 1)


def sampled(model: LatentDiffusion) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A latent whose U-Net's share is the noise itself; that noise; the person's covariates as they are told."""
    people = [model.joint.draw(stream(0, "somebody"))]  # type: ignore[union-attr]
    noise = row_noise(0, 0)
    first = torch.from_numpy(noise(0, tuple(model.description.latent.shape_CXYZ)))[None]
    told = torch.from_numpy(model.description.covariates.conditions(people))
    return model.sample_latents(people, [noise], GIVES_ITS_NOISE), first, told


def test_sampling_undoes_the_scale_which_is_that_of_the_trainings_latents(
    model: LatentDiffusion, tiny_run: Path
) -> None:
    scale = model.description.latent.scale
    assert scale == pytest.approx(1 / read_json(tiny_run / "latents" / "latents.json")["std"], rel=1e-6)
    assert abs(scale - 1) > 0.01
    latent, noise, _ = sampled(model)
    torch.testing.assert_close(latent, noise / scale)


def test_sampling_puts_the_population_back(model: LatentDiffusion) -> None:
    population = population_of(tuple(model.description.latent.shape_CXYZ))
    latent, noise, told = sampled(replace(model, population=population))
    torch.testing.assert_close(population.standardised(latent, told), noise, atol=1e-5, rtol=1e-5)
