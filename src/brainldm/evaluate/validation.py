"""Is the judge right? What it says where the answer is known, on real people.

    real against real    half of the people judged as if they were synthetic: every row should say "like chance"
    the same person      altered a little, is nearer to the original than anybody else, in every space of features
    planted copies       exact, mirrored, noisy, resampled and warped ones among people whom nobody copied: how many are
                         found, and how often somebody innocent is accused

OUT/validation.json     all three, with counts, seed and intervals
OUT/real_against_real/  the scorecard of the first
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import check_output_apart, locked_folder, write_json
from brainldm.base.pool import check_workers
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import drawn, stream
from brainldm.evaluate.distribution import brain_mask
from brainldm.evaluate.estimate import Estimate, share
from brainldm.evaluate.examine import Examination, Examined, examine, read_for_judging, sketch_of
from brainldm.evaluate.features import FeatureSpace
from brainldm.evaluate.grids import JudgingGrid, judging_grid
from brainldm.evaluate.images import Failure, ImageFolder, JudgedImage, open_images
from brainldm.evaluate.measuring import Instrument
from brainldm.evaluate.memorisation import distances, memorisation, voxel_features
from brainldm.evaluate.pool import each
from brainldm.evaluate.scorecard import Scorecard, evaluate_dataset, feature_spaces

MIN_PEOPLE, MOST_PEOPLE = 8, 500
NOISE = 0.02  # standard deviation, of the intensity range
COARSER = 4 / 3  # voxels of a resampled copy, in voxels of the original
WARP_MM, WARP_SMOOTHNESS_MM = 1.0, 12.0
VOXELS = "voxels at 4 mm"


# ---------------------------------------------------------------------------------------------------------- alterations


def exact(image_XYZ: np.ndarray, grid: JudgingGrid, draws: np.random.Generator) -> np.ndarray:
    return image_XYZ


def mirrored(image_XYZ: np.ndarray, grid: JudgingGrid, draws: np.random.Generator) -> np.ndarray:
    return image_XYZ[::-1]


def noisy(image_XYZ: np.ndarray, grid: JudgingGrid, draws: np.random.Generator) -> np.ndarray:
    return np.clip(image_XYZ + NOISE * draws.standard_normal(image_XYZ.shape, np.float32), 0, 1)


def resampled(image_XYZ: np.ndarray, grid: JudgingGrid, draws: np.random.Generator) -> np.ndarray:
    """To voxels a third larger and back, each time averaged over the larger voxel or interpolated linearly."""
    coarse = ndimage.gaussian_filter(image_XYZ, 0.5 * np.sqrt(COARSER**2 - 1))
    shape = [int(np.ceil(n / COARSER)) for n in image_XYZ.shape]
    coarse = ndimage.affine_transform(coarse, [COARSER] * 3, output_shape=shape, order=1)
    return ndimage.affine_transform(coarse, [1 / COARSER] * 3, output_shape=image_XYZ.shape, order=1)


def warped(image_XYZ: np.ndarray, grid: JudgingGrid, draws: np.random.Generator) -> np.ndarray:
    """Bent smoothly, by WARP_MM (root mean square) along each axis."""
    places = np.indices(image_XYZ.shape, dtype=np.float32)
    for axis, voxel_mm in enumerate(grid.voxel_mm):
        field = ndimage.gaussian_filter(
            draws.standard_normal(image_XYZ.shape, np.float32), WARP_SMOOTHNESS_MM / grid.voxel_mm / 2
        )
        places[axis] += field / field.std() * WARP_MM / voxel_mm
    return ndimage.map_coordinates(image_XYZ, places, order=1)


Alteration = Callable[[np.ndarray, JudgingGrid, np.random.Generator], np.ndarray]
ALTERATIONS: Mapping[str, Alteration] = {
    "exact": exact,
    "mirrored": mirrored,
    "noisy": noisy,
    "resampled": resampled,
    "warped": warped,
}


# --------------------------------------------------------------------------------------------------------- the findings


@dataclass(frozen=True)
class Planted:
    """What the search found among planted copies and innocent people. `false_positive_rate` is what it states: how
    often an innocent person is nearer to the training than everybody whom the reference is of (`reference_is`)."""

    space: str
    training: int
    held_out: int
    found: Mapping[str, Estimate]  # by kind of copy
    accused: Estimate  # innocent people named
    false_positive_rate: float
    reference_is: str


@dataclass(frozen=True)
class Validation:
    """`nearer[space][alteration]` is the share of people whose altered image is nearer to their own than to others;
    spaces are known by their names, and `titles` are for people. `failures` are the images that could not be judged."""

    people: int
    seed: int
    nearer: Mapping[str, Mapping[str, Estimate]]
    planted: tuple[Planted, ...]
    real_against_real: Scorecard
    titles: Mapping[str, str]
    failures: tuple[Failure, ...] = ()

    def as_text(self) -> str:
        lines = [f"x {failure.file}: {failure.message}" for failure in self.failures]
        lines.append(f"{self.people} people. Altered a little, nearer to oneself than to anybody else:")
        for space, kinds in self.nearer.items():
            lines.append(f"  {self.titles[space]}: " + ", ".join(f"{kind} {_told(e)}" for kind, e in kinds.items()))
        lines.append("Planted copies found, and innocent people accused:")
        for planted in self.planted:
            found = ", ".join(f"{kind} {_told(e)}" for kind, e in planted.found.items())
            lines.append(
                f"  {self.titles[planted.space]}: {found}; accused {_told(planted.accused)} (stated rate "
                f"{planted.false_positive_rate:.1%}, by {planted.reference_is}; {planted.held_out} held out)"
            )
        lines.append("Real against real, as if one half were synthetic:")
        return "\n".join(lines) + "\n" + self.real_against_real.as_text()


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} of {estimate.n}" if estimate.value is not None else "none"


def validate(
    folder: Path,
    out: Path,
    *,
    features: Sequence[str] = ("random",),
    instrument: Instrument | None = None,
    pairs: int = 200,
    seed: int = 0,
    workers: int = 1,
    progress: Progress = Quiet(),
) -> Validation:
    """Runs all three on the people in `folder` (a prepared cohort, or images that lie in one space) and writes `out`.
    Images that cannot be judged are listed in `.failures` and in validation.json, and the rest is used. `instrument`
    finds volumes, by default without trained weights. Of more than MOST_PEOPLE, so many drawn at random.

    BadInput where there are fewer than MIN_PEOPLE.
    """
    check_workers(workers)
    if pairs < 1:
        raise UsageError(f"{pairs} pairs were asked for.", remedy="Ask for 1 or more.")
    check_output_apart(out, folder)
    spaces = feature_spaces(features)
    people = open_images(folder, "real")
    grid = judging_grid([[image.path for image in people.images]])
    found = Examination((), ()) if grid is None else _looked_at(people, grid, seed, workers, progress)
    looks = found.images
    if grid is None or len(looks) < MIN_PEOPLE:
        raise BadInput(
            f"has {len(looks)} people who can be judged; {MIN_PEOPLE} are needed.",
            remedy="Prepare more scans.",
            path=folder,
            reason="too_few",
        )
    with locked_folder(out):
        altered = _altered(looks, grid, spaces, seed, workers, progress)
        nearer = {space: _nearer(kinds) for space, kinds in altered.items()}
        planted = tuple(_planted(space, kinds, seed) for space, kinds in altered.items())
        halves = out / "real_against_real"
        card = _real_against_real(people, looks, halves, features, instrument, pairs, seed, workers, progress)
        failures = (*people.failures, *found.failures)
        titles = {VOXELS: VOXELS} | {space.name: space.title for space in spaces}
        validation = Validation(len(looks), seed, nearer, planted, card, titles, failures)
        settings = {"noise": NOISE, "coarser": COARSER, "warp_mm": WARP_MM, "warp_smoothness_mm": WARP_SMOOTHNESS_MM}
        content: dict[str, Any] = {"grid": grid.describe(), "alterations": settings}
        content |= {"people": validation.people, "seed": seed, "spaces": titles}
        content |= {"nearer": {s: {k: asdict(e) for k, e in kinds.items()} for s, kinds in nearer.items()}}
        content |= {"planted": [asdict(one) for one in planted]}
        content |= {"failures": [asdict(failure) for failure in failures]}
        write_json(out / "validation.json", content)
    return validation


def _looked_at(people: ImageFolder, grid: JudgingGrid, seed: int, workers: int, progress: Progress) -> Examination:
    """At most MOST_PEOPLE of them, drawn at random: everybody's copies are in memory together."""
    images = drawn(people.images, MOST_PEOPLE, stream(seed, "evaluate/validated"))
    files = {image.file for image in images}
    return examine(images, "real", grid, sketched=files, workers=workers, progress=progress)


# ------------------------------------------------------------------------------------------------------ altered copies


def _altered(
    looks: Sequence[Examined],
    grid: JudgingGrid,
    spaces: Sequence[FeatureSpace],
    seed: int,
    workers: int,
    progress: Progress,
) -> dict[str, dict[str, np.ndarray]]:
    """By the space's name and alteration: (n, 2, F) features of every person's altered image, as it is and mirrored."""
    mask = brain_mask([look.sketch for look in looks if look.sketch is not None])
    work = partial(_alter_one, grid=grid, spaces=tuple(spaces), mask=mask, seed=seed)
    rows: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    for position, outcome in each(
        work, list(enumerate(look.image for look in looks)), workers=workers, progress=progress, what="altering people"
    ):
        if isinstance(outcome, Exception):
            raise outcome
        rows[position] = outcome
    return {
        space: {kind: np.stack([rows[i][space][kind] for i in range(len(looks))]) for kind in ALTERATIONS}
        for space in rows[0]
    }


def _alter_one(
    numbered: tuple[int, JudgedImage], grid: JudgingGrid, spaces: tuple[FeatureSpace, ...], mask: np.ndarray, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    number, image = numbered
    original_XYZ = read_for_judging(image, grid)
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in (VOXELS, *(space.name for space in spaces))}
    for kind, alter in ALTERATIONS.items():
        image_XYZ = alter(original_XYZ, grid, stream(seed, f"evaluate/alter/{kind}", number)).astype(np.float32)
        found[VOXELS][kind] = voxel_features([sketch_of(image_XYZ, grid)], mask)[0]
        for space in spaces:
            found[space.name][kind] = np.stack([space(image_XYZ), space(image_XYZ[::-1])])
    return found


def _nearer(altered: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    originals = altered["exact"][:, 0]
    found = {}
    for kind, rows in altered.items():
        if kind == "exact":
            continue
        apart = distances(rows, originals)
        own = np.diag(apart).copy()
        np.fill_diagonal(apart, np.inf)
        found[kind] = share(int((own < apart.min(axis=1)).sum()), len(own))
    return found


def _planted(space: str, altered: Mapping[str, np.ndarray], seed: int) -> Planted:
    """Half of the people are trained on, a quarter held out; the rest, innocent, and copies of every training person
    are searched together."""
    originals = altered["exact"]
    order = stream(seed, "evaluate/planted").permutation(len(originals))
    trained, unseen, innocent = np.split(order, [len(order) // 2, len(order) * 3 // 4])
    copies = {kind: rows[trained] for kind, rows in altered.items()}
    made = np.concatenate([originals[innocent], *copies.values()])
    found = memorisation(made, [originals[trained]], originals[unseen], seed)
    named = np.zeros(len(made), dtype=bool)
    named[[suspect.image for suspect in found.suspects]] = True
    counts, start = {}, len(innocent)
    for kind in copies:
        counts[kind] = share(int(named[start : start + len(trained)].sum()), len(trained))
        start += len(trained)
    accused = share(int(named[: len(innocent)].sum()), len(innocent))
    by_chance = found.nearer_by_chance.value
    assert by_chance is not None, f"{MIN_PEOPLE} people leave somebody to compare with"
    return Planted(space, len(trained), len(unseen), counts, accused, by_chance, found.reference_is)


# ---------------------------------------------------------------------------------------------------- real against real


def _real_against_real(
    people: ImageFolder,
    looks: Sequence[Examined],
    out: Path,
    features: Sequence[str],
    instrument: Instrument | None,
    pairs: int,
    seed: int,
    workers: int,
    progress: Progress,
) -> Scorecard:
    """The scorecard of a random half as if it were synthetic; of the others half are taken as trained on."""
    images = [look.image for look in looks]
    order = stream(seed, "evaluate/halves").permutation(len(images))
    half = len(order) // 2
    as_made = tuple(replace(images[i], split=None) for i in sorted(order[:half].tolist()))
    others = sorted(order[half:].tolist())
    trained = set(order[half:][: len(others) // 2].tolist())
    as_real = tuple(replace(images[i], split="train" if i in trained else "test") for i in others)
    return evaluate_dataset(
        replace(people, images=as_made, planned=len(as_made), failures=()),
        replace(people, images=as_real, planned=len(as_real), failures=()),
        out,
        features=features,
        instrument=instrument,
        pairs=pairs,
        seed=seed,
        workers=workers,
        show_made=False,  # nobody here was made: their pictures would be those of people, tied to their rows
        show_real=False,
        progress=progress,
    )
