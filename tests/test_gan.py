"""The GAN baselines: networks, training that resumes to the bit, model folder, generation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainldm.base.describe import describe
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.volume import grid_named
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.generate.plan import make_plan
from brainldm.generate.run import GenerateSettings, generate
from brainldm.generate.start import start
from brainldm.model.folder import load_latent_diffusion, load_model, read_description
from brainldm.model.gan import GanModel
from brainldm.model.precision import autocast
from brainldm.nets.gan import GanConfig, GanDiscriminator, GanEncoder, GanGenerator
from brainldm.recipes.gan import baseline
from brainldm.train.config import GanStageConfig
from brainldm.train.gan_run import train_gan
from brainldm.train.gan_stage import GanStage
from brainldm.train.settings import with_settings
from conftest import write_tiny_cohort

NET = GanConfig((16, 24, 8), (8, 16), noise_features=6, norm_groups=4)
CONFIGS = {
    kind: GanStageConfig(kind=kind, channels=(8, 16), steps=6, batch=2, noise_features=6, norm_groups=4)  # type: ignore[arg-type]
    for kind in ("lsgan", "vaegan")
}


# ---- networks


def test_shapes_and_range() -> None:
    torch.manual_seed(0)
    noise, known = torch.randn(2, 6), torch.rand(2, 4)
    image = GanGenerator(NET)(noise, known)
    assert image.shape == (2, 1, 16, 24, 8) and image.min() > 0 and image.max() < 1
    score, features = GanDiscriminator(NET)(image, known)
    assert score.shape == (2,) and features.shape == (2, 8, 8, 12, 4)
    mean, log_variance = GanEncoder(NET)(image)
    assert mean.shape == log_variance.shape == (2, 6)


@torch.no_grad()
def test_bfloat16_leaves_an_image_its_grey_values() -> None:
    torch.manual_seed(0)
    generator, noise, known = GanGenerator(NET), torch.randn(1, 6), torch.rand(1, 4)
    exact = generator(noise, known)
    with autocast(torch.device("cpu"), "bf16"):
        image = generator(noise, known)
    assert image.dtype == torch.float32 and len(image.unique()) > 0.9 * image.numel()
    torch.testing.assert_close(image, exact, atol=0.02, rtol=0)


def test_covariates_matter_unless_it_is_the_papers_way() -> None:
    torch.manual_seed(0)
    noise, known, other = torch.randn(1, 6), torch.zeros(1, 4), torch.ones(1, 4)
    generator, discriminator = GanGenerator(NET), GanDiscriminator(NET)
    image = generator(noise, known)
    assert not torch.equal(image, generator(noise, other))
    assert not torch.equal(discriminator(image, known)[0], discriminator(image, other)[0])
    papers = replace(NET, covariates=0)
    generator, discriminator = GanGenerator(papers), GanDiscriminator(papers)
    assert torch.equal(generator(noise, known), generator(noise, other))
    assert torch.equal(discriminator(image, known)[0], discriminator(image, other)[0])


def test_grids_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be halved 2 times"):
        GanConfig((16, 22, 8), (8, 16))
    with pytest.raises(ValueError, match="multiples of norm_groups"):
        GanConfig((16, 24, 8), (8, 12))


@pytest.mark.parametrize(
    ("shape_XYZ", "coarse_XYZ"),
    [((160, 224, 160), (5, 7, 5)), ((80, 112, 80), (5, 7, 5)), ((40, 56, 40), (5, 7, 5)), ((48, 64, 48), (3, 4, 3))],
)
def test_recipes_fit_their_grids(shape_XYZ: tuple[int, int, int], coarse_XYZ: tuple[int, ...]) -> None:
    config = baseline("lsgan", shape_XYZ)
    assert GanConfig(shape_XYZ, config.channels, config.noise_features).coarse_XYZ == coarse_XYZ
    with pytest.raises(UsageError, match="no baseline"):
        baseline("wgan", shape_XYZ)


# ---- training


@pytest.fixture(scope="module", params=["lsgan", "vaegan"])
def run(request: pytest.FixtureRequest, tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gan") / request.param
    train_gan(CONFIGS[request.param], tiny_cohort, out, precision="fp32")
    return out


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = max(run.glob("*/checkpoints/*.safetensors"), key=lambda path: path.name)
    return load_file(newest)


def test_a_run_in_two_parts_is_the_unbroken_one(run: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    config = CONFIGS[run.name]  # type: ignore[index]
    train_gan(config, tiny_cohort, tmp_path / "run", steps=3, precision="fp32")
    train_gan(config, tiny_cohort, tmp_path / "run", precision="fp32")
    whole, parts = tensors_of(run), tensors_of(tmp_path / "run")
    assert whole.keys() == parts.keys() and any("encoder" in name for name in whole) == (run.name == "vaegan")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    log = [json.loads(line) for line in (run / run.name / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log == [json.loads(line) for line in (tmp_path / "run" / run.name / "log.jsonl").read_text().splitlines()]


def test_every_network_learns(tiny_cohort: Path, tmp_path: Path) -> None:
    config = CONFIGS["vaegan"]
    train_gan(config, tiny_cohort, tmp_path / "run", steps=1, precision="fp32")
    before = tensors_of(tmp_path / "run")
    train_gan(config, tiny_cohort, tmp_path / "run", steps=2, precision="fp32")
    after = tensors_of(tmp_path / "run")
    for network in ("generator", "discriminator", "encoder"):
        changed = [n for n in before if n.startswith(network) and not torch.equal(before[n], after[n])]
        assert changed, network


def vaegan_stage(tiny_cohort: Path, **changes: float) -> GanStage:
    train = VolumeDataset(PreparedCohort.open(tiny_cohort), "train")
    condition_NF = np.random.default_rng(0).random((len(train), 4))
    config, net = replace(CONFIGS["vaegan"], **changes), replace(NET, shape_XYZ=train.grid.shape_XYZ)  # type: ignore[arg-type]
    return GanStage(config, net, train, condition_NF, seed=0, device=torch.device("cpu"), precision="fp32")


def test_a_vaegans_loss_is_the_game_and_the_weighed_reconstruction(tiny_cohort: Path) -> None:
    stage = vaegan_stage(tiny_cohort, reconstruction_weight=3.0, kl_weight=7.0)
    for step in range(3):
        figures = stage.step(step)
        assert figures["loss"] == pytest.approx(figures["adversarial"] + 3 * figures["reconstruction"], rel=1e-5)
        assert figures["reconstruction"] > 1e-4 * figures["loss"]


def test_gamma_weighs_the_generators_loss_and_not_the_encoders(tiny_cohort: Path) -> None:
    """Larsen, algorithm 1. Seen in gradients: Adam's first step is the same down a steeper slope."""

    def gradient(network: str, **changes: float) -> torch.Tensor:
        stage = vaegan_stage(tiny_cohort, gradient_clip=1e9, **changes)
        stage.step(0)
        return torch.cat([p.grad.flatten() for p in stage.networks[network].parameters() if p.grad is not None])

    for network, alike in (("encoder", True), ("generator", False)):
        first, second = (gradient(network, reconstruction_weight=gamma) for gamma in (1.0, 5.0))
        assert first.any() and torch.equal(first, second) == alike


def test_a_seed_is_a_setting_and_recorded_where_it_always_was(tiny_cohort: Path, tmp_path: Path) -> None:
    config = with_settings(CONFIGS["lsgan"], ["seed=3", "steps=1"])
    train_gan(config, tiny_cohort, tmp_path / "run", precision="fp32")
    there = json.loads((tmp_path / "run" / "run.json").read_text())
    assert there["seed"] == 3 and "seed" not in there["config"]
    assert read_description(tmp_path / "run").training["seed"] == 3
    with pytest.raises(UsageError, match="seed: 3 there, 0 now"):
        train_gan(replace(config, seed=0), tiny_cohort, tmp_path / "run", precision="fp32")


def test_another_runs_folder_is_refused(run: Path, tiny_cohort: Path) -> None:
    config = replace(CONFIGS[run.name], learning_rate=1.0)  # type: ignore[index]
    with pytest.raises(UsageError, match="another run"):
        train_gan(config, tiny_cohort, run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["lsgan", "vaegan"])
def test_one_step_at_the_papers_size(kind: str, tmp_path: Path) -> None:
    """Of the recipe as it is, and one image made by what it left: 2 GB."""
    grid = grid_named("paper")
    write_tiny_cohort(tmp_path / "cohort", people=6, grid=grid)
    train_gan(baseline(kind, grid.shape_XYZ), tmp_path / "cohort", tmp_path / "run", steps=1)
    model = load_model(tmp_path / "run")
    rows = make_plan({}, n=1, seed=0, ranges=model.ranges, joint=model.joint)
    drawn = np.random.default_rng(0)
    made = model.sample([rows[0].covariates], [lambda _, shape: drawn.standard_normal(shape)])
    assert made.shape[1:] == grid.shape_XYZ and np.isfinite(made).all() and made.std() > 0


def test_a_lsgan_learns_the_mean_brightness(tiny_cohort: Path, tmp_path: Path) -> None:
    """Not how a brain looks, in seconds; but where it is bright."""
    config = replace(CONFIGS["lsgan"], steps=200, learning_rate=2e-3)
    train_gan(config, tiny_cohort, tmp_path / "run", precision="fp32")
    model = load_model(tmp_path / "run")
    rows = make_plan({}, n=4, seed=0, ranges=model.ranges, joint=model.joint)
    drawn = np.random.default_rng(0)
    made = model.sample([row.covariates for row in rows], [lambda _, shape: drawn.standard_normal(shape)] * 4)
    cohort = PreparedCohort.open(tiny_cohort)
    people = VolumeDataset(cohort, "train")
    real = np.mean([people.image_XYZ(i) for i in range(len(people))], axis=0)
    assert np.corrcoef(made.mean(axis=0).ravel(), real.ravel())[0, 1] > 0.7


# ---- model folder and generation


def test_the_model_generates_a_dataset_and_says_what_made_it(run: Path, tmp_path: Path) -> None:
    model = load_model(run)
    assert isinstance(model, GanModel)
    rows = make_plan({}, n=3, seed=0, ranges=model.ranges, joint=model.joint)
    told: list[str] = []
    ready = start(run / "model", rows, GenerateSettings(batch=2), say=told.append)
    assert "one pass each" in told[0]
    summary = generate(ready.load(), tmp_path / "made", rows, ready.settings)
    assert summary.made == 3
    facts = json.loads((tmp_path / "made" / "generation.json").read_text())
    assert facts["sampler"] == "none" and facts["model"]["kind"] == run.name
    readme = (tmp_path / "made" / "README.md").read_text()
    assert ("LSGAN" if run.name == "lsgan" else "VAE-GAN") in readme and "diffusion" not in readme
    first = {path.name: path.read_bytes() for path in (tmp_path / "made").rglob("*.nii.gz")}
    one = sorted((tmp_path / "made").rglob("*.nii.gz"))[1]
    one.unlink()
    assert generate(ready.load(), tmp_path / "made", rows, ready.settings).made == 1
    assert one.read_bytes() == first[one.name]


def test_what_is_asked_reaches_it_as_its_description_says(run: Path) -> None:
    model = load_model(run)
    person = [make_plan({}, n=1, seed=0, ranges=model.ranges, joint=model.joint)[0].covariates]
    covariates = model.description.covariates
    told: list[np.ndarray] = []

    def generator(noise: torch.Tensor, condition_BF: torch.Tensor) -> torch.Tensor:
        told.append(condition_BF.numpy())
        return torch.zeros(1, 1, *model.grid.shape_XYZ)

    generator.first = model.generator.first  # type: ignore[attr-defined]
    for scaling in ("min_max", "equalised"):
        changed = covariates.model_copy(update={"scaling": scaling})
        description = model.description.model_copy(update={"covariates": changed})
        replace(model, description=description, generator=generator).sample(person, [lambda _, shape: np.zeros(shape)])  # type: ignore[arg-type]
        np.testing.assert_array_equal(told[-1], changed.conditions(person))
    assert not np.array_equal(*told)


def test_samplers_and_diffusions_commands_are_refused(run: Path, tmp_path: Path) -> None:
    model = load_model(run)
    rows = make_plan({}, n=1, seed=0, ranges=model.ranges, joint=model.joint)
    for settings in (GenerateSettings(sampler="ddim"), GenerateSettings(steps=5)):
        with pytest.raises(UsageError, match="no sampler"):
            start(run / "model", rows, settings)
    with pytest.raises(BadInput, match="latent diffusion is needed"):
        load_latent_diffusion(run)


def test_a_damaged_or_unknown_model_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    with (tmp_path / "model" / "generator.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadInput, match="not those that"):
        load_model(tmp_path / "model")
    content = json.loads((tmp_path / "model" / "model.json").read_text())
    (tmp_path / "model" / "model.json").write_text(json.dumps(content | {"kind": "wgan"}))
    with pytest.raises(BadInput, match="kind 'wgan'"):
        read_description(tmp_path / "model")


def test_info_tells_of_run_and_model(run: Path) -> None:
    assert describe(run)["stages"][run.name]["steps"] == 6
    assert describe(run / "model")["kind"] == f"model ({run.name})"
