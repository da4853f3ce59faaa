"""Several processes train as one does: the same losses, the same checkpoints, and no one hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from brainldm.base.errors import UsageError
from brainldm.model.folder import load_model
from brainldm.train.config import GanStageConfig, Recipe
from brainldm.train.distributed import ALONE, Place, check_divides
from brainldm.train.gan_run import train_gan
from brainldm.train.run import train
from conftest import tiny_recipe

# Float32 sums in another order, of which Adam's first steps make much: 2e-7 was seen in the first, 7e-5 within six.
# Shards lie in memory another way, so convolutions round otherwise: 3e-7 in a step from equal weights, 3e-4 within six.
TOLERANCE, TOLERANCE_OF_LATER_STEPS = 3e-4, 2e-3


def even_recipe() -> Recipe:
    """The tiny recipe with batches that two can share, everything drawn, and activations computed again."""
    tiny = tiny_recipe()
    augmented = replace(tiny.autoencoder.augmentation, flip_probability=0.5, affine_probability=0.5)
    autoencoder = replace(tiny.autoencoder, augmentation=augmented, checkpointing=True)
    diffusion = replace(tiny.diffusion, batch=4, condition_dropout=0.3, checkpointing=True)
    return replace(tiny, autoencoder=autoencoder, diffusion=diffusion)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import brainldm.recipes, brainldm.cli
from brainldm.train.autoencoder_stage import AutoencoderStage
from test_train_distributed import even_recipe
brainldm.recipes.recipe_named = lambda name: even_recipe()
{fault}
brainldm.cli.main()
"""
AT_THE_THIRD_STEP_OF_RANK_1 = """
whole = AutoencoderStage.step
def step(self, number):
    figures = whole(self, number)
    if number == 2 and os.environ["RANK"] == "1":
        {what}
    return figures
AutoencoderStage.step = step
"""


def start_two(folder: Path, cohort: Path, *flags: str, fault: str = "") -> subprocess.Popen[str]:
    """`brainldm train` of the even recipe by two processes, through torchrun, into `folder`."""
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), fault=fault))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), "train", "even", "--data", str(cohort), "--out", str(folder), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def logged(run: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]


def assert_same_losses(
    run: Path,
    wanted: Path,
    tolerance: float = TOLERANCE,
    steps: slice = slice(None),
    stages: tuple[str, ...] = ("autoencoder", "diffusion"),
) -> None:
    for stage in stages:
        rows, wanted_rows = logged(run, stage)[steps], logged(wanted, stage)[steps]
        assert [list(row) for row in rows] == [list(row) for row in wanted_rows]
        values, wanted_values = ([value for row in r for value in row.values()] for r in (rows, wanted_rows))
        np.testing.assert_allclose(values, wanted_values, rtol=tolerance, atol=1e-6)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As torchrun's processes have: another number of threads adds up in another order, and six steps of two networks
    against each other make 3e-4 of that rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(one_thread: None, tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that one process makes, with a seventh step of the second stage from a start of its own."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(even_recipe(), tiny_cohort, out)
    train(even_recipe(), tiny_cohort, out, stage="diffusion", steps=7)
    return out


def test_two_processes_compute_what_one_does_and_one_goes_on(alone: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_two(run, tiny_cohort)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    assert output.count("The model is in") == 1  # only the leader speaks
    assert load_model(run).description.training["diffusion"]["processes"] == 2
    train(even_recipe(), tiny_cohort, run, stage="diffusion", steps=7)
    assert_same_losses(run, alone)
    assert not list(run.rglob(".*"))


def test_one_then_two_with_shards_then_one(alone: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    """The number of processes may change from start to start, and a checkpoint made of shards is a whole one."""
    run = tmp_path / "run"
    train(even_recipe(), tiny_cohort, run, stage="autoencoder", steps=2)
    process = start_two(run, tiny_cohort, "--shard")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    train(even_recipe(), tiny_cohort, run, stage="diffusion", steps=7)
    first_in_shards = slice(2, 3)
    assert_same_losses(run, alone, steps=first_in_shards, stages=("autoencoder",))
    assert_same_losses(run, alone, TOLERANCE_OF_LATER_STEPS)
    for file in (
        "autoencoder/checkpoints/step-00000006.safetensors",
        "diffusion/checkpoints/step-00000006.safetensors",
    ):
        ours, wanted = load_file(run / file), load_file(alone / file)
        assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in wanted.items()}


def test_a_killed_process_ends_the_other_which_says_so(tiny_cohort: Path, tmp_path: Path) -> None:
    """Started without torchrun, which would end the other before it notices."""
    script = tmp_path / "run.py"
    fault = AT_THE_THIRD_STEP_OF_RANK_1.format(what="os.kill(os.getpid(), signal.SIGKILL)")
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), fault=fault))
    port = 20_000 + os.getpid() % 10_000  # below those that the system gives away
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(script), "train", "even", "--data", str(tiny_cohort), "--out", str(tmp_path / "run")]
    leader, killed = (
        subprocess.Popen(
            [*command, "--steps", "100000"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | meeting | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in ("0", "1")
    )
    try:
        assert killed.wait(timeout=240) == -signal.SIGKILL
        _, told = leader.communicate(timeout=60)
    finally:
        leader.kill()
        killed.kill()
        killed.communicate()
    assert leader.returncode == 5 and "another process of this training has ended" in told, told[-3000:]


def test_a_loss_that_is_not_finite_in_one_process_stops_both_and_the_batch_is_kept(
    tiny_cohort: Path, tmp_path: Path
) -> None:
    fault = AT_THE_THIRD_STEP_OF_RANK_1.format(what="figures['l1'] = float('nan')")
    process = start_two(tmp_path / "run", tiny_cohort, "--steps", "100000", fault=fault)
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "the loss is not a finite number at step 3" in output, output[-3000:]
    kept = json.loads((tmp_path / "run" / "autoencoder" / "not_finite.json").read_text())
    assert len(kept["participants"]) == 2  # the whole batch, not the share of one
    batch = load_file(tmp_path / "run" / "autoencoder" / kept["batch"])
    assert batch["image"].shape == (2, 1, 16, 24, 16)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_run_goes_on(alone: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_two(run, tiny_cohort, "--stage", "autoencoder", "--steps", "100000")
    log = run / "autoencoder" / "timing.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "the state is saved" in output, output[-3000:]
    assert list((run / "autoencoder" / "checkpoints").glob("step-*.safetensors"))


# ---- Without a second process ---------------------------------------------------------------------------------------


def test_the_package_is_a_module_to_run_as_torchrun_needs() -> None:
    ran = subprocess.run([sys.executable, "-m", "brainldm", "--version"], check=True, capture_output=True, text=True)
    assert ran.stdout.strip()


def test_shares_are_the_batch() -> None:
    batch = list(range(12))
    for processes in (1, 2, 3, 4):
        places = [Place(rank, processes) for rank in range(processes)]
        assert [one for place in places for one in batch[place.share(12)]] == batch


def test_one_process_changes_nothing() -> None:
    network = nn.Linear(2, 2)
    network(torch.ones(1, 2)).sum().backward()
    before = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    ALONE.average_gradients(network)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, network.parameters()) if p.grad is not None)
    figures = {"loss": 0.1}
    assert ALONE.mean(figures) is figures
    assert ALONE.anywhere(True, False) == (True, False)


def test_a_batch_that_cannot_be_shared_is_refused_before_the_first_step() -> None:
    with pytest.raises(UsageError, match=r"batch of 6 cannot be shared equally by 4 .*1 or 2 or 3 or 6"):
        check_divides(Place(0, 4), "diffusion", 6)
    check_divides(Place(0, 3), "diffusion", 6)


def test_shards_of_one_process_are_refused(tiny_cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to shard"):
        train(even_recipe(), tiny_cohort, tmp_path / "run", shard=True)


def test_a_baseline_under_torchrun_is_refused(
    tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GanStageConfig(kind="lsgan", channels=(8, 16), steps=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process, not in 2"):
        train_gan(config, tiny_cohort, tmp_path / "run")
