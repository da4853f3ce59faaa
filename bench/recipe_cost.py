"""How long a recipe's model takes to make a brain, and how much memory, before anybody has trained it.

    python bench/recipe_cost.py fast                   # writes bench/recipe-cost-fast.json

Weights are random: the arithmetic is the same. Sampled and decoded as `brainldm generate` does, the mean over brains
after one that is not timed. MONAI's way at the same grid is in bench/results.json (`make bench`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

import numpy as np
import torch

import brainldm
from brainldm.base.covariates import Covariates
from brainldm.base.streams import stream
from brainldm.base.volume import GRIDS
from brainldm.diffusion.solvers import SAMPLERS
from brainldm.generate.run import row_noise
from brainldm.model.cost import work_of
from brainldm.model.description import LatentDescription
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.latent_population import LatentPopulation
from brainldm.model.precision import choose_precision
from brainldm.nets.atlas import build_autoencoder
from brainldm.nets.unet import DiffusionUNet
from brainldm.recipes import recipe_named
from brainldm.train.describe_model import described
from brainldm.train.diffusion_stage import unet_config

GRID_OF = {"fast": "paper", "paper": "paper", "demo": "2mm", "small": "2mm", "quick": "4mm"}


def untrained(name: str, precision: str) -> LatentDiffusion:
    """The recipe's model with random weights, none of them 0."""
    recipe, grid = recipe_named(name), GRIDS[GRID_OF[name]]
    torch.manual_seed(0)
    autoencoder = build_autoencoder(recipe.autoencoder.net).eval()
    unet = DiffusionUNet(unet_config(recipe.diffusion, recipe.autoencoder.net.latent_channels)).eval()
    for network in (autoencoder, unet):
        for parameter in network.parameters():
            if not parameter.any():  # what begins at 0 would be computed just as slowly, but shown as grey
                torch.nn.init.normal_(parameter, std=0.02)
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    draws = stream(0, "recipe cost")
    people = [Covariates(i % 2, *draws.uniform((44, 7e3, 1.1e6), (82, 9e4, 1.7e6)).tolist()) for i in range(50)]
    shape = recipe.autoencoder.net.latent_shape_CXYZ(grid.shape_XYZ)
    latent = LatentDescription(shape_CXYZ=shape, scale=1.0, by_population=recipe.diffusion.latent_population)
    description = described(
        recipe, f"untrained-{name}", grid, people, latent, preprocessing={}, training={}, licence=""
    )
    population = LatentPopulation(torch.zeros(shape), torch.zeros(4, *shape), torch.ones(shape))
    return LatentDiffusion(
        description,
        autoencoder,
        unet,
        precision,
        population=population if recipe.diffusion.latent_population else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=sorted(GRID_OF))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--brains", type=int, default=2)
    asked = parser.parse_args()
    precision = choose_precision("auto", torch.device("cpu"))
    model = untrained(asked.recipe, precision)
    decodes = 2 if recipe_named(asked.recipe).diffusion.volume_reader else 1  # before its volumes are read, and after
    somebody = Covariates(0, 63.0, 30_000.0, 1.4e6)
    seconds = []
    for index in range(asked.brains + 1):
        begun = time.perf_counter()
        latent = model.sample_latents([somebody], [row_noise(0, index)], SAMPLERS["unipc"], asked.steps)
        sampled = time.perf_counter()
        for _ in range(decodes):
            image = model.decode(latent)
        seconds.append((sampled - begun, time.perf_counter() - sampled))
        assert np.isfinite(image).all()
    sampling, decoding = np.array(seconds[1:]).mean(axis=0)
    work = work_of(model.description)
    found = {
        "recipe": asked.recipe,
        "image_XYZ": list(model.grid.shape_XYZ),
        "sampler": "unipc",
        "steps": asked.steps,
        "brains": asked.brains,
        "sampling_seconds": round(float(sampling), 3),
        "decoding_seconds": round(float(decoding), 3),
        "seconds_a_brain": round(float(sampling + decoding), 3),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "gflop": {"call": round(work.unet_call_flop / 1e9, 1), "decode": round(work.decode_flop / 1e9, 1)},
        "parameters": {
            "autoencoder": sum(p.numel() for p in model.autoencoder.parameters()),
            "unet": sum(p.numel() for p in model.unet.parameters()),
        },
        "precision": precision,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": {"brainldm": brainldm.__version__, "torch": torch.__version__},
    }
    path = Path(__file__).with_name(f"recipe-cost-{asked.recipe}.json")
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
