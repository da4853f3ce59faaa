"""The cohort's latents are encoded once, through every interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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
    for name in ("mean", "log_variance"):
        assert torch.equal(rest.kept.whole(name), whole.kept.whole(name))
    assert torch.equal(rest.ventricle_factor_N, whole.ventricle_factor_N)
    mean_NCXYZ = whole.kept.whole("mean")
    assert len(mean_NCXYZ) == 2 * n and not torch.equal(mean_NCXYZ[:n], mean_NCXYZ[n:])
    some = [2 * n - 1, 0, 4]
    assert torch.equal(whole.mean_BCXYZ(some), mean_NCXYZ[some])
    std = (mean_NCXYZ.double().var(unbiased=False) + whole.kept.whole("log_variance").double().exp().mean()).sqrt()
    assert whole.std == pytest.approx(float(std), rel=1e-9)

    encoded(tmp_path / "run")
    assert images == []
    torn = sorted((tmp_path / "run").glob("*.safetensors"))[1]
    torn.write_bytes(torn.read_bytes()[:-1])
    encoded(tmp_path / "run")
    assert len(images) == 3, "only the damaged part is encoded again"
    flipped = bytearray(torn.read_bytes())
    flipped[-1] ^= 1
    torn.write_bytes(flipped)
    mended = encoded(tmp_path / "run")
    assert len(images) == 3, "a number that another took the place of is no latent"
    assert torch.equal(mended.kept.whole("mean"), mean_NCXYZ)
    save_file(load_file(torn), torn)
    encoded(tmp_path / "run")
    assert images == [], "what an earlier version wrote has no SHA-256 and stays"
    encoded(tmp_path / "run", key="another autoencoder")
    assert images == everybody_twice
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == -(-2 * n // 3), "what is of no use is kept"
