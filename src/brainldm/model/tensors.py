"""Tensors on disk: safetensors, written whole, and compared with the network they are for."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from brainldm.base.files import atomic_path


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` as the whole of the safetensors file `path`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as part:
        part.touch()
        mode = part.stat().st_mode  # as any file is made here; the library makes its own for the owner's eyes alone
        try:
            save_file(plain, part, metadata=metadata)
            part.chmod(mode)
        except SafetensorError as error:
            # The library wraps what the operating system said; a full disk is the one case that has a remedy.
            full = "os error 28" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def misfits(network: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every way in which named tensors of these shapes are not the parameters of `network`, in words, sorted."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    faults = [f"{name} is missing" for name in wanted.keys() - shapes.keys()]
    faults += [f"{name} is not part of the network" for name in shapes.keys() - wanted.keys()]
    faults += [
        f"{name} has shape {shapes[name]} instead of {wanted[name]}"
        for name in wanted.keys() & shapes.keys()
        if shapes[name] != wanted[name]
    ]
    return sorted(faults)


def shortened(faults: list[str], most: int = 4) -> str:
    """The first few of a list of faults, and how many more there are."""
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more
