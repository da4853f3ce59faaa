"""Stage 1: the autoencoder learns to compress brains (paper 2.2; weights and rates in paper.md 3.1).

    loss = L1 + kl_weight KL + perceptual_weight P + local_histogram_weight H
           + adversarial_weight (D(reconstruction) - 1)^2

KL is a sum over the latent, averaged over the batch, as in the authors' code: hence its tiny weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from brainldm.base.feeding import Feed, made_ahead
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import stream
from brainldm.cohort.dataset import VolumeDataset
from brainldm.model.precision import autocast
from brainldm.nets.atlas import AtlasAutoencoder, build_autoencoder
from brainldm.nets.autoencoder import LatentDistribution, ResidualBlock
from brainldm.nets.discriminator import discriminator_loss, generator_loss, patch_discriminator
from brainldm.train.augment import changed, draw_change
from brainldm.train.batches import BatchOrder, evenly_spread, images_tensor, normal_each
from brainldm.train.checkpoint import module_tensors, optimiser_tensors, restore_module, restore_optimiser
from brainldm.train.config import AutoencoderStageConfig
from brainldm.train.distributed import ALONE, Place, normalised_together
from brainldm.train.local_histogram import local_histogram_distance
from brainldm.train.loop import learning_rate_factor
from brainldm.train.perceptual import PerceptualDistance, perceptual_distance
from brainldm.train.pictures import save_rows
from brainldm.train.reconstruction import reconstruction_report
from brainldm.train.sharding import clip_gradients, shard

_PEOPLE_FOR_THE_MEAN = 200
# Enough for a narrow interval. A tenth of a large study are thousands, at seconds each, and other processes wait.
_MOST_VALIDATED = 300
_TRAINED_PASSES = 4


def mean_image(people: VolumeDataset) -> np.ndarray:
    """The mean of the first 200 images, float32: enough for a mean, and minutes less than of 30,000."""
    count = min(len(people), _PEOPLE_FOR_THE_MEAN)
    total = np.zeros(people.grid.shape_XYZ, np.float64)
    for image_XYZ in made_ahead(people.image_XYZ, count):
        total += image_XYZ
    return (total / count).astype(np.float32)


class AutoencoderStage:
    """The autoencoder, its discriminator, and how one step trains both."""

    name = "autoencoder"

    def __init__(
        self,
        config: AutoencoderStageConfig,
        train: VolumeDataset,
        validation: VolumeDataset,
        *,
        seed: int,
        device: torch.device,
        precision: str,
        place: Place = ALONE,
        sharded: bool = False,
        perceptual_weights: Sequence[Path] = (),
        start: torch.nn.Module | None = None,
    ) -> None:
        self.config, self.train, self.validation, self.place = config, train, validation, place
        self.steps, self.seed, self.device, self.precision = config.steps, seed, device, precision
        self.order = BatchOrder(seed, len(train), config.batch)
        self.share = place.share(config.batch)
        self.feed = Feed(lambda step: self._training_images(step, self.share), config.steps)
        layout = torch.channels_last_3d
        torch.manual_seed(int(stream(seed, "autoencoder-weights").integers(2**31)))  # torch's initialisers read it
        self.autoencoder = build_autoencoder(config.net, checkpointing=config.checkpointing)
        self.started = start is not None
        if start is not None:
            self.autoencoder.load_state_dict(start.state_dict())
        elif config.initial_log_variance:
            self.autoencoder.set_log_variance(config.initial_log_variance)
        self.autoencoder.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        # Its parts, because it is not called as a whole. Those of atlases are small, and so is the discriminator.
        if sharded and not isinstance(self.autoencoder, AtlasAutoencoder):
            shard(self.autoencoder.children(), (ResidualBlock,), device)
        trained = [p for p in self.autoencoder.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(trained, lr=config.learning_rate, fused=True)
        self.discriminator: torch.nn.Module | None = None
        if config.adversarial_weight > 0:
            discriminator = patch_discriminator(config.discriminator_channels, config.discriminator_layers)
            self.discriminator = normalised_together(discriminator, place)
            self.discriminator.to(device=device, memory_format=layout)  # type: ignore[call-overload]
            self.discriminator_optimiser = torch.optim.Adam(
                self.discriminator.parameters(), lr=config.discriminator_learning_rate, fused=True
            )
        self.features: PerceptualDistance | None = None
        if config.perceptual_weight > 0:
            self.features = perceptual_distance(config.perceptual, perceptual_weights, seed).to(device)

    def begin(self) -> None:
        """An autoencoder of atlases begins at the mean image, unless another model's atlases are there."""
        if isinstance(self.autoencoder, AtlasAutoencoder) and not self.started:
            self.autoencoder.set_atlas(torch.from_numpy(mean_image(self.train)).to(self.device))

    # ---- one step -----------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, float]:
        config = self.config
        self._set_learning_rates(step)
        image = images_tensor(self.feed.take(step), self.device)
        adversarial = self.discriminator is not None and step >= config.adversarial_from_step

        # Autoencoder
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            latent = self._encoded(image, step)
            reconstruction = self.autoencoder.decode(latent.sample(self._noise(step, latent.mean_BCXYZ.shape[1:])))
        reconstruction = reconstruction.float()
        figures = {"l1": F.l1_loss(reconstruction, image), "kl": latent.kl_B().mean()}
        loss = figures["l1"] + config.kl_weight * figures["kl"]
        if self.features is not None:
            draws = stream(self.seed, "autoencoder-perceptual", step)
            figures["perceptual"] = self.features.distance(reconstruction, image, draws)
            loss = loss + config.perceptual_weight * figures["perceptual"]
        if config.local_histogram_weight > 0:
            figures["local_histogram"] = local_histogram_distance(reconstruction, image)
            loss = loss + config.local_histogram_weight * figures["local_histogram"]
        if adversarial:
            assert self.discriminator is not None
            self.discriminator.requires_grad_(False)
            with autocast(self.device, self.precision):
                judged = self.discriminator(reconstruction)[-1]
            figures["adversarial"] = generator_loss(judged.float())
            loss = loss + config.adversarial_weight * figures["adversarial"]
        loss.backward()
        self.place.average_gradients(self.autoencoder)
        figures["gradient_norm"] = clip_gradients(self.autoencoder, config.gradient_clip)
        self.optimiser.step()

        # Discriminator
        if adversarial:
            figures |= self._train_discriminator(image, reconstruction.detach())
        return {"loss": loss.item(), **{name: value.item() for name, value in figures.items()}}

    def _encoded(self, image: torch.Tensor, step: int) -> LatentDistribution:
        """An encoder that compares several times learns each of its passes alike: any number of them may come before
        the one with gradients, but few, which cost less; later passes are like the last of these."""
        if not isinstance(self.autoencoder, AtlasAutoencoder):
            return self.autoencoder.encode(image)
        most = min(self.autoencoder.config.passes, _TRAINED_PASSES)
        passes = int(stream(self.seed, "autoencoder-passes", step).integers(1, most + 1))
        return self.autoencoder.encode(image, passes)

    def _noise(self, step: int, shape_CXYZ: Sequence[int]) -> torch.Tensor:
        """For this process's share of the batch."""
        draws = (stream(self.seed, "autoencoder-noise", number) for number in self.order.numbers(step)[self.share])
        return normal_each(draws, shape_CXYZ).to(self.device)

    def _train_discriminator(self, image: torch.Tensor, reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.discriminator is not None
        self.discriminator.requires_grad_(True)
        self.discriminator_optimiser.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            judged_fake = self.discriminator(reconstruction)[-1]
            judged_real = self.discriminator(image)[-1]
        loss = discriminator_loss(judged_real.float(), judged_fake.float())
        (self.config.adversarial_weight * loss).backward()
        self.place.average_gradients(self.discriminator)
        norm = clip_gradients(self.discriminator, self.config.gradient_clip)
        self.discriminator_optimiser.step()
        return {"discriminator": loss.detach(), "discriminator_gradient_norm": norm}

    def _set_learning_rates(self, step: int) -> None:
        config = self.config
        factor = learning_rate_factor(
            step, warmup_steps=config.warmup_steps, total_steps=config.steps, cosine_decay=config.cosine_decay
        )
        self.optimiser.param_groups[0]["lr"] = config.learning_rate * factor
        if self.discriminator is not None:
            self.discriminator_optimiser.param_groups[0]["lr"] = config.discriminator_learning_rate * factor

    def _training_images(self, step: int, share: slice) -> list[np.ndarray]:
        """That share of the step's batch, each image changed by a draw of its own. A function of the step: it is made
        ahead."""
        images = []
        for member, number in zip(self.order.members(step)[share], self.order.numbers(step)[share]):
            draws = stream(self.seed, "autoencoder-augmentation", number)
            images.append(changed(self.train.image_XYZ(member), draw_change(draws, self.config.augmentation)))
        return images

    def _images(self, dataset: VolumeDataset, members: list[int]) -> torch.Tensor:
        return images_tensor([dataset.image_XYZ(i) for i in members], self.device)

    # ---- state --------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        held = module_tensors("autoencoder", self.autoencoder) | optimiser_tensors("autoencoder", self.optimiser)
        if self.discriminator is not None:
            held |= module_tensors("discriminator", self.discriminator)
            held |= optimiser_tensors("discriminator", self.discriminator_optimiser)
        return held

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        restore_module("autoencoder", self.autoencoder, tensors)
        restore_optimiser("autoencoder", self.optimiser, tensors)
        if self.discriminator is not None:
            restore_module("discriminator", self.discriminator, tensors)
            restore_optimiser("discriminator", self.discriminator_optimiser, tensors)

    def batch_names(self, step: int) -> list[str]:
        return [self.train.names[i] for i in self.order.members(step)]

    def batch_tensors(self, step: int) -> dict[str, torch.Tensor]:
        return {"image": images_tensor(self._training_images(step, slice(None)), self.device)}

    # ---- looking at it ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, image_B1XYZ: torch.Tensor) -> torch.Tensor:
        """Reconstructions from the posterior mean, float32."""
        with autocast(self.device, self.precision):
            return self.autoencoder.decode(self.autoencoder.encode(image_B1XYZ).mean_BCXYZ).float()

    def preview(self, path: Path) -> None:
        """Originals above, reconstructions below, of up to four people the network does not train on."""
        shown = self.validation if len(self.validation) else self.train
        originals, reconstructions = [], []
        for index in range(min(4, len(shown))):  # one by one: a step's memory may be for one image
            image = self._images(shown, [index])
            originals.append(image[0, 0].cpu().numpy())
            reconstructions.append(self.reconstruct(image)[0, 0].cpu().numpy())
        if self.place.leads:
            save_rows(path, [np.stack(originals), np.stack(reconstructions)])

    def validate(
        self,
        folder: Path | None = None,
        progress: Progress = Quiet(),
    ) -> dict[str, Any]:
        """What is lost of held-out people, at most _MOST_VALIDATED evenly spread: the means of a reconstruction report,
        written into `folder` if given."""
        people = {"split": "validation", "people_in_split": len(self.validation)}
        if not len(self.validation):
            return {"people": 0, **people}
        some = evenly_spread(len(self.validation), _MOST_VALIDATED)

        def image_XYZ(index: int) -> np.ndarray:
            return self.validation.image_XYZ(some[index])

        report = reconstruction_report(
            self.autoencoder,
            image_XYZ,
            image_XYZ,
            [self.validation.names[member] for member in some],
            self.seed,
            precision=self.precision,
            progress=progress,
        )
        if folder is not None:
            report.write(folder, people)
        return report.summary() | people
