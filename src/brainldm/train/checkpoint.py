"""Checkpoints that a killed run goes on from as if nothing had happened.

One safetensors file holds everything a stage needs: networks, their averages, optimiser moments. There is no generator
state to keep, because every draw is named by (seed, purpose, step). A manifest line with the SHA-256, written after
the rename, makes a checkpoint count; a damaged newest one is passed over for the one before, and said so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import sha256_of
from brainldm.base.manifest import Manifest, is_intact
from brainldm.model.tensors import write_tensors
from brainldm.train.distributed import ALONE, Place
from brainldm.train.sharding import for_checkpoint, laid_out_as

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """A stage's whole state after `step` steps; `seconds` is the training time it took so far."""

    step: int
    seconds: float
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes the checkpoint whole, lists it, and drops all but the newest two."""
    path = folder / _name(checkpoint.step)
    metadata = {"step": checkpoint.step, "seconds": checkpoint.seconds, "facts": checkpoint.facts}
    write_tensors(path, checkpoint.tensors, {"brainldm": json.dumps(metadata)})
    manifest = Manifest(folder / "manifest.jsonl")
    manifest.append(index=checkpoint.step, file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
    # One that a killed run wrote and did not list counts for nothing, so it takes nobody's place.
    listed = {record["file"] for record in manifest.records()}
    there = sorted(folder.glob("step-*.safetensors"))
    kept = [old for old in there if old.name in listed][-KEEP:]
    for old in there:
        if old not in kept:
            old.unlink()
    return path


def load_newest(folder: Path, warn: Callable[[str], None], place: Place = ALONE) -> Checkpoint | None:
    """The newest checkpoint whose bytes are those that were written; None when there is none at all. Of several
    processes the leader proves it, and all map it.

    Damaged ones are passed over with a warning; BadInput when there were some and all are damaged, EnvironmentProblem
    where processes do not see the same files.
    """
    newest = place.from_leader(_newest_whole(folder, warn) if place.leads else None)
    place.check_same(newest is None or newest.is_file(), "newest checkpoints")
    return None if newest is None else _read(newest)


def _listed(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """The manifest's records whose files are there, the newest first."""
    latest = {record["index"]: record for record in Manifest(folder / "manifest.jsonl").records()}
    records = [record for _, record in sorted(latest.items(), reverse=True)]
    return [(record, folder / record["file"]) for record in records if (folder / record["file"]).is_file()]


def _newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    present = _listed(folder)
    for record, path in present:
        if is_intact(folder, record, full=True):
            return path
        warn(f"{path.name} is damaged (its SHA-256 is not the one recorded); going back to the one before.")
    if present:
        raise BadInput(
            "every checkpoint here is damaged.",
            remedy="Restore one from a copy, or delete the folder to train this stage from the beginning.",
            path=folder,
            reason="checksum",
        )
    return None


def steps_made(stage_folder: Path) -> int:
    """How many steps the newest checkpoint of a stage states, unproven; 0 where there is none."""
    return next((record["index"] for record, _ in _listed(stage_folder / "checkpoints")), 0)


def newest_facts(stage_folder: Path) -> dict[str, Any]:
    """What the newest checkpoint of a stage was made for, unproven; nothing where there is none or it cannot be read.
    Its tensors are not looked at."""
    listed = _listed(stage_folder / "checkpoints")
    try:
        return _metadata(listed[0][1])["facts"] if listed else {}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return {}


def check_made_for(stage_folder: Path, wanted: Mapping[str, str], there: Mapping[str, Any]) -> None:
    """UsageError where the facts `there` of a stage's checkpoint are others than those `wanted`: its weights are worth
    nothing on anything else."""
    for name, value in wanted.items():
        if there.get(name, value) != value:
            raise UsageError(
                f"the {stage_folder.name} in this folder was trained on other {name}: what makes them has changed "
                "since.",
                remedy="Delete the folder to train this stage anew, or use another --out.",
                path=stage_folder,
            )


def check_not_beyond(stage_folder: Path, steps: int, made: int) -> None:
    """UsageError where a stage has made more steps than are asked for."""
    if made > steps:
        raise UsageError(
            f"{steps} steps were asked for, and this run has made {made}.",
            remedy=f"Ask for {made} or more, or use another --out.",
            path=stage_folder,
        )


def drop_newer(folder: Path, step: int) -> None:
    """Removes checkpoints after `step`, of which a run that goes on from there knows that they are damaged or were
    never listed: they must not count as one of those kept."""
    for path in folder.glob("step-*.safetensors"):
        if path.name > _name(step):
            path.unlink()


def _name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()["brainldm"])


def _read(path: Path) -> Checkpoint:
    metadata = _metadata(path)
    return Checkpoint(metadata["step"], metadata["seconds"], load_file(path), metadata["facts"])


def optimiser_tensors(name: str, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's moments by flat names, so that they fit a safetensors file."""
    state = optimiser.state_dict()["state"]
    return {
        f"optimiser/{name}/{index}/{key}": for_checkpoint(torch.as_tensor(value))
        for index, entries in state.items()
        for key, value in entries.items()
    }


def restore_optimiser(name: str, optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts saved moments back; the optimiser must be built for the same parameters.

    Moments get the memory layout of their parameter: the fused kernels walk through both as they lie in memory, and
    would pair the wrong elements.
    """
    prefix = f"optimiser/{name}/"
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            index, entry = key.removeprefix(prefix).split("/")
            parameter = parameters[int(index)]
            # A copy in any case: what is read from a checkpoint is its file, mapped, which would stay on disk.
            laid_out = laid_out_as(parameter, tensor) if tensor.shape == parameter.shape else tensor.clone()
            state.setdefault(int(index), {})[entry] = laid_out.detach()
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def module_tensors(name: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": for_checkpoint(tensor) for key, tensor in module.state_dict().items()}


def restore_module(name: str, module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    prefix = f"{name}/"
    saved = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    own = module.state_dict()
    fits = {k for k, t in saved.items() if k in own and own[k].shape == t.shape}  # the rest is for torch to refuse
    module.load_state_dict({k: laid_out_as(own[k], t) if k in fits else t for k, t in saved.items()})
