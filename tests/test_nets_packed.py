"""Packed convolutions and networks: the same numbers, fewer and faster products."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from brainldm.nets.autoencoder import Autoencoder, AutoencoderConfig
from brainldm.nets.blocks import Convolution, double_by_nearest, forget, pack_for_sampling
from brainldm.nets.packed import DoublingConvolution, PackedConvolution, packing_works, phase_weights
from brainldm.nets.unet import DiffusionUNet, UNetConfig

needs_packing = pytest.mark.skipif(not packing_works(), reason="this build of torch cannot pack convolutions")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_a_doubled_convolution_is_eight_small_ones() -> None:
    weight, x = draw(5, 3, 3, 3, 3), draw(2, 3, 4, 5, 6, seed=1)
    expected = F.conv3d(double_by_nearest(x), weight, padding=1)
    padded = F.pad(x, (1, 1, 1, 1, 1, 1))
    for (a, b, c), phase in phase_weights(weight).items():
        found = F.conv3d(padded, phase)[:, :, a : a + 4, b : b + 5, c : c + 6]
        torch.testing.assert_close(found, expected[:, :, a::2, b::2, c::2], rtol=1e-5, atol=1e-5)


@needs_packing
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kernel", "stride", "channels"), [(3, 1, 8), (3, 2, 8), (1, 1, 8), (3, 1, 600)])
def test_a_packed_convolution_gives_what_a_plain_one_gives(batch: int, kernel: int, stride: int, channels: int) -> None:
    weight, bias = draw(channels, 6, kernel, kernel, kernel) / (6 * kernel**3) ** 0.5, draw(channels, seed=1)
    x = draw(batch, 6, 5, 7, 9, seed=2).bfloat16()
    padding = kernel // 2 if stride == 1 else 0
    packed = PackedConvolution(weight.bfloat16(), bias, padding=padding, stride=stride)
    expected = F.conv3d(x.float(), weight.bfloat16().float(), bias, stride=stride, padding=padding)
    for _ in range(2):  # the first call packs
        assert relative_error(packed(x), expected) < 5e-3
    assert relative_error(packed(x[:, :, :3]), F.conv3d(x[:, :, :3].float(), weight, bias, stride, padding)) < 1e-2


@needs_packing
def test_a_packed_doubling_convolution_gives_what_a_plain_one_gives() -> None:
    weight, bias, x = draw(16, 8, 3, 3, 3) / 15, draw(16, seed=1), draw(2, 8, 5, 6, 7, seed=2).bfloat16()
    packed = DoublingConvolution(weight, bias, torch.bfloat16)
    expected = F.conv3d(double_by_nearest(x.float()), weight, bias, padding=1)
    assert relative_error(packed(x), expected) < 5e-3
    whole = packed(x)
    haloed = packed(F.pad(x, (0, 0, 0, 0, 1, 1))[:, :, 1:6], haloed=True)  # planes 1 to 3 and a neighbour at each end
    torch.testing.assert_close(haloed, whole[:, :, 2:8])


def small_unet() -> DiffusionUNet:
    """Not as it is born: zeroed last convolutions would prove nothing."""
    config = UNetConfig(channels=(32, 64), attention=(False, True), head_channels=(0, 64), norm_groups=8, res_blocks=1)
    torch.manual_seed(0)
    unet = DiffusionUNet(config)
    for parameter in unet.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05)
    return unet.eval()


@needs_packing
@torch.no_grad()
def test_a_packed_unet_is_as_near_to_float32_as_autocast_is() -> None:
    unet, x = small_unet(), draw(2, 7, 4, 6, 4)
    inputs = (x, torch.tensor([10.0, 900.0]), draw(2, 1, 4, seed=1))
    exact = unet(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = unet(*inputs)
    names = pack_for_sampling(unet, unet.exact_parts)
    weights = {name: value.bfloat16() if name in names else value for name, value in unet.state_dict().items()}
    unet.load_state_dict(weights, assign=True)
    with torch.autocast("cpu", torch.bfloat16):
        packed = unet(*inputs)
    assert relative_error(packed, exact) < 1.5 * relative_error(rounded, exact) < 0.1
    forget(unet)
    assert all(parameter.device.type == "meta" for parameter in unet.parameters())
    unet.load_state_dict(weights, assign=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(unet(*inputs), packed, rtol=0, atol=0)


@needs_packing
@torch.no_grad()
def test_a_packed_autoencoder_is_as_near_to_float32_as_autocast_is() -> None:
    autoencoder = Autoencoder(AutoencoderConfig(channels=(16, 32, 32), norm_groups=8)).eval()
    latent = draw(1, 3, 3, 4, 3)
    exact = autoencoder.decode(latent)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = autoencoder.decode(latent)
    names = pack_for_sampling(autoencoder, autoencoder.exact_parts)
    assert "decoder.blocks.0.conv.weight" in names
    assert not any(name.startswith(("post_quant_conv", "quant_conv", "encoder.blocks.11")) for name in names)
    weights = autoencoder.state_dict()
    autoencoder.load_state_dict(
        {name: value.bfloat16() if name in names else value for name, value in weights.items()}, assign=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        packed = autoencoder.decode(latent)
        mean = autoencoder.encode(exact).mean_BCXYZ
    assert packed.dtype == torch.float32
    assert relative_error(packed, exact) < 1.5 * relative_error(rounded, exact) < 0.1
    assert mean.shape == latent.shape


@needs_packing
def test_packing_gives_up_the_plain_weights() -> None:
    convolution = Convolution(8, 8)
    convolution.packs = True
    with torch.no_grad():
        convolution(draw(1, 8, 4, 4, 4).bfloat16())
    assert convolution.conv.weight.device.type == "meta"


def test_where_packing_is_impossible_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brainldm.nets.blocks.packing_works", lambda: False)
    with pytest.raises(RuntimeError, match="cannot pack"):
        pack_for_sampling(small_unet(), ())
