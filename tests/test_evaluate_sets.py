"""Sets of images: distances that know what chance gives, and the search for copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from scipy import ndimage

from brainldm.base.streams import stream
from brainldm.evaluate.distribution import brain_mask, intensity_distance, mean_image_distance
from brainldm.evaluate.examine import Sketch, sketch_of
from brainldm.evaluate.grids import JudgingGrid
from brainldm.evaluate.memorisation import Memorisation, distances, memorisation, voxel_features
from brainldm.evaluate.pictures import white_point
from judged_folders import TINY, blob

GRID = JudgingGrid.of(TINY.shape_XYZ, TINY.affine)
VENTRICLES = stream(0, "test/ventricles").uniform(1e4, 5e4, 400)


def sketches(people: range, change: float = 0.0) -> list[Sketch]:
    return [sketch_of(np.clip(blob(VENTRICLES[i], i) + change, 0, 1), GRID) for i in people]


TRAINING, HELD_OUT, OTHERS = sketches(range(24)), sketches(range(34, 44)), sketches(range(100, 120))
MASK = brain_mask(TRAINING)


def searched(
    made: Sequence[Sketch], training: Iterable[Sketch], unseen: Sequence[Sketch], mask: np.ndarray, seed: int
) -> Memorisation:
    """The search among voxels, training images given two at a time."""
    everyone = list(training)
    blocks = (voxel_features(everyone[i : i + 2], mask) for i in range(0, len(everyone), 2))
    return memorisation(voxel_features(made, mask), blocks, voxel_features(unseen, mask), seed)


def test_membership_is_told_where_a_model_copies_and_only_there() -> None:
    clean = searched(OTHERS, TRAINING, HELD_OUT, MASK, 0)
    assert clean.membership_by_chance.low < clean.membership.value < clean.membership_by_chance.high
    assert clean.membership_by_chance.value == pytest.approx(0.5, abs=0.02)
    copying = searched(TRAINING, TRAINING, HELD_OUT, MASK, 0)
    assert copying.membership.value == 1.0 > copying.membership_by_chance.high
    few = searched(OTHERS, TRAINING, HELD_OUT[:2], MASK, 0)
    assert few.membership.value is None and "held out" in few.membership.reason


def test_suspects_are_named_nearest_first() -> None:
    found = searched([*OTHERS[:3], TRAINING[4]], TRAINING, HELD_OUT, MASK, 0)
    assert (found.suspects[0].image, found.suspects[0].training) == (3, 4)
    assert found.suspects[0].rmse == found.least and found.least == pytest.approx(0, abs=1e-6)


def test_two_samples_of_one_population_are_as_far_apart_as_chance() -> None:
    for distance in (intensity_distance, mean_image_distance):
        found = distance(OTHERS, TRAINING, 0)
        assert found.by_chance.low * 0.8 <= found.observed.value <= found.by_chance.high * 1.2
        assert found.observed.n == 20 and found.by_chance.n == 24


def test_chance_is_what_equal_means_show_where_spreads_and_sizes_differ() -> None:
    """A small set of much variety beside a large one of little: a division of both together would mix their spreads."""
    draws = stream(3, "test/spreads")

    def looks(n: int, spread: float) -> list[Sketch]:
        return [Sketch(np.zeros(256), np.full((3, 3, 3), 1.0) + draws.normal(0, spread, (3, 3, 3))) for _ in range(n)]

    found = [mean_image_distance(looks(24, 0.2), looks(72, 0.05), 0) for _ in range(60)]
    assert np.mean([one.by_chance.value for one in found]) == pytest.approx(
        np.mean([one.observed.value for one in found]), rel=0.08
    )
    assert np.mean([one.observed.value <= one.by_chance.high for one in found]) >= 0.9


def test_another_contrast_is_seen_and_measured_in_intensity_units() -> None:
    found = intensity_distance(sketches(range(100, 120), 0.05), TRAINING, 0)
    assert found.observed.value == pytest.approx(0.05, abs=0.01)
    assert found.observed.value > 3 * found.by_chance.high
    mean_image = mean_image_distance(sketches(range(100, 120), 0.05), TRAINING, 0)
    assert mean_image.observed.value > mean_image.by_chance.high


def test_identical_sets_are_0_apart_and_one_image_is_no_set() -> None:
    assert mean_image_distance(TRAINING, TRAINING, 0).observed.value == 0
    alone = intensity_distance(TRAINING[:1], TRAINING, 0)
    assert alone.observed.value is None and alone.by_chance.value is None and "2 images" in alone.observed.reason


def test_the_order_of_images_does_not_matter() -> None:
    one, two = mean_image_distance(OTHERS, TRAINING, 0), mean_image_distance(OTHERS[::-1], TRAINING[::-1], 0)
    assert one.observed.value == pytest.approx(two.observed.value)


def test_clean_images_look_like_unseen_people() -> None:
    found = searched(OTHERS, TRAINING, HELD_OUT, MASK, 0)
    assert found.training == 24 and found.held_out == 10 and found.identical == 0
    assert found.synthetic.value == pytest.approx(found.reference.value, rel=0.15)
    assert found.training_by_chance.value == 24 / 34 and found.nearer_by_chance.value == 1 / 11
    assert found.training_by_chance.low <= found.nearest_is_training.value <= found.training_by_chance.high
    assert found.nearer_than_reference.value <= found.nearer_by_chance.high


def test_planted_copies_are_found() -> None:
    noise = stream(1, "test/noise")
    copies = [
        Sketch(look.histogram, (look.coarse_XYZ + noise.normal(0, 0.01, look.coarse_XYZ.shape)).astype(np.float32))
        for look in TRAINING[:6]
    ]
    found = searched([*OTHERS[:6], *copies], TRAINING, HELD_OUT, MASK, 0)
    assert found.nearer_than_reference.value >= 0.5 > found.nearer_by_chance.high
    assert found.identical == 0
    plain = searched(TRAINING[:5], TRAINING, HELD_OUT, MASK, 0)
    assert plain.identical == 5 and plain.synthetic.value < 1e-6
    assert plain.nearest_is_training.value == 1


def test_planted_copies_of_every_kind_are_found_among_200_and_a_clean_set_is_silent() -> None:
    """Exact, mirrored, noisy and warped copies, five of each, among 180 clean images: every one of them lies nearer to
    a training image than any unseen person, and of the clean ones no more than chance allows."""
    training, unseen = sketches(range(60)), sketches(range(60, 120))
    clean = sketches(range(120, 300))
    noise = stream(3, "test/planted")

    def warped(image: np.ndarray) -> np.ndarray:
        axes = np.meshgrid(*(np.arange(n, dtype=float) for n in image.shape), indexing="ij")
        pushed = [axis + ndimage.gaussian_filter(noise.normal(0, 2, image.shape), 3) for axis in axes]
        return ndimage.map_coordinates(image, pushed, order=1, mode="nearest")

    def planted(number: int, image: np.ndarray) -> np.ndarray:
        kinds = (
            lambda i: i,
            lambda i: i[::-1].copy(),
            lambda i: i + noise.normal(0, 0.03, i.shape) * (i > 0.05),
            warped,
        )
        return np.clip(kinds[number % 4](image), 0, 1)

    copies = [sketch_of(planted(n, blob(VENTRICLES[n], n)), GRID) for n in range(20)]
    mask = brain_mask(training)
    each = [searched([copy], training, unseen, mask, 0).nearer_than_reference.value for copy in copies]
    assert sum(value == 1 for value in each) >= 19  # the stated rate: 95 %
    with_copies = searched([*clean, *copies], training, unseen, mask, 0)
    assert with_copies.nearer_than_reference.value > with_copies.nearer_by_chance.high
    silent = searched(clean, training, unseen, mask, 0)
    assert silent.nearer_than_reference.value <= silent.nearer_by_chance.high
    assert silent.training_by_chance.low <= silent.nearest_is_training.value <= silent.training_by_chance.high


def test_blur_brings_images_nearer_to_everybody_but_not_to_those_seen() -> None:
    blurred = [Sketch(o.histogram, ndimage.gaussian_filter(o.coarse_XYZ, 0.7)) for o in OTHERS]
    found = searched(blurred, TRAINING, HELD_OUT, MASK, 0)
    assert found.training_by_chance.low <= found.nearest_is_training.value <= found.training_by_chance.high


def test_chance_is_what_happens_when_nothing_is_copied() -> None:
    """Both shares, over many draws of three groups from one population, keep inside their stated ranges."""
    draws, inside = stream(2, "test/chance"), np.zeros(2)
    blank, whole = np.zeros(256), np.ones((4, 4, 4), bool)
    for _ in range(120):
        groups = [[Sketch(blank, draws.normal(size=(4, 4, 4))) for _ in range(n)] for n in (12, 20, 6)]
        found = searched(*groups, whole, 0)
        for k, (value, chance) in enumerate(
            (
                (found.nearer_than_reference, found.nearer_by_chance),
                (found.nearest_is_training, found.training_by_chance),
            )
        ):
            inside[k] += chance.low <= value.value <= chance.high
    assert (inside / 120 >= 0.93).all()


def test_chance_where_training_people_stand_in_is_that_of_the_closest_pair() -> None:
    draws, blank, whole = stream(4, "test/pairs"), np.zeros(256), np.ones((4, 4, 4), bool)
    shares = []
    for _ in range(150):
        made, training = ([Sketch(blank, draws.normal(size=(4, 4, 4))) for _ in range(n)] for n in (12, 20))
        found = searched(made, training, [], whole, 0)
        shares.append(found.nearer_than_reference.value)
    assert found.nearer_by_chance.value == pytest.approx(2 / 21)
    assert np.mean(shares) == pytest.approx(2 / 21, abs=0.03)


def test_without_enough_held_out_people_training_people_stand_in() -> None:
    found = searched(OTHERS, TRAINING, HELD_OUT[:2], MASK, 0)
    assert found.reference_is == "training people, to another" and found.reference.n == 24
    nobody = searched(OTHERS, TRAINING, [], MASK, 0)
    assert nobody.nearest_is_training.value is None and nobody.reference.n == 24
    alone = searched(OTHERS, TRAINING[:1], [], MASK, 0)
    assert alone.reference.value is None and alone.synthetic.value is not None
    nothing = searched(OTHERS, [], [], MASK, 0)
    assert nothing.synthetic.value is None and "no training images" in nothing.synthetic.reason


def test_of_many_training_people_some_stand_in_each_compared_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    features = stream(0, "test/blocks").normal(size=(24, 2, 30))
    made, nobody = features[:1] + 0.1, np.empty((0, 2, 30))
    everybody = memorisation(made, [features], nobody, 0).reference
    assert everybody.n == 24
    monkeypatch.setattr("brainldm.evaluate.memorisation.MAX_AMONG_TRAINING", 10)
    blocks = [features[:4], features[4:12], features[12:]]
    found = memorisation(made, blocks, nobody, 0).reference
    apart = distances(features[:10], features[:, 0])
    apart[np.arange(10), np.arange(10)] = np.inf
    assert found.n == 10 and found.value == pytest.approx(np.median(apart.min(axis=1)))


def test_training_images_are_gone_through_in_blocks() -> None:
    many = [TRAINING[i % 24] for i in range(600)]
    assert searched(OTHERS, iter(many), HELD_OUT, MASK, 0).synthetic.value == pytest.approx(
        searched(OTHERS, TRAINING, HELD_OUT, MASK, 0).synthetic.value
    )


def test_white_is_where_the_brightest_voxels_begin() -> None:
    assert 0.8 < white_point(TRAINING) < 1
    dark = [Sketch(np.eye(1, 256, 0)[0], TRAINING[0].coarse_XYZ)]
    assert white_point(dark) == 1.0
