"""Every command that the README and the task pages show is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from brainldm.cli import app
from brainldm.recipes import NAMES, recipe_named
from brainldm.recipes.gan import KINDS, baseline
from brainldm.train.config import PredictorConfig
from brainldm.train.settings import with_settings

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


def trainings() -> list[tuple[str, str, tuple[str, ...]]]:
    """Page, recipe and settings of each training shown, but for those of a placeholder."""
    found = []
    for page, command in SHOWN:
        words = shlex.split(command)
        if words[1] == "train" and words[2] != "RECIPE":
            settings = tuple(value for word, value in pairwise(words) if word == "--set")
            found.append((page, words[2], settings))
    return found


def test_there_are_trainings_to_check() -> None:
    assert {recipe for _, recipe, _ in trainings()} & set(NAMES)
    assert any(settings for _, _, settings in trainings())


@pytest.mark.parametrize(("page", "recipe", "settings"), trainings())
def test_trainings_shown_are_of_a_recipe_that_takes_their_settings(
    page: str, recipe: str, settings: tuple[str, ...]
) -> None:
    if recipe in ("age", "sex"):
        with_settings(PredictorConfig(), settings)
    elif recipe in KINDS:
        with_settings(baseline(recipe, (80, 112, 80)), settings)
    else:
        with_settings(recipe_named(recipe), settings)
