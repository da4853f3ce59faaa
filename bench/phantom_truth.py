"""How the volumes that `prepare` measures in phantoms follow those that the phantoms have.

brainldm phantom PHANTOMS --n 1000 --grid 2mm --seed 1 && brainldm prepare PHANTOMS COHORT --grid 2mm
python bench/phantom_truth.py PHANTOMS COHORT      # adds the cohort's grid to bench/phantom-truth.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import brainldm
from brainldm.cohort.dataset import PreparedCohort
from brainldm.cohort.measure import TemplateMeasure
from brainldm.recipes.card_figures import instrument_figures
from brainldm.recipes.reconstruction import PhantomStudy

OUT = Path(__file__).with_name("phantom-truth.json")


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
        "software": {"brainldm": brainldm.__version__},
    }
    before = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    OUT.write_text(json.dumps(before | {cohort.grid.name: found}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
