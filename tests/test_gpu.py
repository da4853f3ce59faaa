"""On a CUDA device: the same brains in its arithmetic, in the memory that was planned. Run with -m gpu."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from brainldm.generate.plan import make_plan
from brainldm.generate.run import GenerateSettings, row_noise
from brainldm.generate.start import start
from brainldm.model.folder import load_model
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.nets.autoencoder import Autoencoder, AutoencoderConfig
from brainldm.nets.slabs import decode_in_slabs
from brainldm.train.run import train
from test_train import everything_on

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():  # asked for now and not on import: see conftest.py
        pytest.skip("no CUDA device here")


def brains(model: LatentDiffusion, n: int = 2) -> np.ndarray:
    rows = make_plan({}, n=n, seed=0, ranges=model.ranges, joint=model.joint)
    return model.sample([row.covariates for row in rows], [row_noise(0, row.index) for row in rows], steps=8)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - expected).mean()) / np.ptp(expected))


def test_the_same_brains_as_on_a_cpu(tiny_run: Path) -> None:
    expected = brains(load_model(tiny_run))
    assert distance(brains(load_model(tiny_run, "cuda")), expected) < 2e-3  # convolutions in TF32
    assert distance(brains(load_model(tiny_run, "cuda", precision="bf16")), expected) < 0.03


def test_a_training_on_population_latents_reaches_its_previews(tiny_cohort: Path, tmp_path: Path) -> None:
    train(everything_on(), tiny_cohort, tmp_path / "run", device="cuda", steps=2)
    assert list((tmp_path / "run" / "diffusion" / "previews").glob("*.png"))


def test_a_compiled_unet_is_the_same_unet(tiny_run: Path) -> None:
    model = load_model(tiny_run, "cuda", precision="bf16")
    rows = make_plan({}, n=2, seed=0, ranges=model.ranges, joint=model.joint)
    ready = start(tiny_run / "model", rows, GenerateSettings(), device="cuda", precision="bf16", compiles=True)
    assert distance(brains(ready.load()), brains(model)) < 0.03


@torch.no_grad()
def test_slabs_are_the_whole_on_a_gpu_too() -> None:
    network = Autoencoder(AutoencoderConfig(channels=(32, 64, 64))).cuda().eval()
    latent = torch.randn(1, 3, 5, 7, 5, device="cuda")
    whole = network.decode(latent)
    assert (decode_in_slabs(network, latent, 50_000) - whole).abs().max() <= 2e-3 * whole.abs().max()


@pytest.mark.parametrize("batch", [1, 256])
def test_sampling_takes_no_more_memory_than_was_planned(tiny_run: Path, batch: int) -> None:
    """Beyond what its libraries keep for themselves from the first brain on, which is more than all of a tiny model."""
    first = load_model(tiny_run, "cuda", precision="bf16")
    rows = make_plan({}, n=batch, seed=0, ranges=first.ranges, joint=first.joint)
    brains(first, 1)
    del first
    torch.cuda.empty_cache()
    ready = start(tiny_run / "model", rows, GenerateSettings(batch=batch), device="cuda", precision="bf16")
    torch.cuda.reset_peak_memory_stats()
    made = brains(ready.load(), batch)
    assert len(made) == batch and np.isfinite(made).all()
    assert torch.cuda.max_memory_allocated() <= ready.memory.peak_bytes
