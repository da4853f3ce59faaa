"""Stage 2: the U-Net learns to take noise out of latents, told the covariates (paper 2.2).

x_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps;   loss = |U(x_t, t, covariates) - target|^2

z is the latent x scale (the paper), or what the population's mean leaves of it (model/latent_population).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from brainldm.base.covariates import COVARIATES, NOT_TOLD, Covariates
from brainldm.base.feeding import Feed
from brainldm.base.streams import stream
from brainldm.diffusion.target import training_pair
from brainldm.model.description import ScheduleDescription
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.latent_population import LatentPopulation
from brainldm.model.precision import autocast
from brainldm.nets.blocks import SpatialTransformer
from brainldm.nets.unet import DiffusionUNet, ResidualBlock, UNetConfig, with_covariates
from brainldm.train.averages import MovingAverage
from brainldm.train.batches import BatchOrder, normal_each
from brainldm.train.checkpoint import module_tensors, optimiser_tensors, restore_module, restore_optimiser
from brainldm.train.config import DiffusionStageConfig
from brainldm.train.distributed import ALONE, Place
from brainldm.train.latents import Latents
from brainldm.train.loop import learning_rate_factor
from brainldm.train.pictures import save_rows
from brainldm.train.sharding import clip_gradients, for_checkpoint, laid_out_as, shard, whole


def unet_config(config: DiffusionStageConfig, latent_channels: int) -> UNetConfig:
    """The U-Net of a stage, its ends fitted to the latent and the covariates."""
    return UNetConfig(
        in_channels=latent_channels + len(COVARIATES),
        out_channels=latent_channels,
        channels=config.channels,
        attention=config.attention,
        head_channels=config.head_channels,
        res_blocks=config.res_blocks,
        context_features=len(COVARIATES),
        norm_groups=config.norm_groups,
        covariates_in_time=config.covariates_in_time,
        fold=config.fold,
    )


def schedule_description(config: DiffusionStageConfig) -> ScheduleDescription:
    """The noise schedule of a stage, as its model will say."""
    return ScheduleDescription(
        kind=config.schedule, beta_start=config.beta_start, beta_end=config.beta_end, steps=config.schedule_steps
    )


def draw_timesteps(draws: np.random.Generator, config: DiffusionStageConfig, count: int) -> np.ndarray:
    """Timesteps of a batch: all alike, or a standard normal's logistic share of the schedule; then shifted."""
    if config.timestep_draw == "uniform":
        share = draws.random(count)
    else:
        share = 1 / (1 + np.exp(-draws.standard_normal(count)))
    share = config.timestep_shift * share / (1 + (config.timestep_shift - 1) * share)
    return np.minimum((share * config.schedule_steps).astype(np.int64), config.schedule_steps - 1)


@dataclass(frozen=True)
class _Batch:
    """What the U-Net is shown and should answer, (B, C, X, Y, Z) each, with the timestep and normalised covariates."""

    x_BCXYZ: torch.Tensor
    target_BCXYZ: torch.Tensor
    timesteps_B: torch.Tensor
    condition_BF: torch.Tensor


class DiffusionStage:
    """The U-Net, its moving average, and how one step trains it."""

    name = "diffusion"

    def __init__(
        self,
        config: DiffusionStageConfig,
        latents: Latents,
        scale: float,
        population: LatentPopulation | None,
        condition_NF: np.ndarray,
        names: list[str],
        *,
        seed: int,
        device: torch.device,
        precision: str,
        place: Place = ALONE,
        sharded: bool = False,
        start: torch.nn.Module | None = None,
    ) -> None:
        self.config, self.latents, self.scale, self.population, self.names = config, latents, scale, population, names
        self.place, self.sharded = place, sharded
        self.condition_NF = torch.from_numpy(condition_NF)
        self.steps, self.seed, self.device, self.precision = config.steps, seed, device, precision
        self.schedule = schedule_description(config).build()
        batch = min(config.batch, len(names))
        self.order, share = BatchOrder(seed, len(names), batch), place.share(batch)
        self.feed = Feed(lambda step: self._batch(step, share), config.steps)
        torch.manual_seed(int(stream(seed, "diffusion-weights").integers(2**31)))  # torch's initialisers read it
        net = unet_config(config, latents.shape_CXYZ[0])
        self.unet = DiffusionUNet(net, checkpointing=config.checkpointing)
        if start is not None:
            self.unet.load_state_dict(start.state_dict())
        self.unet.to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if sharded:
            shard([self.unet], (ResidualBlock, SpatialTransformer), device)
        self.optimiser = torch.optim.Adam(self.unet.parameters(), lr=config.learning_rate, fused=True)
        self.average = None if config.ema_decay is None else MovingAverage(self.unet, config.ema_decay)
        self.sample_preview: LatentDiffusion | None = None
        self.facts: dict[str, str] = {}  # what the latents are of

    # ---- one step -----------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, float]:
        config = self.config
        self.optimiser.param_groups[0]["lr"] = config.learning_rate * learning_rate_factor(
            step, warmup_steps=config.warmup_steps, total_steps=config.steps, cosine_decay=config.cosine_decay
        )
        batch = self.feed.take(step)
        x_BCXYZ = batch.x_BCXYZ.to(self.device).contiguous(memory_format=torch.channels_last_3d)
        timesteps_B, condition_BF = batch.timesteps_B.to(self.device), batch.condition_BF.to(self.device)

        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            output = self.unet(*with_covariates(x_BCXYZ, timesteps_B, condition_BF))
        loss = F.mse_loss(output.float(), batch.target_BCXYZ.to(self.device))
        loss.backward()
        self.place.average_gradients(self.unet)
        # Where nothing is clipped the norm is looked at all the same: weights that are no numbers must not be saved.
        norm = clip_gradients(self.unet, math.inf if config.gradient_clip is None else config.gradient_clip)
        figures = {"loss": loss.item(), "gradient_norm": norm.item()}
        self.optimiser.step()
        if self.average is not None:
            self.average.update(self.unet, step)
        return figures

    def _batch(self, step: int, share: slice) -> _Batch:
        """That share of the step's batch. A function of the step: it is made ahead."""
        config, members, shape = self.config, self.order.members(step)[share], self.latents.shape_CXYZ
        draws = [stream(self.seed, "diffusion-step", number) for number in self.order.numbers(step)[share]]
        latent_BCXYZ = self.latents.sample(members, normal_each(draws, shape))
        condition_BF = self.condition_NF[members]
        if self.population is None:
            z_BCXYZ = self.scale * latent_BCXYZ
        else:
            z_BCXYZ = self.population.standardised(latent_BCXYZ, condition_BF)
        noise_BCXYZ = normal_each(draws, shape)
        timesteps_B = torch.from_numpy(np.concatenate([draw_timesteps(draw, config, 1) for draw in draws]))
        # Whether somebody's covariates are kept back: the image is still theirs.
        untold_B1 = torch.tensor([[draw.random() < config.condition_dropout] for draw in draws])
        condition_BF = torch.where(untold_B1, NOT_TOLD, condition_BF)
        x_BCXYZ, target_BCXYZ = training_pair(config.target, z_BCXYZ, noise_BCXYZ, timesteps_B, self.schedule)
        return _Batch(x_BCXYZ, target_BCXYZ, timesteps_B, condition_BF)

    # ---- state --------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        held = module_tensors("unet", self.unet) | optimiser_tensors("unet", self.optimiser)
        if self.average is not None:
            held |= {f"average/{name}": for_checkpoint(tensor) for name, tensor in self.average.weights.items()}
        return held

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        restore_module("unet", self.unet, tensors)
        restore_optimiser("unet", self.optimiser, tensors)
        if self.average is not None:
            for name, tensor in self.average.weights.items():
                tensor.copy_(laid_out_as(tensor, tensors[f"average/{name}"]))

    def batch_names(self, step: int) -> list[str]:
        return [self.names[i] for i in self.order.members(step)]

    def batch_tensors(self, step: int) -> dict[str, torch.Tensor]:
        batch = self._batch(step, slice(None))
        return {
            "x": batch.x_BCXYZ,
            "target": batch.target_BCXYZ,
            "timesteps": batch.timesteps_B,
            "condition": batch.condition_BF,
        }

    def trained_unet(self) -> DiffusionUNet:
        """The network to keep, whole: the moving average where there is one."""
        if self.average is None and not self.sharded:
            return self.unet
        weights = self.unet.state_dict() if self.average is None else self.average.weights
        averaged = DiffusionUNet(self.unet.config)
        averaged.load_state_dict({name: whole(tensor) for name, tensor in weights.items()})
        return averaged.to(device=self.device, memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload]

    # ---- looking at it ------------------------------------------------------------------------------------------

    def preview(self, path: Path) -> None:
        """Four brains from the network as it stands, of the middle covariates, always from the same noise."""
        if self.sample_preview is None:
            return
        model = replace(self.sample_preview, unet=self.trained_unet(), precision=self.precision)
        middle = Covariates.from_array(model.ranges.denormalise(np.full(len(COVARIATES), 0.5)))
        noise = [preview_noise(index) for index in range(4)]
        images_BXYZ = model.sample([middle] * 4, noise)
        if self.place.leads:
            save_rows(path, [images_BXYZ])


def preview_noise(index: int):  # type: ignore[no-untyped-def]
    """A row's noise for previews."""
    return lambda step, shape: stream(0, f"preview-{index}", step).standard_normal(shape, np.float32)
