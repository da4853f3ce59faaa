"""Before the first brain: where and in which arithmetic, how long it will take, how much memory; all said aloud."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from brainldm.base.counts import counted
from brainldm.base.errors import EnvironmentProblem, UsageError
from brainldm.base.files import read_json_object
from brainldm.base.manifest import Manifest
from brainldm.diffusion.solvers import SAMPLERS
from brainldm.generate.plan import PlanRow
from brainldm.generate.run import RECORD_NAME, GenerateSettings, check_settings
from brainldm.model.cost import estimate_seconds
from brainldm.model.description import GanDescription
from brainldm.model.folder import load_model, read_description
from brainldm.model.gan import GanModel
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.memory import MemoryPlan, gigabytes, plan_memory
from brainldm.model.precision import choose_device, choose_precision, told_precision


@dataclass(frozen=True)
class Ready:
    """All that is decided before a model is loaded to sample."""

    model: Path
    settings: GenerateSettings
    device: torch.device
    precision: str
    memory: MemoryPlan
    compiles: bool = False

    def load(self) -> LatentDiffusion | GanModel:
        model = load_model(self.model, self.device, precision=self.precision, memory=self.memory)
        if isinstance(model, LatentDiffusion):
            model = replace(model, guidance=self.settings.guidance)
        if self.compiles and isinstance(model, LatentDiffusion):
            return replace(model, unet=torch.compile(model.unet))  # type: ignore[arg-type]
        return model


def start(
    model: Path,
    rows: list[PlanRow],
    settings: GenerateSettings,
    *,
    device: str = "auto",
    precision: str = "auto",
    max_memory: str | None = None,
    may_shrink_batch: bool = False,
    exact: bool = False,
    begun: Path | None = None,
    compiles: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Ready:
    """Chooses the device and the arithmetic, plans the memory, and tells what the work will take.

    With `may_shrink_batch` the batch is halved until the memory suffices, unless the dataset is `begun`: it keeps the
    batch that it was begun with, and what it holds is not planned for. With `exact` images are decoded in one way,
    however much memory is free. UsageError for what cannot be asked; EnvironmentProblem where the memory does not
    suffice.
    """
    description = read_description(model)
    check_settings(description, settings)
    sampler = SAMPLERS[settings.sampler]
    steps = sampler.default_steps if settings.steps is None else settings.steps
    where = choose_device(device)
    chosen = choose_precision(precision, where)
    if compiles and where.type != "cuda":
        raise UsageError("--compile is for CUDA; on a CPU weights are packed instead.", remedy="Leave --compile out.")
    there = 0 if begun is None else len(Manifest(begun / "manifest.jsonl").proven(begun))
    missing = max(0, len(rows) - there)
    brains = counted(missing, "brain") + (f" of {len(rows)}" if missing < len(rows) else "")
    if isinstance(description, GanDescription):
        if max_memory is not None or compiles:
            raise UsageError(
                "--max-memory and --compile are for latent diffusion; a GAN makes an image in one pass.",
                remedy="Leave them out.",
            )
        say(f"{brains}, one pass each, on {told_precision(where, chosen)}.")
        return Ready(model, settings, where, chosen, MemoryPlan())
    limit = None if max_memory is None else parse_memory(max_memory)
    if may_shrink_batch and begun is not None and (begun / RECORD_NAME).is_file():
        settings = replace(settings, batch=read_json_object(begun / RECORD_NAME, batch=int)["batch"])
        may_shrink_batch = False
    batches = [settings.batch]
    while may_shrink_batch and batches[-1] > 1:
        batches.append(batches[-1] // 2)
    memory = MemoryPlan()
    for batch in batches:
        try:
            memory = plan_memory(
                description,
                batch=min(batch, len(rows)),
                precision=chosen,
                device=where,
                limit_bytes=limit,
                one_way=exact,
            )
            break
        except EnvironmentProblem:
            if batch == batches[-1] and missing:
                raise
    if not missing:
        say(f"All {counted(len(rows), 'brain')} are there.")
        return Ready(model, replace(settings, batch=batch), where, chosen, memory, compiles)
    seconds = estimate_seconds(
        description,
        images=missing,
        sampler=settings.sampler,
        steps=steps,
        device=where,
        precision=chosen,
        calls_a_step=1 if settings.guidance == 1 else 2,
    )
    together = f", {batch} at a time" if len(rows) > 1 else ""
    say(
        f"{brains}{together}, {steps} {settings.sampler} steps each, on {told_precision(where, chosen)}: "
        f"about {_duration(seconds)} and at most {gigabytes(memory.peak_bytes)} of memory."
    )
    return Ready(model, replace(settings, batch=batch), where, chosen, memory, compiles)


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
