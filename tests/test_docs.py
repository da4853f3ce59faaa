"""Every command that the README and the task pages show is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from brainldm.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Commands in blocks marked sh and in code spans, without their comments; not a verb that is only mentioned."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`(brainldm [^`\n]+)`", text)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in (*lines, *spans) if line.startswith("brainldm ") and len(line.split()) > 2]


SHOWN = [(page.name, command) for page in PAGES for command in commands(page)]


def test_there_are_commands_to_check() -> None:
    assert {name for name, _ in SHOWN} >= {"README.md", "measuring.md", "published-model.md"}
    assert len(SHOWN) > 15


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_commands_shown_are_taken(page: str, command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if word != "..."]
    app.parse_args(words, exit_on_error=False, print_error=True)
