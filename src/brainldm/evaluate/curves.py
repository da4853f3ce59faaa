"""Learning curves of a training run, thinned to what a picture can show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from brainldm.base.errors import BadInput

POINTS = 300


def learning_curves(run: Path) -> dict[str, Any]:
    """By stage: the mean of every logged figure over at most POINTS equal stretches of steps.

    Reads RUN/<stage>/log.jsonl (or RUN/log.jsonl); BadInput when there is none.
    """
    logs = sorted(run.glob("*/log.jsonl")) or sorted(run.glob("log.jsonl"))
    if not logs:
        raise BadInput(
            "holds no training log (no STAGE/log.jsonl).",
            remedy="Name the folder that brainldm train wrote.",
            path=run,
            reason="missing",
        )
    # In the order of training where the names are known.
    order = {"autoencoder": 0, "diffusion": 1}
    logs.sort(key=lambda log: order.get(log.parent.name, 2))
    return {log.parent.name: _thinned(list(_records(log))) for log in logs}


def _records(log: Path) -> Iterator[dict[str, float]]:
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed run was writing
        if isinstance(record, dict) and isinstance(record.get("step"), int | float):
            yield {name: float(v) for name, v in record.items() if isinstance(v, int | float) and np.isfinite(v)}


def _thinned(records: list[dict[str, float]]) -> dict[str, list[float | None]]:
    stretches = [stretch for stretch in np.array_split(np.arange(len(records)), POINTS) if len(stretch)]
    names = sorted({name for record in records for name in record} - {"step"})
    curves: dict[str, list[float | None]] = {"step": [records[stretch[-1]]["step"] for stretch in stretches]}
    for name in names:
        curves[name] = []
        for stretch in stretches:
            values = [records[i][name] for i in stretch if name in records[i]]
            curves[name].append(float(np.mean(values)) if values else None)
    return curves
