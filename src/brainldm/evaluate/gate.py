"""Which images are plausible at all? Each synthetic image held against the real ones in a few figures: keep or reject.

The same rule by which `generate --gate` draws again (cohort/quality.py), for images of any origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from brainldm.base.tables import write_table
from brainldm.cohort.quality import FALSE_POSITIVE_RATE, FEWEST_PEOPLE, FIGURES, UsualImages
from brainldm.evaluate.estimate import Estimate, share
from brainldm.evaluate.examine import Examined
from brainldm.evaluate.measuring import inert


@dataclass(frozen=True)
class Gate:
    """`objections` to each synthetic image, empty where it is kept; `rejected` is their share, and `by_design` how
    often the rule rejects a real person."""

    objections: tuple[str, ...]
    rejected: Estimate
    by_design: Estimate


def gate(synthetic: Sequence[Examined], real: Sequence[Examined]) -> Gate:
    """Holds the synthetic images against the real ones; nobody is judged where fewer than FEWEST_PEOPLE are real."""
    population = UsualImages.fitted(look.figures for look in real if look.figures is not None)
    if population is None:
        none = Estimate.none(
            f"it takes {FEWEST_PEOPLE} real images to say what is usual, there are {len(real)}", len(real)
        )
        return Gate((), none, none)
    objections = tuple(population.objection(look.figures) for look in synthetic)
    rejected = share(sum(bool(objection) for objection in objections), len(objections))
    return Gate(objections, rejected, Estimate(FALSE_POSITIVE_RATE, n=population.people, reason="how the rule is set"))


def write_gate(path: Path, synthetic: Sequence[Examined], found: Gate) -> None:
    """A row an image: keep or reject, why, and its figures."""
    columns = ("participant_id", "file", "verdict", "objection", *FIGURES)
    rows = []
    for look, objection in zip(synthetic, found.objections):
        figures = {} if look.figures is None else dict(zip(FIGURES, (float(f"{v:.5g}") for v in look.figures)))
        verdict = {"verdict": "reject" if objection else "keep", "objection": objection or None}
        names = {"participant_id": inert(look.image.participant_id), "file": inert(look.image.file)}
        rows.append(names | verdict | figures)
    write_table(path, columns, rows)
