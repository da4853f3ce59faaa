"""TensorBoard, for those who watch with it: the extra brainldm[tensorboard]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brainldm.base.errors import UsageError


def check_tensorboard() -> None:
    """UsageError naming the extra where TensorBoard is not installed; asked before the first step."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--tensorboard needs TensorBoard, which cannot be imported ({error}).",
            remedy="Install it (pip install 'brainldm[tensorboard]'), or leave --tensorboard out: "
            "STAGE/log.jsonl holds the same figures.",
            reason="missing_extra",
        ) from error


class Board:
    """Event files in `folder` of every figure that log.jsonl gets. Those of steps after `done`, which a killed run made
    and which are made again, are hidden."""

    def __init__(self, folder: Path, done: int) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, figures: dict[str, float]) -> None:
        step = int(figures["step"])
        for name, value in figures.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
