"""The weights' gradient of a large convolution on a CPU, slab by slab.

oneDNN has fast kernels for it in float32 up to some two hundred million inputs; beyond, it falls silently to a
reference implementation that is hundreds of times slower, and a step at 160 x 224 x 160 takes hours. A sum over slabs
along X is the same gradient but for the order of additions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv3d_input, conv3d_weight

LARGE = 2**27  # inputs; 184 million were still fast, 211 million were not (torch 2.13, AVX2)
SLAB = 2**26


def in_float32_on_a_cpu(x_BCXYZ: torch.Tensor, conv: nn.Conv3d) -> bool:
    return (
        x_BCXYZ.device.type == "cpu"
        and x_BCXYZ.dtype == conv.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def has_a_slow_gradient(x_BCXYZ: torch.Tensor, conv: nn.Conv3d) -> bool:
    """Whether oneDNN would have no fast kernel for the gradient of `conv`'s weights."""
    return (
        x_BCXYZ.numel() > LARGE
        and in_float32_on_a_cpu(x_BCXYZ, conv)
        and torch.is_grad_enabled()
        and conv.weight.requires_grad
    )


def convolved(x_BCXYZ: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """`conv(x)`, whose weights' gradient comes slab by slab. Stride 1 and a padding that keeps the grid, or
    no padding; the same along all axes."""
    found: torch.Tensor = _Convolved.apply(x_BCXYZ, conv.weight, conv.bias, conv.stride[0], conv.padding[0])
    return found


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, padding: int):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv3d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):  # type: ignore[no-untyped-def]
        (x, weight), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        of_x = conv3d_input(x.shape, weight, gradient, stride, padding) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight)
        planes = max(1, SLAB // x[:, :, :stride].numel())
        for start in range(0, gradient.shape[2], planes):
            part = gradient[:, :, start : start + planes]
            stop = start + part.shape[2]
            low = max(0, start * stride - padding)
            high = min(x.shape[2], (stop - 1) * stride - padding + weight.shape[2])
            if stride == 1:  # a slab is padded as x is: oneDNN is slow otherwise. So nothing comes from its halo.
                part = F.pad(part, (0, 0, 0, 0, start - low, high - stop))
            of_weight += conv3d_weight(x[:, :, low:high], weight.shape, part, stride, padding)
        return of_x, of_weight, gradient.sum((0, 2, 3, 4)), None, None
