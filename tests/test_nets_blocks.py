"""The bricks: folding, halving, doubling and attention, each against a truth that needs no network."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from brainldm.nets import slabbed_gradient
from brainldm.nets.blocks import (
    Attention,
    Convolution,
    at_full_precision,
    check_divisible,
    double_by_nearest,
    fold,
    halve_by_mean,
    unfold,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_unfold_is_the_inverse_of_fold(factor: int) -> None:
    x = draw(2, 3, 6, 12, 18)
    folded = fold(x, factor)
    assert folded.shape == (2, 3 * factor**3, 6 // factor, 12 // factor, 18 // factor)
    assert torch.equal(unfold(folded, factor), x)


def test_fold_keeps_a_voxel_s_neighbours_in_its_channels() -> None:
    x = torch.arange(2 * 4 * 6 * 8.0).reshape(1, 2, 4, 6, 8)
    folded = fold(x, 2)
    assert torch.equal(folded[0, :, 1, 2, 3], x[0, :, 2:4, 4:6, 6:8].flatten())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halving_takes_means_and_keeps_layout_and_type(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = draw(2, 5, 4, 6, 8).to(dtype).contiguous(memory_format=layout)
    halved = halve_by_mean(x)
    expected = F.avg_pool3d(x.float(), 2).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 0.0  # rounded once, from float32 sums
    torch.testing.assert_close(halved, expected, atol=tolerance, rtol=2**-8 if dtype == torch.bfloat16 else 0.0)
    assert halved.dtype == dtype
    assert halved.is_contiguous(memory_format=layout)


def test_halving_undoes_doubling() -> None:
    x = draw(1, 2, 3, 4, 5)
    torch.testing.assert_close(halve_by_mean(double_by_nearest(x)), x)


@pytest.mark.parametrize("shape", [(10, 14, 11), (0, 4, 4), (8, 8)])
def test_a_grid_that_cannot_be_halved_is_refused_with_a_grid_that_can(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"divisible by 4 .* pad it to \(") as caught:
        check_divisible(shape, 4, "the grid")
    assert str(shape) in str(caught.value)


def test_one_token_of_context_gives_every_voxel_the_same_whatever_queries_and_keys() -> None:
    torch.manual_seed(0)
    attention = Attention(8, heads=2, context_features=4)
    x, context = draw(2, 15, 8), draw(2, 1, 4, seed=1)
    out = attention(x, context)
    assert out.shape == x.shape
    assert torch.equal(out, out[:, :1].expand_as(out))
    torch.nn.init.normal_(attention.to_q.weight)
    torch.nn.init.normal_(attention.to_k.weight)
    assert torch.equal(attention(x, context), out)


def test_the_shortcut_for_one_token_agrees_with_attention_proper() -> None:
    torch.manual_seed(0)
    attention = Attention(8, heads=2, context_features=4)
    x, context = draw(2, 15, 8), draw(2, 1, 4, seed=1)
    # Two equal tokens share the softmax in halves, so they weigh the same as one.
    torch.testing.assert_close(attention(x, context), attention(x, context.expand(-1, 2, -1)))


def test_the_last_convolution_is_exact_under_autocast() -> None:
    torch.manual_seed(0)
    convolution, x = Convolution(4, 3), draw(1, 4, 5, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution(x).dtype == torch.bfloat16  # the surroundings do cast
        exact = at_full_precision(convolution, x)
    assert exact.dtype == torch.float32
    assert torch.equal(exact, convolution(x))


def test_the_networks_import_without_monai() -> None:
    """MONAI takes seconds to import, and only the discriminator wants it."""
    code = (
        "import sys, brainldm.nets.autoencoder, brainldm.nets.unet, brainldm.nets.discriminator, "
        "brainldm.diffusion.solvers; sys.exit('monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize(("kernel", "stride", "doubles"), [(3, 1, False), (3, 2, False), (1, 1, False), (3, 1, True)])
@pytest.mark.parametrize("planes", [1, 2, 5, 100])
def test_a_large_map_s_gradients_come_slab_by_slab(
    kernel: int, stride: int, doubles: bool, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    convolution = Convolution(4, 3, kernel, stride, doubles)

    def gradients() -> list[torch.Tensor]:
        x = draw(2, 4, 13, 6, 7).requires_grad_()
        convolution.zero_grad()
        y = convolution(x)
        (y * draw(*y.shape, seed=1)).sum().backward()
        weights = convolution.conv.weight.grad, convolution.conv.bias.grad
        return [found.clone() for found in (y, x.grad, *weights) if found is not None]

    whole, calls = gradients(), []
    summed = slabbed_gradient.conv3d_weight
    monkeypatch.setattr(slabbed_gradient, "conv3d_weight", lambda *given: calls.append(1) or summed(*given))
    monkeypatch.setattr(slabbed_gradient, "LARGE", 0)
    monkeypatch.setattr(slabbed_gradient, "SLAB", planes * stride * 2 * 4 * 6 * 7 * (4 if doubles else 1))
    torch.testing.assert_close(gradients(), whole, atol=1e-4, rtol=1e-5)
    made = whole[0].shape[2]
    assert len(whole) == 4 and len(calls) == -(-made // planes)
