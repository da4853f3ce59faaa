"""Who the phantoms are: sex, age, and the volumes that go with them, drawn before any image is made.

Only the head, ventricle and brain sizes depend on sex, as far as the figures below know; an image shows sex through
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from brainldm.base.streams import stream

Sex = Literal["F", "M"]


@dataclass(frozen=True)
class Population:
    """The constants of the population, each with where it comes from. Volumes in mL, ages in decades where a slope is.

    OASIS here means 30 people of OASIS-1 aged 18-90 with manual labels; the cohort is the paper's (UK Biobank).
    """

    # The cohort's range, but uniform in age where the cohort is bell-shaped (63.6 +- 7.5): what is asked of a model
    # trained on phantoms is the slope with age, and a uniform spread determines it best. OASIS covers the range.
    age_low_years: float = 44.0
    age_high_years: float = 82.0
    male_fraction: float = 0.47  # the cohort

    # Intracranial volume. Level: 1450 over both sexes (FreeSurfer, 40 people: 1480 +- 179); sex and residual: OASIS.
    # OASIS's brain mask also shrinks with age, 21.9 mL a decade; a skull does not, so that slope is left out.
    head_female_ml: float = 1404.0
    head_male_more_ml: float = 97.0
    head_residual_ml: float = 126.0

    # Lateral ventricles, natural logarithm of mL: OASIS.
    log_ventricles_at_0: float = 2.03
    log_ventricles_a_decade: float = 0.205
    log_ventricles_male_more: float = 0.357
    log_ventricles_residual: float = 0.47
    ventricles_low_ml: float = 6.0
    ventricles_high_ml: float = 120.0

    # Grey and white matter as a fraction of the head. Level and slope: OASIS. Residual: OASIS has 0.016, which would
    # give head-size-normalised volumes a third of the cohort's range (1144-1794 mL); widened as far as one template
    # bears without looking ill.
    brain_fraction_at_0: float = 0.783
    brain_fraction_a_decade: float = -0.0066
    brain_fraction_residual: float = 0.025
    # Ventricles grow at the brain's expense. Our choice; the sources do not give it.
    residual_correlation: float = -0.4

    # Residuals beyond this many standard deviations are drawn again: no impossible heads in a small population.
    residual_limit: float = 2.5

    def expected_ventricles_ml(self, sex: Sex, age_years: float) -> float:
        """The median ventricular volume of such people."""
        male = float(sex == "M")
        return math.exp(
            self.log_ventricles_at_0
            + self.log_ventricles_a_decade * age_years / 10
            + self.log_ventricles_male_more * male
        )

    def expected_brain_fraction(self, age_years: float) -> float:
        return self.brain_fraction_at_0 + self.brain_fraction_a_decade * age_years / 10

    def expected_head_ml(self, sex: Sex) -> float:
        return self.head_female_ml + self.head_male_more_ml * float(sex == "M")


@dataclass(frozen=True)
class Person:
    """What a phantom's anatomy aims at. What it got is measured on its labels and is never copied from here."""

    sex: Sex
    age_years: float
    head_mm3: float
    ventricles_mm3: float  # as in the head, not normalised
    brain_fraction: float  # grey + white over head


def draw_person(seed: int, index: int, population: Population | None = None) -> Person:
    """Person `index` of the population `seed`: the same whoever else is drawn.

    >>> draw_person(0, 5) == draw_person(0, 5), draw_person(0, 5) == draw_person(0, 6)
    (True, False)
    """
    population = population or Population()
    draws = stream(seed, "phantom person", index)
    sex: Sex = "M" if draws.random() < population.male_fraction else "F"
    age_years = round(float(draws.uniform(population.age_low_years, population.age_high_years)), 1)
    head_z, ventricles_z, other_z = _limited_normals(draws, population.residual_limit)
    rho = population.residual_correlation
    brain_z = float(rho * ventricles_z + math.sqrt(1 - rho**2) * other_z)
    ventricles_ml = population.expected_ventricles_ml(sex, age_years) * math.exp(
        population.log_ventricles_residual * ventricles_z
    )
    ventricles_ml = min(max(ventricles_ml, population.ventricles_low_ml), population.ventricles_high_ml)
    return Person(
        sex=sex,
        age_years=age_years,
        head_mm3=1000 * (population.expected_head_ml(sex) + population.head_residual_ml * float(head_z)),
        ventricles_mm3=1000 * ventricles_ml,
        brain_fraction=population.expected_brain_fraction(age_years) + population.brain_fraction_residual * brain_z,
    )


def _limited_normals(draws: np.random.Generator, limit: float) -> np.ndarray:
    while True:
        normals = draws.standard_normal(3)
        if (np.abs(normals) <= limit).all():
            return normals
