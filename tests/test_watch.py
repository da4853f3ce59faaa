"""A run that can be watched: pace, waiting, TensorBoard, `info`, and images made ready ahead."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainldm.base.describe import _TELLERS, describe
from brainldm.base.errors import BadInput, EnvironmentProblem, UsageError
from brainldm.base.feeding import Feed, made_ahead
from brainldm.base.files import lock_holder, locked_folder, read_json, sha256_of
from brainldm.cli import _check_flags_of
from brainldm.cohort.dataset import VolumeDataset
from brainldm.train.batches import BatchOrder
from brainldm.train.loop import run_stage
from brainldm.train.run import train
from conftest import tiny_recipe


def rows_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ feeding


def test_a_feed_gives_what_each_step_would_make_itself() -> None:
    """In order, from the middle (a resumed run), back and forth; never beyond the last step."""
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    for threads in (1, 3):
        feed = Feed(make, steps=8, threads=threads)
        assert [feed.take(step) for step in (3, 4, 5, 2, 3, 6, 7)] == [9, 16, 25, 4, 9, 36, 49]
        assert [feed.take(0)] == [0]
    assert max(made) == 7
    assert list(made_ahead(make, 20)) == [step * step for step in range(20)]


def test_a_feed_of_several_threads_makes_several_steps_at_a_time() -> None:
    together = threading.Barrier(3, timeout=60)

    def make(step: int) -> int:
        if step > 0:
            together.wait()
        return step

    feed = Feed(make, steps=4, threads=3)
    assert [feed.take(step) for step in range(4)] == [0, 1, 2, 3]


def test_a_feed_makes_ahead_while_the_step_runs() -> None:
    begun: list[int] = []
    ready = threading.Event()

    def make(step: int) -> int:
        begun.append(step)
        if step == 1:
            ready.set()
        return step

    feed = Feed(make, steps=3)
    feed.take(0)
    assert ready.wait(timeout=60) and 1 in begun  # nobody asked for step 1 yet


def test_a_feed_raises_where_it_is_asked_and_counts_waiting() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise BadInput("the image is gone.")
        time.sleep(0.05)
        return step

    feed = Feed(make, steps=5)
    assert feed.take(0) == 0
    assert feed.waited_seconds >= 0.05
    with pytest.raises(BadInput, match="gone"):
        feed.take(1)


def test_batches_are_the_same_to_every_thread() -> None:
    order = BatchOrder(0, 7, 2)
    expected = [BatchOrder(0, 7, 2).members(step) for step in range(30)]
    found: dict[int, list[list[int]]] = {}

    def walk(which: int) -> None:
        steps = range(30) if which % 2 else reversed(range(30))
        members = {step: order.members(step) for step in steps}
        found[which] = [members[step] for step in range(30)]

    threads = [threading.Thread(target=walk, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(members == expected for members in found.values()) and len(found) == 4


def test_a_run_from_an_uncompressed_file_is_the_run_from_the_scans(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path
) -> None:
    """Stopped in between, too. The training images lie in the folder asked for; a finished stage makes none."""
    cache = tmp_path / "cache"
    train(tiny_recipe(), tiny_cohort, tmp_path / "run", stage="autoencoder", steps=2, cache=cache)
    train(tiny_recipe(), tiny_cohort, tmp_path / "run", stage="autoencoder", cache=cache)
    assert (cache / "train.int16").stat().st_size == 8 * 2 * 16 * 24 * 16
    name = "autoencoder/log.jsonl"
    assert sha256_of(tmp_path / "run" / name) == sha256_of(tiny_run / name)
    train(tiny_recipe(), tiny_cohort, tmp_path / "run", stage="autoencoder", cache=tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_what_does_not_fit_in_memory_is_laid_out_in_the_run_or_inflated_where_there_is_no_room(
    tiny_run: Path,
    tiny_cohort: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(VolumeDataset, "fits_in_memory", False)
    train(tiny_recipe(), tiny_cohort, tmp_path / "roomy", stage="autoencoder")
    assert (tmp_path / "roomy" / "cache" / "train.int16").is_file()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    train(tiny_recipe(), tiny_cohort, tmp_path / "full", stage="autoencoder")
    assert "Every epoch inflates its images again" in capsys.readouterr().err
    expected = sha256_of(tiny_run / "autoencoder" / "log.jsonl")
    assert [sha256_of(tmp_path / name / "autoencoder" / "log.jsonl") for name in ("roomy", "full")] == [expected] * 2
    with pytest.raises(EnvironmentProblem, match="uncompressed images take"):  # a folder that was asked for
        train(tiny_recipe(), tiny_cohort, tmp_path / "asked", stage="autoencoder", cache=tmp_path / "c")


# ----------------------------------------------------------------------------------------------------------- watching


class Waits:
    """A stage of batches of three that waits for a tenth of its step, and can be given an end."""

    name, steps = "waits", 6

    def __init__(self) -> None:
        self.feed: Feed[int] = Feed(lambda step: step, self.steps)

    def step(self, step: int) -> dict[str, float]:
        self.feed.waited_seconds += 0.002
        time.sleep(0.02)
        return {"loss": 1.0 / (step + 1)}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(1)}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None: ...

    def batch_names(self, step: int) -> list[str]:
        return ["a", "b", "c"]

    def preview(self, path: Path) -> None: ...


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, what: str, total: int, done: int = 0) -> None: ...

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.notes.append(note)


def test_pace_and_waiting_are_told_logged_and_summed(tmp_path: Path) -> None:
    progress = Notes()
    summary = run_stage(Waits(), tmp_path, progress=progress)
    assert "loss 0.1667" in progress.notes[-1] and "images/s" in progress.notes[-1]
    assert "% waiting for data" in progress.notes[-1]
    waits = [row["wait_seconds"] for row in rows_of(tmp_path / "timing.jsonl")]
    assert waits == pytest.approx([0.002] * 6)
    assert 0 < summary["images_per_second"] < 3 / 0.02
    assert 0 < summary["data_wait_share"] < 0.11
    assert summary["data_wait_share"] == pytest.approx(0.012 / (18 / summary["images_per_second"]), rel=0.01)
    assert "wait_seconds" not in (tmp_path / "log.jsonl").read_text()  # what depends on the clock is not in the log


def test_the_log_is_there_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brainldm.train.loop.LOG_SECONDS", 0.0)

    class Looks(Waits):
        def step(self, step: int) -> dict[str, float]:
            seen.append(len(rows_of(tmp_path / "log.jsonl")))
            return super().step(step)

    seen: list[int] = []
    run_stage(Looks(), tmp_path)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_info_tells_how_far_a_run_is(tiny_run: Path, tmp_path: Path) -> None:
    facts = describe(tiny_run)
    assert facts["training_now"].startswith("no")
    assert list(facts["stages"]) == ["autoencoder", "diffusion"]
    stage = facts["stages"]["autoencoder"]
    assert (stage["steps"], stage["planned_steps"], stage["seconds_left"]) == (6, 6, 0)
    assert stage["images_per_second"] > 0 and 0 <= stage["data_wait_share"] <= 1
    assert stage["last"]["l1"] == pytest.approx(np.mean([r["l1"] for r in rows_of(tiny_run / "autoencoder/log.jsonl")]))
    assert stage["newest_checkpoint"]["index"] == 6
    assert stage["validation"]["people"] == 1
    assert facts["stage autoencoder"].startswith("6 of 6 steps; loss ")
    assert "newest checkpoint: step 6" in facts["stage diffusion"]


def test_a_stage_that_is_left_out_keeps_its_planned_steps(
    tiny_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe()
    falling = replace(recipe, autoencoder=replace(recipe.autoencoder, cosine_decay=True))
    train(falling, tiny_cohort, tmp_path, stage="autoencoder", steps=1)
    train(falling, tiny_cohort, tmp_path, stage="diffusion", steps=2)
    recorded = read_json(tmp_path / "run.json")["recipe"]
    assert (recorded["autoencoder"]["steps"], recorded["diffusion"]["steps"]) == (1, 2)
    assert describe(tmp_path)["stage autoencoder"].startswith("1 of 1 steps")
    train(falling, tiny_cohort, tmp_path, stage="autoencoder", steps=2)
    assert "learning rate was falling over 1 steps" in capsys.readouterr().err


@pytest.mark.parametrize("marker", _TELLERS)
@pytest.mark.parametrize("content", ["[]", "7", "{}"])
def test_info_names_a_file_of_ours_that_is_damaged(marker: str, content: str, tmp_path: Path) -> None:
    (tmp_path / marker).write_text(content)
    if content == "{}" and marker not in ("model.json", "generation.json"):
        assert describe(tmp_path)["kind"]
        return
    with pytest.raises(BadInput, match="is damaged") as caught:
        describe(tmp_path)
    assert caught.value.path == tmp_path / marker


def test_info_tells_the_time_left_of_a_run_in_the_middle(tmp_path: Path) -> None:
    folder = tmp_path / "autoencoder"
    folder.mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"autoencoder": {"steps": 100, "batch": 4}}}))
    log = [{"step": n, "loss": float(n)} for n in range(1, 71)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log) + '{"step": 71, "lo')
    times = [{"step": n, "seconds": 2.0 * n, "wait_seconds": 0.5} for n in range(1, 71)]
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    with locked_folder(tmp_path):
        facts = describe(tmp_path)
        assert "process" in facts["training_now"]
    assert lock_holder(tmp_path) is None
    stage = facts["stages"]["autoencoder"]
    assert (stage["steps"], stage["seconds_left"], stage["images_per_second"]) == (70, 60, 2)
    assert stage["data_wait_share"] == pytest.approx(0.25)
    assert stage["last"]["loss"] == np.mean(range(21, 71))
    told = facts["stage autoencoder"]
    assert told == (
        "70 of 100 steps; loss 45.5; 2 images/s; 25 % waiting for data; 1:00 left at this pace; no checkpoint yet"
    )


# --------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_that_is_missing_is_named_before_the_first_step(
    tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"brainldm\[tensorboard\]"):
        train(tiny_recipe(), tiny_cohort, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_what_the_log_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the writer, whose calls are TensorBoard's."""
    written: list[tuple[str, float, int]] = []
    opened: list[tuple[str, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None: ...

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run_stage(Waits(), tmp_path, tensorboard=True)
    assert opened == [(str(tmp_path / "tensorboard"), 1)]
    assert written == [("loss", row["loss"], row["step"]) for row in rows_of(tmp_path / "log.jsonl")]
    later = Waits()
    later.steps = 7
    run_stage(later, tmp_path, tensorboard=True)
    assert opened[1][1] == 7 and written[-1][2] == 7


@pytest.mark.parametrize(("recipe", "flag"), [("age", "cache"), ("sex", "tensorboard"), ("lsgan", "perceptual")])
def test_flags_that_would_be_passed_over_are_refused(recipe: str, flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag}"):
        _check_flags_of(recipe, **{flag: True})
    _check_flags_of("paper", perceptual="random", cache=Path(), tensorboard=True)
    _check_flags_of("vaegan", perceptual=None, cache=Path("c"), tensorboard=True)


def test_the_summary_of_a_stage_tells_its_pace(tiny_run: Path) -> None:
    summary = read_json(tiny_run / "autoencoder" / "summary.json")
    assert summary["images_per_second"] > 0 and 0 <= summary["data_wait_share"] <= 1
