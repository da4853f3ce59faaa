"""How much memory sampling takes, and how it is made to fit.

Three things take it: the weights, the U-Net's feature maps, and the decoder's, which at full resolution are gigabytes.
Two decisions bound it: images are decoded in slabs, so that one map is held where the plain way holds four, and a large
U-Net's weights are given up while images are decoded (reading them again takes seconds, sampling a batch minutes).
Neither changes the result, but for the order of additions.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from brainldm.base.errors import EnvironmentProblem
from brainldm.model.description import LatentDiffusionDescription
from brainldm.nets.atlas import AnyAutoencoderConfig, AtlasAutoencoderConfig
from brainldm.nets.autoencoder import AutoencoderConfig
from brainldm.nets.packed import packing_works
from brainldm.nets.unet import DiffusionUNet, UNetConfig

SLAB_BYTES = 24 << 20  # a few of these fit a processor's cache; larger ones are slower
_WHOLE_BELOW_BYTES = 2 * SLAB_BYTES  # maps so small are decoded whole
_SLABS_AT_WORK = 28  # slabs with their neighbours before and after each operation, and gaps between them; measured
_COPIES_WHILE_PACKING = 8  # of the largest weight; measured
_PLAIN_COPIES = 4  # maps that a whole decode holds at once: input, residual, normalised, convolved
_KEEPS_UNET_BELOW_BYTES = 256 << 20
_GAPS = 1.1  # what the C library cannot use again, as a share of all
_SHARE_OF_FREE = 0.9


@dataclass(frozen=True)
class MemoryPlan:
    """How a model is kept within memory: size of slabs (None: whole images), and whether the U-Net stays while images
    are decoded. `peak_bytes` is what the process will take at most, on the device (0: not planned)."""

    slab_bytes: int | None = None
    keeps_unet: bool = True
    peak_bytes: int = 0


def plan_memory(
    description: LatentDiffusionDescription,
    *,
    batch: int,
    precision: str,
    device: torch.device,
    limit_bytes: int | None = None,
    one_way: bool = False,
) -> MemoryPlan:
    """The fastest plan whose peak is within `limit_bytes`, by default nine tenths of what is free and what we hold.
    With `one_way` images are decoded in the way that takes the least, whatever is free: the same bits every time.

    EnvironmentProblem where no plan is: with the least that would do.
    """
    held, free = _held_and_free(device)
    limit = int(held + _SHARE_OF_FREE * free) if limit_bytes is None else limit_bytes
    itemsize = 2 if precision == "bf16" else 4
    packs = precision == "bf16" and device.type == "cpu" and packing_works()
    autoencoder, unet = description.autoencoder, description.unet
    grid_XYZ, latent_XYZ = description.grid.shape_XYZ, description.latent.shape_CXYZ[1:]
    numbers, largest = parameters(unet)
    unet_bytes = numbers * (2 if packs else 4)
    sampling = unet_bytes + batch * unet_map_bytes(unet, latent_XYZ)
    if packs:
        sampling += _COPIES_WHILE_PACKING * largest * 2
    elif precision == "bf16":
        sampling += 2 * numbers  # autocast's copies, which last as long as a call
    images = batch * 3 * 4 * _voxels(grid_XYZ)  # images of the batch, and copies on the way to a file
    ways = _ways_to_decode(autoencoder, grid_XYZ, itemsize, device)[-1 if one_way else 0 :]
    may_keep_unet = device.type == "cuda" or unet_bytes < _KEEPS_UNET_BELOW_BYTES
    plans = [
        MemoryPlan(
            slab_bytes, keeps, held + int(_GAPS * max(sampling, (unet_bytes if keeps else 0) + decoding + images))
        )
        for slab_bytes, decoding in ways
        for keeps in ((True, False) if may_keep_unet else (False,))
    ]
    for plan in plans:
        if plan.peak_bytes <= limit:
            return plan
    least = min(plan.peak_bytes for plan in plans)
    advice = [f"Allow {gigabytes(least)}"]
    if batch > 1:
        advice.append("take a smaller --batch")
    if precision == "fp32" and device.type == "cpu":
        advice.append("leave --exact and --precision fp32 out")
    raise EnvironmentProblem(
        f"sampling {batch} at a time needs {gigabytes(least)} of memory, and {gigabytes(limit)} "
        f"{'are free' if limit_bytes is None else 'were allowed'}.",
        remedy=", or ".join(advice) + ".",
        reason="memory",
    )


def _ways_to_decode(
    autoencoder: AnyAutoencoderConfig, grid_XYZ: tuple[int, ...], itemsize: int, device: torch.device
) -> list[tuple[int | None, int]]:
    """Sizes of slabs (None: whole images) that are worth trying, the fastest first, and what each takes at most."""
    if isinstance(autoencoder, AtlasAutoencoderConfig):
        return [(None, atlas_bytes(autoencoder))]
    whole = _PLAIN_COPIES * largest_map_bytes(autoencoder, grid_XYZ, itemsize)
    ways = [(None, whole)] if device.type == "cuda" or whole < _PLAIN_COPIES * _WHOLE_BELOW_BYTES else []
    return [*ways, (SLAB_BYTES, slab_peak_bytes(autoencoder, grid_XYZ, itemsize))]


def gigabytes(count: int) -> str:
    """3.2 GB, in the units that --max-memory takes.

    >>> gigabytes(3_200_000_000), gigabytes(1_000_000)
    ('3.2 GB', '1 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def parameters(config: UNetConfig) -> tuple[int, int]:
    """How many numbers the U-Net's weights are: all, and the largest of them."""
    with torch.device("meta"):
        numbers = [parameter.numel() for parameter in DiffusionUNet(config).parameters()]
    return sum(numbers), max(numbers)


def unet_map_bytes(config: UNetConfig, latent_XYZ: tuple[int, ...]) -> int:
    """Feature maps that one row holds at most in a call, float32: all skips, and six of the widest where they join."""
    total = 0
    for level, width in enumerate(config.channels):
        voxels = _voxels(latent_XYZ) // config.fold**3 // 8**level
        total += (config.res_blocks + 1) * width * voxels
    widest = 2 * config.channels[0] * _voxels(latent_XYZ) // config.fold**3
    return 4 * (total + 6 * widest)


def largest_map_bytes(config: AutoencoderConfig, grid_XYZ: tuple[int, ...], itemsize: int) -> int:
    """The decoder's largest feature map: where the finest level begins, still with the channels of the one before."""
    return max(itemsize * channels * voxels for channels, voxels in _decoder_maps(config, grid_XYZ))


def atlas_bytes(config: AtlasAutoencoderConfig) -> int:
    """What a decode by atlases holds at most, float32: per voxel the atlases, moved and weighted, their weights and
    displacements, where to look them up, and the image; per cell the maps of the convolutions."""
    voxels, cells = _voxels(config.grid_XYZ), _voxels(config.cells_XYZ)
    return 4 * ((4 * config.atlases + 12) * voxels + (_PLAIN_COPIES * config.channels + config.cell**3) * cells)


def slab_peak_bytes(config: AutoencoderConfig, grid_XYZ: tuple[int, ...], itemsize: int) -> int:
    """What a decode in slabs holds at most.

    A map is given up slab by slab while the next is made, but for a residual block, which keeps what it adds at the
    end.
    """
    maps = list(_decoder_maps(config, grid_XYZ))
    held = [channels * voxels for channels, voxels in maps]
    residual = [2 * config.channels[level] * _level_voxels(config, grid_XYZ, level) for level in _levels(config)]
    _, y, z = grid_XYZ
    thinnest = itemsize * 2 * config.channels[min(1, len(config.channels) - 1)] * y * z // config.fold**2
    return itemsize * max(*held, *residual) + _SLABS_AT_WORK * max(SLAB_BYTES, thinnest)


def _decoder_maps(config: AutoencoderConfig, grid_XYZ: tuple[int, ...]) -> list[tuple[int, int]]:
    """Channels and voxels of the maps that enter each level of the decoder."""
    last = len(config.channels) - 1
    return [
        (config.channels[min(level + 1, last)], _level_voxels(config, grid_XYZ, level)) for level in _levels(config)
    ]


def _levels(config: AutoencoderConfig) -> range:
    return range(len(config.channels))


def _level_voxels(config: AutoencoderConfig, grid_XYZ: tuple[int, ...], level: int) -> int:
    return _voxels(grid_XYZ) // config.fold**3 // 8**level


def _voxels(shape_XYZ: tuple[int, ...]) -> int:
    x, y, z = shape_XYZ
    return x * y * z


def return_freed_memory() -> None:
    """Gives freed memory back to the system at once: the C library would keep gigabytes of it for later."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _held_and_free(device: torch.device) -> tuple[int, int]:
    """Bytes this process holds now, and that it could still have."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
    free = min([psutil.virtual_memory().available, *_free_in_groups(Path("/"))])
    return psutil.Process().memory_info().rss, free


def _free_in_groups(root: Path) -> list[int]:
    """Bytes left in each control group that bounds this process: a job or a container may have less than its machine.

    They are its own group and those that hold it, in both versions; what cannot be read bounds nothing.
    """
    own = {"": "", "memory": ""}  # by controller, as the kernel lists them; version 2 names none
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    free = []
    version_2 = ("memory.max", "memory.current", "inactive_file")
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for mounted, path, (limit, usage, inactive) in (
        ("sys/fs/cgroup", own[""], version_2),
        ("sys/fs/cgroup/memory", own["memory"], version_1),
    ):
        # Above the mount there are no such files. A container may see its own group there, under no path at all.
        for group in (root / mounted / path, *(root / mounted / path).parents):
            with contextlib.suppress(OSError, ValueError):
                allowed, used = (int((group / name).read_text()) for name in (limit, usage))
                facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # What files left in memory counts as used, and is given up when it is needed.
                free.append(allowed - used + int(facts.get(inactive, 0)))
    return free
