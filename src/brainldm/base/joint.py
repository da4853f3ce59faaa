"""How the covariates of a population occur together: their joint distribution, from which people are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import betainc, ndtr, ndtri

from brainldm.base.covariates import CONTINUOUS, COVARIATES, FEMALE, MALE, CovariateRanges, Covariates, covariates_array
from brainldm.base.errors import BadInput, UsageError

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
        from scipy.stats import rankdata  # takes half a second to import, which drawing needs not

        CovariateRanges.fitted(rows)  # the same people must have usable ranges
        values = covariates_array(rows)
        n = len(values)
        male = values[:, 0] == MALE
        marginals = {
            name: Marginal.fitted(values[:, 1 + i], logarithmic=name.endswith("_mm3"))
            for i, name in enumerate(CONTINUOUS)
        }
        ranks = np.stack([rankdata(values[:, 1 + i]) for i in range(len(CONTINUOUS))], axis=1)
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
                if m.logarithmic and m.low <= 0:
                    raise ValueError(f"the marginal of {name} has no logarithm: its lowest value is {m.low:g}")
            means = np.array(content["mean_by_sex"], dtype=float)
            covariance = np.array(content["covariance"], dtype=float)
            if means.shape != (2, 3) or covariance.shape != (3, 3):
                raise ValueError("mean_by_sex must be 2 x 3 and covariance 3 x 3")
            np.linalg.cholesky(covariance)
            male_probability = float(content["male_probability"])
            if not 0 <= male_probability <= 1:
                raise ValueError(f"male_probability is {male_probability:g}")
            people = int(content["people"])
        except (KeyError, TypeError, ValueError, OverflowError, np.linalg.LinAlgError) as error:
            raise BadInput(
                f"the joint distribution of the covariates is damaged or incomplete ({error}).",
                remedy="Restore the model from where it came.",
                reason="bad_joint_distribution",
            ) from error
        return cls(
            people,
            male_probability,
            marginals,
            (tuple(means[0].tolist()), tuple(means[1].tolist())),
            tuple(tuple(line) for line in covariance.tolist()),
        )
