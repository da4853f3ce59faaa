"""Does it copy? How near synthetic images lie to the images that the model was trained on.

The distance is the root-mean-square difference of intensities over the voxels of the brain, at about 4 mm, of the image
as it is or mirrored, whichever is less. It finds plain, mirrored, noisy and slightly warped copies. It does not find
copies that are shifted by voxels of that size or keep only part of a person, and smooth images lie nearer to everybody;
that is why synthetic images are also asked whether their nearest real person is one that the model has seen, which
smoothness cannot change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from brainldm.base.streams import stream
from brainldm.evaluate.estimate import CONFIDENCE, Estimate, median, share
from brainldm.evaluate.examine import Sketch

# Two files of one image, written with different precision, differ by about this (int16 and uint8 steps are below it).
IDENTICAL_RMSE = 0.002
MIN_HELD_OUT = 3
DRAWS = 1000
_TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class Memorisation:
    """Distances are root-mean-square differences in units of the intensity range.

    `reference` is the same distance for people that the model has not seen: those held out, or where fewer than
    MIN_HELD_OUT are, each training person to the nearest other one (`reference_is` says which).
    `nearer_than_reference` is the share of synthetic images that lie nearer to a training image than any of the
    reference people does; `nearest_is_training` the share whose nearest real image is a training image rather than a
    held-out one. Beside each stands what it is by chance when nothing is copied, with the range that holds 95 %.
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
    seed: int,
) -> Memorisation:
    """Compares `synthetic` and `held_out` with every image of `training`, which is gone through once, in blocks."""
    queries = np.stack([_both_ways(look, mask_XYZ) for look in (*synthetic, *held_out)])
    made, unseen = queries[: len(synthetic)], queries[len(synthetic) :]
    nearest, who = np.full(len(queries), np.inf), np.zeros(len(queries), dtype=int)
    trained, among_training = 0, []
    for block in _blocks(training, mask_XYZ):
        apart = _apart(queries, block[:, 0])
        closest = apart.argmin(axis=1)
        distance = apart[np.arange(len(queries)), closest]
        who = np.where(distance < nearest, trained + closest, who)
        nearest = np.minimum(nearest, distance)
        trained += len(block)
        if len(unseen) < MIN_HELD_OUT:
            among_training.append(block)
    if trained == 0:
        return _nothing("there are no training images to compare with", len(made), len(unseen))

    own = nearest[: len(made)]
    if len(unseen) >= MIN_HELD_OUT:
        reference, reference_is = nearest[len(made) :], "held-out people"
    else:
        reference, reference_is = _leave_one_out(among_training), "training people, to another"
    nearer, nearer_by_chance = _nearer(own, reference)
    seen, seen_by_chance = _seen_or_not(made, own, who[: len(made)], unseen, trained, seed)
    return Memorisation(
        trained,
        len(unseen),
        reference_is,
        median(own),
        median(reference) if len(reference) else Estimate.none("fewer than 2 training people"),
        nearer,
        nearer_by_chance,
        seen,
        seen_by_chance,
        int((own < IDENTICAL_RMSE).sum()),
    )


def _nearer(own: np.ndarray, reference: np.ndarray) -> tuple[Estimate, Estimate]:
    n, m = len(own), len(reference)
    if m == 0:
        none = Estimate.none("there are no reference people")
        return none, none
    # Were all n + m alike, how many of the n lie below the least of the m is beta-binomial.
    low, high = (float(stats.betabinom.ppf(p, n, 1, m)) / n for p in (_TAIL, 1 - _TAIL))
    return share(int((own < reference.min()).sum()), n), Estimate(1 / (m + 1), low, high, m, "beta-binomial")


def _seen_or_not(
    made: np.ndarray, to_training: np.ndarray, who: np.ndarray, unseen: np.ndarray, trained: int, seed: int
) -> tuple[Estimate, Estimate]:
    if len(unseen) == 0:
        none = Estimate.none("nobody was held out, so there is no unseen person to be nearer to")
        return none, none
    apart = _apart(made, unseen[:, 0])
    is_unseen = apart.min(axis=1) < to_training
    # Some people are the nearest of many images; deciding again and again at random who counts as seen takes them
    # into account.
    person = np.where(is_unseen, trained + apart.argmin(axis=1), who)
    people, generator = trained + len(unseen), stream(seed, "evaluate/seen")
    shares = []
    for _ in range(DRAWS):
        seen = np.zeros(people, dtype=bool)
        seen[generator.permutation(people)[:trained]] = True
        shares.append(seen[person].mean())
    low, high = np.quantile(shares, [_TAIL, 1 - _TAIL]).tolist()
    return (
        share(int((~is_unseen).sum()), len(made)),
        Estimate(trained / people, low, high, people, f"{DRAWS} random choices of who was seen"),
    )


def _nothing(reason: str, synthetic: int, held_out: int) -> Memorisation:
    none = Estimate.none(reason, synthetic)
    return Memorisation(0, held_out, "", none, none, none, none, none, none, 0)


def _both_ways(look: Sketch, mask_XYZ: np.ndarray) -> np.ndarray:
    """(2, v): the voxels of the brain of an image as it is, and mirrored."""
    return np.stack([look.coarse_XYZ[mask_XYZ], look.coarse_XYZ[::-1][mask_XYZ]]).astype(np.float64)


def _blocks(looks: Iterable[Sketch], mask_XYZ: np.ndarray, size: int = 256) -> Iterator[np.ndarray]:
    """(n, 2, v), n at most `size`."""
    block: list[np.ndarray] = []
    for look in looks:
        block.append(_both_ways(look, mask_XYZ))
        if len(block) == size:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


def _apart(queries_N2V: np.ndarray, images_MV: np.ndarray) -> np.ndarray:
    """(n, m): the distance of the nearer of a query's two ways to each image."""
    return np.minimum(_rmse(queries_N2V[:, 0], images_MV), _rmse(queries_N2V[:, 1], images_MV))


def _rmse(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, m) root-mean-square differences between the rows of (n, v) and (m, v)."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1)[None, :] - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0) / first.shape[1])


def _leave_one_out(blocks: Sequence[np.ndarray]) -> np.ndarray:
    everyone = np.concatenate(blocks)
    if len(everyone) < 2:
        return np.empty(0)
    apart = _apart(everyone, everyone[:, 0])
    np.fill_diagonal(apart, np.inf)
    return apart.min(axis=1)
