"""What a reader of the scorecard has to know before believing it, as sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from brainldm.base.counts import counted
from brainldm.base.covariates import CONTINUOUS
from brainldm.base.derivative import are_phantoms
from brainldm.evaluate.diversity import SCALE_WEIGHTS, scale_weights
from brainldm.evaluate.examine import Examination
from brainldm.evaluate.images import ImageFolder
from brainldm.evaluate.judge import Findings
from brainldm.evaluate.memorisation import MIN_HELD_OUT, Memorisation

FEW_IMAGES = 30
# Studies of memorisation (Dar et al. 2024, arXiv 2402.01054) found a third and more of the training images in models
# that were trained on hundreds of people.
FEW_TRAINING_PEOPLE = 1000


def caveats(made: ImageFolder, people: ImageFolder | None, found: Findings) -> tuple[str, ...]:
    """All that applies to this evaluation, the weightiest first."""
    said: list[str] = []
    if people is not None and found.copies is not None:
        said += _of_copies(made, people, found, found.copies)
        if are_phantoms(people.provenance):
            said.append(
                "The reference people are phantoms: these figures show that the machinery works, and nothing of how "
                "brains learnt from real scans would come out."
            )
        if people.volumes_were_measured:
            said.append(
                "The volumes recorded of the real people were themselves measured, in their scans as they came: the "
                "figures of the instrument alone show what this grid costs it, not how far it is from the truth."
            )
        searched = len(found.synthetic.sketches)
        if searched < len(found.synthetic.images):
            said.append(
                f"{searched} of {len(found.synthetic.images)} synthetic images, drawn at random, were searched for "
                "copies and compared as a set in grey values."
            )
        if found.held_out_only:
            said.append(
                f"The people compared with are {found.sampled} of the {len(people.held_out)} held out; the "
                f"{len(people.training)} trained on only serve the search for copies."
            )
        elif found.sampled < len(people.images):
            said.append(f"{found.sampled} of {len(people.images)} real images, drawn at random, stand for all of them.")
        said += _of_predictors(people, found)
        trained = sum(look.image.split == "train" for look in found.real.images)
        if trained and people.held_out:
            said.append(
                f"{trained} of the {len(found.real.images)} real images that the set is compared with were trained on, "
                "and whoever copies those lies nearest to them: --held-out compares with the others."
            )
    said += _of_images("synthetic", found.synthetic)
    if people is not None:
        said += _of_images("real", found.real)
    said += _of_a_sweep(found.synthetic)
    for side, poor in found.hard_to_measure.items():
        if poor:
            said.append(
                f"{poor} {side} image{'s look' if poor > 1 else ' looks'} so unlike a brain that the instrument does "
                "not believe its own volumes there (quality_poor in the tables of what was measured): they are in the "
                "rows of volumes all the same."
            )
    for row in found.rows:
        figure = row.synthetic if row.key.endswith(".frechet_all") else None
        if figure is not None and figure.value is not None and figure.reason:
            said.append(f"{row.title}: {figure.reason}.")
    scales = len(scale_weights(found.grid.shape_XYZ))
    if 0 < scales < len(SCALE_WEIGHTS):
        said.append(
            f"MS-SSIM uses {scales} of its {len(SCALE_WEIGHTS)} scales, because {found.grid.describe()} have no room "
            "for more, and the weights of the others are scaled up to 1: compare it only with values at this grid."
        )
    return (*said, *made.warnings, *(people.warnings if people is not None else ()))


def _of_copies(made: ImageFolder, people: ImageFolder, found: Findings, copies: Memorisation) -> Iterator[str]:
    model = _model(made)
    stated = model.get("training_images")
    trained = stated if isinstance(stated, int) else len(people.training)
    if 0 < trained < FEW_TRAINING_PEOPLE:
        # The model's own cohort, by its name: the people compared with may be others.
        phantoms = are_phantoms({"prepared.json": {"name": model.get("cohort", "")}})
        yield (
            f"Trained on {counted(trained, 'image')}: a model that has seen so few makes copies and blends of them."
            + ("" if phantoms else " Do not take its brains for nobody's, and do not share them as such.")
        )
    real_files = {look.sha256 for look in found.real.images}
    same = max(copies.identical, sum(look.sha256 in real_files for look in found.synthetic.images))
    if same:
        yield f"{same} synthetic image{'s equal' if same > 1 else ' equals'} a real one: copies, not synthetic."
    if not people.training:
        yield (
            "The real folder does not say whom the model was trained on: every real image counts as a training image "
            "in the search for copies."
        )
    elif isinstance(stated, int) and stated != len(people.training):
        yield (
            f"The model says it was trained on {stated} images and the reference cohort has {len(people.training)} "
            "training people: the search for copies may have looked at the wrong people."
        )
    if people.training and copies.held_out < MIN_HELD_OUT:
        yield (
            f"{copies.held_out or 'No'} {'person was' if copies.held_out == 1 else 'people were'} held out: in the "
            "search for copies, distances between training people stand for those of unseen people."
        )


def _of_predictors(people: ImageFolder, found: Findings) -> Iterator[str]:
    """Where a predictor's own figure on real people may be of people it has learnt from."""
    split_by = {name: value for name, value in people.config.items() if name in ("holdout", "seed")}
    for covariate, predictor in found.predictors.items():
        learnt_by = getattr(predictor, "training", {}).get("split_by")
        if not people.held_out:
            why = "the real folder does not say who was held out"
        elif learnt_by and learnt_by != split_by:
            why = "it was trained on a cohort whose people were held out otherwise"
        else:
            continue
        yield (
            f"The predictor of {covariate.removesuffix('_years')} may have learnt from the real people here ({why}): "
            "its own figure on them is then too good to compare with."
        )


def _model(made: ImageFolder) -> Mapping[str, Any]:
    """What is recorded of the model that made the images; empty where nothing is."""
    generation = made.provenance.get("generation.json")
    model = generation.get("model") if isinstance(generation, dict) else None
    return model if isinstance(model, dict) else {}


def _of_images(side: str, found: Examination) -> Iterator[str]:
    n = len(found.images)
    if n < FEW_IMAGES:
        yield f"Only {n} {side} image{'s' * (n != 1)} could be judged: read the intervals before the values."
    resampled = sum(look.resampled for look in found.images)
    if resampled:
        yield (
            f"{resampled} of {n} {side} images lie on another grid and were brought to the common one, which smooths "
            "them: rows that compare the two sets also show that."
        )
    scaled = sum(look.scaled for look in found.images)
    if scaled:
        yield f"{scaled} of {n} {side} images had intensities outside 0..1 and were min-max scaled one by one."
    twice = n - len({look.sha256 for look in found.images})
    if twice:
        yield f"{twice} of {n} {side} images are the same file as another of them."


def _of_a_sweep(synthetic: Examination) -> Iterator[str]:
    for name in CONTINUOUS:
        values = [look.image.covariates[name] for look in synthetic.images if name in look.image.covariates]
        times = Counter(values).values()
        # A plan repeats its grid evenly, which ages in whole years do not.
        if len(values) >= 4 and len(times) <= len(values) // 2 and max(times) - min(times) <= 1:
            yield (
                "The brains were asked for on a grid of values, not drawn like the population: rows that compare the "
                "two sets as wholes also show that plan."
            )
            return
