"""Regional volumes: known differences, tables of others, and SynthSeg where a program of that name is installed."""

from __future__ import annotations

import json
import math
import os
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from brainldm.base.errors import BadInput, EnvironmentProblem, UsageError
from brainldm.base.streams import stream
from brainldm.base.tables import read_table, write_table
from brainldm.base.volume import Volume
from brainldm.cohort.synthseg import SynthSegMeasure
from brainldm.evaluate.morphometry import cohen_d, compare_tables, morphometry, wasserstein
from brainldm.evaluate.scorecard import evaluate_dataset
from judged_folders import write_cohort, write_synthetic

NAMES = ("left hippocampus", "right hippocampus", "thalamus", "pallidum")


def people(n: int, seed: int, **shift: float) -> list[dict[str, float]]:
    drawn = stream(seed, "test/morphometry").normal(4000, 300, (n, len(NAMES)))
    return [{name: float(v) + shift.get(name.split()[-1], 0) for name, v in zip(NAMES, row)} for row in drawn]


def test_a_region_that_differs_is_found_and_sized() -> None:
    found = morphometry(people(60, 1, thalamus=600), people(80, 2), 0)
    assert found is not None
    worst = found.regions[0]
    assert worst.name == "thalamus" and worst.cohen_d.low < 2.0 < worst.cohen_d.high
    assert all(region.cohen_d.low < 0 < region.cohen_d.high for region in found.regions[1:])
    assert found.parts.beyond.low > 0 and found.parts.across.n == 20
    same = morphometry(people(60, 3), people(80, 2), 0)
    assert same is not None and same.parts.beyond.low < 0 < same.parts.beyond.high


def test_too_little_variety_is_no_likeness() -> None:
    """It brings people nearer to others, and yet counts as a difference."""
    usual = people(64, 1)
    alike = [{name: 4000 + 0.5 * (volume - 4000) for name, volume in person.items()} for person in usual]
    found = morphometry(alike, people(190, 2), 0)
    assert found is not None
    assert found.parts.across.value < found.parts.real.value and found.parts.beyond.low > 0


def test_cohen_d_of_known_samples() -> None:
    a, b = np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 4, 5, 6])
    pooled = math.sqrt((3 * a.var(ddof=1) + 4 * b.var(ddof=1)) / 7)
    assert cohen_d(a, b).value == pytest.approx((2.5 - 4) / pooled)
    assert cohen_d(a[:1], b).value is None
    assert cohen_d(np.ones(3), np.ones(4)).value is None


def test_wasserstein_is_the_best_assignment() -> None:
    drawn = stream(0, "test/wasserstein")
    x, y = drawn.normal(size=(5, 3)), drawn.normal(size=(5, 3))
    costs = np.sqrt(((x[:, None] - y[None]) ** 2).mean(axis=2))
    assert wasserstein(x, y) == pytest.approx(min(costs[range(5), list(p)].mean() for p in permutations(range(5))))
    assert wasserstein(x, x[::-1]) == 0


def test_few_people_and_alike_ones_get_a_reason() -> None:
    few = morphometry(people(1, 1), people(3, 2), 0)
    assert few is not None and few.parts.across.value is None and "8 synthetic and 16 real" in few.parts.across.reason
    alike = morphometry(people(9, 1), [people(1, 2)[0]] * 9, 0)
    assert alike is not None and alike.parts.beyond.value is None and "the same" in alike.parts.beyond.reason
    assert morphometry([], people(3, 2), 0) is None
    assert morphometry([{"thalamus": 1.0}], people(3, 2), 0) is None


def test_two_tables_of_anybodys(tmp_path: Path) -> None:
    for name, members in (("made.tsv", people(20, 1)), ("real.tsv", people(30, 2))):
        rows = [{"who": f"p{i}", "head": 1.5e6 + 1e4 * i, **volumes} for i, volumes in enumerate(members)]
        write_table(tmp_path / name, ("who", "head", *NAMES), rows)
    found = compare_tables(tmp_path / "made.tsv", tmp_path / "real.tsv", tmp_path / "out", head="head")
    assert {region.name for region in found.regions} == set(NAMES)
    table = read_table(tmp_path / "out" / "regions.tsv")
    assert [row["region"] for row in table.rows] == [region.name for region in found.regions]
    assert json.loads((tmp_path / "out" / "morphometry.json").read_text())["head"] == "head"
    write_table(tmp_path / "one.tsv", ("who", *NAMES), [{"who": "p1", **people(1, 1)[0]}])
    alone = compare_tables(tmp_path / "one.tsv", tmp_path / "real.tsv", tmp_path / "alone")
    assert alone.regions[0].cohen_d.value is None and alone.regions[0].synthetic_sd is None
    assert {row["synthetic_sd_mm3"] for row in read_table(tmp_path / "alone" / "regions.tsv").rows} == {"n/a"}
    write_table(tmp_path / "other.tsv", ("who", "insula"), [{"who": "p1", "insula": 3.0}])
    with pytest.raises(BadInput, match="regions in common"):
        compare_tables(tmp_path / "other.tsv", tmp_path / "real.tsv", tmp_path / "none")
    before = (tmp_path / "out" / "regions.tsv").read_bytes()
    (tmp_path / "link.tsv").symlink_to("out/regions.tsv")
    with pytest.raises(UsageError, match=r"link\.tsv: the output would overwrite"):
        compare_tables(tmp_path / "made.tsv", tmp_path / "link.tsv", tmp_path / "out")
    assert (tmp_path / "out" / "regions.tsv").read_bytes() == before


# ------------------------------------------------------------------------------------------- other programs' tables

SYNTHSEG = (
    "subject",
    "total intracranial",
    "left lateral ventricle",
    "right lateral ventricle",
    "left inferior lateral ventricle",
    "right inferior lateral ventricle",
    "left thalamus",
    "right thalamus",
    "csf",
)


def synthseg_table(path: Path, ventricles_mm3: list[float], names: list[str]) -> Path:
    drawn = stream(0, "test/synthseg")
    lines = [",".join(SYNTHSEG)]
    for name, total in zip(names, ventricles_mm3):
        thalami = drawn.normal(7000, 400, 2)
        cells = (1_500_000, total * 0.45, total * 0.45, total * 0.05, total * 0.05, *thalami, 900)
        lines.append(",".join([name, *map(str, cells)]))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_volumes_from_tables_are_taken_instead_of_measured(tmp_path: Path) -> None:
    asked = [2e4 + 2e3 * i for i in range(8)]
    made = write_synthetic(tmp_path / "made", asked)
    people_there = write_cohort(tmp_path / "real", asked)
    ids = [row["participant_id"] for row in read_table(people_there / "participants.tsv").rows]
    table = synthseg_table(tmp_path / "s.csv", asked, [f"sub-{i:06d}_T1w.nii.gz" for i in range(8)])
    of_real = synthseg_table(tmp_path / "r.csv", asked, ids)
    card = evaluate_dataset(made, people_there, tmp_path / "out", volumes=(table, of_real), features=("none",), pairs=5)
    assert not card.failures
    assert card.row("ventricles_mm3.pearson_r").synthetic.value == pytest.approx(1)
    assert card.settings["instrument"] == "table:s.csv"
    assert "there are 8 and 8" in card.row("regions.wasserstein").synthetic.reason  # the regions were read
    assert (tmp_path / "out" / "regions.tsv").exists()
    with pytest.raises(UsageError, match="one side only"):
        evaluate_dataset(made, people_there, tmp_path / "x", volumes=(table, None))


def test_an_image_that_the_table_lacks_is_a_failure(tmp_path: Path) -> None:
    made = write_synthetic(tmp_path / "made", [2e4, 3e4])
    table = synthseg_table(tmp_path / "s.csv", [2e4], ["sub-000000"])
    card = evaluate_dataset(made, None, tmp_path / "out", volumes=(table, None), features=("none",), pairs=5)
    assert [failure.reason for failure in card.failures] == ["not_in_table"]


def test_synthseg_is_run_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Volume(np.zeros((4, 4, 4), dtype=np.float32), np.eye(4))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="not installed"):
        SynthSegMeasure()(image)
    table = synthseg_table(tmp_path / "answer.csv", [3e4], ["sub-image.nii.gz"])
    program = tmp_path / "mri_synthseg"
    program.write_text(f'#!/bin/sh\nwhile [ "$1" != --vol ]; do shift; done\n/bin/cp {table} "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    assert SynthSegMeasure()(image).ventricles_mm3 == pytest.approx(3e4)
    program.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    with pytest.raises(BadInput, match="out of memory"):
        SynthSegMeasure()(image)
