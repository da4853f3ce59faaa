"""A stage that is asked to end saves and says so, whichever signal a scheduler sends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from brainldm.train.checkpoint import load_newest
from brainldm.train.loop import Terminated, run_stage


class AskedToEnd:
    """A stage of which the second step sends its own process a signal."""

    name, steps = "asked", 5

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.made = number, 0

    def step(self, step: int) -> dict[str, float]:
        self.made += 1
        if step == 1:
            os.kill(os.getpid(), self.number)
        return {"loss": 1.0}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"made": torch.tensor(self.made)}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.made = int(tensors["made"])

    def batch_names(self, step: int) -> list[str]:
        return ["somebody"]

    def preview(self, path: Path) -> None: ...


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_stage_after_its_step_and_the_next_run_goes_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    before = signal.signal(number, signal.SIG_IGN)  # a signal that nobody listens for must not end the tests
    try:
        with pytest.raises(Terminated, match="after step 2 of 5; the state is saved") as caught:
            run_stage(AskedToEnd(number), tmp_path)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert caught.value.exit_code == 143 and caught.value.remedy
    found = load_newest(tmp_path / "checkpoints", warn=pytest.fail)
    assert found is not None and found.step == 2
    rest = AskedToEnd(number)
    assert run_stage(rest, tmp_path)["steps"] == rest.made == 5
