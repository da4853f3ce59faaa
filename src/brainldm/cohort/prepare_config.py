"""What a preparation is asked to do, and one scan's part of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from brainldm.base.errors import UsageError
from brainldm.base.volume import grid_named
from brainldm.cohort.bids import Scan
from brainldm.cohort.split import check_holdout


@dataclass(frozen=True)
class PrepareConfig:
    """What decides the prepared images and who is in which split. Where to write and how fast is not in here.

    `register`: `auto` aligns rigidly whatever is not named `space-MNI...`; `none` takes the header's word. Nothing
    undoes a warp: heads in MNI spaces other than our own are flagged.
    `skull`: `keep` what is there, or `strip` it with the study's own masks, by the template, or with deepbet.
    `volumes`: `measure` them in the scan, take them from the study's `table`, or from a file of SynthSeg or FreeSurfer.
    `percentile`: None is the paper's min-max; 99.9, say, is robust to a few bright voxels.
    """

    grid: str = "paper"
    register: Literal["auto", "rigid", "none", "unires"] = "auto"
    skull: Literal["keep", "strip"] = "keep"
    strip_with: Literal["mask", "template", "deepbet"] = "template"
    volumes: str = "measure"
    masks: Path | None = None
    nan: Literal["error", "zero"] = "error"
    volume_index: int | None = None
    assume_orientation: bool = False
    percentile: float | None = None
    strict: bool = False
    holdout: float = 0.2
    seed: int = 0

    def check(self) -> None:
        """UsageError for what no study could be prepared with."""
        grid_named(self.grid)
        check_holdout(self.holdout)
        if self.percentile is not None and not 50 < self.percentile <= 100:
            raise UsageError(f"percentile is {self.percentile:g}.", remedy="It must be above 50 and at most 100.")
        if self.skull == "keep" and self.strip_with != "template":
            raise UsageError(
                f"skulls were to be stripped with {self.strip_with}, and to be kept.", remedy="Add --skull strip."
            )
        if self.strip_with == "deepbet" and self.masks is not None:
            raise UsageError(
                "masks were given, and skulls to be stripped with deepbet.", remedy="Leave one of them out."
            )
        if self.skull == "keep" and self.masks is not None:
            raise UsageError("brain masks were given, and the skull is to be kept.", remedy="Add --skull strip.")
        if self.register == "unires" and self.uses_masks:
            raise UsageError("UniRes moves the scans, so that masks fit no more.", remedy="Use --strip-with template.")

    @property
    def uses_masks(self) -> bool:
        """Whether skulls are stripped with masks that come with the study."""
        return self.skull == "strip" and (self.strip_with == "mask" or self.masks is not None)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON; of paths only the name, because where things lay is nobody's business."""
        content = dict(vars(self))
        content["masks"] = None if self.masks is None else Path(self.masks).name
        if self.volumes not in ("measure", "table"):
            content["volumes"] = f"file {Path(self.volumes).name}"
        return content


@dataclass(frozen=True)
class ScanTask:
    """One scan to prepare into the folder `out`. `measure` is False where the volumes are known from elsewhere."""

    index: int
    scan: Scan
    out: Path
    config: PrepareConfig
    measure: bool
