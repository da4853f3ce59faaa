"""Does it obey? What was asked of each brain against what an instrument finds in it.

The instrument has an error of its own, which no generator can beat; it is stated beside, from real people whose
recorded values are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brainldm.evaluate.estimate import Estimate, area_under_curve, mean, pearson_r, straight_line
from brainldm.evaluate.examine import Examined
from brainldm.evaluate.measuring import Measurements


@dataclass(frozen=True)
class Agreement:
    """How `measured` follows `asked`. Perfect: r 1, slope 1, intercept 0, errors 0.

    `intercept`, `absolute_error` (mean of |measured - asked|) and `bias` (mean of measured - asked) are in the
    covariate's unit.
    """

    pearson_r: Estimate
    slope: Estimate
    intercept: Estimate
    absolute_error: Estimate
    bias: Estimate

    @classmethod
    def none(cls, reason: str) -> Agreement:
        return cls(*(Estimate.none(reason) for _ in range(5)))


def agreement(asked: Sequence[float | None], measured: Sequence[float | None]) -> Agreement:
    """The agreement over the images for which both are known."""
    pairs = [(a, m) for a, m in zip(asked, measured, strict=True) if a is not None and m is not None]
    if not pairs:
        return Agreement.none("no image has both an asked and a measured value")
    x, y = [a for a, _ in pairs], [m for _, m in pairs]
    line = straight_line(x, y)
    errors = [m - a for a, m in pairs]
    return Agreement(
        pearson_r(x, y),
        line.slope,
        line.intercept,
        mean([abs(error) for error in errors], at_least=0.0),
        mean(errors),
    )


def sex_told(images: Sequence[Examined], by: Measurements) -> Estimate:
    """How well the predicted probability of being male tells the images known as male from those known as female."""
    scores: dict[str, list[float]] = {"F": [], "M": []}
    for look in images:
        value = by.value(look, "sex")
        if value is not None and look.image.sex in scores:
            scores[look.image.sex].append(value)
    return area_under_curve(scores["F"], scores["M"])


@dataclass(frozen=True)
class TrainingRanges:
    """The least and greatest value of each covariate among the people a model was trained on."""

    by_name: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, people: Sequence[Mapping[str, float]]) -> TrainingRanges:
        """The ranges of these people's covariates; a covariate that nobody has gets none."""
        names = sorted({name for person in people for name in person})
        known = {name: [person[name] for person in people if name in person] for name in names}
        return cls({name: (min(values), max(values)) for name, values in known.items()})

    def outside(self, covariates: Mapping[str, float]) -> tuple[str, ...]:
        """The covariates that lie outside, as far as ranges are known."""
        return tuple(name for name, value in covariates.items() if not self._holds(name, value))

    def _holds(self, name: str, value: float) -> bool:
        low, high = self.by_name.get(name, (value, value))
        # A value written with fewer digits than the table holds is no extrapolation.
        slack = 1e-6 * max(abs(low), abs(high))
        return low - slack <= value <= high + slack
