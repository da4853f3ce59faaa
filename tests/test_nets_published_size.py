"""At the paper's size: names, shapes and numbers of parameters are those of the published weights."""

from __future__ import annotations

import pytest
import torch

from brainldm.nets.autoencoder import Autoencoder, AutoencoderConfig
from brainldm.nets.unet import DiffusionUNet, UNetConfig, with_covariates
from test_nets_autoencoder import monai_autoencoder
from test_nets_unet import monai_unet


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_autoencoder_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        ours, theirs = Autoencoder(AutoencoderConfig()), monai_autoencoder(AutoencoderConfig())
    assert shapes(ours) == shapes(theirs)
    assert len(shapes(ours)) == 162
    assert parameters(ours) == 13_766_248
    assert AutoencoderConfig().latent_shape_CXYZ((160, 224, 160)) == (3, 20, 28, 20)


def test_the_unet_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        ours, theirs = DiffusionUNet(UNetConfig()), monai_unet(UNetConfig())
    assert shapes(ours) == shapes(theirs)
    assert len(shapes(ours)) == 528
    assert parameters(ours) == 553_168_899


@pytest.mark.slow
@torch.no_grad()
def test_the_full_size_networks_run() -> None:
    """One step of the U-Net (2.2 GB of weights) and one decoded brain; minutes and about 10 GB on two cores."""
    unet = DiffusionUNet(UNetConfig()).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    torch.nn.init.normal_(unet.out[2].conv.weight, std=0.01)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn((1, 3, 20, 28, 20), generator=generator)
    eps = unet(*with_covariates(latent, torch.tensor([980]), torch.tensor([[0.0, 0.1, 0.2, 0.4]])))
    assert eps.shape == latent.shape
    assert torch.isfinite(eps).all() and eps.std() > 0
    del unet
    autoencoder = Autoencoder(AutoencoderConfig()).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16):
        image = autoencoder.decode(latent)
    assert image.shape == (1, 1, 160, 224, 160)
    assert torch.isfinite(image).all() and image.std() > 0
