"""The baselines' training: LSGAN (Mao et al. 2017) and VAE-GAN (Larsen et al. 2016).

    LSGAN     D: 1/2 (D(x) - 1)^2 + 1/2 D(G(z))^2                      G: 1/2 (D(G(z)) - 1)^2          (Mao, eq. 9)
    VAE-GAN   encoder: KL + |f(x) - f(G(z_x))|^2      D: x is real; G(z_x) and G(z) are not      (Larsen, algorithm 1)
              G: gamma |f(x) - f(G(z_x))|^2 + its wish that D took G(z_x) and G(z) for real

f is the discriminator's last level but one, z_x the encoder's noise for x. The VAE-GAN's game is played with least
squares too, so that the two baselines differ in one thing. Each step trains the discriminator once and the others once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from brainldm.base.feeding import Feed
from brainldm.base.streams import stream
from brainldm.cohort.dataset import VolumeDataset
from brainldm.model.precision import autocast
from brainldm.nets.gan import GanConfig, GanDiscriminator, GanEncoder, GanGenerator
from brainldm.train.batches import BatchOrder, images_tensor
from brainldm.train.checkpoint import module_tensors, optimiser_tensors, restore_module, restore_optimiser
from brainldm.train.config import GanStageConfig
from brainldm.train.pictures import save_rows
from brainldm.train.sharding import clip_gradients


class GanStage:
    """Generator, discriminator and, for the VAE-GAN, the encoder, and how one step trains them."""

    def __init__(
        self,
        config: GanStageConfig,
        net: GanConfig,
        train: VolumeDataset,
        condition_NF: np.ndarray,
        *,
        seed: int,
        device: torch.device,
        precision: str,
    ) -> None:
        self.name: str = config.kind
        self.config, self.net, self.train, self.condition_NF = config, net, train, condition_NF.astype(np.float32)
        self.steps, self.seed, self.device, self.precision = config.steps, seed, device, precision
        self.order = BatchOrder(seed, len(train), config.batch)
        self.feed = Feed(lambda step: self._images_XYZ(self.order.members(step)), config.steps)
        torch.manual_seed(int(stream(seed, f"{config.kind}-weights").integers(2**31)))  # torch's initialisers read it
        self.generator, self.discriminator = GanGenerator(net), GanDiscriminator(net)
        self.encoder = GanEncoder(net) if config.kind == "vaegan" else None
        self.networks: dict[str, torch.nn.Module] = {"generator": self.generator, "discriminator": self.discriminator}
        if self.encoder is not None:
            self.networks["encoder"] = self.encoder
        rates = {"discriminator": config.discriminator_learning_rate}
        self.optimisers = {}
        for name, network in self.networks.items():
            network.to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
            self.optimisers[name] = torch.optim.Adam(
                network.parameters(), lr=rates.get(name, config.learning_rate), betas=(0.5, 0.999), fused=True
            )

    # ---- one step -----------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, float]:
        members = self.order.members(step)
        image = images_tensor(self.feed.take(step), self.device)
        condition = torch.from_numpy(self.condition_NF[members]).to(self.device)
        noise = self._noise(step, "gan-noise", len(members))
        figures: dict[str, torch.Tensor] = {}

        # What the generator makes: of noise, and of the noise that the encoder finds in the image
        with autocast(self.device, self.precision):
            made = [self.generator(noise, condition)]
            if self.encoder is not None:
                mean, log_variance = self.encoder(image)
                mean, log_variance = mean.float(), log_variance.float()
                own = mean + torch.exp(0.5 * log_variance) * self._noise(step, "gan-posterior", len(members))
                made.append(self.generator(own, condition))

        # Discriminator
        figures |= self._train_discriminator(image, [one.detach() for one in made], condition)

        # Generator and encoder
        self.discriminator.requires_grad_(False)
        with autocast(self.device, self.precision):
            judged = [self.discriminator(one, condition) for one in made]
        figures["adversarial"] = total = torch.stack([0.5 * (s.float() - 1).square().mean() for s, _ in judged]).mean()
        if self.encoder is not None:
            with autocast(self.device, self.precision), torch.no_grad():
                _, wanted = self.discriminator(image, condition)
            figures["reconstruction"] = (judged[1][1].float() - wanted.float()).square().mean()
            figures["kl"] = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            total = total + self.config.reconstruction_weight * figures["reconstruction"]
            # The encoder has no part in the game.
            of_encoder = figures["reconstruction"] + self.config.kl_weight * figures["kl"]
            figures |= self._descend({"generator": total, "encoder": of_encoder})
        else:
            figures |= self._descend({"generator": total})
        self.discriminator.requires_grad_(True)
        return {"loss": total.item(), **{name: value.item() for name, value in figures.items()}}

    def _train_discriminator(
        self, image: torch.Tensor, made: list[torch.Tensor], condition: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        with autocast(self.device, self.precision):
            real = self.discriminator(image, condition)[0].float()
            fake = [self.discriminator(one, condition)[0].float() for one in made]
        loss = 0.5 * (real - 1).square().mean() + 0.5 * torch.stack([one.square().mean() for one in fake]).mean()
        return {"discriminator": loss.detach(), **self._descend({"discriminator": loss})}

    def _descend(self, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One step of each network named, down its own loss; all gradients are taken before anything moves. The norms
        that they had, for the log."""
        for number, (name, loss) in enumerate(losses.items(), start=1):
            self.optimisers[name].zero_grad(set_to_none=True)
            loss.backward(inputs=list(self.networks[name].parameters()), retain_graph=number < len(losses))
        norms = {}
        for name in losses:
            norms[f"{name}_gradient_norm"] = clip_gradients(self.networks[name], self.config.gradient_clip)
            self.optimisers[name].step()
        return norms

    def _noise(self, step: int, purpose: str, count: int) -> torch.Tensor:
        drawn = stream(self.seed, purpose, step).standard_normal((count, self.net.noise_features), np.float32)
        return torch.from_numpy(drawn).to(self.device)

    def _images(self, members: list[int]) -> torch.Tensor:
        return images_tensor(self._images_XYZ(members), self.device)

    def _images_XYZ(self, members: list[int]) -> list[np.ndarray]:
        return [self.train.image_XYZ(i) for i in members]

    # ---- state --------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        held: dict[str, torch.Tensor] = {}
        for name, network in self.networks.items():
            held |= module_tensors(name, network) | optimiser_tensors(name, self.optimisers[name])
        return held

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, network in self.networks.items():
            restore_module(name, network, tensors)
            restore_optimiser(name, self.optimisers[name], tensors)

    def batch_names(self, step: int) -> list[str]:
        return [self.train.names[i] for i in self.order.members(step)]

    def batch_tensors(self, step: int) -> dict[str, torch.Tensor]:
        return {"image": self._images(self.order.members(step))}

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Real people above, made ones below, asked for the same covariates."""
        members = list(range(min(4, len(self.train))))
        condition = torch.from_numpy(self.condition_NF[members]).to(self.device)
        with autocast(self.device, self.precision):
            made = self.generator(self._noise(0, "gan-preview", len(members)), condition).float()
        save_rows(path, [self._images(members)[:, 0].cpu().numpy(), made[:, 0].cpu().numpy()])
