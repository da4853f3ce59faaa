"""Same row, same brain; nothing half-written counts; the same command finishes the work."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainldm.base.covariates import Covariates
from brainldm.base.errors import BadInput, PartialFailure, UsageError
from brainldm.base.files import sha256_of
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import read_nifti
from brainldm.base.tables import read_table
from brainldm.cohort.normalise import drawn_into_unit_range
from brainldm.generate import run as generation
from brainldm.generate.dataset import image_name
from brainldm.generate.plan import PlanRow, Sweep, make_plan, read_plan, write_plan
from brainldm.generate.run import GenerateSettings, check_settings, generate, row_noise
from brainldm.generate.writing import Brain, writing_brains
from brainldm.model.folder import load_model, read_description
from brainldm.model.latent_diffusion import LatentDiffusion

FAST = GenerateSettings(steps=3, batch=2)
NOISE_OF_ROW_3 = [-0.78055644, 1.57941496, 0.80452693]


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> LatentDiffusion:
    return load_model(tiny_run)


def plan_of(model: LatentDiffusion, n: int, **asked: Sweep) -> list[PlanRow]:
    return make_plan(asked, n=n, seed=0, ranges=model.ranges, joint=model.joint)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.glob("sub-*/anat/*.nii.gz"))}


# ---- the plan


def test_rows_do_not_depend_on_how_many_there_are(model: LatentDiffusion) -> None:
    assert plan_of(model, 20)[:5] == plan_of(model, 5)


def test_fixed_and_swept_covariates_are_held(model: LatentDiffusion) -> None:
    low, high = model.ranges.low[1], model.ranges.high[1]
    rows = plan_of(model, 8, sex=Sweep(0, 1, 2), age_years=Sweep(low, high, 4))
    assert [(row.covariates.sex, row.covariates.age_years) for row in rows] == [
        (sex, pytest.approx(age)) for sex in (0, 1) for age in np.linspace(low, high, 4)
    ]
    assert len({row.covariates.ventricles_mm3 for row in rows}) == 8
    assert all(all(model.ranges.inside(row.covariates).values()) for row in rows)


def test_outside_the_training_range_is_refused_or_marked(model: LatentDiffusion) -> None:
    asked = {"age_years": Sweep(120, 120, 1)}
    with pytest.raises(UsageError, match=r"age_years 120 is outside .*--allow-extrapolation"):
        make_plan(asked, n=2, seed=0, ranges=model.ranges, joint=model.joint)
    rows = make_plan(asked, n=2, seed=0, ranges=model.ranges, joint=model.joint, allow_extrapolation=True)
    assert [row.extrapolated for row in rows] == [("age_years",)] * 2


def test_plan_survives_its_table(model: LatentDiffusion, tmp_path: Path) -> None:
    rows = plan_of(model, 5)
    write_plan(tmp_path / "plan.tsv", rows)
    assert read_plan(tmp_path / "plan.tsv") == rows


def test_faults_of_a_plan_are_located(tmp_path: Path) -> None:
    plan = tmp_path / "plan.tsv"
    plan.write_text("sex\tage_years\tventricles_mm3\tbrain_mm3\nF\t61,5\t3e4\t1.4e6\n")
    with pytest.raises(BadInput, match=r"line 2, column 'age_years': '61,5' is not a number"):
        read_plan(plan)
    plan.write_text("sex\tage_years\tventricles_mm3\nF\t61\t3e4\n")
    with pytest.raises(BadInput, match="no column 'brain_mm3'"):
        read_plan(plan)
    plan.write_text("index\tsex\tage_years\tventricles_mm3\tbrain_mm3\n1\tF\t61\t3e4\t1e6\n")
    with pytest.raises(BadInput, match="must be 0"):
        read_plan(plan)


def test_slips_of_a_plan_s_units_are_refused_and_the_paper_s_extremes_are_not(tmp_path: Path) -> None:
    plan, header = tmp_path / "plan.tsv", "sex\tage_years\tventricles_mm3\tbrain_mm3"
    for row, told in (
        ("F\t70\t40\t1450000", r"line 2, column 'ventricles_mm3': '40' .*millilitres"),
        ("F\t70\t40000\t1450", r"line 2, column 'brain_mm3': '1450' .*millilitres"),
        ("F\t-70\t40000\t1450000", r"'-70' is outside 0 to 125"),
        ("F\t1e300\t40000\t1450000", r"'1e300' is outside 0 to 125"),
    ):
        plan.write_text(f"{header}\n{row}\n")
        with pytest.raises(BadInput, match=told):
            read_plan(plan)
    beyond = [PlanRow(0, Covariates(0, 63.0, -75e3, 1.4e6)), PlanRow(1, Covariates(1, 63.0, 7e5, 9e5))]
    beyond += [PlanRow(2, Covariates(1, 63.0, 400.0, 1.4e6), ("ventricles_mm3",))]  # chance, and marked
    write_plan(plan, beyond)
    assert [row.covariates for row in read_plan(plan)] == [row.covariates for row in beyond]


def test_a_plan_has_an_end(model: LatentDiffusion) -> None:
    ages = {"age_years": Sweep(50, 60, 10**9)}
    for asked, n in (({}, 10**9), (ages, None), (ages, 2)):
        with pytest.raises(UsageError, match=r"1000000000 brains .* at most 1000000"):
            make_plan(asked, n=n, seed=0, ranges=model.ranges, joint=model.joint)


# ---- the brains


def test_same_row_same_brain_whatever_batch_or_company(model: LatentDiffusion) -> None:
    people = [row.covariates for row in plan_of(model, 4)]
    together = model.sample(people, [row_noise(0, i) for i in range(4)], steps=3)
    alone = model.sample(people[2:3], [row_noise(0, 2)], steps=3)
    assert np.allclose(together[2], alone[0], atol=1e-4)
    other_seed = model.sample(people[2:3], [row_noise(1, 2)], steps=3)
    assert not np.allclose(alone, other_seed, atol=1e-3)


def test_a_dataset_is_the_same_brains_whatever_the_batch_and_others_by_another_seed(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    person = plan_of(model, 1)[0].covariates
    rows = [PlanRow(index, person) for index in range(5)]  # only their noise differs

    def made(name: str, **settings: object) -> np.ndarray:
        generate(model, tmp_path / name, rows, replace(FAST, dtype="float32", **settings))  # type: ignore[arg-type]
        return np.stack([read_nifti(tmp_path / name / image_name(row)).data_XYZ for row in rows])

    in_twos_NXYZ = made("twos")
    for batch in (1, 5):
        np.testing.assert_allclose(made(f"batch {batch}", batch=batch), in_twos_NXYZ, atol=1e-4)

    def differ(one_XYZ: np.ndarray, other_XYZ: np.ndarray) -> bool:
        return float(np.abs(one_XYZ - other_XYZ).max()) > 1e-2

    assert all(differ(in_twos_NXYZ[i], in_twos_NXYZ[j]) for i in range(5) for j in range(i))
    assert all(map(differ, made("seed", seed=1), in_twos_NXYZ))
    assert np.ptp(made("one noise", same_noise=True), axis=0).max() < 1e-4


def test_a_row_has_noise_of_its_own_for_each_step_and_attempt() -> None:
    """These numbers are a promise: a dataset that somebody made is made again by them."""
    assert row_noise(0, 3)(0, (3,)).tolist() == pytest.approx(NOISE_OF_ROW_3, abs=1e-6)
    draws = [row_noise(seed, row, attempt)(step, (3,)) for seed, row, attempt, step in np.ndindex(2, 2, 2, 2)]
    assert len({draw.tobytes() for draw in draws}) == 16


def test_a_plan_is_of_its_seed(model: LatentDiffusion) -> None:
    other = make_plan({}, n=3, seed=1, ranges=model.ranges, joint=model.joint)
    assert not {row.covariates for row in other} & {row.covariates for row in plan_of(model, 3)}


@pytest.mark.parametrize("sampler", ["ddim", "ddim-original", "ddpm"])
def test_every_sampler_gives_finite_brains(model: LatentDiffusion, sampler: str) -> None:
    steps = None if sampler == "ddpm" else 3
    images = model.sample([Covariates(0, 60.0, 3e4, 1.45e6)], [row_noise(0, 0)], sampler=sampler, steps=steps)
    assert np.isfinite(images).all()


def test_dataset_is_whole_and_described(model: LatentDiffusion, tmp_path: Path) -> None:
    rows = plan_of(model, 3)
    summary = generate(model, tmp_path / "out", rows, FAST)
    assert (summary.made, summary.were_there) == (3, 0)
    records = Manifest(tmp_path / "out" / "manifest.jsonl").proven(tmp_path / "out", full=True)
    assert sorted(records) == [0, 1, 2]
    volume = read_nifti(tmp_path / "out" / image_name(rows[0]))
    assert np.allclose(volume.affine, model.grid.affine, atol=1e-4)
    assert 0 <= volume.data_XYZ.min() < volume.data_XYZ.max() <= 1
    table = read_table(tmp_path / "out" / "participants.tsv")
    assert table.number(1, "ventricular_volume") == rows[1].covariates.ventricles_mm3
    sidecar = json.loads((tmp_path / "out" / "space-MNI152rigid_desc-synth_T1w.json").read_text())
    assert sidecar["SyntheticData"] is True


def test_bids_validator_finds_no_error(model: LatentDiffusion, tmp_path: Path) -> None:
    validator = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    if validator is None:
        pytest.skip("bids-validator-deno is not installed (pip install brainldm[bids])")
    generate(model, tmp_path / "out", plan_of(model, 3), FAST)
    command = [validator, str(tmp_path / "out"), "--max-rows", "-1", "--format", "json"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    issues = json.loads(result.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_same_command_finishes_what_is_missing(model: LatentDiffusion, tmp_path: Path) -> None:
    rows = plan_of(model, 5)
    generate(model, tmp_path / "whole", rows, FAST)
    generate(model, tmp_path / "again", rows, FAST)
    lost = tmp_path / "again" / image_name(rows[3])
    lost.unlink()
    summary = generate(model, tmp_path / "again", rows, FAST)
    assert (summary.made, summary.were_there) == (1, 4)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "whole")
    assert len(hashes(tmp_path / "whole")) == 5


def test_a_brain_of_other_bytes_is_made_again(model: LatentDiffusion, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", plan_of(model, 2)
    generate(model, out, rows, FAST)
    before, path = hashes(out), out / image_name(rows[1])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert generate(model, out, rows, FAST).made == 1
    assert hashes(out) == before


def test_a_dataset_grows_by_the_rows_that_follow(model: LatentDiffusion, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", plan_of(model, 5)
    generate(model, out, rows[:2], FAST)
    first = hashes(out)
    summary = generate(model, out, rows, FAST)
    assert (summary.made, summary.were_there) == (3, 2)
    assert first.items() <= hashes(out).items() and len(hashes(out)) == 5
    assert read_plan(out / "plan.tsv") == rows and json.loads((out / "generation.json").read_text())["n"] == 5
    assert len(read_table(out / "participants.tsv")) == 5
    write_plan(out / "plan.tsv", rows)  # stopped between the two files
    (out / "generation.json").write_text((out / "generation.json").read_text().replace('"n": 5', '"n": 2'))
    assert generate(model, out, rows, FAST).made == 0
    assert json.loads((out / "generation.json").read_text())["n"] == 5
    longer = plan_of(model, 7)
    write_plan(out / "plan.tsv", longer)  # stopped there, and then fewer are asked for
    assert generate(model, out, longer[:6], FAST).made == 1
    assert read_plan(out / "plan.tsv") == longer[:6]
    write_plan(out / "plan.tsv", longer)
    assert generate(model, out, longer[:6], FAST).made == 0
    assert read_plan(out / "plan.tsv") == longer[:6]
    with pytest.raises(UsageError, match="n: 6 there, 2 now"):
        generate(model, out, rows[:2], FAST)
    others = [*rows[:4], PlanRow(4, Covariates(0, 60.0, 3e4, 1.45e6)), *longer[5:]]
    with pytest.raises(UsageError, match="other covariates"):
        generate(model, out, others, FAST)
    with pytest.raises(UsageError, match="steps: 3 there"):
        generate(model, out, longer, replace(FAST, steps=2))


def test_another_processor_s_last_digits_are_the_same_plan(model: LatentDiffusion, tmp_path: Path) -> None:
    """exp and log differ in them; the rows that are there stay as they were asked for."""
    out, rows = tmp_path / "out", plan_of(model, 4)
    generate(model, out, rows[:2], FAST)
    nudged = [replace(row, covariates=_nudged(row.covariates)) for row in rows]
    assert generate(model, out, nudged, FAST).made == 2
    kept = [row.covariates for row in read_plan(out / "plan.tsv")]
    assert kept == [row.covariates for row in (*rows[:2], *nudged[2:])]
    assert read_table(out / "participants.tsv").number(1, "age") == rows[1].covariates.age_years


def _nudged(person: Covariates) -> Covariates:
    return replace(person, age_years=float(np.nextafter(person.age_years, 0)))


def test_brains_without_their_plan_are_not_given_another(model: LatentDiffusion, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", plan_of(model, 2)
    generate(model, out, rows, FAST)
    (out / "plan.tsv").unlink()
    before = (out / "participants.tsv").read_bytes()
    with pytest.raises(BadInput, match=r"plan\.tsv, which says what was asked of the 2 brains there, is missing"):
        generate(model, out, rows, FAST)
    assert (out / "participants.tsv").read_bytes() == before and not (out / "plan.tsv").exists()


def test_a_record_says_by_what_software_the_earlier_brains_were_made(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = tmp_path / "out", plan_of(model, 4)
    generate(model, out, rows[:2], FAST)
    assert "earlier_runs" not in json.loads((out / "generation.json").read_text())
    monkeypatch.setattr("brainldm.__version__", "9.9")
    for _ in range(2):  # the second time there is nothing to make
        generate(model, out, rows, FAST)
        record = json.loads((out / "generation.json").read_text())
        assert record["software"]["brainldm"] == "9.9" and record["n"] == 4
        (earlier,) = record["earlier_runs"]
        assert earlier["brains"] == 2 and earlier["software"]["brainldm"] != "9.9" and earlier["software"]["numpy"]
        sidecar = json.loads((out / "space-MNI152rigid_desc-synth_T1w.json").read_text())
        assert sidecar["Generator"] == record


def test_a_model_may_be_renamed_and_licensed_before_its_dataset_is_finished(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    rows = plan_of(model, 3)
    generate(model, tmp_path, rows[:2], FAST)
    named = replace(model, description=model.description.model_copy(update={"name": "new", "licence": "CC0-1.0"}))
    assert generate(named, tmp_path, rows, FAST).made == 1
    assert json.loads((tmp_path / "dataset_description.json").read_text())["License"] == "CC0-1.0"


def test_the_manifest_of_a_finished_dataset_has_one_line_a_brain_in_order(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    rows = plan_of(model, 4)
    generate(model, tmp_path, rows, FAST)
    (tmp_path / image_name(rows[1])).write_bytes(b"torn")
    generate(model, tmp_path, rows, FAST)
    assert [record["index"] for record in Manifest(tmp_path / "manifest.jsonl").records()] == [0, 1, 2, 3]


GENERATE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import brainldm.base.files as files
from brainldm.generate.plan import make_plan
from brainldm.generate.run import GenerateSettings, generate
from brainldm.model.folder import load_model
calls = 0
whole = files.os.fsync
def dying_fsync(handle):
    global calls
    calls += 1
    if calls == {die_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(handle)
files.os.fsync = dying_fsync
model = load_model(Path({run!r}))
rows = make_plan({{}}, n=5, seed=0, ranges=model.ranges, joint=model.joint)
generate(model, Path({out!r}), rows, GenerateSettings(steps=3, batch=2))
"""


@pytest.mark.parametrize("die_at", [3, 19, 21, 26])
def test_killed_and_run_again_gives_the_same_files(
    model: LatentDiffusion, tiny_run: Path, tmp_path: Path, die_at: int
) -> None:
    out = tmp_path / "out"
    script = GENERATE_AND_DIE.format(die_at=die_at, run=str(tiny_run), out=str(out))
    died = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    rows = plan_of(model, 5)
    generate(model, tmp_path / "whole", rows, FAST)
    generate(model, out, rows, FAST)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert sorted(Manifest(out / "manifest.jsonl").proven(out, full=True)) == [0, 1, 2, 3, 4]
    assert not list(out.rglob(".part-*"))


@pytest.mark.parametrize("meanwhile", [True, False])
def test_brains_handed_over_are_written_in_order_whatever_ends_the_sampling(
    model: LatentDiffusion, tmp_path: Path, meanwhile: bool
) -> None:
    rows, manifest = plan_of(model, 5), Manifest(tmp_path / "manifest.jsonl")
    rising_XYZ = np.linspace(0, 0.2, math.prod(model.grid.shape_XYZ), dtype=np.float32).reshape(model.grid.shape_XYZ)
    images = [rising_XYZ * (row.index + 1) for row in rows]
    broken = {3: np.full(model.grid.shape_XYZ, np.nan, np.float32)}

    def sample_and_write(wrong: dict[int, np.ndarray]) -> None:
        with writing_brains(tmp_path, model.grid, "float32", manifest, meanwhile=meanwhile) as write:
            for batch in (rows[:2], rows[2:]):
                write([Brain(row, wrong.get(row.index, images[row.index]), attempt=0) for row in batch])
            raise UsageError("asked to end")

    with pytest.raises(ValueError, match="not finite"):  # of the writing: whoever waits for it hears of it
        sample_and_write(broken)
    assert [record["index"] for record in manifest.records()] == [0, 1, 2, 4]
    manifest.path.unlink()
    with pytest.raises(UsageError, match="asked to end"):
        sample_and_write({})
    assert sorted(manifest.proven(tmp_path, full=True)) == [0, 1, 2, 3, 4]
    assert [record["index"] for record in manifest.records()] == [0, 1, 2, 3, 4]
    for row, image_XYZ in zip(rows, images):
        np.testing.assert_allclose(read_nifti(tmp_path / image_name(row)).data_XYZ, image_XYZ)


def test_another_dataset_in_the_folder_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    generate(model, tmp_path / "out", plan_of(model, 2), FAST)
    with pytest.raises(UsageError, match="seed: 0 there, 5 now"):
        generate(model, tmp_path / "out", plan_of(model, 2), GenerateSettings(steps=3, batch=2, seed=5))
    other = [PlanRow(row.index, Covariates(0, 60.0, 3e4, 1.45e6)) for row in plan_of(model, 2)]
    with pytest.raises(UsageError, match="other covariates"):
        generate(model, tmp_path / "out", other, FAST)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").touch()
    with pytest.raises(UsageError, match="not empty"):
        generate(model, tmp_path / "foreign", plan_of(model, 2), FAST)


def test_a_whole_dataset_of_another_device_is_left_as_it_is(model: LatentDiffusion, tmp_path: Path) -> None:
    """Made on a GPU, asked for again on a CPU: nothing is left to do. With a brain missing it is another dataset."""
    out, rows = tmp_path / "out", plan_of(model, 2)
    generate(model, out, rows, FAST)
    record = json.loads((out / "generation.json").read_text()) | {"device": "cuda", "precision": "bf16"}
    (out / "generation.json").write_text(json.dumps(record))
    before = hashes(out)
    assert generate(model, out, rows, FAST).made == 0
    assert hashes(out) == before and json.loads((out / "generation.json").read_text()) == record
    next(out.glob("sub-*/anat/*.nii.gz")).unlink()
    with pytest.raises(UsageError, match="device: 'cuda' there"):
        generate(model, out, rows, FAST)


def test_unsound_brains_are_drawn_again_and_counted(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1's first draw is empty; row 2 never gives a brain and is listed while the rest is done."""
    rows = plan_of(model, 4)
    seen: dict[float, int] = {}
    honest = LatentDiffusion.sample

    def faulty(self, covariates, noise, **options):  # type: ignore[no-untyped-def]
        images = honest(self, covariates, noise, **options)
        for position, person in enumerate(covariates):
            seen[person.age_years] = seen.get(person.age_years, 0) + 1
            if person == rows[2].covariates or (person == rows[1].covariates and seen[person.age_years] == 1):
                images[position] = np.nan if person == rows[2].covariates else 0.0
        return images

    monkeypatch.setattr(LatentDiffusion, "sample", faulty)
    with pytest.raises(PartialFailure, match="1 of 4"):
        generate(model, tmp_path / "out", rows, FAST)
    failures = read_table(tmp_path / "out" / "failures.tsv")
    assert failures.rows[0]["participant_id"] == "sub-000002"
    records = Manifest(tmp_path / "out" / "manifest.jsonl").proven(tmp_path / "out")
    assert {index: record["attempt"] for index, record in records.items()} == {0: 0, 1: 1, 3: 0}
    listed = [cells["participant_id"] for cells in read_table(tmp_path / "out" / "participants.tsv").rows]
    assert listed == ["sub-000000", "sub-000001", "sub-000003"]
    assert len(read_plan(tmp_path / "out" / "plan.tsv")) == 4
    assert "3 synthetic" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.undo()
    assert generate(model, tmp_path / "out", rows, FAST).made == 1
    assert len(read_table(tmp_path / "out" / "participants.tsv")) == 4


def test_a_brain_drawn_again_twice_is_one_brain(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, brightness = LatentDiffusion.sample, iter((0.0, 0.0, 1.0))
    monkeypatch.setattr(LatentDiffusion, "sample", lambda *a, **options: honest(*a, **options) * next(brightness))
    summary = generate(model, tmp_path / "out", plan_of(model, 1), FAST)
    assert (summary.made, summary.redrawn) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (GenerateSettings(sampler="euler"), "no sampler is named 'euler'"),
        (GenerateSettings(steps=0), "0 sampling steps"),
        (GenerateSettings(sampler="ddpm", steps=50), "ddpm takes all 1000"),
        (GenerateSettings(batch=0), "a batch of 0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    model: LatentDiffusion, tmp_path: Path, settings: GenerateSettings, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        generate(model, tmp_path / "out", plan_of(model, 2), settings)
    assert not (tmp_path / "out").exists()


def test_sound_means_finite_bright_and_not_flat() -> None:
    shape = (8, 8, 8)
    good = np.linspace(0, 1, 512).reshape(shape)
    assert generation.is_sound(good)
    for bad in (np.zeros(shape), np.full(shape, 0.7), np.where(good > 0.99, np.nan, good)):
        assert not generation.is_sound(bad)


def test_disk_full_is_an_environment_problem(model: LatentDiffusion, tmp_path: Path) -> None:
    """Writes into a file system of 200 kB, when this user may mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(mount)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        from brainldm.base.errors import EnvironmentProblem

        rows = plan_of(model, 40)
        with pytest.raises(EnvironmentProblem, match="disk is full"):
            generate(model, mount / "out", rows, GenerateSettings(steps=1, batch=8, dtype="float32"))
        assert not list(mount.rglob(".part-*"))
        proven = Manifest(mount / "out" / "manifest.jsonl").proven(mount / "out", full=True)
        assert len(proven) == len(list(mount.rglob("*.nii.gz")))
    finally:
        subprocess.run(["umount", str(mount)], check=False)


def test_a_model_that_was_always_told_cannot_be_guided(tiny_run: Path) -> None:
    description = read_description(tiny_run)
    with pytest.raises(UsageError, match="never trained without its covariates"):
        check_settings(description, GenerateSettings(guidance=2.0))
    with pytest.raises(UsageError, match="a guidance of nan"):
        check_settings(description, GenerateSettings(guidance=float("nan")))


def test_what_goes_beyond_the_range_is_drawn_together_not_cut_off(model: LatentDiffusion, tmp_path: Path) -> None:
    image_XYZ = np.linspace(-0.2, 1.3, 1000, dtype=np.float32).reshape(10, 10, 10)
    drawn_XYZ = drawn_into_unit_range(image_XYZ)
    assert drawn_XYZ.dtype == np.float32 and drawn_XYZ.min() == 0 and drawn_XYZ.max() == 1
    assert np.array_equal(drawn_XYZ[image_XYZ <= 0.9], np.maximum(image_XYZ[image_XYZ <= 0.9], 0))
    assert (np.diff(drawn_XYZ[image_XYZ > 0]) > 0).all()
    assert np.array_equal(drawn_into_unit_range(image_XYZ / 2), np.maximum(image_XYZ / 2, 0))

    brighter = replace(model, autoencoder=Brighter(model.autoencoder))
    generate(brighter, tmp_path, plan_of(model, 1), FAST)
    written = read_nifti(next(tmp_path.rglob("*_T1w.nii.gz"))).data_XYZ
    assert (written == 1).sum() == 1 and (written > 0.9).mean() > 0.2


class Brighter(torch.nn.Module):
    """An autoencoder whose images go far beyond 1."""

    def __init__(self, autoencoder: torch.nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def decode(self, latent_BCXYZ: torch.Tensor) -> torch.Tensor:
        image_B1XYZ = self.autoencoder.decode(latent_BCXYZ)
        return 0.5 * image_B1XYZ + torch.linspace(0.5, 1.5, image_B1XYZ.shape[-1])
