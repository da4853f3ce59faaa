"""How well a phantom's age can be told at best: from everything that age changes in it, known without error.

    python bench/age_in_phantoms.py      # writes bench/age-in-phantoms.json

Linear regression of age on sex, ventricles (their logarithm), the brain's share of the head, the grey matter's level
and the lesion load (its logarithm), each alone and all together. A predictor that sees images can hardly do better, nor
can age be told better in generated brains that are as various as phantoms of one age are.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import brainldm
from brainldm.base.streams import stream
from brainldm.cohort.appearance import Appearance
from brainldm.cohort.population import draw_person
from brainldm.evaluate.conditioning import agreement

PEOPLE, SEED = 20_000, 0


def main() -> None:
    people, look, draws = [draw_person(SEED, index) for index in range(PEOPLE)], Appearance(), stream(SEED, "look")
    age_years = np.array([person.age_years for person in people])
    decades = (age_years - 60) / 10  # as cohort/appearance has them
    load = np.log(look.lesion_ml_at_60) + look.log_lesion_a_decade * decades
    load += look.log_lesion_residual * draws.standard_normal(PEOPLE)
    signs = {
        "sex": np.array([person.sex == "M" for person in people], float),
        "ventricles": np.log([person.ventricles_mm3 for person in people]),
        "brain_fraction": np.array([person.brain_fraction for person in people]),
        "grey_level": look.grey_a_decade * decades + look.grey_spread * draws.standard_normal(PEOPLE),
        "lesions": np.minimum(load, np.log(look.lesion_ml_most)),
    }
    found = {name: told(age_years, [values]) for name, values in signs.items()}
    found["all"] = told(age_years, list(signs.values()))
    facts = {"people": PEOPLE, "seed": SEED, "pearson_r": found, "software": {"brainldm": brainldm.__version__}}
    Path(__file__).with_name("age-in-phantoms.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))


def told(age_years: np.ndarray, signs: list[np.ndarray]) -> dict[str, float]:
    """Pearson's r of age and its regression on the signs, with its interval."""
    design = np.column_stack([np.ones(len(age_years)), *signs])
    line = design @ np.linalg.lstsq(design, age_years, rcond=None)[0]
    r = agreement(age_years.tolist(), line.tolist()).pearson_r
    return {"value": r.value, "low": r.low, "high": r.high}


if __name__ == "__main__":
    main()
