"""One training by several processes, each with its share of every batch. torchrun starts them, on one node or many.

A recipe's batch is the whole batch, and what is drawn for an image belongs to its place in the run, so that N processes
compute what one does, within rounding, and each makes its own share alone. Each holds all the weights (or shards of
them: sharding.py) and averages the gradients after its backward pass: one thing after another, at the price that
sending does not overlap computing. The first process, the leader, alone writes, but for latents (parts.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from brainldm.base.errors import EnvironmentProblem, UsageError

TIMEOUT_SECONDS = 600.0
# While the leader writes or encodes, the others wait without looking at the clock. One that dies is noticed all the
# same, by its closed connection.
_PATIENCE = timedelta(days=7)
_BUCKET_ELEMENTS = 2**24  # 64 MB of float32: few messages, little memory

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of one training: number `rank` of `processes`, `local_rank` on its node.

    With one process every method gives back what it got, at no cost. With more, all processes must call the same
    methods in the same order.
    """

    rank: int = 0
    processes: int = 1
    local_rank: int = 0
    _patient: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def from_environment(cls) -> Place:
        """The place that torchrun gave this process; the only one where torchrun did not start it."""
        rank, processes, local = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        return cls(rank, processes, local)

    @property
    def alone(self) -> bool:
        return self.processes == 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """Which part of a batch is this process's; `check_divides` has made sure that parts are equal."""
        each = batch // self.processes
        return slice(self.rank * each, (self.rank + 1) * each)

    def mean(self, figures: dict[str, float]) -> dict[str, float]:
        """Means over the processes. What is not finite in one is not finite in all, so all see it."""
        if self.alone:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(figures, (values / self.processes).tolist()))

    def anywhere(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is up in any process."""
        if self.alone:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(bool(value) for value in raised.tolist())

    def check_same(self, value: object, what: str) -> None:
        """EnvironmentProblem where processes see different things."""
        if self.alone:
            return
        seen: list[object] = [None] * self.processes
        dist.all_gather_object(seen, value, group=self._patient)
        if any(one != seen[0] for one in seen):
            raise EnvironmentProblem(
                f"the processes of this training see different {what}: {', '.join(repr(one) for one in seen)}.",
                remedy="Put the run's folder on a file system that all nodes share.",
                reason="not_shared",
            )

    def from_leader(self, value: T) -> T:
        """The leader's value, everywhere."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._patient)
        return box[0]

    def wait(self) -> None:
        """Returns when all processes have come here, however long the leader takes."""
        if not self.alone:
            dist.barrier(group=self._patient)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The body runs in the leader, then in the others, which find what it wrote."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def average_gradients(self, network: nn.Module) -> None:
        """Replaces every gradient by its mean over the processes. Those of sharded weights are means already."""
        if self.alone:
            return
        found = [p.grad for p in network.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
        for bucket in _buckets(found):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.processes
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
                gradient.copy_(part.view(gradient.shape))


ALONE = Place()


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in groups of one type and at most _BUCKET_ELEMENTS elements (or one tensor that has more)."""
    bucket: list[torch.Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and (held + tensor.numel() > _BUCKET_ELEMENTS or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket


@contextlib.contextmanager
def together(device: torch.device, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Place]:
    """This process's place, connected with the others for the length of the body (gloo, on CUDA also NCCL).

    EnvironmentProblem, exit code 5, where another process ends or is silent for `timeout_seconds`: none hangs.
    """
    place = Place.from_environment()
    if place.alone:
        yield place
        return
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(
                f"{place.processes} processes cannot all train on {device}.",
                remedy="Use --device cuda: each process takes the GPU of its number.",
            )
        if place.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"process {place.local_rank} of this node has no GPU: there are {torch.cuda.device_count()}.",
                remedy="Start as many processes a node as it has GPUs: torchrun --nproc-per-node.",
            )
        torch.cuda.set_device(place.local_rank)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        yield replace(place, _patient=dist.new_group(backend="gloo", timeout=_PATIENCE))
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise EnvironmentProblem(
            f"another process of this training has ended or does not answer (noticed by {place.rank} of "
            f"{place.processes}).",
            remedy="Its own message says why. The same command goes on from the last checkpoint.",
            reason="process_lost",
        ) from error


def check_divides(place: Place, stage: str, batch: int) -> None:
    """UsageError where the batch of a stage cannot be cut into equal shares."""
    if batch % place.processes:
        numbers = [str(n) for n in range(1, batch + 1) if batch % n == 0]
        raise UsageError(
            f"the {stage}'s batch of {batch} cannot be shared equally by {place.processes} processes.",
            remedy=f"Start {' or '.join(numbers)} (each --stage may have a number of its own), or use a recipe with "
            "another batch.",
        )


def one_process_only(what: str) -> None:
    """UsageError where torchrun started several processes for something that trains in one."""
    processes = Place.from_environment().processes
    if processes > 1:
        raise UsageError(f"{what} trains in one process, not in {processes}.", remedy="Start it without torchrun.")


# ---- Batch normalisation over the whole batch ---------------------------------------------------------------------


def normalised_together(network: nn.Module, place: Place) -> nn.Module:
    """The network with batch normalisations that see the whole batch, not this process's share of it.

    torch's SyncBatchNorm does the same but needs a GPU. Parameters and their names stay as they are.
    """
    if place.alone:
        return network
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm3d):
            child.__class__ = _BatchNormOverProcesses
        else:
            setattr(network, name, normalised_together(child, place))
    return network


class _MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over the processes. Its gradient, of the processes' summed losses, is a mean as well."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _mean_over_processes(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _mean_over_processes(gradient)


def _mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class _BatchNormOverProcesses(nn.BatchNorm3d):
    def forward(self, x_BCXYZ: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x_BCXYZ)
        x = x_BCXYZ.float()
        axes, shape = (0, 2, 3, 4), (1, -1, 1, 1, 1)
        mean: torch.Tensor = _MeanOverProcesses.apply(x.mean(axes))
        centred = x - mean.view(shape)
        variance: torch.Tensor = _MeanOverProcesses.apply(centred.square().mean(axes))
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                count = x.numel() // x.shape[1] * dist.get_world_size()
                momentum = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(x_BCXYZ.dtype)
