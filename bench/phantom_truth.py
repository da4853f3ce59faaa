"""How the volumes that `prepare` measures in phantoms follow those that the phantoms have.

brainldm phantom PHANTOMS --n 1000 --grid 2mm --seed 1 && brainldm prepare PHANTOMS COHORT --grid 2mm
python bench/phantom_truth.py PHANTOMS COHORT      # adds the cohort's grid to bench/phantom-truth.json
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np

import brainldm
from brainldm.base.tables import read_table
from brainldm.cohort.dataset import PreparedCohort
from brainldm.cohort.measure import TemplateMeasure
from brainldm.evaluate.estimate import mean
from brainldm.recipes.card_figures import figure, instrument_figures
from brainldm.recipes.reconstruction import PhantomStudy

EDGES_ML = (0, 20, 40, 60, 80, 95, 110, 130)
OUT = Path(__file__).with_name("phantom-truth.json")


def by_size(cohort: PreparedCohort, study: PhantomStudy) -> list[dict[str, object]]:
    """The bias of measured ventricles among phantoms whose true ones lie between EDGES_ML."""
    table = read_table(study.folder / "participants.tsv")
    truth = {cells["participant_id"]: table.number(row, "ventricles_mm3") for row, cells in enumerate(table.rows)}
    true_mm3 = np.array([truth[row.participant_id] for row in cohort.people], dtype=np.float64)
    errors_mm3 = np.array([row.covariates.ventricles_mm3 for row in cohort.people]) - true_mm3
    found: list[dict[str, object]] = []
    for low, high in pairwise(EDGES_ML):
        estimate = mean(errors_mm3[(true_mm3 >= 1000 * low) & (true_mm3 < 1000 * high)].tolist())
        found.append({"true_ml": [low, high], "bias_mm3": figure(estimate, 0)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phantoms", type=Path)
    parser.add_argument("cohort", type=Path)
    asked = parser.parse_args()
    study, cohort = PhantomStudy.open(asked.phantoms), PreparedCohort.open(asked.cohort)
    found = {
        "phantoms": len(cohort.people),
        "phantom_seed": study.seed,
        "instrument": TemplateMeasure.name,
        **instrument_figures(cohort.people, study, 0),
        "ventricles_by_size": by_size(cohort, study),
        "software": {"brainldm": brainldm.__version__},
    }
    before = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    OUT.write_text(json.dumps(before | {cohort.grid.name: found}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
