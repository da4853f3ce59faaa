"""What an autoencoder loses of people: L1, PSNR, SSIM and MS-SSIM, each person's and their means, and a picture.

    reconstruction.json   how it was measured; means with 95 % bootstrap intervals over people; a row a person
    reconstruction.tsv    the same rows
    reconstruction.png    originals, reconstructions, and their differences

Reconstructions are decodings of the posterior's mean, clamped to 0..1 as images are stored. The similarities are
MONAI's, with the settings of paper.md 3.3: a Gaussian of 7 voxels and sigma 1.5, constants 0.01 and 0.03, range 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import brainldm
from brainldm.base.errors import UsageError
from brainldm.base.feeding import made_ahead
from brainldm.base.files import locked_folder, write_json
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import stream
from brainldm.base.tables import write_table
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.cohort.split import HELD_OUT, SPLITS
from brainldm.model.description import AUTOENCODER_NAME
from brainldm.model.folder import load_autoencoder
from brainldm.model.precision import autocast, choose_device, choose_precision
from brainldm.nets.atlas import AnyAutoencoder
from brainldm.train.pictures import save_rows

FIGURES = ("l1", "psnr_db", "ssim", "ms_ssim")  # best: 0; infinite (120 at most is said); 1; 1
KERNEL, SIGMA_VOXELS, K1, K2 = 7, 1.5, 0.01, 0.03
# Wang et al. 2003, table 1, finest scale first.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
RESAMPLINGS, FEWEST_FOR_AN_INTERVAL = 2000, 4
PICTURED, DIFFERENCE_GAIN = 4, 4.0

Images = Callable[[int], np.ndarray]  # index -> (X, Y, Z) in 0..1
ReportedSplit = Literal["held-out", "train", "validation", "test", "all"]


@dataclass(frozen=True)
class ReconstructionReport:
    """`rows`: participant_id and FIGURES of each person, None for what the grid is too small for. `pictured`: image,
    reconstruction and difference from the reference of the first few."""

    rows: tuple[dict[str, Any], ...]
    seed: int
    ms_ssim_weights: tuple[float, ...]
    pictured: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]

    def figures(self) -> dict[str, dict[str, Any]]:
        """Of each figure: its mean, its 95 % percentile bootstrap interval over people, how many they are, and why
        something of that is null."""
        n = len(self.rows)
        draws, resampled = stream(self.seed, "reconstruction/people"), np.empty((0, len(FIGURES)))
        values_NF = np.array([[row[name] for name in FIGURES] for row in self.rows], dtype=float).reshape(n, -1)
        if n >= FEWEST_FOR_AN_INTERVAL:
            resampled = np.stack([values_NF[draws.integers(0, n, n)].mean(0) for _ in range(RESAMPLINGS)])
        told = {}
        for position, name in enumerate(FIGURES):
            mean = None if n == 0 or np.isnan(values_NF[0, position]) else float(values_NF[:, position].mean())
            interval, reason = None, ""
            if mean is None:
                reason = f"images are smaller than the {KERNEL}-voxel window" if n else "there are no people"
            elif len(resampled):
                interval = np.percentile(resampled[:, position], [2.5, 97.5]).tolist()
            else:
                reason = f"an interval needs at least {FEWEST_FOR_AN_INTERVAL} people"
            told[name] = {"mean": mean, "interval_95": interval, "n": n, "reason": reason}
        return told

    def summary(self) -> dict[str, Any]:
        """The means by name, with `people`, `seed` and `interval_95`: what a training summary keeps, without names."""
        figures = self.figures()
        return {
            "people": len(self.rows),
            **{name: told["mean"] for name, told in figures.items()},
            "interval_95": {name: told["interval_95"] for name, told in figures.items()},
            "seed": self.seed,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "brainldm reconstruction",
            "figures": self.figures(),
            "seed": self.seed,
            "resamplings": RESAMPLINGS,
            "measured": {
                "values": "0..1, reconstructions clamped to it",
                "psnr_peak": 1.0,
                "kernel_voxels": KERNEL,
                "sigma_voxels": SIGMA_VOXELS,
                "k1": K1,
                "k2": K2,
                "data_range": 1.0,
                "ms_ssim_scale_weights": list(self.ms_ssim_weights),
            },
            "picture": {"rows": ["original", "reconstruction", f"{DIFFERENCE_GAIN:g} x |difference|"]},
            "rows": list(self.rows),
        }

    def write(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """Writes the three files into `folder`; `about` is added to the JSON."""
        write_table(folder / "reconstruction.tsv", ("participant_id", *FIGURES), self.rows)
        if self.pictured:
            save_rows(folder / "reconstruction.png", [np.stack(row) for row in zip(*self.pictured)])
        write_json(folder / "reconstruction.json", (about or {}) | self.to_json())


@torch.no_grad()
def reconstruction_report(
    autoencoder: AnyAutoencoder,
    images: Images,
    references: Images,
    names: Sequence[str],
    seed: int,
    *,
    precision: str = "fp32",
    progress: Progress = Quiet(),
) -> ReconstructionReport:
    """How near the reconstructions of `images` are to `references`, one a name.

    Both are callables of an index 0..len(names)-1 that give (X, Y, Z) in 0..1 on one grid, in several threads. For what
    an autoencoder loses the two are the same; with others (a phantom without its noise) it is what it keeps or restores
    of those. The autoencoder runs where its weights are; `seed` is the bootstrap's.
    """
    device = next(autoencoder.parameters()).device
    rows: list[dict[str, Any]] = []
    pictured: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    weights: tuple[float, ...] = ()

    def both(index: int) -> tuple[np.ndarray, np.ndarray]:
        image_XYZ = images(index)
        return image_XYZ, image_XYZ if references is images else references(index)

    progress.start("reconstructing", len(names))
    for name, pair in zip(names, made_ahead(both, len(names)), strict=True):
        image, reference = (_tensor(image_XYZ, device) for image_XYZ in pair)
        with autocast(device, precision):
            decoded = autoencoder.decode(autoencoder.encode(image).mean_BCXYZ)
        found = decoded.float().clamp(0, 1)
        weights = scale_weights(tuple(image.shape[2:]))
        rows.append({"participant_id": name, **compared(found, reference, weights)})
        if len(pictured) < PICTURED:
            difference = (DIFFERENCE_GAIN * (found - reference).abs()).clamp(0, 1)
            shown = [x[0, 0].cpu().numpy() for x in (image, found, difference)]
            pictured.append((shown[0], shown[1], shown[2]))
        progress.advance()
    return ReconstructionReport(tuple(rows), seed, weights, tuple(pictured))


def _tensor(image_XYZ: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_XYZ, dtype=np.float32))[None, None].to(device)


def compared(found: torch.Tensor, reference: torch.Tensor, weights: tuple[float, ...]) -> dict[str, float | None]:
    """FIGURES of one image (1, 1, X, Y, Z) in 0..1; None for what has no `weights` of scales, being too small."""
    from monai.metrics import MultiScaleSSIMMetric, SSIMMetric  # takes seconds to import

    error = found - reference
    figures: dict[str, float | None] = {
        "l1": error.abs().mean().item(),
        "psnr_db": -10 * float(np.log10(max(error.square().mean().item(), 1e-12))),
        "ssim": None,
        "ms_ssim": None,
    }
    if weights:
        ssim = SSIMMetric(3, data_range=1.0, win_size=KERNEL, kernel_sigma=SIGMA_VOXELS, k1=K1, k2=K2)
        scaled = MultiScaleSSIMMetric(
            3, data_range=1.0, kernel_size=KERNEL, kernel_sigma=SIGMA_VOXELS, k1=K1, k2=K2, weights=weights
        )
        figures |= {"ssim": ssim(found, reference).item(), "ms_ssim": scaled(found, reference).item()}
    return figures


def scale_weights(shape_XYZ: Sequence[int]) -> tuple[float, ...]:
    """The weights of the scales that images of this shape have room for, summing to 1; empty when not even one fits.

    The judge's rule (evaluate/diversity: at least the kernel along the shortest side after the last halving), and
    MONAI's own, which asks for more from four scales on.

    >>> [len(scale_weights(shape)) for shape in ((160, 224, 160), (80, 112, 80), (40, 56, 40), (6, 9, 9))]
    [5, 4, 3, 0]
    """
    side = min(shape_XYZ)
    fitting = [n for n in range(1, 6) if side // max(2 ** (n - 1), (n - 1) ** 2) >= KERNEL]
    scales = max(fitting, default=0)
    kept = SCALE_WEIGHTS[:scales]
    return kept if scales == len(SCALE_WEIGHTS) else tuple(weight / sum(kept) for weight in kept)


# ------------------------------------------------------------------------------------------------------ a whole cohort


def reconstruct_cohort(
    model: Path,
    data: Path,
    out: Path,
    *,
    split: ReportedSplit = "held-out",
    most: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = Quiet(),
) -> ReconstructionReport:
    """Reconstructs a prepared cohort's images with a model folder's autoencoder and writes the report into `out`.

    `held-out` is everybody the model did not train on (validation and test); at most the first `most` people of each
    split. UsageError where the split is empty or the model is of another grid.
    """
    cohort = PreparedCohort.open(data)
    wanted = {"held-out": HELD_OUT, "all": SPLITS}.get(split, (split,))
    sets = [VolumeDataset(cohort, name, cache_bytes=0) for name in SPLITS if name in wanted]
    if most is not None and most < 1:
        raise UsageError(f"{most} people of each split were asked for.", remedy="Ask for 1 or more.")
    people = [(one, index) for one in sets for index in range(len(one))[:most]]
    if not people:
        raise UsageError(f"the {split} split is empty.", remedy="Choose another --split, such as all.", path=data)
    where = choose_device(device)
    description, autoencoder = load_autoencoder(model, where)
    shape_XYZ = tuple(description.grid.shape_XYZ)
    if shape_XYZ != cohort.grid.shape_XYZ:
        raise UsageError(
            f"the model is of the grid {shape_XYZ} and the cohort of {cohort.grid.shape_XYZ}.",
            remedy="Prepare the study on the model's grid.",
            path=model,
            reason="grid",
        )
    chosen = choose_precision(precision, where)

    turned = description.grid.network_x == "right_to_left"

    def image_XYZ(index: int) -> np.ndarray:
        """As the network sees it; a mirrored pair has the figures of the pair."""
        one, member = people[index]
        return one.image_XYZ(member)[::-1] if turned else one.image_XYZ(member)

    with locked_folder(out):
        names = [one.names[member] for one, member in people]
        report = reconstruction_report(
            autoencoder, image_XYZ, image_XYZ, names, seed, precision=chosen, progress=progress
        )
        about = {
            "model": {"name": description.name, "autoencoder_sha256": description.weights[AUTOENCODER_NAME].sha256},
            "cohort": {"name": cohort.name, "digest": cohort.digest},
            "split": split,
            "precision": chosen,
            "versions": {"brainldm": brainldm.__version__, "torch": torch.__version__},
        }
        report.write(out, about)
    return report
