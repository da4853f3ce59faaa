"""The scorecard on terminals of any width: no figure is cut, no name lost, and what has no room is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from brainldm.evaluate.estimate import Estimate
from brainldm.evaluate.printed import as_markdown, as_text
from brainldm.evaluate.rows import PLAIN, Row


def row(title: str, value: float) -> Row:
    found = Estimate(value, value - 17.736, value + 13.787, 200, "t")
    return Row(
        "conditioning", f"key.{title}", title, PLAIN, "the instrument's own", "", found, found, "held-out", found
    )


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [(40, "difference, n, best"), (80, "difference, n, best"), (116, "n, best"), (128, "best"), (200, "")],
)
def test_names_and_figures_are_whole_at_any_width(monkeypatch: pytest.MonkeyPatch, columns: int, left_out: str) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = as_text([row("Ventricles: Pearson r", 0.981), row("Brain volume: bias", 135.161)], [], [])
    shown = " ".join(text.split())
    assert "Does it obey? Ventricles: Pearson r 0.981 (-16.755..14.768) 0.981 (-16.755..14.768)" in shown
    assert "Brain volume: bias 135.161 (117.425..148.948)" in shown and "…" not in text
    assert max(map(len, text.splitlines())) <= min(max(columns, 80), 140)
    assert (f"no room for {left_out}: see scorecard.md" in text) if left_out else ("no room" not in text)


def test_figures_too_long_for_the_narrowest_are_broken_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = as_text([row("Fréchet distance", 2235161.161)], [], [])
    assert text.count("2235161.161") == 2 and text.count("(2235143.425..2235174.948)") == 2
    assert "Fréchet distance" in text


def test_the_document_says_what_the_reference_is_and_why_there_is_no_value() -> None:
    hostile = row("<b>Left|pallidum</b>: Cohen's d", 0.5)
    text = as_markdown([hostile, replace(hostile, title="Age: slope", synthetic=Estimate.none("all were <1>"))], [], [])
    line = next(line for line in text.splitlines() if "pallidum" in line)
    assert line.replace("\\|", "").count("|") == 8 and "| held-out |" in line
    assert "- No value for Age: slope: all were &lt;1>." in text and "<b>" not in text
