"""A count with its noun: 1 brain, 2 brains."""

from __future__ import annotations


def counted(count: int, one: str, many: str = "") -> str:
    """The count and what is counted; `many` is `one` with an s where it is not given.

    >>> counted(1, "brain"), counted(0, "brain"), counted(1, "person is", "people are")
    ('1 brain', '0 brains', '1 person is')
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"
