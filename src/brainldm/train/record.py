"""Which run a folder holds: written before the first step, compared by every later one."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import brainldm
from brainldm.base.errors import UsageError
from brainldm.base.files import read_json, write_json
from brainldm.cohort.dataset import PreparedCohort
from brainldm.train.checkpoint import check_not_beyond, steps_made

# What earlier versions did not record, and did: a run of theirs goes on.
_BEFORE_IT_WAS_RECORDED: dict[str, Any] = {
    "recipe.autoencoder.perceptual": "random",
    "recipe.autoencoder.local_histogram_weight": 0.0,
    "recipe.diffusion.volume_reader": False,
    "perceptual_weights_sha256": [],
}
# What no earlier version recorded of baselines and predictors, so that it cannot be known.
_UNKNOWN_BEFORE = ("precision", "device")
# More steps; what takes memory or time and leaves the result; and settings, whose outcome is compared itself.
_MAY_CHANGE = ("steps", "checkpointing", "checkpoint_minutes", "minutes_share", "settings")


def record_run(out: Path, wanted: dict[str, Any], steps: Mapping[str, int]) -> None:
    """Writes run.json: `wanted` and the versions; UsageError where `out` holds another run, or things that are none.
    What does not change the result may change, and the number of steps, but not to fewer than a stage of `steps` has
    made."""
    path = out / "run.json"
    for stage, asked in steps.items():
        check_not_beyond(out / stage, asked, steps_made(out / stage))
    if path.is_file():
        different = _differences(read_json(path), wanted)
        if different:
            raise UsageError(
                f"this folder holds another run; it differs in {'; '.join(different[:4])}.",
                remedy="Use the same recipe and data to go on with it, or another --out.",
                path=out,
            )
    elif out.is_dir() and any(out.glob("[!.]*")):
        raise UsageError("the folder is not empty and is no training run.", remedy="Choose another --out.", path=out)
    versions = {"brainldm": brainldm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    write_json(path, wanted | {"versions": versions})


def record_one_stage(
    out: Path, what: Mapping[str, str], config: Any, cohort: PreparedCohort, *, stage: str, precision: str, device: str
) -> None:
    """The same of a run of one `stage` of that `config` alone: a baseline or a predictor, as `what` names it."""
    recorded = asdict(config)
    # The seed stands beside the config, where runs that began before it was one of its settings have it.
    run = {**what, "seed": recorded.pop("seed"), "config": recorded, "cohort": cohort.digest}
    record_run(out, run | {"precision": precision, "device": device}, {stage: config.steps})


def _differences(recorded: Any, wanted: Any, where: str = "") -> list[str]:
    """Which fields of two run descriptions differ, with both values, but those that a run may change. JSON knows no
    tuples, so lists and tuples are one."""
    if isinstance(wanted, dict) and isinstance(recorded, dict):
        texts = []
        for key in wanted:
            place = f"{where}.{key}".lstrip(".")
            unknown = key not in recorded and place in _UNKNOWN_BEFORE
            if key not in _MAY_CHANGE and not unknown:
                before = recorded.get(key, _BEFORE_IT_WAS_RECORDED.get(place))
                texts += _differences(before, wanted[key], place)
        return texts
    if isinstance(wanted, tuple | list) and isinstance(recorded, list):
        wanted = list(wanted)
    return [] if recorded == wanted else [f"{where}: {recorded!r} there, {wanted!r} now"]
