"""In which arithmetic a network runs, chosen once and said aloud."""

from __future__ import annotations

import contextlib

import torch

from brainldm.base.counts import counted
from brainldm.base.errors import UsageError
from brainldm.nets.packed import packing_works

PRECISIONS = ("auto", "fp32", "bf16")


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` takes CUDA where it is, else the CPU. UsageError where this machine has
    none of that type or of that number, or the type is not known here.

    On CUDA float32 convolutions are computed in float32 from then on: torch's default, TF32, keeps 10 bits of a factor.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device is named {name!r}.", remedy="Use auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"devices of type {device.type} are not known here; cpu and cuda are.", remedy="Use auto, cpu or cuda."
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "CUDA was asked for and this machine (or this build of torch) has none.", remedy="Use --device cpu."
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(
            f"{name} was asked for and this machine has {counted(count, 'CUDA device')}.",
            remedy=f"Use cuda:{count - 1}{' or one before it' if count > 1 else ''}.",
        )
    return device


def choose_precision(name: str, device: torch.device, *, trained_side: int | None = None) -> str:
    """fp32 or bf16; `auto` takes bf16 where the processor multiplies in it (CUDA, AMX, AVX512-BF16), else fp32.

    `trained_side` is the smallest side of a feature map that a training goes back through. Below 3 voxels oneDNN's
    bfloat16 convolution (torch 2.13) returns weight gradients that are not finite now and then; from 3 on they agree
    with float32 to 0.3 %. So such a training is refused bf16, and `auto` takes fp32.
    """
    if name not in PRECISIONS:
        raise UsageError(f"no precision is named {name!r}.", remedy=f"Choose one of: {', '.join(PRECISIONS)}.")
    wrong_gradients = device.type == "cpu" and trained_side is not None and trained_side < 3
    if name == "bf16" and wrong_gradients:
        raise UsageError(
            f"bf16 gradients are wrong on this processor for feature maps {trained_side} voxels wide.",
            remedy="Use --precision fp32.",
        )
    if name != "auto":
        return name
    if wrong_gradients:
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def device_name(device: torch.device) -> str:
    """`cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def told_precision(device: torch.device, precision: str) -> str:
    """Where and in which arithmetic, and why not the faster one, in words for whoever waits."""
    if device.type == "cuda":
        return f"{device_name(device)} in {precision}"
    place = f"{torch.get_num_threads()} CPU threads in {precision}"
    if precision == "bf16":
        return place if packing_works() else f"{place} (without packed weights, which this build of torch cannot make)"
    if choose_precision("auto", device) == "bf16":
        return f"{place} (exact)"
    return f"{place} (this processor does not multiply in bfloat16, which would be faster)"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context in which a network runs in `precision`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    # Without torch's cache of rounded weights: one filled where no gradients are taken would (before torch 2.13) keep
    # them from the passes after, and rounding weights anew costs next to nothing.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
