"""A model made small enough to come with the package: the same networks, their weights in float16."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from brainldm.base.errors import UsageError
from brainldm.base.files import make_folder
from brainldm.model.description import GanDescription, LatentDiffusionDescription
from brainldm.model.folder import DESCRIPTION_NAME, find_model, load_model, read_description, save_model, tensors_of

# PyPI takes 100 MB a file; a package that people install to look at brains should be nowhere near it.
MOST_BYTES = 25_000_000


@dataclass(frozen=True)
class Packaged:
    """`bytes` is all of the folder; `rounding` the largest change of a weight, relative to the largest of its tensor
    (float16 keeps 11 bits: 0.0005)."""

    description: LatentDiffusionDescription | GanDescription
    bytes: int
    rounding: float


def package_model(model: Path, out: Path, *, licence: str | None = None, most_bytes: int = MOST_BYTES) -> Packaged:
    """Writes the model at `model` into the folder `out` with its weights in float16, under `licence` if given.

    UsageError, before anything is written, where it would take more than `most_bytes`, where a weight is beyond
    float16, or where `out` holds anything but such a package.
    """
    loaded = load_model(model)
    parts = tensors_of(loaded)
    names = {DESCRIPTION_NAME, *parts}
    if out.is_dir() and (others := sorted(p.name for p in out.iterdir() if p.name not in names and p.name[0] != ".")):
        raise UsageError(
            f"the folder holds other things ({', '.join(others[:3])}).", remedy="Choose an empty or new one.", path=out
        )
    if (out / DESCRIPTION_NAME).is_file() and read_description(out).weights_dtype != "float16":
        raise UsageError("the folder holds a model in full precision.", remedy="Choose an empty or new one.", path=out)
    if os.path.realpath(out) == os.path.realpath(find_model(model)):
        raise UsageError("this is the model itself.", remedy="Choose another folder.", path=out)
    needed = 2 * sum(tensor.numel() for tensors in parts.values() for tensor in tensors.values())
    if needed > most_bytes:
        raise UsageError(
            f"its weights take {needed / 1e6:.1f} MB in float16; a package may take {most_bytes / 1e6:g} MB.",
            remedy="Train a smaller model, or raise --max-megabytes where it comes with no package.",
            path=model,
            reason="too_large",
        )
    make_folder(out)
    description = save_model(out, loaded, weights_dtype="float16", licence=licence)
    rounding = max(
        float((tensor.half().float() - tensor).abs().max()) / max(1e-30, float(tensor.abs().max()))
        for tensors in parts.values()
        for tensor in tensors.values()
    )
    return Packaged(description, sum((out / name).stat().st_size for name in names), rounding)
