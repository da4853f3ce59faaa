"""The same work for many images: by position, with progress, in processes only where that is worth their start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from brainldm.base.pool import each_in_a_pool
from brainldm.base.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    progress: Progress,
    what: str,
    done_before: int = 0,
    heavy: bool = True,
) -> Iterator[tuple[int, Result | Exception]]:
    """Yields (position, result or exception) for every item as it is finished, in no certain order.

    Work that is not `heavy` is done in this process. `work` must be importable and picklable.

    >>> from brainldm.base.progress import Quiet
    >>> list(each(abs, [-1, 2], workers=1, progress=Quiet(), what="taking absolute values"))
    [(0, 1), (1, 2)]
    """
    progress.start(what, len(items) + done_before, done_before)
    numbered = list(enumerate(items))
    for (position, _), outcome in each_in_a_pool(
        partial(_of_numbered, work), numbered, workers=workers if heavy else 1
    ):
        progress.advance()
        yield position, outcome


def _of_numbered(work: Callable[[Item], Result], numbered: tuple[int, Item]) -> Result:
    return work(numbered[1])
