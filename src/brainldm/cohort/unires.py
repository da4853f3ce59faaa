"""The paper's own alignment: drives a UniRes that somebody installed, with the settings its first author used.

UniRes (Brudfors et al. 2019, arXiv:1909.01140) and the nitorch under it are not on PyPI and pin an older numpy, so they
live in an environment of their own, whose interpreter is asked to do the work.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.base.nifti import read_nifti, write_nifti
from brainldm.base.volume import Volume
from brainldm.cohort.program import run_program

PYTHON_VARIABLE = "BRAINLDM_UNIRES_PYTHON"
INSTALL = (
    "Install it into an environment of its own: python -m venv unires-env; unires-env/bin/pip install "
    "'nitorch[all] @ git+https://github.com/balbasty/nitorch' 'unires @ git+https://github.com/brudfors/UniRes'; then "
    f"export {PYTHON_VARIABLE}=$PWD/unires-env/bin/python. "
    "Or leave --register out: the default aligns and reslices, too."
)

# The settings of the job that prepared ADNI for the same group in 2021 (UniRes fdeee7b). No iterations means no
# super-resolution and no denoising: align and reslice. `atlas_rigid=False` is rigid plus one isotropic scale.
SETTINGS = {
    "atlas_rigid": False,
    "common_output": True,
    "crop": True,
    "do_atlas_align": True,
    "do_coreg": True,
    "do_res_origin": True,
    "fov": "head",
    "max_iter": 0,
    "scaling": True,
    "unified_rigid": True,
    "vx": 1.0,
    "do_print": 0,
    "prefix": "",
}

_SCRIPT = """
import json, sys
import torch
from unires.run import preproc
from unires.struct import settings
chosen = settings()
for name, value in json.loads(sys.argv[3]).items():
    setattr(chosen, name, value)
chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
chosen.dir_out = sys.argv[2]
preproc([sys.argv[1]], chosen)
"""


@lru_cache(maxsize=1)
def unires_python() -> str:
    """The interpreter that can import UniRes; EnvironmentProblem saying how to install it where there is none.

    Looked for in the environment variable above, beside a `unires` command on the PATH, and here.
    """
    command = shutil.which("unires")
    beside = str(Path(command).resolve().parent / "python") if command else ""
    for python in (os.environ.get(PYTHON_VARIABLE, ""), beside, sys.executable):
        if python and _can_import_unires(python):
            return python
    raise EnvironmentProblem("UniRes is not installed.", remedy=INSTALL, reason="no_unires")


def _can_import_unires(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", "import unires.run"], capture_output=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def aligned_by_unires(scan: Volume, path: Path) -> Volume:
    """`scan`, which was read from `path`, as UniRes aligns and reslices it: 1 mm, the common grid of all its outputs.
    BadInput when it fails or hangs."""
    with tempfile.TemporaryDirectory(prefix="brainldm-unires-") as folder:
        source = Path(folder) / "scan.nii.gz"
        write_nifti(source, scan.data_XYZ, scan.affine, dtype="float32")
        target = Path(folder) / "out"
        target.mkdir()
        command = [unires_python(), "-c", _SCRIPT, str(source), str(target), json.dumps(SETTINGS)]
        done = run_program("UniRes", command)
        written = sorted(target.glob("*.nii*"))
        if done.returncode != 0 or not written:
            said = (done.stderr.strip().splitlines() or ["it wrote no image"])[-1]
            raise BadInput(f"UniRes could not align this scan ({said}).", path=path, reason="unires")
        return read_nifti(written[0], nan="zero", assume_orientation=True)
