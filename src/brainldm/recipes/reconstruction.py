"""How much an autoencoder keeps of people it has not seen, where the truth is known: phantoms without their noise.

A phantom study keeps the images as a scanner would show them. The same people without noise are painted anew from the
study's seed: that is what an autoencoder should give back, since noise carries nothing and cannot be kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainldm.base.errors import BadInput
from brainldm.base.files import read_json
from brainldm.base.manifest import Manifest
from brainldm.base.pool import each_in_a_pool
from brainldm.base.progress import Progress, Quiet
from brainldm.base.volume import GRIDS, Grid
from brainldm.cohort.dataset import PreparedCohort, PreparedRow, VolumeDataset
from brainldm.cohort.phantom import PhantomConfig, draw_person, make_phantom
from brainldm.cohort.split import HELD_OUT
from brainldm.model.description import AUTOENCODER_NAME
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.train.reconstruction import compared, scale_weights

# How far the cohort's image of a phantom may be from the same painted anew: both are kept as 16-bit integers, and
# preparing brings one onto its own grid once more.
_SAME_IMAGE = 1e-3
FIGURES = ("psnr_db", "ssim", "psnr_in_head_db", "psnr_of_the_scan_db")


@dataclass(frozen=True)
class PhantomStudy:
    """A study that `brainldm phantom` wrote: what paints its people again. `index_of` is by participant."""

    folder: Path
    seed: int
    grid: Grid
    index_of: Mapping[str, int]

    @classmethod
    def open(cls, folder: Path) -> PhantomStudy:
        """The study in `folder`; BadInput where it is none, or its people cannot be painted again by this program."""
        facts = read_json(folder / "phantom.json") if (folder / "phantom.json").is_file() else {}
        remedy = "Name the folder that `brainldm phantom` wrote."
        if facts.get("kind") != "phantom study":
            raise BadInput("is no phantom study.", remedy=remedy, path=folder, reason="not_phantoms")
        if facts["anatomies"] != "MNI152" or facts["grid"]["name"] not in GRIDS:
            raise BadInput("its people were not made from the template.", remedy=remedy, path=folder, reason="anatomy")
        if facts["constants"] != json.loads(json.dumps(dataclasses.asdict(PhantomConfig()))):
            raise BadInput(
                "was made with other constants than this brainldm paints with.",
                remedy="Use the version that made it (phantom.json names it), or make the study again.",
                path=folder / "phantom.json",
                reason="other_constants",
            )
        records = Manifest(folder / "manifest.jsonl").records()
        index_of = {record["participant_id"]: int(record["index"]) for record in records if "index" in record}
        return cls(folder, int(facts["seed"]), GRIDS[facts["grid"]["name"]], index_of)


@dataclass(frozen=True)
class Painting:
    """One phantom to paint again: everything a worker process needs."""

    grid: Grid
    seed: int
    index: int


def painted(task: Painting) -> tuple[np.ndarray, np.ndarray]:
    """The phantom as its scan shows it and without noise, both in 0..1 on one scale, float32."""
    phantom = make_phantom(draw_person(task.seed, task.index), task.grid, task.seed, task.index)
    return phantom.image_XYZ.astype(np.float32), phantom.noise_free_XYZ.astype(np.float32)


def reconstructions(
    model: LatentDiffusion,
    people: Sequence[PreparedRow],
    cohort: PreparedCohort,
    study: PhantomStudy,
    records: Manifest,
    *,
    workers: int = 1,
    progress: Progress = Quiet(),
) -> list[dict[str, Any]]:
    """FIGURES of each person's reconstruction, from `records` where they are there already.

    `psnr_db` and `ssim` are against the image without noise, over the whole box; `psnr_in_head_db` leaves the air out;
    `psnr_of_the_scan_db` is what the scan that went in has itself. BadInput where the cohort's image of a person is not
    the study's.
    """
    autoencoder = model.description.weights[AUTOENCODER_NAME].sha256
    known = {(record["sha256"], record["autoencoder"]): record for record in records.records() if "psnr_db" in record}
    waiting = [row for row in people if (row.sha256, autoencoder) not in known]
    dataset = VolumeDataset(cohort, cache_bytes=0)
    by_task = {Painting(study.grid, study.seed, study.index_of[row.participant_id]): row for row in waiting}
    progress.start("reconstructing held-out phantoms", len(people), len(people) - len(waiting))
    with contextlib.closing(each_in_a_pool(painted, list(by_task), workers=workers)) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            scan_XYZ, truth_XYZ = outcome
            row = by_task[task]
            image_XYZ = dataset.image_XYZ(dataset.names.index(row.participant_id))
            if np.abs(image_XYZ - scan_XYZ).max() > _SAME_IMAGE:
                raise BadInput(
                    f"the image of {row.participant_id} is not the one that the phantom study {study.folder.name} "
                    "paints.",
                    remedy="Name the study that this cohort was prepared from.",
                    path=row.path,
                    reason="other_phantoms",
                )
            record: dict[str, Any] = {
                "participant_id": row.participant_id,
                "sha256": row.sha256,
                "autoencoder": autoencoder,
                **likeness(reconstructed(model, image_XYZ), truth_XYZ),
                "psnr_of_the_scan_db": psnr_db(image_XYZ, truth_XYZ),
            }
            records.append(**record)
            known[row.sha256, autoencoder] = record
            progress.advance(1, row.participant_id)
    return [known[row.sha256, autoencoder] for row in people]


def held_out(cohort: PreparedCohort) -> tuple[PreparedRow, ...]:
    """Everybody whom no training has seen, in the order of their ids within validation and test."""
    return tuple(row for split in HELD_OUT for row in cohort.rows(split))


@torch.no_grad()
def reconstructed(model: LatentDiffusion, image_XYZ: np.ndarray) -> np.ndarray:
    """What the autoencoder gives back of an RAS+ image in 0..1, through the mean of its latent, clipped to 0..1."""
    turned = model.description.grid.network_x == "right_to_left"
    image = np.ascontiguousarray(image_XYZ[::-1] if turned else image_XYZ, dtype=np.float32)
    latent = model.autoencoder.encode(torch.from_numpy(image)[None, None].to(model.device))
    return np.clip(model.decode(latent.mean_BCXYZ)[0], 0.0, 1.0)


def likeness(image_XYZ: np.ndarray, truth_XYZ: np.ndarray) -> dict[str, float | None]:
    """Higher is better: PSNR in dB (of a range of 1), over the box and where the truth is above 0, and SSIM (1 is
    perfect), as in every reconstruction report (train/reconstruction)."""
    pair = [torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32))[None, None] for a in (image_XYZ, truth_XYZ)]
    figures = compared(pair[0], pair[1], scale_weights(image_XYZ.shape))
    return {
        "psnr_db": figures["psnr_db"],
        "ssim": figures["ssim"],
        "psnr_in_head_db": psnr_db(image_XYZ[truth_XYZ > 0], truth_XYZ[truth_XYZ > 0]),
    }


def psnr_db(image: np.ndarray, truth: np.ndarray) -> float:
    """Higher is better: 10 log10 of 1 over the mean squared error; equal images have 120 dB here, not infinity."""
    error = float(np.square(np.asarray(image, dtype=np.float64) - truth).mean())
    return float(-10 * np.log10(max(error, 1e-12)))
