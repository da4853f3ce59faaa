"""What a model shows of the volumes it is asked for, and what it must be told to show what was asked.

    shown = intercept + slopes . (sex, age, ventricles, brain)      of ventricles and of brain, mm^3

A network seldom answers in full: asked for 40 ml more brain it may show 25. Straight lines through brains that it made
and somebody measured (recipes/calibrate) say by how much, and their inverse is what it is told from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from brainldm.base.covariates import COVARIATES, VOLUMES, Covariates, covariates_array

_AT = [COVARIATES.index(name) for name in VOLUMES]
_OTHERS = [position for position in range(len(COVARIATES)) if position not in _AT]
# Below this slope a model hardly follows, and what it would have to be told lies far outside what it has seen.
LEAST_SLOPE = 0.3


def fitted_lines(asked: Sequence[Covariates], shown_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares over brains: intercepts (2,) in mm^3, slopes (2, 4), and the standard deviations (2,) of what the
    lines leave, in mm^3. A covariate that all brains share gets no slope."""
    asked_N4 = covariates_array(asked)
    centre_4 = asked_N4.mean(axis=0)
    spread_4 = asked_N4.std(axis=0)
    varies = spread_4 > 1e-9 * np.maximum(1.0, np.abs(centre_4))
    scaled_NV = (asked_N4[:, varies] - centre_4[varies]) / spread_4[varies]
    design_NG = np.column_stack([np.ones(len(asked_N4)), scaled_NV])
    lines_G2 = np.linalg.lstsq(design_NG, shown_N2, rcond=None)[0]
    slopes_24 = np.zeros((len(VOLUMES), len(COVARIATES)))
    slopes_24[:, varies] = (lines_G2[1:] / spread_4[varies][:, None]).T
    intercepts_2 = lines_G2[0] - slopes_24 @ centre_4
    left_N2 = shown_N2 - design_NG @ lines_G2
    degrees = max(1, len(asked_N4) - design_NG.shape[1])
    return intercepts_2, slopes_24, np.sqrt((left_N2**2).sum(axis=0) / degrees)


def told_for(asked: Sequence[Covariates], intercepts_2: np.ndarray, slopes_24: np.ndarray) -> list[Covariates]:
    """The covariates to tell so that the lines show what is asked: other volumes, the same age and sex."""
    asked_N4 = covariates_array(asked)
    missing_N2 = asked_N4[:, _AT] - intercepts_2 - asked_N4[:, _OTHERS] @ slopes_24[:, _OTHERS].T
    told_N2 = np.linalg.solve(slopes_24[:, _AT], missing_N2.T).T
    return [
        replace(row, ventricles_mm3=float(ventricles), brain_mm3=float(brain))
        for row, (ventricles, brain) in zip(asked, told_N2)
    ]


def own_slopes(slopes_24: np.ndarray) -> dict[str, float]:
    """How much of a change that is asked each volume shows itself: 1 is in full."""
    return {name: float(slopes_24[row, at]) for row, (name, at) in enumerate(zip(VOLUMES, _AT))}
