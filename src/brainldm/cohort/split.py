"""Who is trained on, who is watched while training, who is kept for the end: by person, for ever.

A person's number between 0 and 1 comes from their id and the seed alone, so that nobody changes sides when people are
added to a study or taken from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Literal, get_args

from brainldm.base.errors import UsageError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
HELD_OUT: tuple[Split, ...] = ("validation", "test")  # whom no training has seen

# From so many people on, a split that the numbers leave empty is given one person.
_PEOPLE_FOR = {"validation": 5, "test": 10}


def place_of(participant_id: str, seed: int) -> float:
    """A number in 0..1 that belongs to this person under this seed, evenly spread over people."""
    digest = hashlib.sha256(f"{seed}\x1fsplit\x1f{participant_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(participant_id: str, seed: int, holdout: float) -> Split:
    """Where a person belongs: the first half of `holdout` is test, the second half validation, the rest train."""
    place = place_of(participant_id, seed)
    if place < holdout / 2:
        return "test"
    return "validation" if place < holdout else "train"


def assign_splits(
    participant_ids: Collection[str], *, seed: int, holdout: float, moved: Mapping[str, Split] | None
) -> dict[str, Split]:
    """Everybody's split. `moved` are those whom the first call took out of their own (`moved_people`); None is that
    first call.

    Chance can leave a split of a small study empty. Then, and only when the study is first split, one person of train
    is moved there: the one whose number is nearest. People who come later go where their number says.
    """
    check_holdout(holdout)
    splits = {i: (moved or {}).get(i, split_of(i, seed, holdout)) for i in sorted(participant_ids)}
    if moved is not None:
        return splits
    by_place = sorted(splits, key=lambda i: place_of(i, seed))
    for split in HELD_OUT if holdout > 0 else ():
        in_train = [i for i in by_place if splits[i] == "train"]
        if split not in splits.values() and len(splits) >= _PEOPLE_FOR[split] and len(in_train) > 1:
            splits[in_train[0]] = split
    if splits and "train" not in splits.values():
        splits[by_place[-1]] = "train"
    return splits


def moved_people(splits: Mapping[str, Split], *, seed: int, holdout: float) -> dict[str, Split]:
    """Those of `splits` who are not where their own number puts them."""
    return {i: s for i, s in splits.items() if s != split_of(i, seed, holdout)}


def check_holdout(holdout: float) -> None:
    if not 0 <= holdout < 1:
        raise UsageError(
            f"holdout is {holdout:g}; it must be at least 0 and below 1.",
            remedy="It is the share of people not trained on, say, 0.2.",
        )
