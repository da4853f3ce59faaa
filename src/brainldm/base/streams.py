"""Named random streams: every draw belongs to (root seed, purpose, index) and to nothing else.

The same row gets the same noise whatever the batch, the worker, the order or a resume, because nothing reads a global
generator. NumPy's Philox is used throughout: torch's CPU generator keeps only 32 bits of a seed, so that streams
of different rows could coincide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def stream(root_seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A generator of its own for `purpose` and `index` under `root_seed`.

    Equal arguments give equal draws on every machine; any difference gives an independent stream (a 128-bit Philox key
    from SHA-256 of the three).

    >>> a, b = stream(0, "noise", 3), stream(0, "noise", 3)
    >>> bool((a.standard_normal(4) == b.standard_normal(4)).all())
    True
    """
    name = f"{int(root_seed)}\x1f{purpose}\x1f{int(index)}".encode()
    key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def drawn(items: Sequence[T], most: int, generator: np.random.Generator) -> list[T]:
    """At most `most` of the items, drawn at random, in their order.

    >>> drawn("abc", 5, stream(0, "some"))
    ['a', 'b', 'c']
    """
    if len(items) <= most:
        return list(items)
    chosen = generator.choice(len(items), size=most, replace=False)
    return [items[position] for position in sorted(chosen.tolist())]
