"""Random streams: the same for the same name, on any machine, and independent of one another."""

from __future__ import annotations

import numpy as np

from brainldm.base.streams import stream


def test_a_stream_is_known_for_ever() -> None:
    """These numbers are a promise: datasets are regenerated from them years later."""
    told = stream(0, "noise", 3).integers(0, 2**63, 2).tolist()
    assert told == stream(0, "noise", 3).integers(0, 2**63, 2).tolist()
    assert told == PINNED


def test_every_part_of_the_name_counts() -> None:
    names = [(0, "noise", 0), (1, "noise", 0), (0, "noise", 1), (0, "noise ", 0), (0, "n", 0), (2**32, "noise", 0)]
    names += [(-1, "noise", 0), (0, "noise", 2**32), (11, "a", 1), (1, "a", 11), (1, "1\x1fa", 1)]
    draws = {tuple(stream(*name).integers(0, 2**63, 3).tolist()) for name in names}
    assert len(draws) == len(names)


def test_neighbouring_streams_are_uncorrelated() -> None:
    draws = np.stack([stream(0, "noise", i).standard_normal(4000) for i in range(40)])
    correlations = np.corrcoef(draws)[np.triu_indices(40, 1)]
    # 780 correlations of independent series have a standard deviation of 1/sqrt(4000); six of them never happen.
    assert np.abs(correlations).max() < 6 / np.sqrt(4000)
    assert abs(draws.mean()) < 6 / np.sqrt(draws.size)


def test_nothing_touches_the_global_generator() -> None:
    np.random.seed(1)  # noqa: NPY002  # the very thing that must not matter
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    stream(0, "noise").standard_normal(10)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


PINNED = [6974631540797626985, 8898007525502079460]
