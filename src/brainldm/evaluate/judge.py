"""The steps of an evaluation, in the order they happen: look at the images, measure them, judge the two sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from brainldm.base.covariates import VOLUMES
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.manifest import Manifest
from brainldm.base.progress import Progress
from brainldm.base.streams import drawn, stream
from brainldm.base.volume import same_voxels
from brainldm.evaluate.conditioning import Agreement, TrainingRanges, agreement, sex_told
from brainldm.evaluate.coverage import manifolds
from brainldm.evaluate.distribution import brain_mask, intensity_distance, mean_image_distance
from brainldm.evaluate.diversity import Diversity, diversity
from brainldm.evaluate.examine import Examination, Examined, examine
from brainldm.evaluate.features import FeatureSpace, FeatureStore, extract
from brainldm.evaluate.frechet import set_distance
from brainldm.evaluate.gate import gate, write_gate
from brainldm.evaluate.grids import JudgingGrid, judging_grid
from brainldm.evaluate.images import Failure, ImageFolder, JudgedImage
from brainldm.evaluate.measuring import Instrument, Measurements, measure, measured_in_table, write_measured
from brainldm.evaluate.memorisation import MIN_HELD_OUT, Memorisation, memorisation, voxel_features, write_suspects
from brainldm.evaluate.morphometry import morphometry, write_regions
from brainldm.evaluate.pictures import draw_pictures, white_point
from brainldm.evaluate.rows import (
    Row,
    conditioning_rows,
    distance_rows,
    diversity_rows,
    feature_rows,
    gate_rows,
    manifold_rows,
    memorisation_rows,
    region_rows,
    sex_rows,
    volume_rows,
)

# What an evaluation writes of all images together, beside tables of what was measured in each.
OF_THE_WHOLE = (
    "scorecard.json",
    "scorecard.tsv",
    "scorecard.md",
    "index.html",
    "failures.tsv",
    "learning_curves.json",
    "gate.tsv",
    "regions.tsv",
    "suspects.tsv",
)
# Comparisons that hold many images at once take at most so many of a side, drawn at random.
MAX_SKETCHED = 1000


@dataclass(frozen=True)
class Findings:
    """What the steps gave. `copies` is None where there are no real images; `sampled` is how many of them were looked
    at. `instruments` gave the volumes, by side; `hard_to_measure` counts, by side, the images whose volumes the
    instrument itself does not believe."""

    grid: JudgingGrid
    synthetic: Examination
    real: Examination
    sampled: int
    rows: tuple[Row, ...]
    copies: Memorisation | None
    failures: tuple[Failure, ...]
    seconds: Mapping[str, float]
    instruments: Mapping[str, str]
    hard_to_measure: Mapping[str, int] = field(default_factory=dict)
    held_out_only: bool = False
    predictors: Mapping[str, Instrument] = field(default_factory=dict)


@dataclass
class Judge:
    """One evaluation of the images `made` against those of `people`; results of single images are kept in `cache`.

    With `held_out_only` the people compared with are those whom the model has not seen; copies are looked for among
    those it has.
    """

    made: ImageFolder
    people: ImageFolder | None
    out: Path
    cache: Path
    instrument: Instrument
    pairs: int
    seed: int
    workers: int
    max_real: int
    progress: Progress
    predictors: Mapping[str, Instrument] = field(default_factory=dict)  # by covariate: age_years, sex
    spaces: Sequence[FeatureSpace] = ()
    tables: Mapping[str, Path] = field(default_factory=dict)  # volumes found elsewhere, by side
    held_out_only: bool = False
    failures: list[Failure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, *, shown: Sequence[str] = ("synthetic", "real")) -> Findings:
        """Everything, and pictures of the sides `shown`."""
        begun = time.monotonic()
        # Which images, on which grid
        sample = () if self.people is None else self.sample_of(self.compared_with(self.people), self.max_real, "real")
        grid = judging_grid([[image.path for image in side] for side in (self.made.images, sample)])
        if grid is None:
            raise BadInput(
                "not one of its images can be opened.",
                remedy="See whether they are NIfTI files.",
                path=self.made.folder,
                reason="empty",
            )
        self.check_predictors(grid)

        # One look at each
        synthetic = self.examined(self.made, self.made.images, "synthetic", grid)
        real = Examination((), ())
        if self.people is not None:
            real = self.examined(self.people, sample, "real", grid)

        # From here on the results of an evaluation before this one go: there is something to put in their place
        for name in OF_THE_WHOLE:
            (self.out / name).unlink(missing_ok=True)

        # What the instrument finds in them
        measured = self.measured(synthetic, "synthetic", grid)
        measured_real = self.measured(real, "real", grid)
        predicted = {
            name: (
                self.predicted(synthetic, "synthetic", predictor, grid),
                self.predicted(real, "real", predictor, grid),
            )
            for name, predictor in self.predictors.items()
        }
        outside = self.outside_training()
        by, by_real = zip((measured, measured_real), *predicted.values())
        write_measured(self.out / "measured.tsv", synthetic.images, by, known_as="asked", outside=outside)
        write_measured(self.out / "measured_reference.tsv", real.images, by_real, known_as="recorded")

        # The judgements
        found = dict.fromkeys(VOLUMES, (measured, measured_real)) | predicted
        rows = self.conditioning(synthetic, real, found, outside)
        rows += self.in_pairs(synthetic, real, grid)
        rows += self.distribution(synthetic, real, measured, measured_real)
        copies = None
        if self.people is not None:
            rows += self.in_spaces(synthetic, real, grid)
            found_copies = self.copies(synthetic, real, grid)
            copies = found_copies[None]
            for space, of_space in found_copies.items():
                rows += memorisation_rows(of_space, space)

        # Pictures
        with self.timed("pictures"):
            draw_pictures(
                self.out / "figures",
                {"synthetic": synthetic.images, "real": real.images},
                shown=shown,
                white=white_point([*synthetic.sketches, *real.sketches]),
                seed=self.seed,
            )
        self.seconds["all"] = time.monotonic() - begun
        seconds = {name: round(value, 2) for name, value in self.seconds.items()}
        return Findings(
            grid,
            synthetic,
            real,
            len(sample),
            tuple(rows),
            copies,
            tuple(self.failures),
            seconds,
            {"synthetic": measured.instrument} | ({} if self.people is None else {"real": measured_real.instrument}),
            {"synthetic": measured.poor(synthetic.images), "real": measured_real.poor(real.images)},
            self.held_out_only,
            self.predictors,
        )

    def check_predictors(self, grid: JudgingGrid) -> None:
        """UsageError where a predictor is of another grid than `grid`: it would refuse every image."""
        for predictor in self.predictors.values():
            own = getattr(predictor, "grid", None)  # an instrument that takes any image has none
            if own is not None and not same_voxels(own, grid):
                taken = JudgingGrid.of(own.shape_XYZ, own.affine)
                raise UsageError(
                    f"the predictor {predictor.name} takes images of {taken.describe()} from {_first_voxel(taken)} on, "
                    f"and these are judged as {grid.describe()} from {_first_voxel(grid)} on.",
                    remedy="Train one on a cohort of that grid (brainldm train age or sex), or judge without it.",
                    path=self.made.folder,
                )

    # ---- looking ----------------------------------------------------------------------------------------------------

    def compared_with(self, people: ImageFolder) -> tuple[JudgedImage, ...]:
        """The real images that may be drawn for the comparison of the two sets."""
        if not self.held_out_only:
            return people.images
        if not people.held_out:
            raise BadInput(
                "nobody in it is marked as held out (split `validation` or `test` in participants.tsv).",
                remedy="Name a prepared cohort, or compare with everybody.",
                path=people.folder,
                reason="nobody_held_out",
            )
        return people.held_out

    def sample_of(self, images: Sequence[JudgedImage], limit: int, side: str) -> tuple[JudgedImage, ...]:
        """At most `limit` of the images, drawn at random, in their order."""
        return tuple(drawn(images, limit, stream(self.seed, f"evaluate/sample/{side}")))

    def examined(self, folder: ImageFolder, images: Sequence[JudgedImage], side: str, grid: JudgingGrid) -> Examination:
        sketched = {image.file for image in self.sample_of(images, MAX_SKETCHED, f"{side}/sketched")}
        with self.timed("reading"):
            found = examine(images, side, grid, sketched=sketched, workers=self.workers, progress=self.progress)
        self.failures += [*folder.failures, *found.failures]
        if not found.images:
            first = self.failures[-1]
            raise BadInput(
                f"not one of its {len(images)} images can be judged; {first.file} {first.message}",
                remedy=first.remedy,
                path=folder.folder,
                reason="empty",
            )
        return found

    def measured(self, found: Examination, side: str, grid: JudgingGrid) -> Measurements:
        if side in self.tables:
            measured = measured_in_table(found.images, side, self.tables[side])
        else:
            measured = self.asked_of(self.instrument, found.images, side, grid)
        self.failures += measured.failures
        return measured

    def predicted(self, found: Examination, side: str, predictor: Instrument, grid: JudgingGrid) -> Measurements:
        """What a predictor says of the images; of real people only of those held out, since it has learnt the rest."""
        unseen = [look for look in found.images if side == "synthetic" or look.image.split != "train"]
        predicted = self.asked_of(predictor, unseen, side, grid)
        self.failures += predicted.failures
        return predicted

    def asked_of(
        self, instrument: Instrument, images: Sequence[Examined], side: str, grid: JudgingGrid
    ) -> Measurements:
        with self.timed("measuring"):
            return measure(
                images,
                side,
                instrument,
                Manifest(self.cache / "measured.jsonl"),
                grid=grid,
                workers=self.workers,
                progress=self.progress,
            )

    def outside_training(self) -> Callable[[Examined], tuple[str, ...] | None]:
        """Which covariates of an image lie outside the training range: as its plan says, or else as the training people
        of the reference cohort tell; None where nobody knows."""
        training = [] if self.people is None else [image.covariates for image in self.people.training]
        ranges = TrainingRanges.of(training)

        def outside(look: Examined) -> tuple[str, ...] | None:
            if look.image.extrapolated is not None:
                return look.image.extrapolated
            return ranges.outside(look.image.covariates) if training else None

        return outside

    # ---- judging ----------------------------------------------------------------------------------------------------

    def conditioning(
        self,
        synthetic: Examination,
        real: Examination,
        found: Mapping[str, tuple[Measurements, Measurements]],
        outside: Callable[[Examined], tuple[str, ...] | None],
    ) -> list[Row]:
        rows = []
        for covariate, (measured, measured_real) in found.items():
            if covariate == "sex":
                rows += sex_rows(
                    sex_told(synthetic.images, measured),
                    None if self.people is None else sex_told(real.images, measured_real),
                )
                continue

            def compared(looks: Sequence[Examined], by: Measurements, name: str = covariate) -> Agreement:
                known = [look.image.covariates.get(name) for look in looks]
                return agreement(known, [by.value(look, name) for look in looks])

            beyond = [covariate in (outside(look) or ()) for look in synthetic.images]
            groups = {"all": compared(synthetic.images, measured)}
            if any(beyond):
                for group, wanted in (("inside the training range", False), ("outside the training range", True)):
                    members = [look for look, is_beyond in zip(synthetic.images, beyond) if is_beyond is wanted]
                    groups[group] = compared(members, measured)
            own = None if self.people is None else compared(real.images, measured_real)
            measured_before = self.people is not None and self.people.volumes_were_measured and covariate in VOLUMES
            rows += conditioning_rows(covariate, groups, own, recorded_is_measured=measured_before)
        return rows

    def in_pairs(self, synthetic: Examination, real: Examination, grid: JudgingGrid) -> list[Row]:
        def of(found: Examination, side: str) -> dict[str, Diversity]:
            images = [replace(look.image, sha256=look.sha256) for look in found.images]
            with self.timed("pairs"):
                return diversity(
                    images,
                    side,
                    grid,
                    pairs=self.pairs,
                    seed=self.seed,
                    workers=self.workers,
                    progress=self.progress,
                )

        return diversity_rows(of(synthetic, "synthetic"), None if self.people is None else of(real, "real"))

    def distribution(
        self, synthetic: Examination, real: Examination, measured: Measurements, measured_real: Measurements
    ) -> list[Row]:
        rows = []
        for covariate in VOLUMES:
            own, others = (
                [value for look in found.images if (value := by.value(look, covariate)) is not None]
                for found, by in ((synthetic, measured), (real, measured_real))
            )
            rows += volume_rows(covariate, own, None if self.people is None else others)
        if self.people is not None:
            kept = gate(synthetic.images, real.images)
            rows += gate_rows(kept)
            if kept.objections:
                write_gate(self.out / "gate.tsv", synthetic.images, kept)
            rows += self.regions((synthetic, measured), (real, measured_real))
            sets = synthetic.sketches, real.sketches
            with self.timed("distribution"):
                rows += distance_rows(intensity_distance(*sets, self.seed), mean_image_distance(*sets, self.seed))
                mask = brain_mask(real.sketches)
                voxels = [np.stack([look.coarse_XYZ[mask] for look in looks]) for looks in sets]
                rows += manifold_rows(*manifolds(voxels[0], voxels[1], self.seed))
        return rows

    def regions(self, *sides: tuple[Examination, Measurements]) -> list[Row]:
        volumes = [
            [by.by_sha256[look.sha256].regions for look in found.images if look.sha256 in by.by_sha256]
            for found, by in sides
        ]
        with self.timed("distribution"):
            found = morphometry(volumes[0], volumes[1], self.seed)
        if found is None:
            return []
        write_regions(self.out / "regions.tsv", found)
        return region_rows(found)

    def in_spaces(self, synthetic: Examination, real: Examination, grid: JudgingGrid) -> list[Row]:
        rows = []
        for space in self.spaces:
            sides = (
                self.features(synthetic.images, "synthetic", space, grid),
                self.features(real.images, "real", space, grid),
            )
            with self.timed("distribution"):
                rows += feature_rows(set_distance(*sides, self.seed), space)
        return rows

    def features(
        self, looks: Sequence[Examined], side: str, space: FeatureSpace, grid: JudgingGrid, *, mirrored: bool = False
    ) -> np.ndarray:
        store = FeatureStore(self.cache / "features", space, grid)
        with self.timed("features"):
            return extract(looks, side, store, mirrored=mirrored, workers=self.workers, progress=self.progress)

    def copies(
        self, synthetic: Examination, real: Examination, grid: JudgingGrid
    ) -> dict[FeatureSpace | None, Memorisation]:
        """The search for copies among the brain's voxels (None) and in each space of features."""
        assert self.people is not None
        training: Sequence[JudgedImage] = self.people.training
        held_out = self.sample_of(self.people.held_out, MAX_SKETCHED, "held-out")
        if not training:  # the folder does not say whom a model was trained on: everybody may have been
            training, held_out = self.people.images, ()
        mask = brain_mask(real.sketches)
        made = [look for look in synthetic.images if look.sketch is not None]
        trained: list[Examined] = []

        def voxels_of_training() -> Iterator[np.ndarray]:
            for looks in self.looks(training, real, grid, "training"):
                trained.extend(replace(look, sketch=None) for look in looks)
                yield voxel_features((look.sketch for look in looks if look.sketch is not None), mask)

        unseen = [look for looks in self.looks(held_out, real, grid, "held-out") for look in looks]

        def voxels(looks: Sequence[Examined]) -> np.ndarray:
            return voxel_features((look.sketch for look in looks if look.sketch is not None), mask)

        with self.timed("copies"):
            found: dict[FeatureSpace | None, Memorisation] = {
                None: memorisation(voxels(made), voxels_of_training(), voxels(unseen), self.seed)
            }
        for space in self.spaces:

            def both(looks: Sequence[Examined], side: str, space: FeatureSpace = space, ways: int = 2) -> np.ndarray:
                made = [self.features(looks, side, space, grid, mirrored=mirrored) for mirrored in (False, True)[:ways]]
                return np.stack(made, axis=1) if looks else np.empty((0, ways, 0))

            # Mirror images of training people matter only where they stand for the unseen.
            ways = 1 if len(unseen) >= MIN_HELD_OUT else 2
            blocks = (
                both(trained[start : start + MAX_SKETCHED], "training", ways=ways)
                for start in range(0, len(trained), MAX_SKETCHED)
            )
            found[space] = memorisation(both(made, "synthetic"), blocks, both(unseen, "held-out"), self.seed)
        write_suspects(
            self.out / "suspects.tsv",
            {"voxels" if space is None else space.name: of_space.suspects for space, of_space in found.items()},
            [look.image for look in made],
            [look.image for look in trained],
        )
        return found

    def looks(
        self, images: Sequence[JudgedImage], real: Examination, grid: JudgingGrid, who: str
    ) -> Iterator[list[Examined]]:
        """The images of real people with their sketches, in blocks; those not looked at yet are looked at, so that the
        images of a large cohort are never all in memory. `who` they are is said while they are read."""
        known = {look.image.file: look for look in real.images if look.sketch is not None}
        if there := [known[image.file] for image in images if image.file in known]:
            yield there
        failed = {failure.file for failure in real.failures}
        rest = [image for image in images if image.file not in known and image.file not in failed]
        for start in range(0, len(rest), MAX_SKETCHED):
            block = rest[start : start + MAX_SKETCHED]
            files = {image.file for image in block}
            found = examine(block, "real", grid, sketched=files, workers=self.workers, progress=self.progress, who=who)
            self.failures += found.failures
            if found.images:
                yield list(found.images)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - begun


def _first_voxel(grid: JudgingGrid) -> str:
    return f"({', '.join(f'{mm:g}' for mm in grid.affine[:3, 3])}) mm"
