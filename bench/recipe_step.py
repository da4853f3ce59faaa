"""How long one training step of a recipe takes here, at its full size, and how much memory.

    python bench/recipe_step.py paper --stage autoencoder   # writes bench/recipe-step-paper-autoencoder.json
    python bench/recipe_step.py paper --stage diffusion
    python bench/recipe_step.py paper --stage diffusion --device cuda --steps 6    # bench/...-cuda.json

The stage is the trainer's own, with all its losses on from the first step (the recipe brings the adversarial one in
later) and its own batch. Images are phantoms; stage 2 is shown random latents of the recipe's shape: the arithmetic is
the same. A process measures one stage, because its peak memory is the process'.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from recipe_cost import GRID_OF

import brainldm
from brainldm.base.streams import stream
from brainldm.base.volume import GRIDS, Grid
from brainldm.cohort.phantom import draw_person, make_phantom
from brainldm.model.precision import choose_device, choose_precision, device_name
from brainldm.recipes import recipe_named
from brainldm.train.autoencoder_stage import AutoencoderStage
from brainldm.train.config import Recipe
from brainldm.train.diffusion_stage import DiffusionStage
from brainldm.train.latents import Latents
from brainldm.train.parts import Parts


class Phantoms:
    """People enough for one batch, as a stage asks a cohort for them."""

    def __init__(self, grid: Grid, people: int) -> None:
        self.grid, self.names = grid, [f"phantom-{index}" for index in range(people)]
        self._images = [make_phantom(draw_person(0, i), grid, 0, i).image_XYZ.astype(np.float32) for i in range(people)]

    def __len__(self) -> int:
        return len(self.names)

    def image_XYZ(self, index: int) -> np.ndarray:
        return self._images[index]


def built(
    recipe: Recipe, grid: Grid, name: str, device: torch.device, precision: str
) -> AutoencoderStage | DiffusionStage:
    """The recipe's stage, ready for its first step."""
    if name == "autoencoder":
        config = replace(recipe.autoencoder, adversarial_from_step=0)
        people = Phantoms(grid, config.batch)
        stage = AutoencoderStage(config, people, people, seed=0, device=device, precision=precision)
        stage.begin()
        return stage
    people, shape = recipe.diffusion.batch, recipe.autoencoder.net.latent_shape_CXYZ(grid.shape_XYZ)
    draws = stream(0, "recipe step")
    mean = torch.from_numpy(draws.standard_normal((people, *shape), np.float32))
    latents = Latents(
        Parts(({"mean": mean, "log_variance": torch.full_like(mean, -6.0)},)),
        torch.ones(people),
        (0.0,) * shape[0],
        (1.0,) * shape[0],
        1.0,
    )
    condition_NF = draws.random((people, 4)).astype(np.float32)
    config = replace(recipe.diffusion, latent_population=False)
    names = [f"person-{index}" for index in range(people)]
    return DiffusionStage(config, latents, 1.0, None, condition_NF, names, seed=0, device=device, precision=precision)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process held: of the GPU's memory where it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=sorted(GRID_OF))
    parser.add_argument("--stage", choices=("autoencoder", "diffusion"), required=True)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    recipe, grid = recipe_named(asked.recipe), GRIDS[GRID_OF[asked.recipe]]
    device = choose_device(asked.device)
    precision = choose_precision("auto", device)
    stage = built(recipe, grid, asked.stage, device, precision)
    seconds, figures = [], []
    for step in range(asked.steps):
        begun = time.perf_counter()
        figures.append(stage.step(step))  # which reads its losses: a GPU has ended then
        seconds.append(round(time.perf_counter() - begun, 2))
    network = stage.autoencoder if isinstance(stage, AutoencoderStage) else stage.unet
    found = {
        "recipe": asked.recipe,
        "stage": asked.stage,
        "image_XYZ": list(grid.shape_XYZ),
        "batch": (recipe.autoencoder if asked.stage == "autoencoder" else recipe.diffusion).batch,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds_a_step": seconds,
        "figures": figures,
        "peak_memory_gb": round(peak_memory_bytes(device) / 1e9, 2),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": device_name(device),
        "processor": platform.processor() or platform.machine(),
        "versions": {"brainldm": brainldm.__version__, "torch": torch.__version__},
    }
    assert all(np.isfinite(value) for step in figures for value in step.values())
    where = "" if device.type == "cpu" else f"-{device.type}"
    path = Path(__file__).with_name(f"recipe-step-{asked.recipe}-{asked.stage}{where}.json")
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
