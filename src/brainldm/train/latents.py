"""The cohort seen through the trained autoencoder: encoded once, kept as mean and log-variance.

RUN/latents/*.safetensors   mean and log-variance (C, X, Y, Z) of the people of the training split in order, as they
                            are, then of all of them once more for each augmented view; some in each file
RUN/latents/latents.json    which autoencoder and cohort they are of, their scale and statistics
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainldm.base.feeding import made_ahead
from brainldm.base.files import read_json, write_json
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import stream
from brainldm.cohort.dataset import VolumeDataset
from brainldm.model.precision import autocast
from brainldm.nets.atlas import AnyAutoencoder
from brainldm.train.augment import Change, changed, draw_change
from brainldm.train.config import NO_AUGMENTATION, Augmentation
from brainldm.train.distributed import ALONE, Place
from brainldm.train.parts import Parts, kept_in_parts


@dataclass(frozen=True)
class Latents:
    """Latents of the training people and their statistics, in the autoencoder's own units.

    `kept` has them by number, `mean` and `log_variance` (C, X, Y, Z) each. `ventricle_factor_N` is what an augmentation
    did to the ventricles' volume; the brain's is normalised for head size, so no change of size touches it.
    """

    kept: Parts
    ventricle_factor_N: torch.Tensor
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    std: float

    @property
    def shape_CXYZ(self) -> tuple[int, ...]:
        return tuple(self.kept.parts[0]["mean"].shape[1:])

    def mean_BCXYZ(self, members: Sequence[int]) -> torch.Tensor:
        return self.kept.rows("mean", members)

    def sample(self, members: Sequence[int], noise_BCXYZ: torch.Tensor) -> torch.Tensor:
        """z = mean + sigma x noise for those members: a fresh draw at every step, as the autoencoder meant it."""
        sigma = (0.5 * self.kept.rows("log_variance", members)).exp()
        return self.mean_BCXYZ(members) + sigma * noise_BCXYZ


def distributions(kept: Parts) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Means and log-variances (N, C, X, Y, Z) of all latents in order, a part at a time."""
    return ((part["mean"], part["log_variance"]) for part in kept.parts)


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
    place: Place = ALONE,
    progress: Progress = Quiet(),
) -> Latents:
    """The latents of `dataset`, from `folder` as far as they are there with the same `key` (a digest of the
    autoencoder's weights and the cohort), else encoded and kept; several processes share the work. Views beyond the
    first are of images changed by `augmentation`."""
    made_by = {"key": key, "views": views, "augmentation": asdict(augmentation), "seed": seed}
    made_by = json.loads(json.dumps(made_by))  # as it is read back
    kept = _encoded(folder, autoencoder, dataset, made_by, augmentation, device, precision, progress, place)
    path = folder / "latents.json"
    with place.leader_first():
        facts = read_json(path) if path.is_file() else {}
        if facts.get("made_by") != made_by:
            facts = {"made_by": made_by, "people": len(dataset), **_statistics(kept)}
            write_json(path, facts)
    return Latents(
        kept, kept.whole("ventricle_factor"), tuple(facts["channel_mean"]), tuple(facts["channel_std"]), facts["std"]
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
    place: Place,
) -> Parts:
    """Every image's latent, view by view."""
    images = [(view, index) for view in range(made_by["views"]) for index in range(len(dataset))]

    def image_of(number: int) -> tuple[np.ndarray, float]:
        view, index = images[number]
        change = Change()
        if view > 0:
            change = draw_change(stream(made_by["seed"], f"latent-view-{view}", index), augmentation)
        return changed(dataset.image_XYZ(index), change), change.scale**3

    def latents_of(numbers: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        for image_XYZ, ventricle_factor in made_ahead(lambda position: image_of(numbers[position]), len(numbers)):
            image = torch.from_numpy(np.ascontiguousarray(image_XYZ))[None, None].to(device)
            with torch.no_grad(), autocast(device, precision):
                latent = autoencoder.encode(image.contiguous(memory_format=torch.channels_last_3d))
            yield {
                "mean": latent.mean_BCXYZ[0].float().cpu(),
                "log_variance": latent.log_variance_BCXYZ[0].float().cpu(),
                "ventricle_factor": torch.tensor(ventricle_factor),
            }

    return kept_in_parts(folder, made_by, range(len(images)), latents_of, "encoding latents", progress, place)


def _statistics(kept: Parts) -> dict[str, Any]:
    """Means and standard deviations of the drawn latents, by channel and of all, in float64, a part at a time."""
    axes = (0, 2, 3, 4)
    count, (total_C, squares_C, own_C) = 0, torch.zeros(3, 1, dtype=torch.float64)
    for mean, log_variance in distributions(kept):
        count += mean[:, 0].numel()
        total_C = total_C + mean.double().sum(axes)
        squares_C = squares_C + mean.double().square().sum(axes)
        own_C = own_C + log_variance.double().exp().sum(axes)
    channel_mean = total_C / count
    # Variance of z = variance of the means + mean of the variances.
    channel_variance = squares_C / count - channel_mean.square() + own_C / count
    pooled = channel_variance.mean() + channel_mean.var(unbiased=False)
    return {
        "std": float(pooled.sqrt()),
        "channel_mean": channel_mean.tolist(),
        "channel_std": channel_variance.sqrt().tolist(),
    }
