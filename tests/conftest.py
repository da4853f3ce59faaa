"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans that development is checked against; it is never part of the repository."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("BRAINLDM_TEST_DATA", default))
    if not (folder / "oasis17").is_dir():
        pytest.skip(f"no real scans here: set BRAINLDM_TEST_DATA to a folder that holds oasis17/ (looked in {folder})")
    return folder
