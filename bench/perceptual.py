"""What a perceptual distance does to an autoencoder's reconstructions: none, random features, a trained encoder.

    brainldm phantom PHANTOMS --n 120 --grid 4mm --seed 1 --workers 2
    brainldm prepare PHANTOMS COHORT --grid 4mm --workers 2
    python bench/perceptual.py COHORT WORK      # writes bench/perceptual.json; goes on with what WORK holds

Stage 1 of recipe `quick` is trained three times, alike but for the distance, and reconstructs the held-out people. The
encoder is that of the training without one. Values of different distances are different quantities, so each weight is
chosen to make the term SHARE of L1 on held-out people, as the training without a distance leaves them. The two whose
weights are not ours (lpips-squeeze, medicalnet) are compared as well where they are given:

    python bench/perceptual.py COHORT WORK --weights medicalnet resnet_50_23dataset.pth
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import brainldm
from brainldm.base.files import write_json
from brainldm.base.progress import shown_progress
from brainldm.base.streams import stream
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.cohort.quality import FIGURES, figures_of
from brainldm.cohort.split import HELD_OUT
from brainldm.evaluate.estimate import mean
from brainldm.model.folder import load_autoencoder
from brainldm.nets.atlas import AnyAutoencoder
from brainldm.recipes import recipe_named
from brainldm.train.config import PERCEPTUAL_DISTANCES, Recipe
from brainldm.train.perceptual import perceptual_distance
from brainldm.train.reconstruction import compared, scale_weights
from brainldm.train.run import train

SHARE = 0.5
SHARPNESS = list(FIGURES).index("sharpness")
COMPARED = ("psnr_db", "ssim", "ms_ssim", "sharpness_kept")


def people_of(cohort: PreparedCohort) -> list[torch.Tensor]:
    """Images (1, 1, X, Y, Z) of everybody held out."""
    sets = [VolumeDataset(cohort, split) for split in HELD_OUT]
    return [torch.from_numpy(one.image_XYZ(i).copy())[None, None] for one in sets for i in range(len(one))]


@torch.no_grad()
def reconstructed(autoencoder: AnyAutoencoder, people: list[torch.Tensor]) -> list[torch.Tensor]:
    return [autoencoder.decode(autoencoder.encode(image).mean_BCXYZ).clamp(0, 1) for image in people]


def figures(people: list[torch.Tensor], found: list[torch.Tensor], voxel_mm: float) -> dict[str, list[float]]:
    """COMPARED of each person; `sharpness_kept` is the mean change from voxel to voxel over that of the scan."""
    weights, told = scale_weights(tuple(people[0].shape[2:])), {name: list[float]() for name in COMPARED}
    for image, answer in zip(people, found):
        values: dict[str, Any] = compared(answer, image, weights)
        before, after = (figures_of(x[0, 0].numpy(), voxel_mm) for x in (image, answer))
        values["sharpness_kept"] = after[SHARPNESS] / before[SHARPNESS] if after is not None else 0.0
        for name in COMPARED:
            told[name].append(float(values[name]))
    return told


def weight_for(distance: str, files: list[Path], people: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The weight that makes the term SHARE of L1, as the reconstructions `found` have it."""
    network, draws = perceptual_distance(distance, files, seed=0), stream(0, "bench/perceptual")
    with torch.no_grad():
        far = np.mean([network.distance(answer, image, draws).item() for image, answer in zip(people, found)])
    return float(SHARE * np.mean([(a - b).abs().mean().item() for a, b in zip(people, found)]) / far)


def with_distance(recipe: Recipe, distance: str, weight: float) -> Recipe:
    """Its stage 2 is left at one step: a model folder needs both."""
    config = replace(recipe.autoencoder, perceptual_weight=weight)
    if distance != "none":
        config = replace(config, perceptual=distance)
    return replace(recipe, autoencoder=config, diffusion=replace(recipe.diffusion, steps=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--weights", nargs="+", action="append", default=[], metavar=("DISTANCE", "FILE"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("perceptual.json"))
    asked = parser.parse_args()
    cohort, recipe = PreparedCohort.open(asked.cohort), recipe_named("quick")
    people = people_of(cohort)
    distances = {"none": [], "random": [], "encoder": [asked.work / "none"]}
    distances |= {name: [Path(file) for file in files] for name, *files in asked.weights}
    if unknown := distances.keys() - {"none", *PERCEPTUAL_DISTANCES}:
        parser.error(f"no such distance: {', '.join(unknown)}")
    results: dict[str, Any] = {
        "cohort": {"name": cohort.name, "digest": cohort.digest, "grid": cohort.grid.name},
        "recipe": recipe.name,
        "seed": recipe.seed,
        "share_of_l1": SHARE,
        "held_out": len(people),
        "distances": {},
        "software": {"brainldm": brainldm.__version__, "torch": torch.__version__},
    }
    plain: list[torch.Tensor] = []
    alone: dict[str, list[float]] = {}
    for name, files in distances.items():
        weight = weight_for(name, files, people, plain) if name != "none" else 0.0
        with shown_progress() as progress:
            summary = train(
                with_distance(recipe, name, weight),
                asked.cohort,
                asked.work / name,
                perceptual_weights=files,
                progress=progress,
            ).stages["autoencoder"]
        found = reconstructed(load_autoencoder(asked.work / name)[1], people)
        told = figures(people, found, cohort.grid.voxel_mm)
        if name == "none":
            plain, alone = found, told
        results["distances"][name] = {
            "weight": weight,
            "steps": summary["steps"],
            "seconds": summary["seconds"],
            **{figure: asdict(mean(values)) for figure, values in told.items()},
            "more_than_none": {
                figure: asdict(mean([a - b for a, b in zip(values, alone[figure])])) for figure, values in told.items()
            },
        }
        write_json(asked.out, results)
        print(name, {figure: round(float(np.mean(values)), 4) for figure, values in told.items()}, flush=True)


if __name__ == "__main__":
    main()
