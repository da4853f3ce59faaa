"""What the judge costs: seconds of each part for 1000 volumes at 1 mm and 2 mm, on one core of this machine.

    .venv/bin/python bench/judge_cost.py          writes docs/judge-cost.json and prints the table

A part's time is the median over a few phantoms (pairs of them for the likeness figures), times 1000. What is computed
once for a set (distances between sets) is timed on features of 1000 images. MedicalNet has random weights here: its
cost does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

import brainldm
from brainldm.base.files import write_json
from brainldm.base.streams import stream
from brainldm.base.volume import grid_named
from brainldm.cohort.measure import TemplateMeasure
from brainldm.cohort.phantom import write_phantom_study
from brainldm.evaluate.coverage import manifolds
from brainldm.evaluate.diversity import Prepared, likeness, scale_weights
from brainldm.evaluate.examine import examine_one, read_for_judging
from brainldm.evaluate.features import features_of
from brainldm.evaluate.frechet import frechet_distance, kernel_distance
from brainldm.evaluate.grids import grid_of_file
from brainldm.evaluate.images import open_images
from brainldm.evaluate.measuring import measure_one
from brainldm.evaluate.memorisation import memorisation
from brainldm.evaluate.networks import MedicalNetSpace, RandomSpace
from brainldm.nets.medicalnet import MedicalNet

OUT = Path(__file__).parents[1] / "docs" / "judge-cost.json"


def seconds(work: Callable[[], object], times: int) -> float:
    """The median time of a call, after one that is not counted."""
    work()
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return median(taken)


def of_a_grid(grid: str, scratch: Path, times: int) -> dict[str, float]:
    """Seconds for 1000 volumes, by part."""
    write_phantom_study(scratch / grid, n=2, grid=grid_named(grid), seed=0, workers=2)
    images = open_images(scratch / grid, "real").images[:2]
    judging = grid_of_file(images[0].path)
    assert judging is not None
    checkpoint = scratch / "medicalnet.pth"
    if not checkpoint.exists():
        torch.save(MedicalNet().state_dict(), checkpoint)
    weights = scale_weights(judging.shape_XYZ)
    volumes = [read_for_judging(image, judging) for image in images]
    prepared = [Prepared.of(volume, len(weights)) for volume in volumes]
    aligned = TemplateMeasure(aligned=True)
    parts: dict[str, Callable[[], object]] = {
        "read, check, sketch": lambda: examine_one((images[0], True), judging),
        "measure volumes": lambda: measure_one(images[0], TemplateMeasure()),
        "measure volumes, known to be aligned": lambda: measure_one(images[0], aligned),
        "features, random network": lambda: features_of(images[0], RandomSpace(), judging),
        "features, Med3D ResNet-50": lambda: features_of(images[0], MedicalNetSpace(checkpoint, "random"), judging),
        "likeness, preparing an image": lambda: Prepared.of(volumes[0], len(weights)),
        "likeness, comparing a pair": lambda: likeness(prepared[0], prepared[1], weights),
    }
    return {name: 1000 * seconds(work, times) for name, work in parts.items()}


def of_sets(count: int = 1000) -> dict[str, float]:
    """Seconds for sets of `count` images on each side."""
    drawn = stream(0, "bench/judge")
    made, real = (drawn.standard_normal((count, 2048)) for _ in range(2))
    voxels, training = (drawn.standard_normal((count, 2, 20_000)).astype(np.float32) for _ in range(2))
    return {
        "Frechet distance, 2048 features": seconds(lambda: frechet_distance(made, real), 1),
        "kernel distance, 2048 features": seconds(lambda: kernel_distance(made, real), 1),
        "precision, recall, density, coverage": seconds(lambda: manifolds(made, real, 0), 1),
        "search for copies among 1000 people": seconds(lambda: memorisation(voxels, [training], made[:0], 0), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="calls of each part that are counted")
    parser.add_argument("--grids", nargs="+", default=["paper", "2mm"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        by_grid = {grid: of_a_grid(grid, Path(scratch), arguments.times) for grid in arguments.grids}
    result = {
        "seconds_per_1000_volumes": by_grid,
        "seconds_for_sets_of_1000": of_sets(),
        "times": arguments.times,
        "threads": 1,
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {"brainldm": brainldm.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    write_json(OUT, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
