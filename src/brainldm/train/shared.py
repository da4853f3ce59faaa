"""What the two stages of one run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from brainldm.base.files import read_json_object
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.train.config import Recipe
from brainldm.train.distributed import Place
from brainldm.train.loop import EndsBetween, Stage, run_stage
from brainldm.train.perceptual import PerceptualChoice


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe, the people it is trained on, where it lies and in which arithmetic it is made. `start` is the model
    that the stages begin with, if any; `cache` where images lie uncompressed (None: in the run's own folder)."""

    recipe: Recipe
    cohort: PreparedCohort
    train: VolumeDataset
    validation: VolumeDataset
    out: Path
    device: torch.device
    precision: str
    start: LatentDiffusion | None
    perceptual: PerceptualChoice
    cache: Path | None
    tensorboard: bool
    place: Place
    shard: bool
    progress: EndsBetween

    @property
    def start_facts(self) -> dict[str, str] | None:
        """Which model the run began with."""
        if self.start is None:
            return None
        return {"name": self.start.description.name, "id": self.start.description.identity}

    def run_stage(self, stage: Stage, minutes: float | None) -> dict[str, Any]:
        """Trains the stage in its folder; its summary."""
        self.progress.check()
        return run_stage(
            stage,
            self.out / stage.name,
            minutes=minutes,
            checkpoint_minutes=self.recipe.checkpoint_minutes,
            tensorboard=self.tensorboard,
            progress=self.progress.progress,  # the loop itself ends with its state saved
            place=self.place,
            asked=self.progress.asked,
        )


def recorded_run(out: Path) -> dict[str, Any]:
    """What run.json says of the run in `out`; nothing where there is none yet."""
    path = out / "run.json"
    return read_json_object(path) if path.is_file() else {}
