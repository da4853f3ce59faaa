"""The cohort seen through the trained autoencoder: encoded once, kept as mean and log-variance.

RUN/latents/latents.safetensors   mean and log-variance (N, C, X, Y, Z), in the order of the training split
RUN/latents/latents.json          which autoencoder and cohort they are of, their scale and statistics
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from brainldm.base.files import read_json, sha256_of, write_json
from brainldm.base.progress import Progress, Quiet
from brainldm.cohort.dataset import VolumeDataset
from brainldm.model.precision import autocast
from brainldm.model.tensors import write_tensors
from brainldm.nets.autoencoder import Autoencoder


@dataclass(frozen=True)
class Latents:
    """Latents of the training people and their statistics, in the autoencoder's own units."""

    mean_NCXYZ: torch.Tensor
    log_variance_NCXYZ: torch.Tensor
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    std: float

    def sample(self, members: list[int], noise_BCXYZ: np.ndarray) -> torch.Tensor:
        """z = mean + sigma x noise for those members: a fresh draw at every step, as the autoencoder meant it."""
        sigma = (0.5 * self.log_variance_NCXYZ[members]).exp()
        return self.mean_NCXYZ[members] + sigma * torch.from_numpy(noise_BCXYZ)


def encode_cohort(
    folder: Path,
    autoencoder: Autoencoder,
    dataset: VolumeDataset,
    key: str,
    *,
    device: torch.device,
    precision: str,
    progress: Progress = Quiet(),  # noqa: B008  # stateless
) -> Latents:
    """The latents of `dataset`, from `folder` when they are there with the same `key` (a digest of the autoencoder's
    weights and the cohort), else encoded and kept."""
    path, facts_path = folder / "latents.safetensors", folder / "latents.json"
    if facts_path.is_file() and path.is_file():
        facts = read_json(facts_path)
        if facts.get("key") == key and facts.get("sha256") == sha256_of(path):
            return _with_statistics(load_file(path))
    progress.start("encoding latents", len(dataset))
    means, log_variances = [], []
    for index in range(len(dataset)):
        image = torch.from_numpy(dataset.image_XYZ(index))[None, None].to(device)
        with torch.no_grad(), autocast(device, precision):
            latent = autoencoder.encode(image.contiguous(memory_format=torch.channels_last_3d))
        means.append(latent.mean_BCXYZ.float().cpu().contiguous())
        log_variances.append(latent.log_variance_BCXYZ.float().cpu().contiguous())
        progress.advance()
    tensors = {"mean": torch.cat(means), "log_variance": torch.cat(log_variances)}
    latents = _with_statistics(tensors)
    write_tensors(path, tensors)
    write_json(
        facts_path,
        {
            "key": key,
            "sha256": sha256_of(path),
            "people": len(dataset),
            "std": latents.std,
            "channel_mean": latents.channel_mean,
            "channel_std": latents.channel_std,
        },
    )
    return latents


def _with_statistics(tensors: dict[str, torch.Tensor]) -> Latents:
    mean, log_variance = tensors["mean"], tensors["log_variance"]
    axes = (0, 2, 3, 4)
    channel_mean = mean.double().mean(axes)
    # Variance of z = variance of the means + mean of the variances.
    channel_variance = mean.double().var(axes, unbiased=False) + log_variance.double().exp().mean(axes)
    pooled = channel_variance.mean() + channel_mean.var(unbiased=False)
    return Latents(
        mean,
        log_variance,
        tuple(channel_mean.tolist()),
        tuple(channel_variance.sqrt().tolist()),
        float(pooled.sqrt()),
    )
