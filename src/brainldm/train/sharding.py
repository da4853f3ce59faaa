"""Networks in shards: each process holds 1 / N of the weights, moments and averages (FSDP2, `--shard`).

A block's weights are gathered when it runs and given up after. Checkpoints are whole: the same file goes on with any
number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(roots: Iterable[nn.Module], units: tuple[type[nn.Module], ...], device: torch.device) -> None:
    """Cuts each of `roots` into shards over all processes; the modules of the types `units` in them are gathered one
    at a time, the rest of a root together. Make the optimiser after it. Each root must be called as a module."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for root in roots:
        for parameter in root.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 takes no other layout; activations keep theirs
        for module in root.modules():
            if module is not root and isinstance(module, units):
                fully_shard(module, mesh=mesh)
        fully_shard(root, mesh=mesh)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor put together from its shards, in every process; as it is where it has none."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def for_checkpoint(tensor: torch.Tensor) -> torch.Tensor:
    """The same, but kept by the leader alone and in the machine's memory: eight whole copies a node would be many."""
    if not isinstance(tensor, DTensor):
        return tensor
    together = whole(tensor).detach()
    return together.cpu() if dist.get_rank() == 0 else together.new_empty(0)


def laid_out_as(own: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` in the memory layout of `own`, and in its shards where it has some."""
    if isinstance(own, DTensor):
        # Every process has read the whole tensor, so nothing is sent.
        return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return torch.empty_like(own).copy_(tensor)


def clip_gradients(network: nn.Module, most: float) -> torch.Tensor:
    """Scales the gradients down to a norm of `most` over the whole network; returns the norm they had."""
    return whole(torch.nn.utils.clip_grad_norm_(network.parameters(), most))
