"""What is told and planned before the first brain, and what imported models need: memory, time, orientation, form."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainldm.base.covariates import PAPER_RANGES, Covariates
from brainldm.base.errors import BadInput, EnvironmentProblem, PartialFailure, UsageError
from brainldm.base.files import read_json, write_json
from brainldm.base.nifti import read_nifti
from brainldm.base.volume import GRIDS
from brainldm.diffusion.solvers import SAMPLERS
from brainldm.generate.dataset import as_bundle, bundle_grid, image_name
from brainldm.generate.plan import PlanRow, check_ranges, make_plan
from brainldm.generate.run import GenerateSettings, generate, row_noise
from brainldm.generate.sampler_table import compare_samplers
from brainldm.generate.start import Ready, parse_memory, start
from brainldm.model.cost import convolution_speed, estimate_seconds, network_calls, work_of
from brainldm.model.description import (
    CovariatesDescription,
    GridDescription,
    LatentDescription,
    LatentDiffusionDescription,
)
from brainldm.model.folder import load_model, read_description
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.memory import SLAB_BYTES, MemoryPlan, _free_in_groups, _held_and_free, gigabytes, plan_memory
from brainldm.model.precision import choose_device
from brainldm.nets.autoencoder import AutoencoderConfig
from brainldm.nets.blocks import is_forgotten
from brainldm.nets.packed import packing_works
from brainldm.nets.unet import UNetConfig
from brainldm.recipes.figures import figure_2, figure_4, make_figure

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture(scope="module")
def published() -> LatentDiffusionDescription:
    """The description of the published model, without its weights."""
    return LatentDiffusionDescription(
        name="published",
        autoencoder=AutoencoderConfig(),
        unet=UNetConfig(),
        latent=LatentDescription(shape_CXYZ=(3, 20, 28, 20), scale=1.0),
        covariates=CovariatesDescription(ranges=PAPER_RANGES.to_json()),
        grid=GridDescription.of(GRIDS["paper"], network_x="right_to_left"),
        preprocessing={},
        training={},
        licence="unknown",
        weights={},
    )


def rows_of(model: LatentDiffusion, n: int) -> list[PlanRow]:
    return make_plan({}, n=n, seed=0, ranges=model.ranges, joint=model.joint)


# ---- time and memory


def test_work_is_counted_as_published(published: LatentDiffusionDescription) -> None:
    work = work_of(published)
    assert work.unet_call_flop == pytest.approx(1.45e12, rel=0.01)
    assert work.decode_flop == pytest.approx(15.1e12, rel=0.01)


def test_time_grows_with_the_work(
    tiny_run: Path, published: LatentDiffusionDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One speed for all: what else runs on the machine is not the work's.
    assert convolution_speed(read_description(tiny_run), CPU, "fp32") > 0
    monkeypatch.setattr("brainldm.model.cost.convolution_speed", lambda *_: 2e11)

    def seconds(description: LatentDiffusionDescription, **changes: object) -> float:
        asked = {"images": 4, "sampler": "ddim", "steps": 50, "device": CPU, "precision": "fp32"} | changes
        return estimate_seconds(description, **asked)  # type: ignore[arg-type]

    assert seconds(published) > 50 * seconds(read_description(tiny_run), steps=5)
    assert 4 < seconds(published, steps=500) / seconds(published) < 12
    assert network_calls("heun", 10) == 19 and network_calls("unipc", 10) == 10


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_plan_keeps_to_the_limit_or_says_what_it_needs(
    published: LatentDiffusionDescription, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a process that has only just begun: what the tests before left behind is not the plan's.
    monkeypatch.setattr("brainldm.model.memory._held_and_free", lambda device: (GB // 2, 20 * GB))

    def plan(limit_bytes: int, batch: int = 1) -> MemoryPlan:
        return plan_memory(published, batch=batch, precision=precision, device=CPU, limit_bytes=limit_bytes)

    ample = plan(100 * GB)
    assert ample.peak_bytes < (3.5 if precision == "bf16" else 6) * GB  # MONAI: 10.5 GB
    assert not ample.keeps_unet and ample.slab_bytes
    assert plan(ample.peak_bytes + 10**8).peak_bytes <= ample.peak_bytes + 10**8
    with pytest.raises(
        EnvironmentProblem, match=r"needs \d\.\d GB of memory, and 1\.0 GB were allowed\. Allow"
    ) as told:
        plan(GB, batch=2)
    assert "smaller --batch" in str(told.value)
    assert ("--exact" in str(told.value)) == (precision == "fp32")


def test_small_models_are_decoded_whole_and_kept(tiny_run: Path) -> None:
    plan = plan_memory(read_description(tiny_run), batch=4, precision="fp32", device=CPU)
    assert plan.slab_bytes is None and plan.keeps_unet


def test_amounts_of_memory() -> None:
    assert [parse_memory(t) for t in ("3GB", "512 mb", "2GiB", ".5G")] == [3 * GB, 512 * 10**6, 2 << 30, GB // 2]
    for wrong in ("3", "0GB", "much", "-1GB", "3GB now"):
        with pytest.raises(UsageError, match="no amount of memory"):
            parse_memory(wrong)


def test_what_is_told_before_the_first_brain(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, told = rows_of(load_model(tiny_run), 5), []
    ready = start(tiny_run / "model", rows, GenerateSettings(), precision="fp32", say=told.append)
    assert len(told) == 1
    assert told[0].startswith("5 brains, 4 at a time, 12 unipc steps each, on ")
    assert "about" in told[0] and "B of memory" in told[0]
    assert ready.settings.batch == 4

    def hungry(description: LatentDiffusionDescription, *, batch: int, **_: object) -> MemoryPlan:
        if batch > 1:
            raise EnvironmentProblem("too much")
        return MemoryPlan(peak_bytes=1)

    monkeypatch.setattr("brainldm.generate.start.plan_memory", hungry)
    assert start(tiny_run / "model", rows, GenerateSettings(), may_shrink_batch=True).settings.batch == 1
    with pytest.raises(EnvironmentProblem, match="too much"):
        start(tiny_run / "model", rows, GenerateSettings())
    with pytest.raises(UsageError, match="--compile is for CUDA"):
        start(tiny_run / "model", rows, GenerateSettings(), device="cpu", compiles=True)
    for wrong in ({"batch": 0}, {"sampler": "magic"}, {"steps": 0}, {"as_bundle": True}):
        with pytest.raises(UsageError):
            start(tiny_run / "model", rows, replace(GenerateSettings(), **wrong))  # type: ignore[arg-type]


def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="cuda:9 was asked for and this machine has 2 CUDA devices"):
        choose_device("cuda:9")


# ---- precision and residency do not change a brain


@pytest.mark.skipif(not packing_works(), reason="this build of torch cannot pack convolutions")
def test_bf16_gives_nearly_the_same_brains(tiny_run: Path) -> None:
    exact, fast = load_model(tiny_run), load_model(tiny_run, precision="bf16")
    people = [row.covariates for row in rows_of(exact, 2)]
    noise = [row_noise(0, index) for index in range(2)]
    expected, found = (model.sample(people, noise, steps=5) for model in (exact, fast))
    rmse = float(np.sqrt(np.square(found - expected).mean()))
    assert 0 < rmse < 0.02 * float(np.ptp(expected))


def test_giving_up_the_unet_between_batches_changes_nothing(tiny_run: Path) -> None:
    lean = load_model(tiny_run, memory=MemoryPlan(slab_bytes=1 << 30, keeps_unet=False))
    usual = load_model(tiny_run)
    people, noise = [Covariates(0, 60.0, 3e4, 1.45e6)], [row_noise(0, 0)]
    expected = usual.sample(people, noise, steps=3)
    for _ in range(2):
        found = lean.sample(people, noise, steps=3)
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))
    assert is_forgotten(lean.unet)
    latents = lean.sample_latents(people, noise, SAMPLERS["ddim"], 3)
    assert not is_forgotten(lean.unet)
    lean.decode(latents)  # as the table of samplers does
    assert is_forgotten(lean.unet)


# ---- where a brain lies, and in which form


def test_a_model_of_images_stored_right_to_left_is_turned(tiny_run: Path) -> None:
    model = load_model(tiny_run)
    turned_grid = model.description.grid.model_copy(update={"network_x": "right_to_left"})
    turned = replace(model, description=model.description.model_copy(update={"grid": turned_grid}))
    people, noise = [Covariates(0, 60.0, 3e4, 1.45e6)], [row_noise(0, 0)]
    np.testing.assert_array_equal(turned.sample(people, noise, steps=2), model.sample(people, noise, steps=2)[:, ::-1])


def test_the_bundle_s_form_lies_where_the_paper_s_grid_does() -> None:
    grid = bundle_grid(GRIDS["paper"])
    assert grid.shape_XYZ == (150, 214, 145)
    # Read from the uncropped scan, 192 x 256 x 256 stored right to left from 96.48: voxels 21 to 170 of x are kept.
    np.testing.assert_allclose(grid.origin_mm, (96.48149872 - 170, -141.47715759 + 21, -156.55375671 + 96))
    with pytest.raises(UsageError, match=r"this model's is 40 x 56 x 40"):
        bundle_grid(GRIDS["4mm"])
    image = np.random.default_rng(0).normal(size=(160, 224, 160)).astype(np.float32)
    found = as_bundle(image)
    assert found.shape == grid.shape_XYZ and found.min() == 0 and found.max() == 1
    inside = image[5:155, 5:219, :145]
    saved = ((inside - inside.min()) / np.ptp(inside) * 255).astype(np.uint8)  # as the bundle's saver has it
    np.testing.assert_array_equal(np.rint(found * 255), saved)
    assert np.isfinite(as_bundle(np.zeros((160, 224, 160), np.float32))).all()


def test_extrapolated_brains_say_so_themselves(tiny_run: Path, tmp_path: Path) -> None:
    model = load_model(tiny_run)
    inside = rows_of(model, 1)[0]
    far = PlanRow(1, replace(inside.covariates, ventricles_mm3=-1e4))
    rows = check_ranges([inside, far], model.ranges, allow_extrapolation=True)
    generate(model, tmp_path, rows, GenerateSettings(sampler="ddim", steps=1, batch=2))
    sidecars = [(tmp_path / image_name(row)).name.replace(".nii.gz", ".json") for row in rows]
    paths = [(tmp_path / image_name(row)).with_name(name) for row, name in zip(rows, sidecars)]
    assert not paths[0].exists()
    assert json.loads(paths[1].read_text()) == {"Extrapolated": True, "ExtrapolatedCovariates": ["ventricles_mm3"]}


# ---- the figures of the paper, and the table of samplers


def test_figures_ask_for_what_the_paper_shows() -> None:
    two, four = figure_2().covariates(PAPER_RANGES), figure_4().covariates(PAPER_RANGES)
    assert len(two) == 10 and len(four) == 6
    assert two[0].ventricles_mm3 == pytest.approx(6995.68) and two[4].ventricles_mm3 == pytest.approx(171375.0)
    assert four[1].ventricles_mm3 == pytest.approx(6995.68 + 1.9 * 164379.32)
    assert four[2].ventricles_mm3 < 0
    assert four[5].brain_mm3 == pytest.approx(1144240 - 0.5 * 649670)


@pytest.mark.parametrize("number", [2, 4])
def test_a_figure_is_a_dataset_and_a_picture(tiny_run: Path, tmp_path: Path, number: int) -> None:
    picture = make_figure(number, tiny_run / "model", tmp_path / "figure", steps=2, precision="fp32")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert len(list((tmp_path / "figure").glob("sub-*/anat/*.nii.gz"))) == (10 if number == 2 else 6)
    again = make_figure(number, tiny_run / "model", tmp_path / "figure", steps=2, precision="fp32")
    assert again == picture


def test_the_table_of_samplers(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brainldm.generate.sampler_table.REFERENCE", ("unipc", 100))
    compared = {"ddim": (10, 50), "unipc": (10, 40)}
    table = compare_samplers(tiny_run, tmp_path, n=3, precision="fp32", compared=compared)
    by = {(row.sampler, row.steps): row for row in table.rows}
    assert by["ddim", 50].rmse < by["ddim", 10].rmse
    assert by["unipc", 40].rmse < by["unipc", 10].rmse
    assert all(row.rmse_low <= row.rmse <= row.rmse_high for row in table.rows)
    stored = json.loads((tmp_path / "samplers.json").read_text())
    assert stored["n"] == 3 and stored["seed"] == 0 and len(stored["rows"]) == 4
    assert (tmp_path / "samplers.png").exists()
    assert "unipc" in table.as_text()


def test_a_schedule_shorter_than_the_reference_is_compared_by_its_own_steps(tiny_run: Path, tmp_path: Path) -> None:
    short = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    description = read_json(short / "model.json")
    write_json(short / "model.json", description | {"schedule": description["schedule"] | {"steps": 20}})
    table = compare_samplers(short, tmp_path / "out", n=2, precision="fp32", compared={"ddim": (5, 50)})
    assert [(row.sampler, row.steps) for row in table.rows] == [("ddim", 5)]
    assert table.facts["reference"]["steps"] == 20 and "RMSE to 20 steps" in table.as_text()


def test_a_figure_is_drawn_without_the_brain_that_could_not_be_made(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, lowest = LatentDiffusion.sample, load_model(tiny_run).ranges.low[2]

    def faulty(self, covariates, noise, **options):  # type: ignore[no-untyped-def]
        images = honest(self, covariates, noise, **options)
        images[[person.ventricles_mm3 < lowest for person in covariates]] = 0
        return images

    monkeypatch.setattr(LatentDiffusion, "sample", faulty)
    with pytest.raises(PartialFailure, match="1 of 6 brains could not be made"):
        make_figure(4, tiny_run, tmp_path, steps=2, precision="fp32")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


# ---- at full size


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_peak_is_within_the_plan(published: LatentDiffusionDescription, tmp_path: Path, precision: str) -> None:
    """A brain of the published size in a process of its own, from random weights: minutes, and 2.3 GB of disk."""
    from brainldm.model.folder import save_model
    from brainldm.nets.autoencoder import Autoencoder
    from brainldm.nets.unet import DiffusionUNet

    save_model(
        tmp_path,
        LatentDiffusion(published, Autoencoder(published.autoencoder), DiffusionUNet(published.unet)),
    )
    script = f"""
import torch
from pathlib import Path
from brainldm.base.covariates import Covariates
from brainldm.generate.run import row_noise
from brainldm.model.folder import load_model, read_description
from brainldm.model.memory import plan_memory
folder = Path({str(tmp_path)!r})
plan = plan_memory(read_description(folder), batch=1, precision={precision!r}, device=torch.device("cpu"))
model = load_model(folder, precision={precision!r}, memory=plan)
for _ in range({2 if precision == "bf16" else 1}):
    model.sample([Covariates(0, 63.0, 4e4, 1.45e6)], [row_noise(0, 0)], sampler="unipc", steps=1)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(plan.peak_bytes, int(peak.split()[1]) * 1024)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    planned, taken = map(int, told.split())
    assert 0.6 * planned < taken <= planned


def test_the_written_form_of_a_bundle(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a paper-shaped grid the files are 150 x 214 x 145, 8-bit, and lie where they belong."""
    model = load_model(tiny_run)
    shape = GRIDS["paper"].shape_XYZ
    grid = GridDescription.of(GRIDS["paper"])
    latent = model.description.latent.model_copy(update={"shape_CXYZ": (3, *(n // 4 for n in shape))})
    description = model.description.model_copy(update={"grid": grid, "latent": latent})
    image = np.random.default_rng(0).uniform(-0.05, 1.1, (1, *shape)).astype(np.float32)
    monkeypatch.setattr(LatentDiffusion, "sample", lambda *_, **__: image.copy())
    settings = GenerateSettings(steps=1, dtype="uint8_unit", as_bundle=True)
    rows = rows_of(model, 1)
    generate(replace(model, description=description), tmp_path, rows, settings)
    written = read_nifti(tmp_path / image_name(rows[0]))
    np.testing.assert_allclose(written.affine, bundle_grid(GRIDS["paper"]).affine, atol=1e-4)
    np.testing.assert_allclose(written.data_XYZ, as_bundle(image[0]), atol=1e-6)  # what the decoder gave, not cut off
    assert json.loads((tmp_path / "generation.json").read_text())["grid"]["shape_XYZ"] == [150, 214, 145]


def test_what_is_there_is_not_planned_for(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole dataset needs no memory; of another the time is that of the brains that are missing."""
    model, told = load_model(tiny_run), list[str]()
    rows = rows_of(model, 3)
    generate(model, tmp_path, rows[:2], GenerateSettings(steps=1))
    start(tiny_run, rows, GenerateSettings(steps=1), begun=tmp_path, say=told.append)
    monkeypatch.setattr("brainldm.model.memory._held_and_free", lambda device: (0, 0))
    with pytest.raises(EnvironmentProblem):
        start(tiny_run, rows, GenerateSettings(steps=1), begun=tmp_path)
    start(tiny_run, rows[:2], GenerateSettings(steps=1), begun=tmp_path, say=told.append)
    assert told[0].startswith("1 brain of 3") and told[1] == "All 2 brains are there."


def test_exact_is_decoded_in_one_way_however_much_is_free(
    published: LatentDiffusionDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    for free, whole in ((100 * GB, True), (12 * GB, False)):
        monkeypatch.setattr("brainldm.model.memory._held_and_free", lambda device, free=free: (0, free))
        asked = {"batch": 1, "precision": "fp32", "device": cuda}
        assert (plan_memory(published, **asked).slab_bytes is None) == whole
        assert plan_memory(published, one_way=True, **asked).slab_bytes == SLAB_BYTES


def test_a_dataset_keeps_the_batch_that_it_was_begun_with(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much memory is free when it is gone on with."""
    covariates = read_description(tiny_run).covariates
    rows = make_plan({}, n=4, seed=0, ranges=covariates.fitted_ranges(), joint=covariates.joint_model())

    def begin() -> Ready:
        return start(tiny_run, rows, GenerateSettings(), may_shrink_batch=True, begun=tmp_path / "out")

    asked: list[int] = []

    def only_one_at_a_time(description: LatentDiffusionDescription, *, batch: int, **rest: Any) -> MemoryPlan:
        asked.append(batch)
        if batch > 1:
            raise EnvironmentProblem("too little memory.")
        return plan_memory(description, batch=batch, **rest)

    monkeypatch.setattr("brainldm.generate.start.plan_memory", only_one_at_a_time)
    ready = begin()
    assert asked == [4, 2, 1] and ready.settings.batch == 1
    monkeypatch.undo()
    generate(ready.load(), tmp_path / "out", rows, ready.settings)
    assert begin().settings.batch == 1


@pytest.mark.parametrize("record", ["{}", "[]", '{"batch": "four", "n": "two"}'])
def test_a_damaged_record_of_a_begun_dataset_is_named(tiny_run: Path, tmp_path: Path, record: str) -> None:
    model = load_model(tiny_run)
    rows = rows_of(model, 2)
    (tmp_path / "generation.json").write_text(record)
    with pytest.raises(BadInput, match="is damaged") as caught:
        start(tiny_run, rows, GenerateSettings(), may_shrink_batch=True, begun=tmp_path)
    assert caught.value.path == tmp_path / "generation.json"
    with pytest.raises(BadInput, match="is damaged"):
        generate(model, tmp_path, rows, GenerateSettings())


def test_little_memory_is_told_in_megabytes() -> None:
    assert [gigabytes(count) for count in (GB, 999 * 10**6, 10**5)] == ["1.0 GB", "999 MB", "0.1 MB"]


def cgroup(folder: Path, limit: str, usage: int = 8000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = {"memory.max": limit, "memory.current": str(usage), "memory.stat": "anon 1000\ninactive_file 6000\n"}
    for name, text in told.items():
        (folder / name).write_text(text)


def cgroup_1(folder: Path, limit: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stat = "inactive_file 0\ntotal_inactive_file 6000\n"
    told = {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": "8000", "memory.stat": stat}
    for name, text in told.items():
        (folder / name).write_text(text)


def own_groups(root: Path, lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)


def test_what_files_left_in_memory_is_free(tmp_path: Path) -> None:
    cgroup(tmp_path / "sys/fs/cgroup", "9000")
    assert _free_in_groups(tmp_path) == [7000]


def test_a_job_has_what_its_own_group_and_those_around_it_leave(tmp_path: Path) -> None:
    own_groups(tmp_path, "0::/slurm/job:7/step\n")
    mounted = tmp_path / "sys/fs/cgroup"
    cgroup(mounted / "slurm/job:7/step", "max")
    cgroup(mounted / "slurm/job:7", "9000")
    cgroup(mounted / "slurm", "50000", usage=40000)
    cgroup(mounted / "another", "1")
    assert sorted(_free_in_groups(tmp_path)) == [7000, 16000]


def test_groups_of_version_1_count_too(tmp_path: Path) -> None:
    own_groups(tmp_path, "9:cpu,cpuacct:/other\n4:memory:/docker/a\n0::/\n")
    mounted = tmp_path / "sys/fs/cgroup/memory"
    cgroup_1(mounted, 2**63 - 4096)
    cgroup_1(mounted / "docker/a", 9000)
    cgroup_1(mounted / "other", 1)
    assert min(_free_in_groups(tmp_path)) == 7000


def test_a_container_whose_group_lies_at_the_root_is_bound_by_it(tmp_path: Path) -> None:
    """As the host names it, the group is not to be found inside."""
    own_groups(tmp_path, "4:memory:/docker/a\n")
    cgroup_1(tmp_path / "sys/fs/cgroup/memory", 9000)
    assert _free_in_groups(tmp_path) == [7000]


def test_without_groups_nothing_is_bound(tmp_path: Path) -> None:
    assert _free_in_groups(tmp_path) == []


def test_a_machine_without_control_groups_has_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brainldm.model.memory._free_in_groups", lambda root: [])
    held, free = _held_and_free(torch.device("cpu"))
    assert held > 0 and free > 0
