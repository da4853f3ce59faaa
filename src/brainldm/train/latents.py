"""The cohort seen through the trained autoencoder: encoded once, kept as mean and log-variance.

RUN/latents/latents.safetensors   mean and log-variance (N, C, X, Y, Z): the people of the training split in order, as
                                  they are, then all of them once more for each augmented view
RUN/latents/latents.json          which autoencoder and cohort they are of, their scale and statistics
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from brainldm.base.files import read_json, sha256_of, write_json
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import stream
from brainldm.cohort.dataset import VolumeDataset
from brainldm.model.precision import autocast
from brainldm.model.tensors import write_tensors
from brainldm.nets.atlas import AnyAutoencoder
from brainldm.train.augment import Change, changed, draw_change
from brainldm.train.config import NO_AUGMENTATION, Augmentation


@dataclass(frozen=True)
class Latents:
    """Latents of the training people and their statistics, in the autoencoder's own units.

    `ventricle_factor_N` is what an augmentation did to the ventricles' volume; the brain's is normalised for head size,
    so no change of size touches it.
    """

    mean_NCXYZ: torch.Tensor
    log_variance_NCXYZ: torch.Tensor
    ventricle_factor_N: torch.Tensor
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    std: float

    def sample(self, members: list[int], noise_BCXYZ: np.ndarray) -> torch.Tensor:
        """z = mean + sigma x noise for those members: a fresh draw at every step, as the autoencoder meant it."""
        sigma = (0.5 * self.log_variance_NCXYZ[members]).exp()
        return self.mean_NCXYZ[members] + sigma * torch.from_numpy(noise_BCXYZ)


def encode_cohort(
    folder: Path,
    autoencoder: AnyAutoencoder,
    dataset: VolumeDataset,
    key: str,
    *,
    views: int = 1,
    augmentation: Augmentation = NO_AUGMENTATION,
    seed: int = 0,
    device: torch.device,
    precision: str,
    progress: Progress = Quiet(),  # noqa: B008  # stateless
) -> Latents:
    """The latents of `dataset`, from `folder` when they are there with the same `key` (a digest of the autoencoder's
    weights and the cohort), else encoded and kept. Views beyond the first are of images changed by `augmentation`."""
    path, facts_path = folder / "latents.safetensors", folder / "latents.json"
    made_by = {"key": key, "views": views, "augmentation": asdict(augmentation), "seed": seed}
    made_by = json.loads(json.dumps(made_by))
    if facts_path.is_file() and path.is_file():
        facts = read_json(facts_path)
        if facts.get("made_by") == made_by and facts.get("sha256") == sha256_of(path):
            return _with_statistics(load_file(path))
    progress.start("encoding latents", views * len(dataset))
    means, log_variances, factors = [], [], []
    for view in range(views):
        for index in range(len(dataset)):
            change = Change()
            if view > 0:
                change = draw_change(stream(seed, f"latent-view-{view}", index), augmentation)
            image_XYZ = changed(dataset.image_XYZ(index), change)
            image = torch.from_numpy(np.ascontiguousarray(image_XYZ))[None, None].to(device)
            with torch.no_grad(), autocast(device, precision):
                latent = autoencoder.encode(image.contiguous(memory_format=torch.channels_last_3d))
            means.append(latent.mean_BCXYZ.float().cpu().contiguous())
            log_variances.append(latent.log_variance_BCXYZ.float().cpu().contiguous())
            factors.append(change.scale**3)
            progress.advance()
    tensors = {
        "mean": torch.cat(means),
        "log_variance": torch.cat(log_variances),
        "ventricle_factor": torch.tensor(factors),
    }
    latents = _with_statistics(tensors)
    write_tensors(path, tensors)
    write_json(
        facts_path,
        {
            "made_by": made_by,
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
        tensors["ventricle_factor"],
        tuple(channel_mean.tolist()),
        tuple(channel_variance.sqrt().tolist()),
        float(pooled.sqrt()),
    )
