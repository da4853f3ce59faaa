"""How far a training run is, told from the files it leaves: nothing is asked of the process that trains."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from brainldm.base.files import read_json
from brainldm.base.manifest import Manifest
from brainldm.base.progress import clock

RECENT_STEPS = 50
_TAIL_BYTES = 1 << 16


def watch_stages(run: Path, recorded: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each stage that has begun: steps, planned_steps, last (means of the last RECENT_STEPS logged),
    images_per_second and data_wait_share (recent), seconds_left, newest_checkpoint; and all that its summary says once
    it has ended.

    `recorded` is what run.json holds. What cannot be told is None.
    """
    return {log.parent.name: _stage(log.parent, _planned(recorded, log.parent.name)) for log in _logs(run)}


def _logs(run: Path) -> list[Path]:
    order = {"autoencoder": 0, "diffusion": 1}  # of training, where the names are known
    return sorted(run.glob("*/log.jsonl"), key=lambda log: (order.get(log.parent.name, 2), log.parent.name))


def _planned(recorded: dict[str, Any], stage: str) -> dict[str, Any]:
    found = recorded.get("recipe", {}).get(stage) or recorded.get("config") or {}
    return found if isinstance(found, dict) else {}


def _stage(folder: Path, planned: dict[str, Any]) -> dict[str, Any]:
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    rows, times = _last_rows(folder / "log.jsonl"), _last_rows(folder / "timing.jsonl")
    steps = int(rows[-1]["step"]) if rows else int(summary.get("steps", 0))
    wanted = planned.get("steps", summary.get("planned_steps"))
    names = [name for name in (rows[-1] if rows else {}) if name != "step"]
    given = {name: [row[name] for row in rows if name in row] for name in names}
    state = {
        "steps": steps,
        "planned_steps": wanted,
        "last": {name: sum(values) / len(values) for name, values in given.items()},
        "images_per_second": None,
        "data_wait_share": None,
        "seconds_left": None,
        "newest_checkpoint": _newest_checkpoint(folder / "checkpoints"),
    }
    # Where a run was gone on with, the clock of its log goes on too, so differences are training time.
    seconds = times[-1]["seconds"] - times[0]["seconds"] if len(times) > 1 else 0.0
    if seconds > 0:
        each = seconds / (len(times) - 1)
        state["data_wait_share"] = sum(row.get("wait_seconds", 0.0) for row in times[:-1]) / seconds
        if planned.get("batch"):
            state["images_per_second"] = planned["batch"] / each
        if wanted is not None:
            state["seconds_left"] = max(0, wanted - steps) * each
    return summary | state


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last RECENT_STEPS whole rows that have a step, read from the end of the file alone."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    rows = []
    for line in lines[-RECENT_STEPS - 2 :]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut by our reading, or being written
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows[-RECENT_STEPS:]


def _newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    there = [record for record in Manifest(folder / "manifest.jsonl").records() if (folder / record["file"]).is_file()]
    return {key: there[-1][key] for key in ("index", "file", "bytes")} if there else None


def told(state: dict[str, Any]) -> str:
    """A stage's state on one line, for people."""
    planned = state["planned_steps"]
    parts = [f"{state['steps']} of {planned} steps" if planned else f"{state['steps']} steps"]
    parts += [", ".join(f"{name} {value:.4g}" for name, value in state["last"].items())]
    if state["images_per_second"] is not None:
        parts.append(f"{state['images_per_second']:.3g} images/s")
    if state["data_wait_share"] is not None:
        parts.append(f"{100 * state['data_wait_share']:.0f} % waiting for data")
    if state["seconds_left"]:
        parts.append(f"{clock(state['seconds_left'])} left at this pace")
    newest = state["newest_checkpoint"]
    parts.append(f"newest checkpoint: step {newest['index']}" if newest else "no checkpoint yet")
    return "; ".join(part for part in parts if part)
