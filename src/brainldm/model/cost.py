"""How long sampling will take on this machine, told before it begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from brainldm.diffusion.solvers import SAMPLERS
from brainldm.model.description import LatentDiffusionDescription
from brainldm.model.precision import autocast
from brainldm.nets.atlas import build_autoencoder
from brainldm.nets.packed import packing_works
from brainldm.nets.unet import DiffusionUNet

# Beside convolutions: norms, activations, attention and memory traffic, in the time of convolutions, as measured at the
# published size (bench/results.json). Decoding works on maps that no cache holds.
_OVERHEAD_OF_A_STEP = 1.15
_OVERHEAD_OF_A_DECODE = 1.7
_OVERHEAD_OF_A_PACKED_DECODE = 1.2  # which makes doubled maps with fewer products
_LEAST_SECONDS_A_CALL = 0.02  # where networks are small, calling is what takes the time


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one image: a call of the U-Net, and the decoding."""

    unet_call_flop: int
    decode_flop: int


def work_of(description: LatentDiffusionDescription) -> Work:
    """Counted on networks without weights; a multiplication and an addition are two operations."""
    with torch.device("meta"):
        unet, autoencoder = DiffusionUNet(description.unet), build_autoencoder(description.autoencoder)
        config = unet.config
        latent = torch.empty(1, *description.latent.shape_CXYZ)
        joined = torch.empty(1, config.in_channels, *latent.shape[2:])
        context = torch.empty(1, 1, config.context_features)
        call = _flop(unet, joined, torch.zeros(1), context)
        return Work(call, _flop(autoencoder.decode, latent))


@torch.no_grad()
def _flop(function, *inputs: torch.Tensor) -> int:  # type: ignore[no-untyped-def]  # any callable
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def network_calls(sampler: str, steps: int) -> int:
    """How often a sampler calls the network for one image."""
    return 2 * steps - 1 if SAMPLERS[sampler].calls_twice else steps


def estimate_seconds(
    description: LatentDiffusionDescription,
    *,
    images: int,
    sampler: str,
    steps: int,
    device: torch.device,
    precision: str,
    calls_a_step: int = 1,
) -> float:
    """Seconds that `images` will take, from the work they are and the speed of one convolution, measured now.

    Within a factor of 1.5 or so: other work on the machine counts, and convolutions of other sizes run at other speeds.
    """
    work, speed = work_of(description), convolution_speed(description, device, precision)
    step = max(_LEAST_SECONDS_A_CALL, _OVERHEAD_OF_A_STEP * work.unet_call_flop / speed)
    packs = precision == "bf16" and device.type == "cpu" and packing_works()
    overhead = _OVERHEAD_OF_A_PACKED_DECODE if packs else _OVERHEAD_OF_A_DECODE
    decode = max(_LEAST_SECONDS_A_CALL, overhead * work.decode_flop / speed)
    return images * (network_calls(sampler, steps) * calls_a_step * step + description.decodes * decode)


def convolution_speed(description: LatentDiffusionDescription, device: torch.device, precision: str) -> float:
    """Operations a second of a 3 x 3 x 3 convolution of the U-Net's first level: the best of three."""
    width, fold = description.unet.channels[0], description.unet.fold
    shape_XYZ = [n // fold for n in description.latent.shape_CXYZ[1:]]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, width, *shape_XYZ), generator=generator).to(device)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn((width, width, 3, 3, 3), generator=generator).to(device)
    flop = 2 * weight.numel() * x[0, 0].numel()
    best = float("inf")
    with torch.no_grad(), autocast(device, precision):
        for _ in range(4):  # the first is for the libraries to get ready
            begun = time.perf_counter()
            F.conv3d(x, weight, padding=1).sum().item()
            best = min(best, time.perf_counter() - begun)
    return flop / best
