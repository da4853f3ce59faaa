"""Models that come with the package: their names, and the folder in which one lies once it is installed."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from brainldm.base.errors import BadInput

SHIPPED = ("demo",)
MODEL_MARKER, RUN_MARKER = "model.json", "run.json"
_ROOT = Path(str(files("brainldm"))) / "shipped"


def shipped_name(path: Path) -> str | None:
    """The shipped model that `path` names; None where it is a path.

    A folder of that name that holds a model or a training run is a path: what somebody made there is meant.
    """
    own = any((path / marker).is_file() for marker in (MODEL_MARKER, RUN_MARKER, f"model/{MODEL_MARKER}"))
    return str(path) if str(path) in SHIPPED and not own else None


def shipped_folder(name: str) -> Path:
    """The model folder of that name; BadInput where this installation holds none."""
    folder = _ROOT / name
    if not (folder / MODEL_MARKER).is_file():
        raise BadInput(
            f"{name!r} is the model that comes with brainldm, and this installation has none.",
            remedy="Install a released brainldm, or name a model folder: `brainldm train` makes one.",
            path=folder,
            reason="not_shipped",
        )
    return folder
