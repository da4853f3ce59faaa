"""Everything that is made in several steps. A training is a function that returns a config, and its docstring says what
it costs and what to expect; the others go through several commands: figures, tables, a model's card.

The list below is what `brainldm train RECIPE` knows of latent diffusion; it also trains predictors and GANs.
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
