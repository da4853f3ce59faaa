"""The cohort seen through the trained autoencoder: encoded once, kept as mean and log-variance.

RUN/latents/latents.safetensors   mean and log-variance (N, C, X, Y, Z): the people of the training split in order, as
                                  they are, then all of them once more for each augmented view
RUN/latents/latents.json          which autoencoder and cohort they are of, their scale and statistics
RUN/latents/encoding/             those encoded so far, while the cohort is encoded
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from brainldm.train.feeding import Feed
from brainldm.train.parts import PART_LENGTH, kept_in_parts


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
    made_by = json.loads(json.dumps(made_by))  # as it is read back
    facts = read_json(facts_path) if facts_path.is_file() and path.is_file() else {}
    if facts.get("made_by") != made_by or facts.get("sha256") != sha256_of(path):
        tensors = _encoded(
            folder / "encoding", autoencoder, dataset, made_by, augmentation, device, precision, progress
        )
        write_tensors(path, tensors)
        facts = {"made_by": made_by, "sha256": sha256_of(path), "people": len(dataset), **_statistics(tensors)}
        write_json(facts_path, facts)
    shutil.rmtree(folder / "encoding", ignore_errors=True)
    tensors = load_file(path)  # mapped, so that only what a step needs is read
    return Latents(
        tensors["mean"],
        tensors["log_variance"],
        tensors["ventricle_factor"],
        tuple(facts["channel_mean"]),
        tuple(facts["channel_std"]),
        facts["std"],
    )


def _encoded(
    folder: Path,
    autoencoder: AnyAutoencoder,
    dataset: VolumeDataset,
    made_by: dict[str, Any],
    augmentation: Augmentation,
    device: torch.device,
    precision: str,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Every image's latent, view by view, kept in `folder` part by part."""
    images = [(view, index) for view in range(made_by["views"]) for index in range(len(dataset))]

    def image_of(number: int) -> tuple[np.ndarray, float]:
        view, index = images[number]
        change = Change()
        if view > 0:
            change = draw_change(stream(made_by["seed"], f"latent-view-{view}", index), augmentation)
        return changed(dataset.image_XYZ(index), change), change.scale**3

    feed = Feed(image_of, len(images))

    def latent_of(number: int) -> dict[str, torch.Tensor]:
        image_XYZ, ventricle_factor = feed.take(number)
        image = torch.from_numpy(np.ascontiguousarray(image_XYZ))[None, None].to(device)
        with torch.no_grad(), autocast(device, precision):
            latent = autoencoder.encode(image.contiguous(memory_format=torch.channels_last_3d))
        return {
            "mean": latent.mean_BCXYZ.float().cpu(),
            "log_variance": latent.log_variance_BCXYZ.float().cpu(),
            "ventricle_factor": torch.tensor([ventricle_factor]),
        }

    return kept_in_parts(folder, made_by, range(len(images)), latent_of, "encoding latents", progress)


def _statistics(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Means and standard deviations of the drawn latents, by channel and of all, in float64, a part at a time."""
    mean, log_variance = tensors["mean"], tensors["log_variance"]
    axes, count = (0, 2, 3, 4), mean[:, 0].numel()
    parts = list(zip(mean.split(PART_LENGTH), log_variance.split(PART_LENGTH)))
    channel_mean = torch.stack([part.double().sum(axes) for part, _ in parts]).sum(0) / count
    # Variance of z = variance of the means + mean of the variances.
    squares = [(part.double() - channel_mean[:, None, None, None]).square().sum(axes) for part, _ in parts]
    own = [part.double().exp().sum(axes) for _, part in parts]
    channel_variance = torch.stack(squares).sum(0) / count + torch.stack(own).sum(0) / count
    pooled = channel_variance.mean() + channel_mean.var(unbiased=False)
    return {
        "std": float(pooled.sqrt()),
        "channel_mean": channel_mean.tolist(),
        "channel_std": channel_variance.sqrt().tolist(),
    }
