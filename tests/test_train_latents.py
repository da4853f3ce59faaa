"""The cohort's latents are encoded once, through every interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.model.folder import load_latent_diffusion
from brainldm.train.config import Augmentation
from brainldm.train.latents import Latents, encode_cohort


def test_an_interrupted_encoding_goes_on_with_the_parts_that_are_whole(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brainldm.train.parts.PART_LENGTH", 3)
    dataset = VolumeDataset(PreparedCohort.open(tiny_cohort), "train")
    autoencoder = load_latent_diffusion(tiny_run / "model").autoencoder
    images: list[int] = []

    def encoded(folder: Path, key: str = "key", stop_at: int = -1) -> Latents:
        images.clear()

        def image_XYZ(index: int) -> np.ndarray:
            images.append(index)
            if len(images) == stop_at:
                raise KeyboardInterrupt
            return VolumeDataset.image_XYZ(dataset, index)

        monkeypatch.setattr(dataset, "image_XYZ", image_XYZ)
        changes = Augmentation(affine_probability=1.0)
        cpu = torch.device("cpu")
        return encode_cohort(
            folder, autoencoder, dataset, key, views=2, augmentation=changes, device=cpu, precision="fp32"
        )

    n = len(dataset)
    everybody_twice = [*range(n), *range(n)]
    whole = encoded(tmp_path / "whole")
    assert images == everybody_twice
    for stop_at in (2, 5, 9):
        with pytest.raises(KeyboardInterrupt):
            encoded(tmp_path / "run", stop_at=stop_at)
    rest = encoded(tmp_path / "run")
    assert images == everybody_twice[-len(images) :] and len(images) < 2 * n - 6
    assert torch.equal(rest.mean_NCXYZ, whole.mean_NCXYZ)
    assert torch.equal(rest.log_variance_NCXYZ, whole.log_variance_NCXYZ)
    assert torch.equal(rest.ventricle_factor_N, whole.ventricle_factor_N)
    assert not torch.equal(whole.mean_NCXYZ[:n], whole.mean_NCXYZ[n:])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"latents.json", "latents.safetensors"}
    assert load_file(tmp_path / "run" / "latents.safetensors")["mean"].shape[0] == 2 * n

    encoded(tmp_path / "run")
    assert images == []
    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path / "run", key="another autoencoder", stop_at=2 * n)
    encoded(tmp_path / "run")
    assert images == []
