"""What a model's card is made of: model, cohort, phantoms and predictors, opened and found to belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.volume import same_voxels
from brainldm.cohort.dataset import PreparedCohort, PreparedRow
from brainldm.cohort.predictor import Predictor, read_predictor
from brainldm.model.description import ModelDescription
from brainldm.model.folder import find_model, load_latent_diffusion
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.recipes.reconstruction import PhantomStudy, held_out


@dataclass(frozen=True)
class CardParts:
    """What the card is made of, opened and found to belong together."""

    model: Path
    loaded: LatentDiffusion
    cohort: PreparedCohort
    people: tuple[PreparedRow, ...]  # held out
    study: PhantomStudy
    predictors: Mapping[str, Predictor]


def open_parts(
    model: Path, cohort: Path, out: Path, age: Path | None, sex: Path | None, phantoms: Path, seed: int
) -> CardParts:
    """Opens everything; UsageError or BadInput where a part is missing or does not belong to the others."""
    folder = find_model(model)
    if (out / "model.json").exists():
        raise UsageError("the folder holds a model.", remedy="Give the card a folder of its own.", path=out)
    loaded = load_latent_diffusion(folder)
    prepared = PreparedCohort.open(cohort)
    people = held_out(prepared)
    if not people:
        raise UsageError("nobody in this cohort is held out.", remedy="Prepare it with --holdout above 0.", path=cohort)
    study = PhantomStudy.open(phantoms)
    predictors = {}
    for name, target, path in (("age", "age_years", age), ("sex", "sex", sex)):
        if path is None:
            continue
        predictors[name] = read_predictor(path)
        if predictors[name].target != target:
            raise UsageError(
                f"predicts {predictors[name].target}, and --{name} needs {target}.",
                remedy=f"Train one: brainldm train {name} --data COHORT --out RUN.",
                path=path,
            )
    grids = {"model": loaded.grid, "phantom study": study.grid} | {
        f"predictor of {name}": predictor.grid for name, predictor in predictors.items()
    }
    for what, grid in grids.items():
        if not same_voxels(grid, prepared.grid):
            raise UsageError(
                f"the {what} is of {grid.shape_XYZ} voxels of {grid.voxel_mm:g} mm, the cohort of "
                f"{prepared.grid.shape_XYZ} of {prepared.grid.voxel_mm:g} mm.",
                remedy="All must lie on one grid.",
            )
    trainings = {f"predictor of {name}": predictor.training for name, predictor in predictors.items()}
    check_split({"model": loaded.description.training, **trainings}, prepared)
    strangers = [row.participant_id for row in people if row.participant_id not in study.index_of]
    if strangers:
        raise BadInput(
            f"lacks {', '.join(strangers[:3])} of the cohort ({len(strangers)} of {len(people)} held out).",
            remedy="Name the study that the cohort was prepared from.",
            path=phantoms,
            reason="other_phantoms",
        )
    check_seed(loaded.description, seed)
    return CardParts(folder, loaded, prepared, people, study, predictors)


def check_split(trainings: Mapping[str, Mapping[str, Any]], cohort: PreparedCohort) -> None:
    """UsageError where one of those trained (by what it is) saw a cohort of another split: whoever is held out here may
    have been trained on."""
    for what, training in trainings.items():
        split_by = training.get("split_by")
        if split_by and split_by != cohort.split_by:
            raise UsageError(
                f"the {what} was trained on a cohort split with {_told(split_by)}, this one is with "
                f"{_told(cohort.split_by)}: who is held out here may have been trained on.",
                remedy=f"Prepare the study with {' '.join(f'--{name} {value}' for name, value in split_by.items())}.",
                path=cohort.folder,
            )


def check_seed(model: ModelDescription, seed: int) -> None:
    """UsageError where the model was calibrated on the brains of that seed: it would be judged by what it was fitted
    to."""
    response = model.covariates.response
    if response is not None and response.seed == seed:
        raise UsageError(
            f"the model was calibrated on the brains of seed {seed}: it would be judged by what it was fitted to.",
            remedy="Choose another --seed.",
        )


def _told(split_by: Mapping[str, Any]) -> str:
    return " and ".join(f"{name} {value}" for name, value in split_by.items())
