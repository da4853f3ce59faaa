"""Stage 1 of a run: the autoencoder is trained, looked at, and read again for stage 2."""

from __future__ import annotations

from typing import Any

import torch

from brainldm.base.errors import EnvironmentProblem, UsageError
from brainldm.base.files import read_json, write_json
from brainldm.base.progress import warn
from brainldm.nets.atlas import AnyAutoencoder, build_autoencoder
from brainldm.train.autoencoder_stage import AutoencoderStage
from brainldm.train.checkpoint import load_newest, restore_module, steps_made
from brainldm.train.shared import Run


def train_autoencoder(run: Run, minutes: float | None) -> dict[str, Any]:
    """RUN/autoencoder: trained to its end or for so long, with what it loses of held-out people in its summary."""
    _feed_from_disk(run)
    path = run.out / "autoencoder" / "summary.json"
    before = read_json(path) if path.is_file() else {}
    run.place.wait()
    stage = AutoencoderStage(
        run.recipe.autoencoder,
        run.train,
        run.validation,
        seed=run.recipe.seed,
        device=run.device,
        precision=run.precision,
        place=run.place,
        sharded=run.shard,
        perceptual_weights=run.perceptual.weights,
        start=None if run.start is None else run.start.autoencoder,
    )
    summary = run.run_stage(stage, minutes)
    if "validation" in before and before["steps"] == summary["steps"]:
        summary["validation"] = before["validation"]
    else:
        folder = path.parent if run.place.leads else None
        # Of shards all must take part; whole weights the leader looks at alone, and the others wait.
        found = stage.validate(folder, run.progress) if run.shard or run.place.leads else {}
        summary["validation"] = run.place.from_leader(found)
    if run.place.leads:
        write_json(path, summary)
        config = run.recipe.autoencoder
        if config.reaches_adversarial(config.steps) and not config.reaches_adversarial(summary["steps"]):
            warn(
                f"time ended stage 1 after {summary['steps']} steps, before its adversarial loss, which was "
                f"to begin at step {config.adversarial_from_step}."
            )
    run.place.wait()
    return summary


def _feed_from_disk(run: Run) -> None:
    """Where there are steps to make and images do not fit in memory (or a cache was asked for), they are laid out
    uncompressed. A default cache that the disk has no room for is done without, and said so."""
    wanted = run.cache is not None or not run.train.fits_in_memory
    if not wanted or steps_made(run.out / "autoencoder") >= run.recipe.autoencoder.steps:
        return
    try:
        run.train.keep_uncompressed(run.cache or run.out / "cache", run.progress)
    except EnvironmentProblem as error:
        if run.cache is not None or error.reason != "disk_full":
            raise
        warn(f"{error} Every epoch inflates its images again.")


def trained_autoencoder(run: Run) -> tuple[AnyAutoencoder, dict[str, Any]]:
    """The autoencoder as stage 1 left it (with any number of steps), or where it was left out, the one of the model
    that the run began with; and its summary."""
    path = run.out / "autoencoder" / "summary.json"
    if not path.is_file() and run.start is not None:
        return run.start.autoencoder.to(run.device), {"stage": "autoencoder", "taken_from": run.start_facts}
    if not path.is_file():
        raise UsageError(
            "stage 2 needs the autoencoder, and stage 1 has not ended here.",
            remedy="Train with --stage autoencoder (or all) first, or with --start-from a model that has one.",
            path=run.out,
        )
    checkpoint = load_newest(run.out / "autoencoder" / "checkpoints", warn, run.place)
    summary = read_json(path)
    if checkpoint is None or checkpoint.step != summary["steps"]:
        raise UsageError(
            f"stage 1 ended after {summary['steps']} steps, and its newest checkpoint is of "
            f"{'none' if checkpoint is None else checkpoint.step}: it went on and did not end, or lost its last.",
            remedy="Train with --stage autoencoder (or all) to its end first.",
            path=run.out,
        )
    autoencoder = build_autoencoder(run.recipe.autoencoder.net)
    autoencoder.to(device=run.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    restore_module("autoencoder", autoencoder, checkpoint.tensors)
    return autoencoder.eval(), summary
