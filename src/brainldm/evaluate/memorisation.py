"""Does it copy? How near synthetic images lie to the images that the model was trained on.

The distance is the root-mean-square difference of intensities over the voxels of the brain, at about 4 mm. It finds
plain copies. It does not find copies that are shifted, mirrored or warped, or that keep only part of a person, and
smooth images lie nearer to everybody; that is why synthetic images are also asked whether their nearest real person is
one that the model has seen, which smoothness cannot change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from brainldm.evaluate.estimate import Estimate, median, share
from brainldm.evaluate.examine import Sketch

# Two files of one image, written with different precision, differ by about this (int16 and uint8 steps are below it).
IDENTICAL_RMSE = 0.002
MIN_HELD_OUT = 3


@dataclass(frozen=True)
class Memorisation:
    """Distances are root-mean-square differences in units of the intensity range.

    `reference` is the same distance for people that the model has not seen: those held out, or where fewer than
    MIN_HELD_OUT are, each training person to the nearest other one (`reference_is` says which).
    `nearer_than_reference` is the share of synthetic images that lie nearer to a training image than any of the
    reference people does, `nearer_by_chance` what it would be if synthetic images were such people.
    `nearest_is_training` is the share of synthetic images whose nearest real image is a training image rather than a
    held-out one, `training_by_chance` the share of training images among the real ones.
    """

    training: int
    held_out: int
    reference_is: str
    synthetic: Estimate
    reference: Estimate
    nearer_than_reference: Estimate
    nearer_by_chance: Estimate
    nearest_is_training: Estimate
    training_by_chance: Estimate
    identical: int


def memorisation(
    synthetic: Sequence[Sketch],
    training: Iterable[Sketch],
    held_out: Sequence[Sketch],
    mask_XYZ: np.ndarray,
) -> Memorisation:
    """Compares `synthetic` and `held_out` with every image of `training`, which is gone through once, in blocks."""
    queries = np.stack([_features(look, mask_XYZ) for look in (*synthetic, *held_out)])
    made = len(synthetic)
    nearest = np.full(len(queries), np.inf)
    trained, among_training = 0, []
    for block in _blocks(training, mask_XYZ):
        trained += len(block)
        nearest = np.minimum(nearest, _rmse(queries, block).min(axis=1))
        if len(held_out) < MIN_HELD_OUT:
            among_training.append(block)
    if trained == 0:
        return _nothing("there are no training images to compare with", len(synthetic), len(held_out))

    own = nearest[:made]
    if len(held_out) >= MIN_HELD_OUT:
        reference, reference_is = nearest[made:], "held-out people"
    else:
        reference, reference_is = _leave_one_out(among_training), "training people, to another"
    reference_estimate = median(reference) if len(reference) else Estimate.none("fewer than 2 training people")
    if len(reference):
        nearer = share(int((own < reference.min()).sum()), made)
        by_chance = Estimate(1 / (len(reference) + 1), n=len(reference), reason="exact, if nothing is copied")
    else:
        nearer = by_chance = reference_estimate
    seen, seen_by_chance = _seen_or_not(queries[:made], own, queries[made:], trained)
    return Memorisation(
        trained,
        len(held_out),
        reference_is,
        median(own),
        reference_estimate,
        nearer,
        by_chance,
        seen,
        seen_by_chance,
        int((own < IDENTICAL_RMSE).sum()),
    )


def _seen_or_not(
    synthetic: np.ndarray, to_training: np.ndarray, held_out: np.ndarray, trained: int
) -> tuple[Estimate, Estimate]:
    if len(held_out) == 0:
        none = Estimate.none("nobody was held out, so there is no unseen person to be nearer to")
        return none, none
    to_held_out = _rmse(synthetic, held_out).min(axis=1)
    chance = trained / (trained + len(held_out))
    return (
        share(int((to_training < to_held_out).sum()), len(synthetic)),
        Estimate(chance, n=trained + len(held_out), reason="exact, if seen and unseen people are alike"),
    )


def _nothing(reason: str, synthetic: int, held_out: int) -> Memorisation:
    none = Estimate.none(reason, synthetic)
    return Memorisation(0, held_out, "", none, none, none, none, none, none, 0)


def _features(look: Sketch, mask_XYZ: np.ndarray) -> np.ndarray:
    return look.coarse_XYZ[mask_XYZ].astype(np.float64)


def _blocks(looks: Iterable[Sketch], mask_XYZ: np.ndarray, size: int = 256) -> Iterator[np.ndarray]:
    block: list[np.ndarray] = []
    for look in looks:
        block.append(_features(look, mask_XYZ))
        if len(block) == size:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


def _rmse(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, m) root-mean-square differences between the rows of (n, v) and (m, v)."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1)[None, :] - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0) / first.shape[1])


def _leave_one_out(blocks: Sequence[np.ndarray]) -> np.ndarray:
    everyone = np.concatenate(blocks)
    if len(everyone) < 2:
        return np.empty(0)
    apart = _rmse(everyone, everyone)
    np.fill_diagonal(apart, np.inf)
    return apart.min(axis=1)
