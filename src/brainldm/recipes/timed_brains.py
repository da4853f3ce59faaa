"""Brains for a table or a card, and how long one of them took."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from brainldm.base.errors import PartialFailure
from brainldm.base.files import read_json, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.progress import Progress
from brainldm.generate.plan import PlanRow
from brainldm.generate.run import RECORD_NAME, GenerateSettings, generate
from brainldm.generate.start import start
from brainldm.model.precision import device_name


def make_brains(
    model: Path,
    rows: list[PlanRow],
    settings: GenerateSettings,
    out: Path,
    timing: Path,
    *,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Makes what is missing of the dataset `out`; returns how long a brain took on average, and on what, over the runs
    that made some, which the file `timing` adds up. A run that was killed is not timed: no seconds where none was.

    Brains that cannot be made are counted in `not_made`: they never will be, and the others are there to be judged.
    """
    ready = start(model, rows, settings, may_shrink_batch=True, begun=out, say=say)
    loaded = ready.load()
    begun, before = time.monotonic(), _brains_in(out)
    with contextlib.suppress(PartialFailure):
        generate(loaded, out, rows, ready.settings, progress=progress)
    spent, there = time.monotonic() - begun, _brains_in(out)
    made = there - before
    machine = {
        "device": device_name(ready.device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    timed: dict[str, Any] = read_json(timing) if timing.is_file() else {"brains": 0, "seconds": 0.0, "machine": machine}
    if made:
        timed = {"brains": timed["brains"] + made, "seconds": timed["seconds"] + spent, "machine": machine}
        write_json(timing, timed)
    recorded = read_json(out / RECORD_NAME)  # of those who made them, which may have been another machine
    return {
        "seconds_a_brain": timed["seconds"] / timed["brains"] if timed["brains"] else None,
        "brains_timed": timed["brains"],
        "not_made": len(rows) - there,
        "batch": recorded["batch"],
        "precision": recorded["precision"],
        "machine": timed["machine"],
    }


def _brains_in(dataset: Path) -> int:
    return len(Manifest(dataset / "manifest.jsonl").proven(dataset))


def _processor() -> str:
    """What the processor calls itself; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""
