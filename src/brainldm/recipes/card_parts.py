"""What a model's card is made of: model, cohort, phantoms and predictors, opened and found to belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainldm.base.errors import BadInput, UsageError
from brainldm.cohort.dataset import PreparedCohort, PreparedRow
from brainldm.cohort.predictor import Predictor, read_predictor
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


def open_parts(model: Path, cohort: Path, out: Path, age: Path | None, sex: Path | None, phantoms: Path) -> CardParts:
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
        if grid.shape_XYZ != prepared.grid.shape_XYZ or not np.allclose(grid.affine, prepared.grid.affine, atol=1e-3):
            raise UsageError(
                f"the {what} is of {grid.shape_XYZ} voxels of {grid.voxel_mm:g} mm, the cohort of "
                f"{prepared.grid.shape_XYZ} of {prepared.grid.voxel_mm:g} mm.",
                remedy="All must lie on one grid.",
            )
    strangers = [row.participant_id for row in people if row.participant_id not in study.index_of]
    if strangers:
        raise BadInput(
            f"lacks {', '.join(strangers[:3])} of the cohort ({len(strangers)} of {len(people)} held out).",
            remedy="Name the study that the cohort was prepared from.",
            path=phantoms,
            reason="other_phantoms",
        )
    return CardParts(folder, loaded, prepared, people, study, predictors)
