"""Rows of a plan become images on disk; what the manifest proves is not made again.

Rows are sampled in batches whose members are fixed by the plan (row i always belongs to batch i // size), so an
interrupted run that is taken up again does the same arithmetic as one that never stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import brainldm
from brainldm.base.counts import counted
from brainldm.base.covariates import Covariates
from brainldm.base.errors import BadInput, PartialFailure, UsageError
from brainldm.base.files import locked_folder, read_json_object, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import Dtype
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import stream
from brainldm.base.tables import write_table
from brainldm.base.volume import Grid
from brainldm.cohort.normalise import drawn_into_unit_range
from brainldm.cohort.quality import UsualImages, figures_of
from brainldm.diffusion.solvers import DEFAULT_SAMPLER, SAMPLERS, sampler_named
from brainldm.generate.dataset import as_bundle, bundle_grid, image_name, write_description
from brainldm.generate.plan import PlanRow, read_plan, write_plan
from brainldm.generate.writing import Brain, writing_brains
from brainldm.model.description import GanDescription, LatentDiffusionDescription
from brainldm.model.gan import GanModel
from brainldm.model.latent_diffusion import LatentDiffusion, RowNoise

ATTEMPTS = 3
RECORD_NAME = "generation.json"


@dataclass(frozen=True)
class GenerateSettings:
    """How images are made; all of it is recorded, and a dataset is made with one setting."""

    seed: int = 0
    sampler: str = DEFAULT_SAMPLER
    steps: int | None = None
    batch: int = 4
    dtype: Dtype = "int16_unit"
    as_bundle: bool = False
    gate: bool = False  # reject images unlike the training people's in the figures of cohort/quality.py
    guidance: float = 1.0  # above 1: what is asked is exaggerated (Ho & Salimans 2022)
    same_noise: bool = False  # every row starts from row 0's noise: figures in which only what is asked differs


@dataclass(frozen=True)
class GenerateSummary:
    """How many brains were made, how many were there before, and how many of those made took more than one draw."""

    made: int
    were_there: int
    redrawn: int


def generate(
    model: LatentDiffusion | GanModel,
    out: Path,
    rows: list[PlanRow],
    settings: GenerateSettings,
    *,
    progress: Progress = Quiet(),
) -> GenerateSummary:
    """Makes every row of the plan that `out` does not hold yet, as a BIDS derivative.

    The plan and the settings are written before the first brain; `out` must be empty or hold the same, or the first
    rows of it (where it holds every brain already, it may have been made on another device). Rows that it holds stay as
    its plan states them. An image that is not finite or empty is drawn again from the row's next stream, up to twice;
    rows that stay so are listed in failures.tsv, not in participants.tsv, and PartialFailure is raised after all others
    are done.
    """
    check_settings(model.description, settings)
    population = _population(model.description) if settings.gate else None
    with locked_folder(out):
        manifest = Manifest(out / "manifest.jsonl")
        proven = manifest.proven(out, full=True)  # a millisecond a brain
        missing = [row for row in rows if row.index not in proven]
        facts, rows = _record_or_compare(out, _facts(model, settings, len(rows)), rows, len(proven))
        write_description(out, facts, rows)
        batches = _batches_with_missing(rows, missing, settings.batch)
        each, decodes = _passes(model.description, settings), model.description.decodes
        progress.start("generating brains (sampling steps)", sum(each + decodes * len(batch) for batch in batches))
        redrawn, failed, grid = 0, dict[int, str](), _written_grid(model.grid, settings)
        with writing_brains(out, grid, settings.dtype, manifest, meanwhile=model.device.type != "cpu") as write:
            for batch in batches:
                images_BXYZ, attempts, objections = _sample_until_sound(model, batch, settings, population, progress)
                sound = []
                for row, image_XYZ, attempt, objection in zip(batch, images_BXYZ, attempts, objections):
                    if row.index in proven:
                        continue
                    if image_XYZ is None:
                        failed[row.index] = objection
                        continue
                    redrawn += attempt > 0
                    sound.append(Brain(row, as_bundle(image_XYZ) if settings.as_bundle else image_XYZ, attempt))
                write(sound)
                progress.advance(0, note=f"{batch[-1].index + 1} of {len(rows)} brains")
        if missing:
            manifest.rewrite(record for _, record in sorted(manifest.proven(out).items()))  # a line a brain, in order
        if failed:
            write_description(out, facts, [row for row in rows if row.index not in failed])
        _report_failures(out, rows, failed)
    return GenerateSummary(len(missing) - len(failed), len(proven), redrawn)


def check_settings(description: LatentDiffusionDescription | GanDescription, settings: GenerateSettings) -> None:
    """UsageError for a sampler, a number of steps, a batch or a form that cannot be, before anything is written."""
    sampler = sampler_named(settings.sampler)
    if settings.batch < 1:
        raise UsageError(f"a batch of {settings.batch} was asked for.", remedy="Ask for at least 1.")
    _check_guidance(description, settings.guidance)
    if isinstance(description, GanDescription):
        if settings.sampler != DEFAULT_SAMPLER or settings.steps is not None:
            raise UsageError(
                f"a model of kind {description.kind} makes an image in one pass: it has no sampler and no steps.",
                remedy="Leave --sampler and --steps out.",
            )
    else:
        try:
            sampler.timesteps(description.schedule.build(), _steps(settings))
        except ValueError as error:
            raise UsageError(f"{error}.", remedy="Leave --steps out for the sampler's own number.") from error
    _written_grid(description.grid.build(), settings)
    if settings.gate:
        _population(description)


def _check_guidance(description: LatentDiffusionDescription | GanDescription, guidance: float) -> None:
    if not (math.isfinite(guidance) and guidance >= 0):
        raise UsageError(f"a guidance of {guidance:g} was asked for.", remedy="Ask for 0 or more; 1 is none.")
    if guidance != 1 and not description.covariates.dropout:
        raise UsageError(
            "this model was never trained without its covariates, so it cannot be guided.",
            remedy="Leave --guidance out, or train with a condition_dropout above 0.",
        )


def _passes(description: LatentDiffusionDescription | GanDescription, settings: GenerateSettings) -> int:
    """How many sampling steps a batch takes before its images are decoded."""
    if isinstance(description, GanDescription):
        return 0
    return len(SAMPLERS[settings.sampler].timesteps(description.schedule.build(), _steps(settings)))


def _population(description: LatentDiffusionDescription | GanDescription) -> UsualImages:
    if description.quality is None:
        raise UsageError(
            "this model does not say what its training images look like, so --gate has nothing to compare with.",
            remedy="Leave --gate out, or train on 20 people or more with this version.",
        )
    return UsualImages.from_json(description.quality)


def _written_grid(grid: Grid, settings: GenerateSettings) -> Grid:
    return bundle_grid(grid) if settings.as_bundle else grid


def _steps(settings: GenerateSettings) -> int:
    return SAMPLERS[settings.sampler].default_steps if settings.steps is None else settings.steps


def _facts(model: LatentDiffusion | GanModel, settings: GenerateSettings, n: int) -> dict[str, Any]:
    description = model.description
    one_pass = isinstance(model, GanModel)
    return {
        "software": {"brainldm": brainldm.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "model": {
            "name": description.name,
            "kind": description.kind,
            "id": description.identity,
            "weights_sha256": {name: weights.sha256 for name, weights in sorted(description.weights.items())},
            "licence": description.licence,
            "skull_stripped": description.preprocessing.get("skull_stripped", True),
            "training_images": description.training.get("training_images"),
            "cohort": description.training.get("cohort"),
            "ranges": description.covariates.ranges,
            **_response_facts(description),
        },
        "grid": _written_grid(model.grid, settings).to_json(),
        "n": n,
        "seed": settings.seed,
        "sampler": "none" if one_pass else settings.sampler,
        "steps": 1 if one_pass else _steps(settings),
        "batch": settings.batch,
        "precision": model.precision,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "dtype": settings.dtype,
        "as_bundle": settings.as_bundle,
        "gate": settings.gate,
        "guidance": settings.guidance,
        "same_noise": settings.same_noise,
    }


def _response_facts(description: LatentDiffusionDescription | GanDescription) -> dict[str, Any]:
    """How the model is told what is asked, where it was calibrated: the same weights make other brains of it."""
    response = description.covariates.response
    return {} if response is None else {"response": response.model_dump(mode="json")}


# What a dataset of an earlier version was made with, where it does not say.
_BEFORE = {"guidance": 1.0}
# May differ between the runs that make one dataset: they change at most the last bits of an image, never its noise.
_MAY_DIFFER = ("software", "threads")
# And so may these where every brain is there: nothing is made, and the record stays as it is.
_MAY_DIFFER_OF_A_WHOLE = ("device", "precision", "batch")
# Another processor's exp and log give a drawn covariate other last digits.
_SAME_COVARIATE = 1e-9


def _record_or_compare(
    out: Path, facts: dict[str, Any], rows: list[PlanRow], proven: int
) -> tuple[dict[str, Any], list[PlanRow]]:
    """The facts of the dataset in `out`, which holds `proven` of its brains: `facts`, written where there are none yet
    or more brains are asked for, or what is recorded of a whole one; and the rows as its plan states them. UsageError
    where it is another."""
    path, plan = out / RECORD_NAME, out / "plan.tsv"
    if not path.exists():
        if any(out.glob("[!.]*")):
            raise UsageError("the folder is not empty and holds no brains of ours.", remedy="Choose another.", path=out)
        write_json(path, facts)
        write_plan(plan, rows)
        return facts, rows
    recorded = read_json_object(path, n=int)
    grows, whole = recorded["n"] < len(rows), proven == len(rows)
    may_differ = _MAY_DIFFER + (_MAY_DIFFER_OF_A_WHOLE if whole else ()) + (("n",) if grows else ())
    different = [
        f"{name}: {_compared(there)!r} there, {_compared(value)!r} now"
        for name, value in facts.items()
        if name not in may_differ and _compared(there := recorded.get(name, _BEFORE.get(name))) != _compared(value)
    ]
    if not different and not plan.exists():
        if proven:
            raise BadInput(
                f"plan.tsv, which says what was asked of the {counted(proven, 'brain')} there, is missing.",
                remedy="Copy it from where the dataset came, or make the brains anew in another folder.",
                path=out,
                reason="plan_missing",
            )
        write_plan(plan, rows)  # stopped between the two files
    longer = False
    if not different:
        planned = [row.covariates for row in read_plan(plan)]
        both = min(len(planned), len(rows))
        # Growing writes the plan first: a run that was killed before the record left a longer one.
        if both < recorded["n"] or not all(_alike(there, row.covariates) for there, row in zip(planned, rows)):
            different = ["plan: other covariates"]
        rows = [replace(row, covariates=there) for row, there in zip(rows, planned)] + rows[both:]
        longer = len(planned) > len(rows)
    if different:
        raise UsageError(
            f"this folder holds another dataset; it differs in {'; '.join(different[:3])}.",
            remedy="Give the same command to finish it, or another folder.",
            path=out,
        )
    if grows or longer:  # row i is the same whatever the number of rows
        write_plan(plan, rows)
    facts = {**recorded, "n": len(rows)} if whole else _with_earlier_runs(facts, recorded, proven)
    if facts != recorded:
        write_json(path, facts)
    return facts, rows


def _compared(fact: Any) -> Any:
    """A model is known by its hash: it may have been renamed, or given a licence, since."""
    return fact["id"] if isinstance(fact, dict) and "id" in fact else fact


def _alike(one: Covariates, other: Covariates) -> bool:
    return one.sex == other.sex and np.allclose(one.as_array(), other.as_array(), rtol=_SAME_COVARIATE, atol=0)


def _with_earlier_runs(facts: dict[str, Any], recorded: dict[str, Any], proven: int) -> dict[str, Any]:
    """The facts of this run and, where brains that are there were made by other software or threads, what those were:
    `earlier_runs`, each with how many brains there were after it."""
    earlier = list(recorded.get("earlier_runs", ()))
    by = {name: recorded.get(name) for name in _MAY_DIFFER}
    if proven and any(by[name] != facts[name] for name in _MAY_DIFFER):
        earlier.append({**by, "brains": proven})
    return {**facts, "earlier_runs": earlier} if earlier else facts


def _batches_with_missing(rows: list[PlanRow], missing: list[PlanRow], size: int) -> list[list[PlanRow]]:
    wanted = sorted({row.index // size for row in missing})
    return [rows[number * size : (number + 1) * size] for number in wanted]


def _sample_until_sound(
    model: LatentDiffusion | GanModel,
    batch: list[PlanRow],
    settings: GenerateSettings,
    population: UsualImages | None,
    progress: Progress,
) -> tuple[list[np.ndarray | None], list[int], list[str]]:
    """Images of the batch, None where no attempt gave one, how many attempts before it each took, and what spoke
    against the last attempt."""
    images: list[np.ndarray | None] = [None] * len(batch)
    attempts, objections = [0] * len(batch), [""] * len(batch)
    for attempt in range(ATTEMPTS):
        open_rows = [position for position, image in enumerate(images) if image is None]
        if not open_rows:
            break
        sampled_BXYZ = model.sample(
            [batch[position].covariates for position in open_rows],
            [
                row_noise(settings.seed, 0 if settings.same_noise else batch[position].index, attempt)
                for position in open_rows
            ],
            sampler=settings.sampler,
            steps=settings.steps,
            progress=progress if attempt == 0 else Quiet(),
        )
        for position, image_XYZ in zip(open_rows, sampled_BXYZ):
            attempts[position] = attempt
            # What becomes a file is within 0..1, but for the bundle's form, which stretches what the decoder gives.
            unit_XYZ = drawn_into_unit_range(image_XYZ) if is_sound(image_XYZ) else image_XYZ
            objections[position] = objection_to(unit_XYZ, population, model.grid.voxel_mm)
            if not objections[position]:
                images[position] = image_XYZ if settings.as_bundle else unit_XYZ
    return images, attempts, objections


def objection_to(image_XYZ: np.ndarray, population: UsualImages | None, voxel_mm: float) -> str:
    """Why an image is not kept, in words; empty when it is."""
    if not is_sound(image_XYZ):
        return "it is not finite or empty"
    return "" if population is None else population.objection(figures_of(image_XYZ, voxel_mm))


def is_sound(image_XYZ: np.ndarray) -> bool:
    """Whether an image is finite and not empty: some of it is bright, and not all of it is alike."""
    if not np.isfinite(image_XYZ).all():
        return False
    clipped = np.clip(image_XYZ, 0.0, 1.0)
    return bool(clipped.max() > 0.1 and clipped.std() > 1e-3)


def row_noise(seed: int, index: int, attempt: int = 0) -> RowNoise:
    """The noise of row `index`: step 0 is the start of the trajectory, later steps are a stochastic sampler's."""

    def noise(step: int, shape: tuple[int, ...]) -> np.ndarray:
        purpose = f"generate/attempt-{attempt}/step-{step}"
        return stream(seed, purpose, index).standard_normal(shape, np.float32)

    return noise


def _report_failures(out: Path, rows: list[PlanRow], failed: dict[int, str]) -> None:
    path = out / "failures.tsv"
    if not failed:
        path.unlink(missing_ok=True)
        return
    by_index = {row.index: row for row in rows}
    write_table(
        path,
        ("participant_id", "file", "reason", "message", "remedy"),
        (
            {
                "participant_id": by_index[index].participant_id,
                "file": image_name(by_index[index]),
                "reason": "not_sound",
                "message": f"{ATTEMPTS} draws gave no image to keep: of the last, {objection}",
                "remedy": "Ask for covariates nearer to the training range, or train the model longer",
            }
            for index, objection in failed.items()
        ),
    )
    raise PartialFailure(
        f"{len(failed)} of {counted(len(rows), 'brain')} could not be made: see failures.tsv; the rest is done.",
        path=out,
    )
