"""Does it obey? What was asked of each brain against what an instrument finds in it.

The instrument has an error of its own, which no generator can beat; it is stated beside, from real people whose
recorded values are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brainldm.evaluate.estimate import Estimate, mean, pearson_r, straight_line


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


@dataclass(frozen=True)
class TrainingRange:
    """The least and greatest value that a covariate has among the people a model was trained on."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> TrainingRange | None:
        return cls(min(values), max(values)) if values else None

    def holds(self, value: float) -> bool:
        # A value typed with fewer digits than the table holds is not an extrapolation.
        slack = 1e-6 * max(abs(self.low), abs(self.high))
        return self.low - slack <= value <= self.high + slack
