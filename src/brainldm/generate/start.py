"""Before the first brain: where and in which arithmetic, how long it will take, how much memory; all said aloud."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from brainldm.base.errors import UsageError
from brainldm.diffusion.solvers import sampler_named
from brainldm.generate.plan import PlanRow
from brainldm.generate.run import GenerateSettings
from brainldm.model.cost import estimate_seconds
from brainldm.model.folder import load_model, read_description
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.memory import MemoryPlan, gigabytes, plan_memory
from brainldm.model.precision import choose_device, choose_precision, told_precision


@dataclass(frozen=True)
class Ready:
    """All that is decided before a model is loaded to sample."""

    model: Path
    device: torch.device
    precision: str
    memory: MemoryPlan
    seconds: float

    def load(self) -> LatentDiffusion:
        return load_model(self.model, self.device, precision=self.precision, memory=self.memory)


def start(
    model: Path,
    rows: list[PlanRow],
    settings: GenerateSettings,
    *,
    device: str = "auto",
    precision: str = "auto",
    max_memory: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Ready:
    """Chooses the device and the arithmetic, plans the memory, and tells what the work will take.

    UsageError for what cannot be asked; EnvironmentProblem where the memory does not suffice.
    """
    description = read_description(model)
    where = choose_device(device)
    chosen = choose_precision(precision, where)
    limit = None if max_memory is None else parse_memory(max_memory)
    batch = min(settings.batch, len(rows))
    sampler = sampler_named(settings.sampler)
    steps = sampler.default_steps if settings.steps is None else settings.steps
    memory = plan_memory(description, batch=batch, precision=chosen, device=where, limit_bytes=limit)
    seconds = estimate_seconds(
        description, images=len(rows), sampler=settings.sampler, steps=steps, device=where, precision=chosen
    )
    brains = "1 brain" if len(rows) == 1 else f"{len(rows)} brains"
    say(
        f"{brains}, {steps} {settings.sampler} steps each, on {told_precision(where, chosen)}: "
        f"about {_duration(seconds)} and at most {gigabytes(memory.peak_bytes)} of memory."
    )
    return Ready(model, where, chosen, memory, seconds)


def parse_memory(text: str) -> int:
    """Bytes of text such as 3GB, 512 MB or 2.5GiB.

    >>> parse_memory("3GB"), parse_memory("1.5 GiB")
    (3000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt])(i?)b?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise UsageError(f"{text!r} is no amount of memory.", remedy="Write, say, 3GB.")
    power = "kmgt".index(found[2].lower()) + 1
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
