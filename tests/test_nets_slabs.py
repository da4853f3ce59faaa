"""Decoding in slabs is decoding, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from brainldm.nets.autoencoder import Autoencoder, AutoencoderConfig
from brainldm.nets.blocks import pack_for_sampling
from brainldm.nets.packed import packing_works
from brainldm.nets.slabs import _affine, _applied, decode_in_slabs

LATENT_SHAPE = (1, 3, 3, 2, 4)


def autoencoder(**changes: object) -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(**({"channels": (8, 16, 16), "norm_groups": 4} | changes))  # type: ignore[arg-type]
    network = Autoencoder(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # norms that are not the identity, biases that are not 0
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("slab_bytes", [1, 5_000, 40_000, 1 << 30])
@pytest.mark.parametrize("changes", [{}, {"fold": 2}, {"channels": (8,)}, {"res_blocks": 1, "channels": (8, 16)}])
@torch.no_grad()
def test_slabs_of_any_size_give_the_whole_decode(slab_bytes: int, changes: dict) -> None:
    network, latent = autoencoder(**changes), 2 * torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    whole = network.decode(latent)
    found = decode_in_slabs(network, latent, slab_bytes)
    assert found.shape == whole.shape and found.dtype == torch.float32
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.skipif(not packing_works(), reason="this build of torch cannot pack convolutions")
@torch.no_grad()
def test_slabs_of_packed_weights_are_as_good_as_the_whole() -> None:
    network, latent = autoencoder(), torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    exact = network.decode(latent)
    pack_for_sampling(network, network.exact_parts)
    with torch.autocast("cpu", torch.bfloat16):
        whole = network.decode(latent)
        slabs = decode_in_slabs(network, latent, 5_000)
    assert (slabs - exact).norm() < 1.3 * (whole - exact).norm()


@torch.no_grad()
def test_statistics_merged_over_slabs_are_the_group_norm_s() -> None:
    """With means far from 0, where sums of squares would lose their digits."""
    norm = torch.nn.GroupNorm(2, 6, eps=1e-6)
    x = 300 + torch.randn((1, 6, 7, 4, 5), generator=torch.Generator().manual_seed(0))
    slabs = [s.contiguous(memory_format=torch.channels_last_3d) for s in x.split((1, 4, 2), dim=2)]
    affine = _affine(slabs, norm)
    found = torch.cat([_applied(slab, affine) for slab in slabs], dim=2)
    expected = F.group_norm(x.double(), 2, eps=1e-6).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_more_than_one_latent_is_refused() -> None:
    with pytest.raises(ValueError, match="in turn"):
        decode_in_slabs(autoencoder(), torch.zeros(2, 3, 2, 2, 2), 1 << 20)
