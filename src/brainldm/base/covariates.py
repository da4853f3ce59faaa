"""The four numbers a brain is asked for: their names, order, units and ranges.

This is the one place that knows them. Everywhere outside a model they are in physical units; `CovariateRanges` is the
door to the 0..1 that the networks see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from brainldm.base.errors import BadInput

if TYPE_CHECKING:
    from brainldm.base.joint import CovariateModel

COVARIATES = ("sex", "age_years", "ventricles_mm3", "brain_mm3")
CONTINUOUS = COVARIATES[1:]
VOLUMES = COVARIATES[2:]
UNITS = {"sex": "female 0, male 1", "age_years": "year", "ventricles_mm3": "mm^3", "brain_mm3": "mm^3"}
MEANINGS = {
    "sex": "Sex; female is 0 and male is 1 where a number is needed",
    "age_years": "Age at the scan",
    "ventricles_mm3": "Volume of the lateral ventricles with their inferior horns, in the scan's own head size",
    "brain_mm3": "Volume of grey and white matter, normalised for head size",
}
FEMALE, MALE = 0, 1
SEX_LETTERS = ("F", "M")
_SEX_WORDS = {"f": FEMALE, "female": FEMALE, "0": FEMALE, "m": MALE, "male": MALE, "1": MALE}


class Plausible(NamedTuple):
    """What a person can have; anything outside is a wrong unit or a slip."""

    low: float
    high: float


# Wide enough for every adult and child, narrow enough that millilitres (ventricles 5 to 200, brain 700 to 2000) or
# litres given as mm^3 fall outside.
PLAUSIBLE = {
    "sex": Plausible(0, 1),
    "age_years": Plausible(0, 125),
    "ventricles_mm3": Plausible(500, 600_000),
    "brain_mm3": Plausible(200_000, 3_500_000),
}


@dataclass(frozen=True)
class Covariates:
    """What is known of one person, or asked of one brain, in physical units."""

    sex: int
    age_years: float
    ventricles_mm3: float
    brain_mm3: float

    @property
    def sex_letter(self) -> str:
        return SEX_LETTERS[self.sex]

    def as_array(self) -> np.ndarray:
        """float64, shape (4,), in the order of `COVARIATES`."""
        return np.array([self.sex, self.age_years, self.ventricles_mm3, self.brain_mm3], dtype=np.float64)

    @classmethod
    def from_array(cls, values: np.ndarray) -> Covariates:
        sex, age_years, ventricles_mm3, brain_mm3 = (float(v) for v in values)
        return cls(round(sex), age_years, ventricles_mm3, brain_mm3)


def sex_code(text: str) -> int | None:
    """0 for female, 1 for male, None for anything else: the words every table and command is read with."""
    return _SEX_WORDS.get(text.strip().lower())


def implausible(name: str, value: float) -> str:
    """Why no person can have this value, as the end of a sentence; empty when somebody can."""
    low, high = PLAUSIBLE[name]
    if low <= value <= high:
        return ""
    rule = f"is outside {low:g} to {high:g}"
    if name.endswith("_mm3") and low <= value * 1000 <= high:
        return f"{rule} mm^3; it looks like millilitres (1 mL = 1000 mm^3)"
    return f"{rule}{' mm^3' if name.endswith('_mm3') else ''}"


def covariates_array(rows: Sequence[Covariates]) -> np.ndarray:
    """float64, shape (n, 4), one row a person."""
    return np.array([row.as_array() for row in rows], dtype=np.float64).reshape(len(rows), len(COVARIATES))


def volumes_array(rows: Sequence[Covariates]) -> np.ndarray:
    """float64, shape (n, 2): ventricles and brain, mm^3."""
    return covariates_array(rows)[:, -len(VOLUMES) :]


# ------------------------------------------------------------------------------------------------- the door to 0..1


@dataclass(frozen=True)
class CovariateRanges:
    """Lowest and highest value of each covariate among the people trained on; maps them to 0..1 and back.

    Sex is passed as it is (female 0, male 1), so training on one sex alone is possible; the other is then outside.
    """

    low: tuple[float, float, float, float]
    high: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        for name, low, high in zip(COVARIATES, self.low, self.high):
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise BadInput(
                    f"the range of {name} is {low:g} to {high:g}, which is none.",
                    remedy="Restore the model from where it came.",
                    reason="bad_range",
                )
            if low == high and name != "sex":
                raise BadInput(
                    f"everybody has the same {name}, {low:g}: a model cannot learn what it does.",
                    remedy=f"Add people who differ in {name}.",
                    reason="constant_covariate",
                )

    @classmethod
    def fitted(cls, rows: Sequence[Covariates]) -> CovariateRanges:
        """The ranges of these people, who should be the training split and nobody else."""
        if not rows:
            raise BadInput(
                "there is nobody to take covariate ranges from.",
                remedy="Prepare a study with more people, or with a smaller --holdout.",
                reason="no_training_images",
            )
        values = covariates_array(rows)
        low, high = values.min(axis=0).tolist(), values.max(axis=0).tolist()
        return cls((low[0], low[1], low[2], low[3]), (high[0], high[1], high[2], high[3]))

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """(..., 4) physical to (..., 4) with each range mapped to 0..1; values outside go beyond 0..1."""
        offset, scale = self._offset_and_scale()
        return (np.asarray(values, dtype=np.float64) - offset) / scale

    def denormalise(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `normalise`."""
        offset, scale = self._offset_and_scale()
        return np.asarray(values, dtype=np.float64) * scale + offset

    def _offset_and_scale(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.array(self.low), np.array(self.high)
        low[0], high[0] = FEMALE, MALE
        return low, high - low

    def inside(self, covariates: Covariates) -> dict[str, bool]:
        """For each covariate whether the value is one that training covered."""
        values = covariates.as_array()
        return {n: lo <= v <= hi for n, v, lo, hi in zip(COVARIATES, values.tolist(), self.low, self.high)}

    def outside_of(self, covariates: Covariates) -> str:
        """A sentence on what lies outside the ranges; empty when all is inside."""
        values = covariates.as_array()
        faults = [
            f"{name} {value:g} is outside {low:g} to {high:g}"
            for name, value, low, high in zip(COVARIATES, values, self.low, self.high)
            if not low <= value <= high
        ]
        return "; ".join(faults)

    def to_json(self) -> dict[str, Any]:
        return {
            name: {"low": low, "high": high, "units": UNITS[name]}
            for name, low, high in zip(COVARIATES, self.low, self.high)
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CovariateRanges:
        """The ranges in a model's description; BadInput when one is missing."""
        try:
            pairs = [(float(content[name]["low"]), float(content[name]["high"])) for name in COVARIATES]
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"the covariate ranges are incomplete: {', '.join(COVARIATES)} each need a low and a high.",
                remedy="Restore the model from where it came.",
                reason="bad_ranges",
            ) from error
        (a, b), (c, d), (e, f), (g, h) = pairs
        return cls((a, c, e, g), (b, d, f, h))


# What a network is told of a covariate that is not to be told (training drops them now and then, for guidance). Values
# that mean something lie about 0..1; extrapolation as far as the paper's reaches -0.5.
NOT_TOLD = -1.0
# Normal scores between these are mapped to 0..1.
_SCORE_REACH = 2.5


def conditions(
    rows: Sequence[Covariates], ranges: CovariateRanges, equalised_by: CovariateModel | None = None
) -> np.ndarray:
    """What a network is told of these people: float32, shape (n, 4), in the order of `COVARIATES`.

    Each range as 0..1 (the paper's way); or equalised by the training people's distribution: the normal score of a
    value's rank among them, -2.5 as 0 and 2.5 as 1, so that people are spread evenly over what the network sees. Both
    go on beyond the training range.
    """
    values = covariates_array(rows)
    told = ranges.normalise(values)
    if equalised_by is not None:
        for position, name in enumerate(COVARIATES):
            if name != "sex":
                scores = [equalised_by.marginals[name].score(value) for value in values[:, position].tolist()]
                told[:, position] = 0.5 + np.array(scores) / (2 * _SCORE_REACH)
    return told.astype(np.float32)


# Pinaya et al. 2022, section 2.1: UK Biobank fields 31, 21003, 25004 and 25009 of 31,740 people.
PAPER_RANGES = CovariateRanges((0.0, 44.0, 6995.68, 1144240.0), (1.0, 82.0, 171375.0, 1793910.0))
