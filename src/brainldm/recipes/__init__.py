"""A run is a Python function that returns a config; its docstring says what it costs and what to expect.

The list below is what `brainldm train RECIPE` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from brainldm.base.errors import UsageError

if TYPE_CHECKING:
    from brainldm.train.config import Recipe

NAMES = ("quick", "demo", "small", "fast", "paper")


def recipe_named(name: str) -> Recipe:
    """The recipe of that name."""
    from brainldm.recipes import demo, fast, paper, quick, small

    makers: dict[str, Callable[[], Recipe]] = {
        "quick": quick.quick,
        "demo": demo.demo,
        "small": small.small,
        "fast": fast.fast,
        "paper": paper.paper,
    }
    if name not in makers:
        raise UsageError(f"no recipe is named {name!r}.", remedy=f"Choose one of: {', '.join(NAMES)}.")
    return makers[name]()
