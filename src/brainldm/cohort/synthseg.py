"""Volumes by FreeSurfer's `mri_synthseg` (Billot et al. 2023), where it is installed: what the paper measured with."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.base.nifti import write_nifti
from brainldm.base.volume import Volume
from brainldm.cohort.measure import Measured, measured_from_tables
from brainldm.cohort.program import run_program

PROGRAM = "mri_synthseg"


def installed_program() -> str:
    """Where the program is; EnvironmentProblem when it is not installed."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise EnvironmentProblem(
            f"{PROGRAM} is not installed here.",
            remedy="Install FreeSurfer 7.4 or newer and source its SetUpFreeSurfer.sh, or leave --measure out.",
            reason="not_installed",
        )
    return program


@dataclass(frozen=True)
class SynthSegMeasure:
    """Runs the program on one image at a time, on the CPU. Its start takes longer than its work: for many images run it
    yourself on the whole folder and give its table (`--volumes`)."""

    name: str = PROGRAM

    def __call__(self, image: Volume) -> Measured:
        """BadInput when the program fails on the image or hangs; EnvironmentProblem when it is not installed."""
        program = installed_program()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            scan, table = folder / "sub-image.nii.gz", folder / "volumes.csv"
            write_nifti(scan, image.data_XYZ, image.affine, dtype="float32")
            command = [program, "--i", str(scan), "--o", str(folder / "labels.nii.gz"), "--vol", str(table), "--cpu"]
            done = run_program(PROGRAM, command)
            if done.returncode != 0 or not table.is_file():
                last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
                raise BadInput(f"{PROGRAM} could not segment it: {last[0]}.", reason="not_measurable")
            measured = list(measured_from_tables(table).values())
            if not measured:
                raise BadInput(
                    f"{PROGRAM} wrote no volumes.",
                    remedy=f"Run {PROGRAM} on this image by itself to see what it says.",
                    reason="not_measurable",
                )
            return measured[0]
