"""The demo: brains by the shipped model, judged against phantoms made on the spot, and a page, in one call."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from brainldm import report
from brainldm.base import shipped
from brainldm.base.errors import BadInput
from brainldm.base.files import read_json
from brainldm.base.tables import read_table
from brainldm.cohort import phantom, prepare
from brainldm.evaluate import scorecard
from brainldm.model.package import package_model
from brainldm.model.precision import choose_device, choose_precision
from brainldm.recipes.whole_way import run_demo, run_demo_training
from brainldm.train import run as training
from test_cli import run
from test_table1 import Darkness


def test_the_demo_uses_the_shipped_model(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_model(tiny_run, tmp_path / "installed" / "demo")
    monkeypatch.setattr(shipped, "_ROOT", tmp_path / "installed")
    monkeypatch.setattr(scorecard, "_default_instrument", Darkness)
    asked = {}

    def ellipsoids(out: Path, **how: object) -> None:  # what stands for phantoms on so tiny a grid
        asked.update(how)
        shutil.copytree(tiny_cohort, out, ignore=shutil.ignore_patterns("prepared.json", "manifest.jsonl"))

    monkeypatch.setattr(phantom, "write_phantom_study", ellipsoids)
    said: list[str] = []
    page = run_demo(tmp_path / "out", people=10, seed=1, workers=1, say=said.append)
    assert page.read_text().startswith("<!doctype html>") or "<html" in page.read_text()
    plan = read_table(tmp_path / "out" / "brains" / "plan.tsv")
    assert len(plan) == 24
    assert len({cells["age_years"] for cells in plan.rows}) == 4
    assert len({cells["ventricles_mm3"] for cells in plan.rows}) == 6
    # None of the people compared with is one that a model was trained on: a training's seed is a small number.
    assert asked["n"] == 10 and asked["seed"] == 7_000_001
    assert "Done in" in said[-1] and "brainldm generate demo OUT" in said[-1]


def test_the_demo_that_trains_generates_as_every_machine_does_best(
    tiny_run: Path, tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phantom, "write_phantom_study", lambda *_, **__: None)
    monkeypatch.setattr(prepare, "prepare_study", lambda *_, **__: None)
    monkeypatch.setattr(training, "train", lambda recipe, cohort, out, **__: shutil.copytree(tiny_run, out))
    monkeypatch.setattr(scorecard, "evaluate_dataset", lambda *_, **__: SimpleNamespace(as_text=lambda: ""))
    monkeypatch.setattr(report, "write_report", lambda folder: folder / "index.html")
    said: list[str] = []
    run_demo_training(tmp_path / "out", say=said.append)
    assert any("16 brains" in line and "steps each, on" in line for line in said)
    made = read_json(tmp_path / "out" / "brains" / "generation.json")
    assert made["precision"] == choose_precision("auto", choose_device())


def test_without_a_shipped_model_the_demo_names_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_ROOT", tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"this installation has none.*brainldm demo OUT --train"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flags_of_the_training_belong_to_it(tmp_path: Path) -> None:
    result = run("demo", tmp_path / "out", "--people", 8)
    assert result.returncode == 2 and "Add --train" in result.stderr
    assert not (tmp_path / "out").exists()
