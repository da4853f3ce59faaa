"""How few steps are enough: every sampler at several step counts against 1000 steps of DDIM from the same noise.

The deterministic samplers solve one differential equation, so the same noise leads to the same brain, and the distance
to its (nearly) exact solution is what a sampler gets wrong. The stochastic ones (ddpm, ddim-original) go elsewhere by
design and are not compared. Images are decoded as the U-Net leaves them, also where a model reads and corrects volumes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import brainldm
from brainldm.base.covariates import COVARIATES, CovariateRanges
from brainldm.base.errors import UsageError
from brainldm.base.files import make_folder, write_json
from brainldm.base.joint import CovariateModel
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import stream
from brainldm.diffusion.solvers import SAMPLERS
from brainldm.generate.plan import Sweep, make_plan
from brainldm.generate.run import GenerateSettings, row_noise
from brainldm.generate.start import start
from brainldm.model.cost import network_calls
from brainldm.model.description import LatentDiffusionDescription
from brainldm.model.folder import read_description
from brainldm.model.latent_diffusion import LatentDiffusion

REFERENCE = ("ddim", 1000)  # or as many steps as the schedule has
COMPARED = {
    "ddim": (5, 10, 15, 20, 25, 50, 100, 200),
    "dpm++": (5, 8, 10, 12, 15, 20, 25, 50),
    "unipc": (5, 8, 10, 12, 15, 20, 25, 50),
    "heun": (3, 5, 8, 10, 13, 25),
}
_RESAMPLINGS = 2000


@dataclass(frozen=True)
class SamplerRow:
    """One sampler at one number of steps: RMS difference to the reference over the images' own range 0..1, mean over
    the brains with its 95 % bootstrap interval, and what it costs."""

    sampler: str
    steps: int
    network_calls: int
    rmse: float
    rmse_low: float
    rmse_high: float
    psnr_db: float
    seconds_a_brain: float


@dataclass(frozen=True)
class SamplerTable:
    """The rows, from the fewest network calls to the most of each sampler."""

    rows: list[SamplerRow]
    facts: dict[str, Any]

    def as_text(self) -> str:
        told = f"RMSE to {self.facts['reference']['steps']} steps"
        lines = [f"{'sampler':<8} {'steps':>5} {'calls':>5} {told:>24} {'PSNR dB':>8} {'s a brain':>9}"]
        for row in self.rows:
            interval = f"{row.rmse:.5f} ({row.rmse_low:.5f}-{row.rmse_high:.5f})"
            lines.append(
                f"{row.sampler:<8} {row.steps:>5} {row.network_calls:>5} {interval:>24} "
                f"{row.psnr_db:>8.1f} {row.seconds_a_brain:>9.2f}"
            )
        return "\n".join(lines)


def compare_samplers(
    model_folder: Path,
    out: Path,
    *,
    n: int = 8,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    compared: dict[str, tuple[int, ...]] = COMPARED,
    progress: Progress = Quiet(),
) -> SamplerTable:
    """Samples `n` brains of the model's own people with each sampler and number of steps; writes samplers.json and
    samplers.png. Times are of sampling, without decoding, all brains in one batch."""
    if n < 2:
        raise UsageError(f"{n} brains give no interval.", remedy="Ask for --n 2 or more.")
    description = read_description(model_folder)
    if not isinstance(description, LatentDiffusionDescription):
        raise UsageError("this model takes no steps.", remedy="Name a latent diffusion model.", path=model_folder)
    most = description.schedule.steps
    covariates = description.covariates
    ranges, joint = covariates.fitted_ranges(), covariates.joint_model()
    rows = make_plan(_open_covariates(ranges, joint), n=n, seed=seed, ranges=ranges, joint=joint)
    ready = start(model_folder, rows, GenerateSettings(seed=seed, batch=n), device=device, precision=precision)
    model, where = ready.load(), ready.device
    assert isinstance(model, LatentDiffusion), "the description says so"
    people = [row.covariates for row in rows]
    noise = [row_noise(seed, row.index) for row in rows]

    def sampled(sampler: str, steps: int) -> tuple[np.ndarray, float]:
        model.ready_unet()  # where decoding gave it up; reading it again is no sampling
        begun = time.perf_counter()
        latent_BCXYZ = model.sample_latents(people, noise, SAMPLERS[sampler], steps, progress)
        if where.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        return model.decode(latent_BCXYZ), seconds / n

    wanted = [(sampler, steps) for sampler, counts in compared.items() for steps in counts if steps < most]
    exact, exact_steps = REFERENCE[0], min(REFERENCE[1], most)
    progress.start("comparing samplers (steps)", exact_steps + sum(steps for _, steps in wanted))
    reference_BXYZ, reference_seconds = sampled(exact, exact_steps)
    table = []
    for sampler, steps in wanted:
        images_BXYZ, seconds = sampled(sampler, steps)
        errors_B = np.sqrt(np.square(images_BXYZ - reference_BXYZ).mean(axis=(1, 2, 3), dtype=np.float64))
        draws = stream(seed, "sampler table").choice(errors_B, (_RESAMPLINGS, n)).mean(axis=1)
        low, high = np.percentile(draws, [2.5, 97.5])
        rmse = float(errors_B.mean())
        calls = network_calls(sampler, steps)
        table.append(
            SamplerRow(sampler, steps, calls, rmse, float(low), float(high), -20 * float(np.log10(rmse)), seconds)
        )
    facts = {
        "model": model.name,
        "grid": model.grid.to_json(),
        "n": n,
        "seed": seed,
        "precision": model.precision,
        "device": str(where),
        "threads": torch.get_num_threads(),
        "reference": {"sampler": exact, "steps": exact_steps, "seconds_a_brain": reference_seconds},
        "software": {"brainldm": brainldm.__version__, "torch": torch.__version__},
    }
    found = SamplerTable(table, facts)
    make_folder(out)
    write_json(out / "samplers.json", {**facts, "rows": [asdict(row) for row in table]})
    _draw(found, out / "samplers.png")
    return found


def _open_covariates(ranges: CovariateRanges, joint: CovariateModel | None) -> dict[str, Sweep]:
    """Nothing is asked of a model that knows its people; of another, the middle of each range."""
    if joint is not None:
        return {}
    middle = (np.array(ranges.low) + np.array(ranges.high)) / 2
    middle[0] = ranges.low[0]
    return {name: Sweep(float(value), float(value), 1) for name, value in zip(COVARIATES, middle)}


def _draw(table: SamplerTable, path: Path) -> None:
    """RMSE over network calls, a line a sampler, both logarithmic."""
    from matplotlib.figure import Figure

    from brainldm.base.files import atomic_path

    reference = "{steps} steps of {sampler}".format(**table.facts["reference"])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for sampler in dict.fromkeys(row.sampler for row in table.rows):
        rows = [row for row in table.rows if row.sampler == sampler]
        axes.plot([row.network_calls for row in rows], [row.rmse for row in rows], marker="o", label=sampler)
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel=f"RMSE to {reference} (images 0..1)")
    axes.legend()
    with atomic_path(path) as part:
        figure.savefig(part, dpi=120, format="png")
