"""The four numbers a brain is asked for: their names, order, units, ranges and joint distribution.

This is the one place that knows them. Everywhere outside a model they are in physical units; `CovariateRanges` is the
door to the 0..1 that the networks see.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import betainc, ndtr, ndtri

from brainldm.base.errors import BadInput, UsageError

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
                raise BadInput(f"the range of {name} is {low:g} to {high:g}, which is none.", reason="bad_range")
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
            raise BadInput("there is nobody to take covariate ranges from.", reason="no_training_images")
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
                reason="bad_ranges",
            ) from error
        (a, b), (c, d), (e, f), (g, h) = pairs
        return cls((a, c, e, g), (b, d, f, h))


# What a network is told of a covariate that is not to be told (training drops them now and then, for guidance). Values
# that mean something lie about 0..1; extrapolation as far as the paper's reaches -0.5.
NOT_TOLD = -1.0
# Normal scores between these are mapped to 0..1.
_SCORE_REACH = 2.5
SCALINGS = ("min_max", "equalised")


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


# --------------------------------------------------------------------------------------------- the joint distribution

# Shrinkage: correlations and differences between the sexes count as if this many more people without any had been
# seen. Five people then give half of what they show, a thousand almost all.
PRIOR_PEOPLE = 5
KNOTS = 21
_TRIES = 64


@dataclass(frozen=True)
class Marginal:
    """One covariate's distribution: values at standard normal scores, smoothed so that no knot is a person's value.

    Volumes are interpolated in their logarithm. Beyond the knots the mean slope goes on; below `low` a volume follows
    the tangent instead of the logarithm, so that every value has a score, negative ones of Figure 4 too. `low` and
    `high` are the training range, which draws do not leave.
    """

    scores: tuple[float, ...]
    values: tuple[float, ...]
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def fitted(cls, sample: np.ndarray, *, logarithmic: bool) -> Marginal:
        n = len(sample)
        # The outermost knots are where the extremes of n people are expected.
        outermost = float(ndtri(n / (n + 1)))
        scores = np.linspace(-outermost, outermost, KNOTS)
        values = _harrell_davis(np.log(sample) if logarithmic else sample, ndtr(scores))
        if logarithmic:
            values = np.exp(values)
        return cls(
            tuple(scores.tolist()), tuple(values.tolist()), float(sample.min()), float(sample.max()), logarithmic
        )

    def _curve(self) -> tuple[np.ndarray, np.ndarray, float]:
        scores, values = np.array(self.scores), np.array(self.values)
        values = np.log(values) if self.logarithmic else values
        slope = (values[-1] - values[0]) / (scores[-1] - scores[0])
        # A plateau (many people of one age) must stay invertible.
        values = np.maximum.accumulate(values) + 1e-6 * slope * (scores - scores[0])
        return scores, values, float(slope)

    def score(self, value: float) -> float:
        """The normal score of a value."""
        scores, values, slope = self._curve()
        at = value
        if self.logarithmic:
            at = math.log(value) if value >= self.low else math.log(self.low) + value / self.low - 1
        if at < values[0]:
            return float(scores[0] + (at - values[0]) / slope)
        if at > values[-1]:
            return float(scores[-1] + (at - values[-1]) / slope)
        return float(np.interp(at, values, scores))

    def value(self, score: np.ndarray) -> np.ndarray:
        """The values of normal scores."""
        scores, values, slope = self._curve()
        at = np.interp(score, scores, values)
        at = at + slope * (np.minimum(score - scores[0], 0) + np.maximum(score - scores[-1], 0))
        if not self.logarithmic:
            return at
        lowest = math.log(self.low)
        return np.where(at >= lowest, np.exp(np.maximum(at, lowest)), self.low * (1 + at - lowest))


def _harrell_davis(sample: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Quantiles as weighted means of all order statistics (Harrell and Davis 1982, Biometrika 69:635)."""
    ordered = np.sort(sample)
    n = len(ordered)
    edges = np.arange(n + 1) / n
    p = probabilities[:, None]
    cumulative = betainc((n + 1) * p, (n + 1) * (1 - p), edges[None, :])
    return np.diff(cumulative, axis=1) @ ordered


@dataclass(frozen=True)
class CovariateModel:
    """How the covariates occur together: a Gaussian copula with a mean of its own for each sex.

    In normal-score space each sex is a Gaussian with common covariance; conditioning is exact there. What is stored
    is smooth: quantiles, one 3 x 3 covariance, two means, one probability, and nobody's row.
    """

    people: int
    male_probability: float
    marginals: dict[str, Marginal]
    mean_by_sex: tuple[tuple[float, ...], tuple[float, ...]]
    covariance: tuple[tuple[float, ...], ...]

    @classmethod
    def fitted(cls, rows: Sequence[Covariates]) -> CovariateModel:
        """The joint distribution of these people (the training split)."""
        CovariateRanges.fitted(rows)  # the same people must have usable ranges
        values = covariates_array(rows)
        n = len(values)
        male = values[:, 0] == MALE
        marginals = {
            name: Marginal.fitted(values[:, 1 + i], logarithmic=name.endswith("_mm3"))
            for i, name in enumerate(CONTINUOUS)
        }
        ranks = np.stack([_mean_ranks(values[:, 1 + i]) for i in range(len(CONTINUOUS))], axis=1)
        scores = ndtri(ranks / (n + 1))
        scores = (scores - scores.mean(axis=0)) / scores.std(axis=0)
        means = np.stack([scores[m].mean(axis=0) if m.any() else np.zeros(scores.shape[1]) for m in (~male, male)])
        within = scores - means[male.astype(int)]
        kept = n / (n + PRIOR_PEOPLE)
        # Total = within + between has unit diagonal; shrinking all three alike keeps it so, and the marginals true.
        covariance = kept * (within.T @ within) / n + (1 - kept) * np.eye(len(CONTINUOUS))
        means = math.sqrt(kept) * means
        return cls(
            people=n,
            male_probability=float(male.mean()),
            marginals=marginals,
            mean_by_sex=(tuple(means[0].tolist()), tuple(means[1].tolist())),
            covariance=tuple(tuple(line) for line in covariance.tolist()),
        )

    def draw(self, generator: np.random.Generator, given: Mapping[str, float] | None = None) -> Covariates:
        """A person of the population, with the values in `given` (physical units, by name) held fixed.

        What is not given is drawn from its distribution given the rest, inside the training ranges even when a given
        value is outside them. The same number of random numbers is used whatever is given.
        """
        given = dict(given or {})
        for name in given:
            if name not in COVARIATES:
                raise UsageError(f"{name!r} is not a covariate.", remedy=f"Choose from: {', '.join(COVARIATES)}.")
        uniform = generator.random()
        normals = generator.standard_normal((_TRIES, len(CONTINUOUS)))
        known = [i for i, name in enumerate(CONTINUOUS) if name in given]
        free = [i for i, name in enumerate(CONTINUOUS) if name not in given]
        known_scores = np.array([self.marginals[CONTINUOUS[i]].score(float(given[CONTINUOUS[i]])) for i in known])
        if "sex" in given:
            sex = int(given["sex"])
        else:
            sex = MALE if uniform < self._male_probability_given(known, known_scores) else FEMALE
        values = np.array([float(given.get(name, math.nan)) for name in CONTINUOUS])
        if free:
            values[free] = self._draw_free(sex, known, known_scores, free, normals)
        return Covariates.from_array(np.concatenate([[sex], values]))

    def _male_probability_given(self, known: list[int], known_scores: np.ndarray) -> float:
        p = self.male_probability
        if not known or p in (0.0, 1.0):
            return p
        inverse = np.linalg.inv(np.array(self.covariance)[np.ix_(known, known)])
        distances = [d @ inverse @ d for d in (known_scores - np.array(mean)[known] for mean in self.mean_by_sex)]
        # Equal covariances: the normalising constants cancel.
        log_odds = math.log(p / (1 - p)) + (distances[FEMALE] - distances[MALE]) / 2
        return float(1 / (1 + math.exp(-np.clip(log_odds, -500, 500))))

    def _draw_free(
        self, sex: int, known: list[int], known_scores: np.ndarray, free: list[int], normals: np.ndarray
    ) -> np.ndarray:
        covariance, mean = np.array(self.covariance), np.array(self.mean_by_sex[sex])
        free_mean, free_covariance = mean[free], covariance[np.ix_(free, free)]
        if known:
            gain = covariance[np.ix_(free, known)] @ np.linalg.inv(covariance[np.ix_(known, known)])
            free_mean = free_mean + gain @ (known_scores - mean[known])
            free_covariance = free_covariance - gain @ covariance[np.ix_(known, free)]
        scores = free_mean + normals[:, free] @ np.linalg.cholesky(free_covariance).T
        marginals = [self.marginals[CONTINUOUS[i]] for i in free]
        tries = np.stack([m.value(scores[:, k]) for k, m in enumerate(marginals)], axis=1)
        low, high = np.array([m.low for m in marginals]), np.array([m.high for m in marginals])
        inside = ((tries >= low) & (tries <= high)).all(axis=1)
        # Where the given values make every try fall outside (they are far out themselves), the nearest inside counts.
        return np.clip(tries[int(np.argmax(inside))], low, high)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "gaussian_copula",
            "people": self.people,
            "male_probability": self.male_probability,
            "marginals": {
                name: {
                    "scores": list(m.scores),
                    "values": list(m.values),
                    "low": m.low,
                    "high": m.high,
                    "logarithmic": m.logarithmic,
                }
                for name, m in self.marginals.items()
            },
            "mean_by_sex": [list(mean) for mean in self.mean_by_sex],
            "covariance": [list(line) for line in self.covariance],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CovariateModel:
        """The joint distribution in a model's description; BadInput when it is incomplete or no distribution."""
        try:
            if content["kind"] != "gaussian_copula":
                raise ValueError(f"kind is {content['kind']!r}")
            marginals = {
                name: Marginal(
                    tuple(map(float, content["marginals"][name]["scores"])),
                    tuple(map(float, content["marginals"][name]["values"])),
                    float(content["marginals"][name]["low"]),
                    float(content["marginals"][name]["high"]),
                    bool(content["marginals"][name]["logarithmic"]),
                )
                for name in CONTINUOUS
            }
            for name, m in marginals.items():
                if len(m.scores) != len(m.values) or len(m.scores) < 2 or not np.all(np.diff(m.scores) > 0):
                    raise ValueError(f"the marginal of {name} is not a table of rising scores")
                if not (np.isfinite(m.values).all() and m.values[0] < m.values[-1] and m.low < m.high):
                    raise ValueError(f"the marginal of {name} does not rise")
            means = np.array(content["mean_by_sex"], dtype=float)
            covariance = np.array(content["covariance"], dtype=float)
            if means.shape != (2, 3) or covariance.shape != (3, 3):
                raise ValueError("mean_by_sex must be 2 x 3 and covariance 3 x 3")
            np.linalg.cholesky(covariance)
            male_probability = float(content["male_probability"])
            if not 0 <= male_probability <= 1:
                raise ValueError(f"male_probability is {male_probability:g}")
            people = int(content["people"])
        except (KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
            raise BadInput(
                f"the joint distribution of the covariates is damaged or incomplete ({error}).",
                reason="bad_joint_distribution",
            ) from error
        return cls(
            people,
            male_probability,
            marginals,
            (tuple(means[0].tolist()), tuple(means[1].tolist())),
            tuple(tuple(line) for line in covariance.tolist()),
        )


def _mean_ranks(sample: np.ndarray) -> np.ndarray:
    """Ranks 1..n; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(sample, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


# ------------------------------------------------------------------------------------- what people write on a command

_QUANTITY = re.compile(r"^\s*([+-]?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|[+-]?\.[0-9]+)\s*([^\s0-9].*?)?\s*$")
_MM3_IN = {"mm3": 1.0, "mm^3": 1.0, "mm³": 1.0, "ul": 1.0, "µl": 1.0, "μl": 1.0}
_MM3_IN |= dict.fromkeys(("ml", "cc", "cm3", "cm^3", "cm³"), 1e3) | dict.fromkeys(("l", "dm3", "dm^3", "dm³"), 1e6)


def parse_volume(text: str) -> float:
    """A volume in mm^3 from text with a unit.

    >>> parse_volume("40ml"), parse_volume("40000 mm3"), parse_volume("1.45 L")
    (40000.0, 40000.0, 1450000.0)
    """
    number, unit = _quantity(text, "a volume", "40ml or 40000mm3")
    if not unit:
        raise UsageError(
            f"{text!r} is a volume without a unit.",
            remedy=f"Write {text.strip()}ml or {text.strip()}mm3.",
            reason="missing_unit",
        )
    if unit.lower() not in _MM3_IN:
        raise UsageError(
            f"{text!r}: {unit!r} is not a unit of volume known here.",
            remedy="Use mm3, ml, cm3 or l.",
            reason="unknown_unit",
        )
    value = number * _MM3_IN[unit.lower()]
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{text!r}: a volume must be above 0 and finite.", remedy="Write, say, 40ml.")
    return value


def parse_age(text: str) -> float:
    """An age in years from text.

    >>> parse_age("70"), parse_age("61.5 y")
    (70.0, 61.5)
    """
    number, unit = _quantity(text, "an age", "70")
    if unit.lower() not in ("", "y", "yr", "yrs", "year", "years"):
        raise UsageError(f"{text!r}: an age is in years here, not in {unit!r}.", remedy="Write, say, 70.")
    fault = implausible("age_years", number)
    if fault:
        raise UsageError(f"{text!r}: this age {fault}.", remedy="Write the age in years, say, 70.")
    return number


def parse_sex(text: str) -> int:
    """0 for female, 1 for male.

    >>> parse_sex("F"), parse_sex("male")
    (0, 1)
    """
    code = sex_code(text)
    if code is None:
        raise UsageError(f"{text!r} is not a sex known here.", remedy="Write F or M (female, male, 0, 1).")
    return code


def sex_code(text: str) -> int | None:
    """0 for female, 1 for male, None for anything else: the words every table and command is read with."""
    return _SEX_WORDS.get(text.strip().lower())


def _quantity(text: str, kind: str, example: str) -> tuple[float, str]:
    found = _QUANTITY.match(text)
    if not found:
        hint = " (the decimal mark is a point)" if re.search(r"[0-9],[0-9]", text) else ""
        raise UsageError(f"{text!r} is not {kind}{hint}.", remedy=f"Write, say, {example}.", reason="not_a_number")
    unit = found.group(2) or ""
    if unit.startswith(","):
        raise UsageError(
            f"{text!r} is not {kind} (the decimal mark is a point).",
            remedy=f"Write, say, {example}.",
            reason="not_a_number",
        )
    return float(found.group(1)), unit
