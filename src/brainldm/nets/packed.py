"""Convolutions laid out once for a CPU, so that sampling does not pay for it at every call.

oneDNN wants weights in blocks of its own. torch hands them over plain and reorders them at each call, which costs as
much as the convolution itself where weights outnumber voxels (768 and more channels on 5 x 7 x 5). Here the reordering
is done at the first call and kept. The operators are those that torch's own compiler emits; where a build lacks them,
`packing_works` says so and plain convolutions are used.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch.nn import functional as F

# oneDNN's AMX kernels fall from 1.9 to 0.65 TFLOP/s when they make more than this many channels at once on
# 20 x 28 x 20; processors without AMX do not mind the split.
MOST_CHANNELS_AT_ONCE = 256


@functools.cache
def packing_works() -> bool:
    """Whether this build of torch has the operators, and they give what a plain convolution gives."""
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((1, 8, 4, 5, 6), generator=generator).bfloat16()
        weight = (torch.randn((16, 8, 3, 3, 3), generator=generator) / 15).bfloat16()
        found = PackedConvolution(weight, None, padding=1)(x)
        expected = F.conv3d(x.float(), weight.float(), padding=1)
        return bool((found.float() - expected).abs().max() < 0.05)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


class PackedConvolution:
    """A convolution by weights (O, I, k, k, k), which are packed here for maps of the dtype they have."""

    def __init__(self, weight_OIXYZ: torch.Tensor, bias_O: torch.Tensor | None, *, padding: int, stride: int = 1):
        self.dtype = weight_OIXYZ.dtype
        self.stride = [stride] * 3
        self.padding = [padding] * 3
        pieces = max(1, -(-weight_OIXYZ.shape[0] // MOST_CHANNELS_AT_ONCE))
        self._weights = list(weight_OIXYZ.chunk(pieces))
        self._biases = [None] * pieces if bias_O is None else list(bias_O.to(self.dtype).chunk(pieces))
        self._are_packed = False

    def __call__(self, x_BCXYZ: torch.Tensor, *, padding: list[int] | None = None) -> torch.Tensor:
        """The convolved map, in the weights' dtype, channels last."""
        x_BCXYZ = x_BCXYZ.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        if not self._are_packed:
            self._pack(list(x_BCXYZ.shape))
        padding = self.padding if padding is None else padding
        pieces = [
            torch.ops.mkldnn._convolution_pointwise(
                x_BCXYZ, weight, bias, padding, self.stride, [1, 1, 1], 1, "none", [], ""
            )
            for weight, bias in zip(self._weights, self._biases)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _pack(self, shape: list[int]) -> None:
        """Lays the weights out for maps of this shape; other shapes are served too, if less well."""
        for number, weight in enumerate(self._weights):
            plain = weight.contiguous(memory_format=torch.channels_last_3d).to_mkldnn()
            reorder = torch._C._nn.mkldnn_reorder_conv3d_weight
            self._weights[number] = reorder(plain, self.padding, self.stride, [1, 1, 1], 1, shape)  # type: ignore[call-arg]
        self._are_packed = True


class DoublingConvolution:
    """A 3 x 3 x 3 convolution of a map doubled by repetition, without the doubled map.

    Each of the 8 voxels that one becomes sees only 2 x 2 x 2 of the map, some of them through two or more taps at once,
    whose weights are summed beforehand: 8 products for each 27. Exact but for rounding.
    """

    def __init__(self, weight_OIXYZ: torch.Tensor, bias_O: torch.Tensor | None, dtype: torch.dtype):
        self.dtype = dtype
        self._phases = {
            phase: PackedConvolution(weight.to(dtype), bias_O, padding=0)
            for phase, weight in phase_weights(weight_OIXYZ).items()
        }

    def __call__(self, x_BCXYZ: torch.Tensor, *, haloed: bool = False) -> torch.Tensor:
        """(B, C, X, Y, Z) to (B, O, 2X, 2Y, 2Z); with `haloed`, the first and last plane along X are neighbours."""
        if not haloed:
            x_BCXYZ = F.pad(x_BCXYZ, (0, 0, 0, 0, 1, 1))
        x_BCXYZ = x_BCXYZ.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        x, y, z = x_BCXYZ.shape[2] - 2, *x_BCXYZ.shape[3:]
        doubled: torch.Tensor | None = None
        for (a, b, c), convolution in self._phases.items():
            # Padding gives one row too many along Y and Z; each half takes its own.
            part = convolution(x_BCXYZ[:, :, a : a + x + 1], padding=[0, 1, 1])[:, :, :, b : b + y, c : c + z]
            if doubled is None:
                shape = (part.shape[0], part.shape[1], 2 * x, 2 * y, 2 * z)
                doubled = torch.empty(shape, dtype=part.dtype, memory_format=torch.channels_last_3d)
            doubled[:, :, a::2, b::2, c::2] = part
        assert doubled is not None
        return doubled


def phase_weights(weight_OIXYZ: torch.Tensor) -> dict[tuple[int, int, int], torch.Tensor]:
    """For each of the 8 places in a doubled voxel the 2 x 2 x 2 weights that act on the map before doubling.

    Along one axis the taps (w0, w1, w2) become (w0, w1 + w2) for the first half of a voxel, (w0 + w1, w2) for the
    second.
    """
    phases = {}
    for a, b, c in itertools.product((0, 1), repeat=3):
        weight = weight_OIXYZ
        for axis, half in zip((2, 3, 4), (a, b, c)):
            first, middle, last = weight.unbind(axis)
            weight = torch.stack((first, middle + last) if half == 0 else (first + middle, last), axis)
        phases[a, b, c] = weight
    return phases
