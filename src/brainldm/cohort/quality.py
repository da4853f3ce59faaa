"""Is this image plausible at all? A few figures of one image, and how far they lie from those of a population.

Cheap enough for every generated brain: a second at 1 mm. It finds images that are broken (empty, saturated, blurred,
grainy, half a head), not images that are merely unlike somebody; whether a set is good is for `evaluate` to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture

from brainldm.base.errors import BadInput
from brainldm.base.streams import stream

FIGURES = {
    "head_ml": "volume of the head",
    "saturated": "share of the head at the top of the range (logarithm of it and a thousandth)",
    "mean": "mean intensity of the head",
    "spread": "spread of the head's intensities",
    "sharpness": "mean change from voxel to voxel in the head",
    "symmetry": "likeness of left and right",
    "dark_tissue": "mean of the darkest of three tissues",
    "middle_tissue": "step from the darkest tissue to the middle one",
    "bright_tissue": "step from the middle tissue to the brightest",
    "bright_share": "share of the brightest tissue",
}
FALSE_POSITIVE_RATE = 0.005
FEWEST_PEOPLE = 20
_HEAD_ABOVE = 0.15  # of the 99th percentile
_MIXTURE_VOXELS = 4000
_LEAST_VARIANCE = 0.01  # in units of each figure's own
_QUANTILES_APART = 2 * stats.norm.ppf(0.975)  # standard deviations between a normal figure's 2.5 and 97.5 %
_ROUNDS = 20  # of weighting; each leaves less than half of what two far people in a hundred add to the spread


def figures_of(image_XYZ: np.ndarray, voxel_mm: float) -> np.ndarray | None:
    """The figures named in FIGURES of an image in 0..1, float64; None where there are none: voxels that are not finite,
    or no head."""
    if not np.isfinite(image_XYZ).all():
        return None
    image_XYZ = np.clip(image_XYZ, 0.0, 1.0)
    top = float(np.percentile(image_XYZ, 99))
    head_XYZ = image_XYZ > max(_HEAD_ABOVE * top, 1e-3)
    if top < 0.05 or head_XYZ.sum() < 64:
        return None
    inside = image_XYZ[head_XYZ]
    changes = [np.abs(np.diff(image_XYZ, axis=axis))[_both(head_XYZ, axis)] for axis in range(3)]
    mirrored_XYZ = image_XYZ[::-1]
    either = head_XYZ | head_XYZ[::-1]
    symmetry = np.corrcoef(image_XYZ[either], mirrored_XYZ[either])[0, 1] if np.ptp(inside) > 0 else 0.0
    return np.array(
        [
            head_XYZ.sum() * voxel_mm**3 / 1000,
            np.log10((inside >= 0.995).mean() + 1e-3),  # nearly 0 in most, and far from normal as it is
            inside.mean(),
            inside.std(),
            np.concatenate(changes).mean() if sum(map(len, changes)) else 0.0,
            symmetry,
            *_tissues(inside),
        ],
        dtype=np.float64,
    )


def _both(head_XYZ: np.ndarray, axis: int) -> np.ndarray:
    """Where two neighbours along `axis` are both in the head."""
    first, second = [slice(None)] * 3, [slice(None)] * 3
    first[axis], second[axis] = slice(None, -1), slice(1, None)
    return head_XYZ[tuple(first)] & head_XYZ[tuple(second)]


def _tissues(inside_N: np.ndarray) -> tuple[float, float, float, float]:
    """Mean of the darkest of three tissues, the two steps to the others, and the share of the brightest."""
    chosen = stream(0, "quality/mixture", len(inside_N)).choice(inside_N, min(len(inside_N), _MIXTURE_VOXELS))
    chosen = chosen + 1e-4 * np.linspace(-1, 1, len(chosen))  # a constant image has a mixture too
    starts = np.quantile(chosen, [0.15, 0.5, 0.85])[:, None]
    mixture = GaussianMixture(
        3, covariance_type="tied", means_init=starts, random_state=0, max_iter=40, tol=1e-3, reg_covar=1e-6
    )
    mixture.fit(chosen[:, None])
    order = np.argsort(mixture.means_[:, 0])
    low, middle, high = mixture.means_[order, 0]
    return float(low), float(middle - low), float(high - middle), float(mixture.weights_[order[2]])


@dataclass(frozen=True)
class UsualImages:
    """Where the figures of a population's images lie: an ellipsoid that holds all but `FALSE_POSITIVE_RATE` of them."""

    people: int
    mean: tuple[float, ...]
    precision: tuple[tuple[float, ...], ...]
    threshold: float

    @classmethod
    def fitted(cls, figures: Iterable[np.ndarray]) -> UsualImages | None:
        """Of the figures of these images; None where there are fewer than FEWEST_PEOPLE.

        The covariance is shrunk (Ledoit and Wolf 2004), and people far from the others count less in it. The threshold
        is set on people the ellipsoid was not fitted to (ten folds): the distance that the stated rate of them pass,
        or their greatest where they are too few to show that rate; or the one that unseen members of a normal
        population pass at it (Hotelling), whichever is farther.
        """
        table = np.array(list(figures), dtype=np.float64).reshape(-1, len(FIGURES))
        n = len(table)
        if n < FEWEST_PEOPLE:
            return None
        # A figure that hardly varies is given a little room: a hundredth of its value.
        low, middle, high = np.quantile(table, [0.025, 0.5, 0.975], axis=0)
        scale = np.maximum((high - low) / _QUANTILES_APART, np.maximum(0.01 * np.abs(middle), 1e-3))
        fold = np.arange(n) % 10
        apart = np.concatenate(
            [_mahalanobis(table[fold == k], *_ellipsoid(table[fold != k], scale)) for k in range(10)]
        )
        p = len(FIGURES)
        unseen = p * (n + 1) * (n - 1) / (n * (n - p)) * stats.f.ppf(1 - FALSE_POSITIVE_RATE, p, n - p)
        expected = float(np.sqrt(unseen))
        mean, precision = _ellipsoid(table, scale)
        enough = 1 / FALSE_POSITIVE_RATE
        seen = np.quantile(apart, 1 - FALSE_POSITIVE_RATE, method="lower") if n >= enough else apart.max()
        return cls(
            n,
            tuple(mean.tolist()),
            tuple(tuple(line) for line in precision.tolist()),
            max(expected, float(seen)),
        )

    def objection(self, figures: np.ndarray | None) -> str:
        """Why an image of these figures is no member, in words; empty where nothing speaks against it."""
        if figures is None:
            return "it holds values that are not finite, or no head"
        mean, precision = np.array(self.mean), np.array(self.precision)
        distance = float(_mahalanobis(figures[None], mean, precision)[0])
        if distance <= self.threshold:
            return ""
        deviations = np.abs(figures - mean) * np.sqrt(np.diag(precision))
        worst = list(FIGURES)[int(np.argmax(deviations))]
        found, usual = figures[list(FIGURES).index(worst)], mean[list(FIGURES).index(worst)]
        return (
            f"it lies {distance:.1f} from the population, above {self.threshold:.1f}; "
            f"most of all the {FIGURES[worst]}: {found:.3g} where {usual:.3g} is usual"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "figures": list(FIGURES),
            "people": self.people,
            "mean": list(self.mean),
            "precision": [list(line) for line in self.precision],
            "threshold": self.threshold,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> UsualImages:
        """BadInput for what is incomplete or of other figures."""
        try:
            if content["figures"] != list(FIGURES):
                raise ValueError("other figures")
            mean = tuple(float(v) for v in content["mean"])
            precision = tuple(tuple(float(v) for v in line) for line in content["precision"])
            if np.array(precision).shape != (len(FIGURES), len(FIGURES)) or len(mean) != len(FIGURES):
                raise ValueError("other shapes")
            return cls(int(content["people"]), mean, precision, float(content["threshold"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"the population's figures of quality are damaged or incomplete ({error}).", reason="bad_quality"
            ) from error


def _ellipsoid(table_NF: np.ndarray, scale_F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision; shrunk after each figure is put in units of its own spread.

    Huber's weights (Maronna 1976): whoever is farther than all but a hundredth of a normal population counts as if
    they were that far, so that a few broken images among the people do not widen what is usual.
    """
    units_NF = table_NF / scale_F
    far = stats.chi2.ppf(0.99, len(scale_F))
    centre_F, weights_N = np.median(units_NF, axis=0), np.ones(len(units_NF))
    for _ in range(_ROUNDS):
        shifted_NF = np.sqrt(weights_N)[:, None] * (units_NF - centre_F)
        covariance_FF = LedoitWolf(assume_centered=True).fit(shifted_NF).covariance_
        precision_FF = np.linalg.inv(covariance_FF + _LEAST_VARIANCE * np.eye(len(scale_F)))
        apart_N = _mahalanobis(units_NF, centre_F, precision_FF)
        weights_N = np.minimum(1.0, far / np.maximum(apart_N**2, 1e-9))
        centre_F = weights_N @ units_NF / weights_N.sum()
    return centre_F * scale_F, precision_FF / np.outer(scale_F, scale_F)


def _mahalanobis(table_NF: np.ndarray, mean_F: np.ndarray, precision_FF: np.ndarray) -> np.ndarray:
    apart = table_NF - mean_F
    return np.sqrt(np.einsum("nf,fg,ng->n", apart, precision_FF, apart))
