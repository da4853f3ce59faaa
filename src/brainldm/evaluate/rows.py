"""The rows of a scorecard: each a figure of the synthetic images, the same figure of a reference, what would be best
and what it means. Every kind of judgement ends here, so that a new one needs only a function that returns rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from brainldm.evaluate.conditioning import Agreement
from brainldm.evaluate.coverage import Manifolds
from brainldm.evaluate.distribution import Distance
from brainldm.evaluate.diversity import FOUR_G_R_SSIM, FOUR_G_SSIM, MS_SSIM, Diversity
from brainldm.evaluate.estimate import Estimate, difference, difference_of_means, mean, standard_deviation
from brainldm.evaluate.features import FeatureSpace
from brainldm.evaluate.frechet import SetDistance
from brainldm.evaluate.gate import Gate
from brainldm.evaluate.memorisation import Memorisation
from brainldm.evaluate.morphometry import Morphometry

SECTIONS = {
    "conditioning": "Does it obey?",
    "diversity": "Is it diverse?",
    "distribution": "Is it real?",
    "memorisation": "Does it copy?",
}
COVARIATE_TITLES = {
    "ventricles_mm3": "Ventricles",
    "brain_mm3": "Brain volume",
    "age_years": "Age",
}


@dataclass(frozen=True)
class Unit:
    """How a value is stored and how it is shown: value * `factor`, with `decimals`, in `shown`."""

    stored: str
    shown: str
    factor: float
    decimals: int


PLAIN = Unit("", "", 1.0, 3)
VOLUME = Unit("mm^3", "mL", 1e-3, 1)
LARGE_VOLUME = Unit("mm^3", "mL", 1e-3, 0)
YEARS = Unit("year", "years", 1.0, 1)
INTENSITY = Unit("intensity range", "", 1.0, 4)
GENERAL = Unit("", "", 1.0, 4)
SHARE = Unit("share", "%", 100.0, 0)
SHARE_OF_FEW = Unit("share", "%", 100.0, 1)


def unit_of(covariate: str) -> Unit:
    if covariate.endswith("_years"):
        return YEARS
    return LARGE_VOLUME if covariate == "brain_mm3" else VOLUME


@dataclass(frozen=True)
class Row:
    """One line of the scorecard. `reference` is the figure that `synthetic` is to be read against, and `reference_is`
    says what it is of; `group` is all images, or those inside or outside the training range."""

    section: str
    key: str
    title: str
    unit: Unit
    best: str
    meaning: str
    synthetic: Estimate | None
    reference: Estimate | None = None
    reference_is: str = "real"
    difference: Estimate | None = None
    group: str = "all"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Row:
        parts = dict(content)
        parts["unit"] = Unit(**parts["unit"])
        for name in ("synthetic", "reference", "difference"):
            if parts[name] is not None:
                parts[name] = Estimate.from_json(parts[name])
        return cls(**parts)


def conditioning_rows(
    covariate: str, groups: dict[str, Agreement], instrument: Agreement | None, *, recorded_is_measured: bool = False
) -> list[Row]:
    """How the covariate was obeyed in each group of images, beside the instrument alone on real people; what is
    recorded of those may itself have been measured."""
    own_error = "The instrument's own error is in it."
    if instrument is not None and recorded_is_measured:
        own_error = "What two measurements of one person differ by is in it."
    unit, name = unit_of(covariate), COVARIATE_TITLES.get(covariate, covariate)
    what = {
        "pearson_r": (
            "Pearson r",
            PLAIN,
            "1",
            "How closely what is found in the images follows what was asked. It also grows with the spread of what "
            "was asked, so read it with the slope and the error.",
        ),
        "slope": (
            "slope",
            PLAIN,
            "1",
            "How much more is found for one more asked. Below 1: differences that were asked for are shown too small.",
        ),
        "intercept": ("intercept", unit, "0", "What the line of measured on asked shows where 0 is asked."),
        "absolute_error": (
            "mean absolute error",
            unit,
            "the instrument's",
            f"How far a brain is from what was asked, on average. {own_error}",
        ),
        "bias": ("bias", unit, "0", "Whether more (+) or less (-) is found than was asked, on average."),
    }
    rows = []
    for group, agreement in groups.items():
        for field in fields(Agreement):
            title, shown_in, best, meaning = what[field.name]
            rows.append(
                Row(
                    "conditioning",
                    f"{covariate}.{field.name}",
                    f"{name}: {title}",
                    shown_in,
                    best,
                    meaning,
                    getattr(agreement, field.name),
                    getattr(instrument, field.name) if instrument is not None and group == "all" else None,
                    "instrument alone",
                    group=group,
                )
            )
    return rows


def sex_rows(synthetic: Estimate, real: Estimate | None) -> list[Row]:
    """How well a classifier trained on real people tells the sex that was asked for."""
    return [
        Row(
            "conditioning",
            "sex.auc",
            "Sex: area under the curve",
            PLAIN,
            "1",
            "How often a brain asked for as male looks more male to the classifier than one asked for as female. 0.5 "
            "is chance; the classifier's own figure on real people is what can be reached.",
            synthetic,
            real,
            "classifier alone",
        )
    ]


LIKENESS = {
    MS_SSIM: (
        "MS-SSIM between pairs",
        "How alike two images of the set are; 1 is identical. Clearly above the real value: the model makes too few "
        "kinds of brain. Clearly below: it adds noise or makes what is no brain.",
    ),
    FOUR_G_R_SSIM: (
        "4-G-R-SSIM between pairs",
        "The same by the structure of gradients in edges, changed edges, smooth parts and texture, each counting the "
        "same; grey values do not matter.",
    ),
    FOUR_G_SSIM: (
        "4-G-SSIM between pairs",
        "4-G-R-SSIM with luminance and contrast in it too: the other reading of the published formula.",
    ),
}


def diversity_rows(synthetic: Mapping[str, Diversity], real: Mapping[str, Diversity] | None) -> list[Row]:
    """Likeness of pairs of synthetic and of real images, and how far apart the two are."""
    rows = []
    for name, (title, meaning) in LIKENESS.items():
        own, other = synthetic[name], None if real is None else real[name]
        apart = None
        if other is not None:
            apart = difference(own.estimate, other.estimate, (own.standard_error, other.standard_error))
        reference = None if other is None else other.estimate
        rows.append(
            Row("diversity", name, title, PLAIN, "the real value", meaning, own.estimate, reference, difference=apart)
        )
    return rows


def feature_rows(found: SetDistance, space: FeatureSpace) -> list[Row]:
    """Distances between the sets in a space of features, each beside two parts of the real set."""
    same = "parts of the real"
    what = (
        (
            "frechet",
            "Frechet, equal sizes",
            GENERAL,
            same,
            "How far the sets lie apart in mean and covariance of the network's features; synthetic to real, and real "
            "to real, in random parts. It depends on the network and shrinks with the number of images.",
            found.parts.across,
            found.parts.real,
        ),
        (
            "frechet_beyond",
            "Frechet, beyond chance",
            GENERAL,
            "0",
            "The row above less what two parts of one set lie apart (the mean of both sets): 0 on average for sets of "
            "one population, of whatever size.",
            found.parts.beyond,
            None,
        ),
        (
            "frechet_all",
            "Frechet, all images",
            GENERAL,
            "equal counts only",
            "With every image of both sides: the figure that publications give. Fewer images give a larger one.",
            found.all,
            None,
        ),
        (
            "kernel",
            "Kernel distance (KID)",
            GENERAL,
            same,
            "The squared maximum mean discrepancy of the features, unbiased: 0 on average for equal sets of any size.",
            found.kernel,
            found.kernel_real,
        ),
    )
    return [
        Row(
            "distribution",
            f"{space.name}.{name}",
            f"{title} ({space.title})",
            unit,
            best,
            meaning,
            synthetic,
            reference,
            same,
        )
        for name, title, unit, best, meaning, synthetic, reference in what
    ]


def gate_rows(found: Gate) -> list[Row]:
    """How many images are no plausible brains."""
    return [
        Row(
            "distribution",
            "gate.rejected",
            "Rejected by the gate",
            SHARE_OF_FEW,
            "the stated rate",
            "The share of images unlike every real one in head volume, intensities, sharpness, symmetry or tissues; "
            "which and why is in gate.tsv. The reference is the rate for which the rule is designed; "
            "fewer than 200 people cannot show it.",
            found.rejected,
            found.by_design,
            "stated rate",
        )
    ]


def region_rows(found: Morphometry) -> list[Row]:
    """Regional volumes as a whole, and the region that differs most."""
    same, count, worst = "parts of the real", len(found.regions), found.regions[0]
    return [
        Row(
            "distribution",
            "regions.wasserstein",
            f"{count} regions: Wasserstein",
            PLAIN,
            same,
            "How far people would have to be moved in the space of the volumes of regions (standard deviations of the "
            "real, a region) to become the other set; in random parts. Every region is in regions.tsv.",
            found.parts.across,
            found.parts.real,
            same,
        ),
        Row(
            "distribution",
            "regions.wasserstein_beyond",
            f"{count} regions: beyond chance",
            PLAIN,
            "0",
            "The row above less what two parts of one set lie apart (the mean of both sets). Too little variety, "
            "which makes the row above small, does not make this one so.",
            found.parts.beyond,
        ),
        Row(
            "distribution",
            "regions.largest_d",
            f"{worst.name.replace('_', ' ').capitalize()}: Cohen's d",
            PLAIN,
            "0",
            f"The region that differs most: synthetic less real mean, in standard deviations. By chance alone the "
            f"largest of {count} is not 0.",
            worst.cohen_d,
        ),
    ]


def volume_rows(covariate: str, synthetic: Sequence[float], real: Sequence[float] | None) -> list[Row]:
    """Mean and spread of a measured volume in both sets."""
    name, unit = COVARIATE_TITLES.get(covariate, covariate), unit_of(covariate)
    apart = None if real is None else difference_of_means(synthetic, real)
    return [
        Row(
            "distribution",
            f"{covariate}.mean",
            f"{name}: mean",
            unit,
            "the real value",
            "As measured. Like the real mean when brains are asked for like the population; a sweep asks for others.",
            mean(synthetic),
            None if real is None else mean(real),
            difference=apart,
        ),
        Row(
            "distribution",
            f"{covariate}.sd",
            f"{name}: standard deviation",
            unit,
            "the real value",
            "As measured. Smaller than the real spread: the model shies away from unusual brains.",
            standard_deviation(synthetic),
            None if real is None else standard_deviation(real),
        ),
    ]


def distance_rows(intensity: Distance, mean_image: Distance) -> list[Row]:
    """Two distances between the sets, each beside what random divisions of all images give."""
    return [
        Row(
            "distribution",
            "intensity_wasserstein",
            "Grey values: Wasserstein distance",
            INTENSITY,
            "chance",
            "How far grey values (0 to 1) would have to be moved on average to be distributed like the real ones. "
            "Above what chance gives: the contrast, the noise or the amount of background differs.",
            intensity.observed,
            intensity.by_chance,
            "chance",
        ),
        Row(
            "distribution",
            "mean_image_rmse",
            "Mean image: RMS difference",
            INTENSITY,
            "chance",
            "How far the average synthetic brain is from the average real one, in grey values (0 to 1), in the brain "
            "at 4 mm. Above what chance gives: other anatomy, another place, or blur.",
            mean_image.observed,
            mean_image.by_chance,
            "chance",
        ),
    ]


def manifold_rows(found: Manifolds, by_chance: Manifolds) -> list[Row]:
    """Precision, recall, density and coverage, each beside what random divisions of all images give."""
    what = {
        "precision": (
            "Precision",
            SHARE,
            "The share of synthetic brains that lie where real ones do. Below chance: some are no such brains.",
        ),
        "recall": (
            "Recall",
            SHARE,
            "The share of real brains that lie where synthetic ones do. Below chance: kinds of brain are missing.",
        ),
        "density": (
            "Density",
            PLAIN,
            "How deep in the crowd of real brains the synthetic ones lie. Above chance: only the most usual are made.",
        ),
        "coverage": (
            "Coverage",
            SHARE,
            "The share of real brains with a synthetic one near them. Below chance: kinds of brain are missing.",
        ),
    }
    return [
        Row(
            "diversity" if name in ("recall", "coverage") else "distribution",
            f"manifold.{name}",
            title,
            unit,
            "chance",
            f"{meaning} Nearness is of grey values in the brain at 4 mm.",
            getattr(found, name),
            getattr(by_chance, name),
            "chance",
        )
        for name, (title, unit, meaning) in what.items()
    ]


def memorisation_rows(found: Memorisation, space: FeatureSpace | None) -> list[Row]:
    """Whether synthetic images lie nearer to training images than unseen people do: in the voxels of the brain at 4 mm,
    or in a space of features."""
    before, of = ("", "") if space is None else (f"{space.name}.", f" ({space.title})")
    unit = INTENSITY if space is None else GENERAL
    in_what = "grey values (0 to 1), in the brain at 4 mm" if space is None else f"features{of}"
    return [
        Row(
            "memorisation",
            f"{before}nearest_training_rmse",
            f"Distance to nearest training image{of}",
            unit,
            "not below",
            f"Median of the root-mean-square difference in {in_what}. Much smaller than between people: copies. "
            "Blurred images are somewhat nearer to everybody.",
            found.synthetic,
            found.reference,
            found.reference_is or "unseen people",
        ),
        Row(
            "memorisation",
            f"{before}nearer_than_unseen",
            f"Nearer to it than any person above{of}",
            SHARE_OF_FEW,
            "chance",
            "The share of synthetic brains that lie nearer to a training image than every person of the row above; the "
            "reference is how often that happens to somebody who is no copy (the false-positive rate). suspects.tsv "
            "names them.",
            found.nearer_than_reference,
            found.nearer_by_chance,
            "chance",
        ),
        Row(
            "memorisation",
            f"{before}nearest_is_training",
            f"Nearest person was in training{of}",
            SHARE,
            "chance",
            "Of all real people, the nearest to a brain should be one that the model has seen only as often as there "
            "are such people among them. Blur cannot change this row; copying drives it to 100 %.",
            found.nearest_is_training,
            found.training_by_chance,
            "chance",
        ),
        Row(
            "memorisation",
            f"{before}membership_auc",
            f"Membership: area under the curve{of}",
            PLAIN,
            "chance",
            "How well somebody who holds only the synthetic brains tells who was in the training, by who lies near one "
            "of them. 0.5 is not at all; the reference is the same game among training people alone. An average over "
            "all of them: copies of a few do not show in it, but in the rows above.",
            found.membership,
            found.membership_by_chance,
            "members only",
        ),
    ]
