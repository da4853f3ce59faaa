"""The examples in docstrings are what happens."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import brainldm

SOURCE = Path(brainldm.__file__).parent
SHOWING = sorted(path for path in SOURCE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


def test_there_are_examples_to_run() -> None:
    assert SHOWING


@pytest.mark.parametrize("path", SHOWING, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_examples_are_what_happens(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(SOURCE.parent).with_suffix("").parts))
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted > 0
