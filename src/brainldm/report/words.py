"""How a page names things and writes numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shown:
    """How a covariate is shown: stored value * `factor`, with `decimals`, in `unit`."""

    title: str
    unit: str
    factor: float
    decimals: int


COVARIATES_SHOWN = {
    "age_years": Shown("Age", "years", 1.0, 1),
    "ventricles_mm3": Shown("Ventricles", "mL", 1e-3, 1),
    "brain_mm3": Shown("Brain volume", "mL", 1e-3, 0),
}

# Section of the scorecard: its title and what it is about.
SECTIONS = {
    "conditioning": (
        "Does it obey?",
        "What was asked of each brain against what is found in its image.",
    ),
    "diversity": ("Is it diverse?", "How alike two brains of the set are, beside how alike two real ones are."),
    "distribution": ("Is it real?", "The synthetic brains as a set, beside the real ones as a set."),
    "memorisation": ("Does it copy?", "How near the brains lie to the people that the model has seen."),
}


def covariate(value: float | None, name: str, *, sign: bool = False) -> str:
    """A covariate as people read it, without its unit; a dash where there is none."""
    if value is None:
        return "–"
    shown = COVARIATES_SHOWN[name]
    return f"{value * shown.factor:{'+' if sign else ''}.{shown.decimals}f}".replace("-", "−")


def estimate(content: Mapping[str, Any] | None, unit: Mapping[str, Any]) -> Mapping[str, str] | None:
    """An estimate's value, interval and the interval's method as text; None where there is no value."""
    if not content or content.get("value") is None:
        return None

    def text(value: float) -> str:
        return f"{value * unit['factor']:.{unit['decimals']}f}".replace("-", "−")

    interval = ""
    if content.get("low") is not None and content.get("high") is not None:
        interval = f"{text(content['low'])} to {text(content['high'])}"
    return {"value": text(content["value"]), "interval": interval, "how": str(content.get("interval", ""))}
