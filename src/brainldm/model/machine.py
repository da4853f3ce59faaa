"""Is this machine fit? Versions, processor, memory, disk, and a convolution checked against float64."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import brainldm
from brainldm.model.precision import choose_device, choose_precision, device_name
from brainldm.nets.packed import packing_works

# torch 2.10 is the first without the known ways to run code from a weights file (CVE-2025-32434, CVE-2026-24747).
_FLOORS = {"torch": (2, 10), "monai": (1, 6, 1)}
_SHOWN = ("torch", "monai", "numpy", "scipy", "nibabel", "nilearn", "SimpleITK", "safetensors", "pydantic")
_OPTIONAL = ("bids-validator-deno", "deepbet")
_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def examine_machine() -> dict[str, Any]:
    """Facts of the machine and what is wrong with it (`problems`, empty when nothing is)."""
    device = choose_device("auto")
    versions = {name: _version(name) for name in (*_SHOWN, *_OPTIONAL)}
    problems = [
        f"{name} {versions[name]} is older than {'.'.join(map(str, floor))}: pip install --upgrade {name}"
        for name, floor in _FLOORS.items()
        if versions[name] is None or _numbers(versions[name]) < floor
    ]
    errors = {precision: _convolution_error(device, precision) for precision in _TOLERANCE}
    problems += [
        f"a 3-D convolution in {name} on {device} is off by {error:.2g} (relative): do not trust results here"
        for name, error in errors.items()
        if not error < _TOLERANCE[name]
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "brainldm": brainldm.__version__,
        "python": platform.python_version(),
        "versions": versions,
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "packed_convolutions": packing_works(),
        "precision_by_default": choose_precision("auto", device),
        "memory_gib": round(memory / 2**30, 1),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "convolution_relative_error": errors,
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str | None) -> tuple[int, ...]:
    parts = (version or "0").split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _convolution_error(device: torch.device, precision: str) -> float:
    """Relative error of a convolution of the U-Net's kind against float64 on the CPU.

    Some releases of cuDNN and torch compute 3-D convolutions in half precision wrongly without a word
    (pytorch issues 163539, 167024), so it is measured rather than assumed.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 10, 14, 10, generator=generator, dtype=torch.float64)
    weight = torch.randn(64, 64, 3, 3, 3, generator=generator, dtype=torch.float64) / (27 * 64) ** 0.5
    expected = F.conv3d(x, weight, padding=1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = torch.channels_last_3d
    found = F.conv3d(x.to(device, dtype).contiguous(memory_format=layout), weight.to(device, dtype), padding=1)
    return float((found.double().cpu() - expected).norm() / expected.norm())
