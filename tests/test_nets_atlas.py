"""An autoencoder that explains an image by atlases: what it knows untrained, and that all of it can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from brainldm.model.precision import autocast
from brainldm.nets.atlas import (
    AtlasAutoencoder,
    AtlasAutoencoderConfig,
    PlaceFeatures,
    build_autoencoder,
    displacements,
    warped,
)
from brainldm.nets.autoencoder import Autoencoder, AutoencoderConfig
from brainldm.nets.blocks import pack_for_sampling
from brainldm.nets.packed import packing_works
from brainldm.nets.slabs import decode_in_slabs
from conftest import TINY_ATLASES

GRID = (16, 24, 20)
CONFIG = replace(TINY_ATLASES, grid_XYZ=GRID, norm_groups=4, passes=3)


def build(config: AtlasAutoencoderConfig = CONFIG) -> AtlasAutoencoder:
    torch.manual_seed(0)
    return AtlasAutoencoder(config)


def blobs(shift_XYZ: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> torch.Tensor:
    """A smooth image (1, 1, *GRID) in 0..1 with slopes along every axis, moved by that many voxels."""
    axes = [torch.arange(n) - s for n, s in zip(GRID, shift_XYZ)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    image = sum(
        torch.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 18)
        for a, b, c in ((5, 7, 6), (10, 16, 13), (6, 15, 8))
    )
    return (0.8 * image)[None, None].float()


def test_an_untrained_decoder_gives_the_atlas_it_was_set() -> None:
    network = build()
    network.set_atlas(blobs()[0, 0])
    torch.testing.assert_close(network.decode(torch.zeros(1, 4, 4, 6, 5)), blobs(), atol=1e-5, rtol=0)


def test_the_first_three_channels_begin_as_a_displacement() -> None:
    network = build()
    network.set_atlas(blobs()[0, 0])
    latent = torch.zeros(1, 4, 4, 6, 5)
    latent[:, 1] = 0.5  # a quarter of a cell: one voxel along Y
    moved = network.decode(latent)
    torch.testing.assert_close(moved[..., :, 2:20, :], blobs((0, -1, 0))[..., :, 2:20, :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift_XYZ", [(1.0, 0.0, 0.0), (0.0, -1.5, 0.5)])
def test_least_squares_find_how_far_things_lie(shift_XYZ: tuple[float, float, float]) -> None:
    found = displacements(blobs(shift_XYZ) - blobs(), blobs(), cell=4)
    assert found.shape == (1, 6, 4, 6, 5)
    middle = 4 * found[0, 3:, 1:3, 2:4, 1:3].mean((1, 2, 3))
    torch.testing.assert_close(middle, -torch.tensor(shift_XYZ), atol=0.35, rtol=0)


def test_where_nothing_is_nothing_moves() -> None:
    flat = torch.full((1, 1, *GRID), 0.5)
    assert not displacements(0.1 * torch.ones_like(flat), flat, cell=4).any()


@torch.no_grad()
def test_an_untrained_encoder_explains_a_moved_image_better_with_each_pass() -> None:
    network = build()
    network.set_atlas(blobs()[0, 0])
    image = blobs((1.2, -1.0, 0.8))
    errors = [float((network.decode(network.encode(image, n).mean_BCXYZ) - image).square().mean()) for n in (1, 2, 3)]
    before = float((blobs() - image).square().mean())
    assert errors[0] < before / 4 and errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(network.encode(image).mean_BCXYZ, network.encode(image, 3).mean_BCXYZ)


def test_warping_is_exact_for_whole_voxels_and_serves_a_batch() -> None:
    maps = torch.rand(1, 2, *GRID, generator=torch.Generator().manual_seed(0))
    moves = torch.zeros(2, 3, *GRID)
    moves[1, 0], moves[1, 2] = 2.0, -1.0
    still, moved = warped(maps, moves)
    torch.testing.assert_close(still, maps[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[:, :-2, :, 1:], maps[0, :, 2:, :, :-1], atol=1e-4, rtol=0)


def test_every_weight_learns() -> None:
    network = build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    latent = network.encode(blobs((1, 0, 1)).expand(2, -1, -1, -1, -1))
    noise = torch.randn(latent.mean_BCXYZ.shape, generator=torch.Generator().manual_seed(1))
    (network.decode(latent.sample(noise)).square().mean() + latent.kl_B().mean()).backward()
    still = [
        name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert still == []


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = AtlasAutoencoder(CONFIG, checkpointing=checkpointing)
        for parameter in network.parameters():
            parameter.data.add_(0.01)
        network.decode(network.encode(blobs()).mean_BCXYZ).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_slabs_are_of_no_use_to_it_and_do_no_harm() -> None:
    network, latent = build().eval(), torch.randn(1, 4, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode_in_slabs(network, latent, 1), network.decode(latent))


def test_the_first_log_variance_is_the_one_that_was_set() -> None:
    network = build()
    network.set_log_variance(-5.0)
    torch.testing.assert_close(network.encode(blobs()).log_variance_BCXYZ, torch.full((1, 4, 4, 6, 5), -5.0))


def test_what_is_learnt_of_a_place_belongs_to_that_place_alone() -> None:
    places = PlaceFeatures(2, (3, 4, 5))
    x = torch.rand(2, 2, 3, 4, 5)
    torch.testing.assert_close(places(x), x)
    places.features.data[0, 1, 2, 0, 4] = 7.0
    expected = x.clone()
    expected[:, 1, 2, 0, 4] += 7
    torch.testing.assert_close(places(x), expected)


def test_a_config_builds_its_own_kind() -> None:
    assert isinstance(build_autoencoder(CONFIG), AtlasAutoencoder)
    assert isinstance(build_autoencoder(AutoencoderConfig(channels=(8,), norm_groups=4)), Autoencoder)


def test_it_knows_one_grid() -> None:
    with pytest.raises(ValueError, match=r"knows the places of \(16, 24, 20\) alone"):
        build().encode(torch.zeros(1, 1, 20, 24, 16))
    with pytest.raises(ValueError, match="the grid of registered images"):
        replace(CONFIG, grid_XYZ=(16, 24, 18))
    with pytest.raises(ValueError, match="latent_channels is 2: a displacement alone takes 3"):
        replace(CONFIG, latent_channels=2)


@pytest.mark.skipif(not packing_works(), reason="this build of torch cannot pack convolutions")
@torch.no_grad()
def test_packed_weights_decode_and_encode_nearly_the_same() -> None:
    network = build().eval()
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    image = blobs((1, 0, 1))
    exact = network.decode(network.encode(image).mean_BCXYZ)
    pack_for_sampling(network, network.exact_parts)
    with torch.autocast("cpu", torch.bfloat16):
        packed = network.decode(network.encode(image).mean_BCXYZ)
    assert packed.dtype == torch.float32
    assert float((packed - exact).square().mean().sqrt()) < 0.01


def test_every_weight_has_its_gradient_in_bf16() -> None:
    """Passes without gradients come before the one with them, in the same context."""
    autoencoder, images = build(), torch.rand((2, 1, *GRID))
    with autocast(torch.device("cpu"), "bf16"):
        latent = autoencoder.encode(images, 2)
        loss = (autoencoder.decode(latent.mean_BCXYZ) - images).square().mean() + latent.kl_B().mean()
    loss.backward()
    without = [name for name, weight in autoencoder.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without == []
