"""Training the predictors of age and sex (Cole et al. 2017): the judge's trained instruments.

    age: mean absolute error in years / the training people's standard deviation; sex: binary cross-entropy

Images are shifted by a few voxels along each axis, as the authors did; nothing else is done to them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from brainldm.base.feeding import Feed
from brainldm.base.streams import stream
from brainldm.cohort.dataset import VolumeDataset
from brainldm.cohort.predictor import Target
from brainldm.model.precision import autocast
from brainldm.nets.cole import ColeConfig, ColeNet
from brainldm.train.batches import BatchOrder, images_tensor
from brainldm.train.checkpoint import module_tensors, optimiser_tensors, restore_module, restore_optimiser
from brainldm.train.config import PredictorConfig
from brainldm.train.loop import learning_rate_factor
from brainldm.train.sharding import clip_gradients

_PREVIEWED = 100  # people: a preview must not take longer than the training between two of them


class PredictorStage:
    """The network and how one step trains it."""

    def __init__(
        self,
        target: Target,
        config: PredictorConfig,
        train: VolumeDataset,
        validation: VolumeDataset,
        *,
        shape_XYZ: tuple[int, int, int],
        seed: int,
        device: torch.device,
        precision: str,
    ) -> None:
        self.name, self.target, self.config, self.train, self.validation = (
            "predictor",
            target,
            config,
            train,
            validation,
        )
        self.steps, self.seed, self.device, self.precision = config.steps, seed, device, precision
        self.order = BatchOrder(seed, len(train), config.batch)
        self.feed = Feed(self._shifted_BXYZ, config.steps)
        self.labels = self._labels(train)
        told = float(self.labels.mean()), float(self.labels.std())
        self.offset, self.scale = told if target == "age_years" else (0.0, 1.0)
        torch.manual_seed(int(stream(seed, "predictor-weights").integers(2**31)))
        self.network = ColeNet(ColeConfig.fitting(shape_XYZ, config.averaging))
        self.network.to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.optimiser = torch.optim.SGD(
            self.network.parameters(), lr=config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
        )

    def _labels(self, people: VolumeDataset) -> np.ndarray:
        return np.array([getattr(row, self.target) for row in people.covariates], dtype=np.float64)

    def step(self, step: int) -> dict[str, float]:
        members = self.order.members(step)
        self.optimiser.param_groups[0]["lr"] = self.config.learning_rate * learning_rate_factor(
            step, warmup_steps=self.config.warmup_steps, total_steps=self.steps, cosine_decay=True
        )
        wanted = torch.from_numpy((self.labels[members] - self.offset) / self.scale).float()
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            found = self.network(images_tensor(self.feed.take(step), self.device)).float()
        loss = self._loss(found, wanted.to(self.device))
        loss.backward()
        norm = clip_gradients(self.network, self.config.gradient_clip)
        self.optimiser.step()
        return {"loss": loss.item(), "gradient_norm": norm.item()}

    def _loss(self, found_B: torch.Tensor, wanted_B: torch.Tensor) -> torch.Tensor:
        if self.target == "sex":
            return F.binary_cross_entropy_with_logits(found_B, wanted_B)
        return F.l1_loss(found_B, wanted_B)

    def _shifted_BXYZ(self, step: int) -> np.ndarray:
        """The batch of that step, each image moved by up to `shift_voxels` along each axis; what comes in from outside
        is 0."""
        most, members = self.config.shift_voxels, self.order.members(step)
        shifts = stream(self.seed, "predictor-shifts", step).integers(-most, most + 1, (len(members), 3))
        moved = []
        for index, shift in zip(members, shifts.tolist()):
            padded = np.pad(self.train.image_XYZ(index), most)
            start = [most + s for s in shift]
            moved.append(padded[tuple(slice(s, n - 2 * most + s) for s, n in zip(start, padded.shape))])
        return np.stack(moved)

    @torch.no_grad()
    def predictions(self, people: VolumeDataset, most: int | None = None) -> np.ndarray:
        """Years, or the probability of being male, one a person; of at most so many people."""
        self.network.eval()
        numbers = []
        for index in range(len(people))[:most]:
            numbers.append(self.network(images_tensor([people.image_XYZ(index)], self.device)).item())
        found = self.offset + self.scale * np.array(numbers)
        return found if self.target == "age_years" else 1 / (1 + np.exp(-np.clip(found, -60, 60)))

    def tensors(self) -> dict[str, torch.Tensor]:
        return module_tensors("predictor", self.network) | optimiser_tensors("predictor", self.optimiser)

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        restore_module("predictor", self.network, tensors)
        restore_optimiser("predictor", self.optimiser, tensors)

    def batch_names(self, step: int) -> list[str]:
        return [self.train.names[i] for i in self.order.members(step)]

    def batch_tensors(self, step: int) -> dict[str, torch.Tensor]:
        return {"image": images_tensor(self._shifted_BXYZ(step), self.device)}

    def preview(self, path: Path) -> None:
        """Known against predicted, held-out people where there are any."""
        from matplotlib.figure import Figure

        from brainldm.base.files import atomic_path

        people = self.validation if len(self.validation) else self.train
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        axes.scatter(self._labels(people)[:_PREVIEWED], self.predictions(people, _PREVIEWED), s=12)
        axes.set(xlabel=f"{self.target}, known", ylabel="predicted")
        with atomic_path(path) as part:
            figure.savefig(part, dpi=100, format="png")
