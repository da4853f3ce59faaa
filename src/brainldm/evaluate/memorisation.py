"""Does it copy? How near synthetic images lie to the images that the model was trained on, in any space of features.

A distance is the root-mean-square difference of two images' features, of the image as it is or mirrored, whichever is
less. Two spaces are searched: the voxels of the brain at about 4 mm, which find plain, mirrored, noisy and slightly
warped copies and those shifted by half such a voxel, but few that are shifted by a whole one; and a network's features,
which find copies of other grey values and sharpness, but (the random network's) few that are shifted at all. Neither
finds a copy of only a part of a person for certain, and smooth images lie nearer to everybody; that is why synthetic
images are also asked whether their nearest real person is one that the model has seen, which smoothness cannot change.

Membership inference turns the question round: can somebody who holds only the synthetic images tell, by who lies near
them, whether a person was in the training? The control plays the same game among training people alone, where there is
nothing to tell. It is an average over all training people, so a set that copies some of many moves it little: it finds
a model that leaks in general, and not a few copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from brainldm.base.streams import stream
from brainldm.base.tables import write_table
from brainldm.evaluate.estimate import CONFIDENCE, Estimate, area_under_curve, median, share
from brainldm.evaluate.examine import Sketch
from brainldm.evaluate.images import JudgedImage
from brainldm.evaluate.measuring import inert

# Two files of one image, written with different precision, differ by about this in grey values (int16 and uint8 steps
# are below it).
IDENTICAL_RMSE = 0.002
MIN_HELD_OUT = 3
MAX_AMONG_TRAINING = 1000  # people whose nearest other training person stands for that of the unseen
DRAWS = 1000
_TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class Suspect:
    """A synthetic image that lies nearer to a training image than any of the reference people does: their places in the
    order in which they were given, and how far apart they lie."""

    image: int
    training: int
    rmse: float


@dataclass(frozen=True)
class Memorisation:
    """Distances are root-mean-square differences of features.

    `reference` is the same distance for people that the model has not seen: those held out, or where fewer than
    MIN_HELD_OUT are, each training person to the nearest other one (`reference_is` says which).
    `nearer_than_reference` is the share of synthetic images that lie nearer to a training image than any of the
    reference people does; `nearest_is_training` the share whose nearest real image is a training image rather than a
    held-out one; `membership` how well nearness to the synthetic images tells training people from held-out ones (area
    under the curve). Beside each stands what it is by chance when nothing is copied, with the range that holds 95 %.
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
    membership: Estimate
    membership_by_chance: Estimate
    least: float  # the smallest distance of a synthetic image to a training image
    identical: int  # synthetic images nearer than IDENTICAL_RMSE to one, which means copies only of grey values
    suspects: tuple[Suspect, ...]  # nearest first


def memorisation(
    made_N2F: np.ndarray, training: Iterable[np.ndarray], unseen_M2F: np.ndarray, seed: int
) -> Memorisation:
    """Compares synthetic and held-out images, each as it is and mirrored, with every image of `training`.

    `training` gives blocks (n, 1 or 2, F), the second being the mirror images, and is gone through once.
    """
    made, unseen = made_N2F, unseen_M2F
    queries = np.concatenate([made, unseen]) if len(unseen) else made
    nearest, who = np.full(len(queries), np.inf), np.zeros(len(queries), dtype=int)
    trained, to_made = 0, list[np.ndarray]()
    some, some_to_others = made[:0], np.array(np.inf)  # of training, where they stand for the unseen
    for block in training:
        apart = distances(queries, block[:, 0])
        closest = apart.argmin(axis=1)
        distance = apart[np.arange(len(queries)), closest]
        who = np.where(distance < nearest, trained + closest, who)
        nearest = np.minimum(nearest, distance)
        to_made.append(apart[: len(made)].min(axis=0))
        trained += len(block)
        if len(unseen) < MIN_HELD_OUT:
            room = MAX_AMONG_TRAINING - len(some)
            some = np.concatenate([some, block[:room]]) if len(some) else block[:room]
            if len(block) > room:
                some_to_others = np.minimum(some_to_others, distances(some, block[room:, 0]).min(axis=1))
    if trained == 0:
        return _nothing("there are no training images to compare with", len(made), len(unseen))

    own = nearest[: len(made)]
    if len(unseen) >= MIN_HELD_OUT:
        reference, reference_is = nearest[len(made) :], "held-out people"
        by_chance = _least_of_strangers(len(own), len(reference))
    else:
        reference, reference_is = np.minimum(_leave_one_out(some), some_to_others), "training people, to another"
        by_chance = _least_of_each_other(len(reference))
    bound = reference.min() if len(reference) else 0.0
    nearer = share(int((own < bound).sum()), len(own)) if len(reference) else by_chance
    seen, seen_by_chance = _seen_or_not(made, own, who[: len(made)], unseen, trained, seed)
    membership, membership_by_chance = _membership(np.concatenate(to_made), made, unseen, seed)
    return Memorisation(
        trained,
        len(unseen),
        reference_is,
        median(own),
        median(reference) if len(reference) else Estimate.none("fewer than 2 training people"),
        nearer,
        by_chance,
        seen,
        seen_by_chance,
        membership,
        membership_by_chance,
        float(own.min()),
        int((own < IDENTICAL_RMSE).sum()),
        tuple(Suspect(int(i), int(who[i]), float(own[i])) for i in np.argsort(own) if own[i] < bound),
    )


def voxel_features(looks: Iterable[Sketch], mask_XYZ: np.ndarray) -> np.ndarray:
    """(n, 2, F): the voxels of the brain at about 4 mm of images as they are, and mirrored."""
    rows = [np.stack([look.coarse_XYZ[mask_XYZ], look.coarse_XYZ[::-1][mask_XYZ]]) for look in looks]
    return np.stack(rows) if rows else np.empty((0, 2, int(mask_XYZ.sum())), dtype=np.float32)


def write_suspects(
    path: Path,
    found: Mapping[str, Sequence[Suspect]],
    made: Sequence[JudgedImage],
    training: Sequence[JudgedImage],
) -> None:
    """A row a suspect and space of features: the brain, the training image that it lies nearest to, and how near."""
    columns = ("space", "participant_id", "file", "nearest_participant_id", "nearest_file", "rmse")
    rows = [
        {
            "space": space,
            "participant_id": inert(made[suspect.image].participant_id),
            "file": inert(made[suspect.image].file),
            "nearest_participant_id": inert(training[suspect.training].participant_id),
            "nearest_file": inert(training[suspect.training].file),
            "rmse": float(f"{suspect.rmse:.5g}"),
        }
        for space, suspects in found.items()
        for suspect in suspects
    ]
    write_table(path, columns, rows)


def _membership(members: np.ndarray, made: np.ndarray, unseen: np.ndarray, seed: int) -> tuple[Estimate, Estimate]:
    """Area under the curve with which the distance to the nearest synthetic image tells members from others."""
    if len(unseen) < MIN_HELD_OUT or len(members) < 2 * MIN_HELD_OUT:
        none = Estimate.none("too few people were held out to be told from those trained on", len(unseen))
        return none, none
    others = distances(made, unseen[:, 0]).min(axis=0)
    found = area_under_curve((-others).tolist(), (-members).tolist())
    generator, size = stream(seed, "evaluate/membership"), min(len(others), len(members) // 2)
    areas = np.empty(DRAWS)
    ranks = stats.rankdata(-members)
    for draw in range(DRAWS):
        left_out = generator.permutation(len(members))[:size]
        # Mann and Whitney's U of the rest, from the ranks of those left out.
        below = ranks[left_out].sum() - size * (size + 1) / 2
        areas[draw] = 1 - below / (size * (len(members) - size))
    low, high = np.quantile(areas, [_TAIL, 1 - _TAIL]).tolist()
    return found, Estimate(float(areas.mean()), low, high, len(members), f"{DRAWS} games among training people")


def _least_of_strangers(n: int, m: int) -> Estimate:
    """How often one of `n` who copy nobody lies nearer to the training people than the nearest of `m` strangers."""
    # Were all n + m alike, how many of the n lie below the least of the m is beta-binomial.
    low, high = (float(stats.betabinom.ppf(p, n, 1, m)) / n for p in (_TAIL, 1 - _TAIL))
    return Estimate(1 / (m + 1), low, high, m, "beta-binomial")


def _least_of_each_other(m: int) -> Estimate:
    """How often somebody who copies nobody lies nearer to one of `m` people than any two of them to each other."""
    if m == 0:
        return Estimate.none("there are no reference people")
    # Of m + 1 people who are all alike, two make the closest pair; where more people than these m stand behind the
    # distances, it is rarer.
    return Estimate(2 / (m + 1), n=m, reason="at most; no interval is known where training people stand in")


def _seen_or_not(
    made: np.ndarray, to_training: np.ndarray, who: np.ndarray, unseen: np.ndarray, trained: int, seed: int
) -> tuple[Estimate, Estimate]:
    if len(unseen) == 0:
        none = Estimate.none("nobody was held out, so there is no unseen person to be nearer to")
        return none, none
    apart = distances(made, unseen[:, 0])
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
    return Memorisation(0, held_out, "", none, none, none, none, none, none, none, none, float("inf"), 0, ())


def distances(queries_NWF: np.ndarray, images_MF: np.ndarray) -> np.ndarray:
    """(n, m): the distance of the nearest of a query's ways to each image."""
    ways = [_rmse(queries_NWF[:, way].astype(np.float64), images_MF) for way in range(queries_NWF.shape[1])]
    return np.minimum.reduce(ways)


def _rmse(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, m) root-mean-square differences between the rows of (n, v) and (m, v)."""
    second = second.astype(np.float64)
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1)[None, :] - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0) / first.shape[1])


def _leave_one_out(everyone: np.ndarray) -> np.ndarray:
    if len(everyone) < 2:
        return np.empty(0)
    apart = distances(everyone, everyone[:, 0])
    np.fill_diagonal(apart, np.inf)
    return apart.min(axis=1)
