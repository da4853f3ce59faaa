"""Whatever ends a training, the same command finishes it, and nothing of it differs from one that was left in peace."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import brainldm.model.tensors as model_tensors
import brainldm.train.loop as loop
from brainldm.base.errors import EnvironmentProblem
from brainldm.base.files import sha256_of
from brainldm.base.manifest import Manifest
from brainldm.base.streams import stream
from brainldm.train.checkpoint import Checkpoint, drop_newer, load_newest, save_checkpoint
from brainldm.train.config import Recipe
from brainldm.train.loop import run_stage
from brainldm.train.run import train
from conftest import tiny_recipe

# ---- Killed 20 times ------------------------------------------------------------------------------------------------

KILLS, STEPS = 20, 20

# Lives are forked from a process that has imported everything once: what is killed is the training, not the importing.
NURSERY = multiprocessing.get_context("forkserver")
NURSERY.set_forkserver_preload(["brainldm.train.run", "monai.networks.nets", "test_train_never_lost"])


def long_recipe() -> Recipe:
    """The tiny recipe with more steps, saving after each."""
    tiny = tiny_recipe(checkpoint_minutes=0.0)
    return replace(
        tiny, autoencoder=replace(tiny.autoencoder, steps=STEPS), diffusion=replace(tiny.diffusion, steps=STEPS)
    )


def _life(out: Path, cohort: Path, at_fsync: int, after_seconds: float) -> None:
    torch.set_num_threads(1)
    loop.FIRST_CHECKPOINT_SECONDS = 0.0
    fsyncs, whole = 0, os.fsync

    def dying_fsync(handle: Any) -> None:
        nonlocal fsyncs
        fsyncs += 1
        if fsyncs == at_fsync:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(handle)

    os.fsync = dying_fsync
    if after_seconds:
        timer = threading.Timer(after_seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    train(long_recipe(), cohort, out)


def live(out: Path, cohort: Path, *, at_fsync: int = 0, after_seconds: float = 0.0) -> bool:
    """One start of the training, killed at that fsync or after those seconds; whether it came to its end first."""
    life = NURSERY.Process(target=_life, args=(out, cohort, at_fsync, after_seconds))
    life.start()
    life.join()
    assert life.exitcode in (0, -signal.SIGKILL)
    return life.exitcode == 0


def flip_a_bit_of_the_newest_checkpoint(run: Path, position: int) -> bool:
    """Damages it where there is an older one to go back to; whether it did."""
    for stage in ("diffusion", "autoencoder"):
        folder = run / stage / "checkpoints"
        listed = {record["file"] for record in Manifest(folder / "manifest.jsonl").records()}
        there = [path for path in sorted(folder.glob("step-*.safetensors")) if path.name in listed]
        if len(there) >= 2:
            content = bytearray(there[-1].read_bytes())
            content[position % len(content)] ^= 1
            there[-1].write_bytes(content)
            return True
    return False


def everything(run: Path) -> dict[str, Any]:
    """Digests of all that a training leaves and that is not a time of day."""
    found: dict[str, Any] = {}
    for stage in ("autoencoder", "diffusion"):
        found[f"{stage} log"] = sha256_of(run / stage / "log.jsonl")
        newest = run / stage / "checkpoints" / f"step-{STEPS:08d}.safetensors"
        for name, tensor in load_file(newest).items():  # weights, averages, moments
            found[f"{stage} {name}"] = tensor.contiguous().numpy().tobytes()
    for file in [*run.glob("latents/*.safetensors"), *run.glob("model/*.safetensors")]:
        found[str(file.relative_to(run))] = sha256_of(file)
    return found


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_twenty_times_at_random_moments(tiny_cohort: Path, tmp_path: Path) -> None:
    """By turns at a random fsync, so during some write, and after a random time. A machine fast enough to end the run
    before the last kill starts another one, and all that ended are compared."""
    assert live(tmp_path / "unbroken", tiny_cohort)
    draws, kills, flips = stream(0, "kills"), 0, 0
    runs = [tmp_path / "killed-0"]
    while kills < KILLS:
        if kills % 2:
            ended = live(runs[-1], tiny_cohort, after_seconds=float(draws.uniform(0.1, 1.0)))
        else:
            ended = live(runs[-1], tiny_cohort, at_fsync=int(draws.integers(1, 25)))
        if ended:
            runs.append(tmp_path / f"killed-{len(runs)}")
            continue
        kills += 1
        if draws.random() < 0.3:
            flips += flip_a_bit_of_the_newest_checkpoint(runs[-1], int(draws.integers(2**31)))
    assert flips >= 2
    assert live(runs[-1], tiny_cohort)
    wanted = everything(tmp_path / "unbroken")
    for run in runs:
        ours = everything(run)
        assert ours.keys() == wanted.keys()
        assert [name for name in ours if ours[name] != wanted[name]] == []
        assert not list(run.rglob(".part-*"))


# ---- A full disk ----------------------------------------------------------------------------------------------------


class Sum:
    """A stage whose state is the sum of its steps."""

    name, steps = "sum", 6

    def __init__(self) -> None:
        self.total = torch.zeros(100)

    def step(self, step: int) -> dict[str, float]:
        self.total += step
        return {"loss": self.total[0].item()}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"total": self.total}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.total = tensors["total"]

    def batch_names(self, step: int) -> list[str]:
        return []

    def preview(self, path: Path) -> None: ...


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def full_at_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    saves = 0
    whole = model_tensors.save_file

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal saves
        saves += 1
        whole(tensors, path, metadata=metadata)
        if saves == 3:
            os.truncate(path, 50)
            raise full_disk()

    monkeypatch.setattr(model_tensors, "save_file", save)


def full_at_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log takes half a line of the fourth step, and no more."""
    whole, opened = Path.open, 0

    class HalfALine:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> HalfALine:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise full_disk()

    def open_file(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        nonlocal opened
        if path.name == "log.jsonl" and mode == "a":
            opened += 1
            if opened == 7:
                return HalfALine(whole(path, mode, *rest, **named))
        return whole(path, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", open_file)


@pytest.mark.parametrize("fill", [full_at_checkpoint, full_at_log])
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(loop, "FIRST_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "LOG_SECONDS", -1.0)
    run_stage(Sum(), tmp_path / "unbroken", checkpoint_minutes=0.0)
    with monkeypatch.context() as now:
        fill(now)
        with pytest.raises(EnvironmentProblem, match="disk is full") as stopped:
            run_stage(Sum(), tmp_path / "run", checkpoint_minutes=0.0)
    assert stopped.value.exit_code == 5
    assert not list(tmp_path.rglob(".part-*"))
    kept = load_newest(tmp_path / "run" / "checkpoints", warn=pytest.fail)
    assert kept is not None
    assert 0 < kept.step < 6
    run_stage(Sum(), tmp_path / "run", checkpoint_minutes=0.0)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (tmp_path / "unbroken" / "log.jsonl").read_bytes()
    newest = load_newest(tmp_path / "run" / "checkpoints", warn=pytest.fail)
    assert newest is not None
    assert newest.tensors["total"].tolist() == [15.0] * 100


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; skips where only root of a whole machine could make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(small_disk: Path, tiny_cohort: Path, tiny_run: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import brainldm.recipes as recipes, brainldm.cli as cli
from conftest import tiny_recipe
recipes.recipe_named = lambda name: tiny_recipe()
sys.argv = ["brainldm", "train", "tiny", "--data", {str(tiny_cohort)!r}, "--out", {str(small_disk / "run")!r}]
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert ended.returncode == 5, ended.stderr[-3000:]
    assert "the disk is full" in ended.stderr
    assert not list(small_disk.rglob(".part-*"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for file in ("model/unet.safetensors", "diffusion/log.jsonl"):
        assert sha256_of(small_disk / "run" / file) == sha256_of(tiny_run / file)


# ---- A time limit ---------------------------------------------------------------------------------------------------


def test_a_time_limit_that_a_preview_reached_stays_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint was written before, and knows of less than the limit. A longer limit is gone on to."""
    now = 0.0

    class SlowToShow(Sum):
        def step(self, step: int) -> dict[str, float]:
            nonlocal now
            now += 59.0
            return super().step(step)

        def preview(self, path: Path) -> None:
            nonlocal now
            now += 5.0

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now))
    assert run_stage(SlowToShow(), tmp_path, minutes=1)["seconds"] == 64
    saved = load_newest(tmp_path / "checkpoints", warn=pytest.fail)
    assert saved is not None and (saved.step, saved.seconds) == (1, 59)
    assert run_stage(SlowToShow(), tmp_path, minutes=1)["steps"] == 1
    assert run_stage(SlowToShow(), tmp_path, minutes=1.5)["steps"] == 2


# ---- Which checkpoints are kept -------------------------------------------------------------------------------------


def test_what_a_killed_run_did_not_list_takes_nobodys_place(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, Checkpoint(step, 1.0, {"w": torch.full((3,), float(step))}, {}))
    (tmp_path / "step-00000003.safetensors").write_bytes(b"renamed, and killed before the manifest's line")
    save_checkpoint(tmp_path, Checkpoint(4, 1.0, {"w": torch.zeros(3)}, {}))
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        "step-00000002.safetensors",
        "step-00000004.safetensors",
    ]


def test_a_damaged_one_does_not_count_once_the_run_has_gone_on_without_it(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, Checkpoint(step, 1.0, {"w": torch.full((3,), float(step))}, {}))
    (tmp_path / "step-00000002.safetensors").write_bytes(b"damaged")
    drop_newer(tmp_path, 1)
    save_checkpoint(tmp_path, Checkpoint(3, 1.0, {"w": torch.zeros(3)}, {}))
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        "step-00000001.safetensors",
        "step-00000003.safetensors",
    ]
