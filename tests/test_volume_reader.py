"""Volumes are read in images and latents changed until they are those told; what cannot be read changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainldm.base.covariates import Covariates
from brainldm.base.errors import BadInput
from brainldm.base.progress import Quiet
from brainldm.base.streams import stream
from brainldm.generate.plan import make_plan
from brainldm.generate.run import GenerateSettings, generate, row_noise
from brainldm.model.cost import estimate_seconds, work_of
from brainldm.model.description import ResponseDescription
from brainldm.model.folder import load_latent_diffusion, read_description, save_model
from brainldm.model.volume_reader import VolumeReader, cell_means, fitted_reader
from brainldm.train import volume_reading
from brainldm.train.run import train
from brainldm.train.volume_reading import find_volume_reader
from conftest import tiny_recipe, write_tiny_cohort

LATENT_CXYZ = (2, 2, 3, 2)
BLOCK = np.ones((2, 2, 2), np.float32)


def decoded(latent_CXYZ: torch.Tensor) -> np.ndarray:
    """An autoencoder whose first channel is the mean intensity of its cells of 2 voxels; the second is not seen."""
    return np.kron(0.5 + 0.1 * latent_CXYZ[0].numpy(), BLOCK)


def people(count: int) -> tuple[torch.Tensor, np.ndarray, list[Covariates]]:
    """Latents; the two volumes, each the sum of other cells; and people who have them."""
    draws = stream(0, "read people")
    latent_NCXYZ = torch.from_numpy(draws.normal(size=(count, *LATENT_CXYZ)).astype(np.float32))
    cells_NV = latent_NCXYZ[:, 0].flatten(1).double().numpy()
    volumes_N2 = np.column_stack([3e4 + 2e3 * cells_NV[:, :4].sum(1), 1.4e6 + 2e4 * cells_NV[:, 4:9].sum(1)])
    rows = [Covariates(i % 2, 50.0 + draws.uniform(0, 20), *volumes) for i, volumes in enumerate(volumes_N2.tolist())]
    return latent_NCXYZ, volumes_N2, rows


@pytest.fixture(scope="module")
def reader() -> VolumeReader:
    latent_NCXYZ, volumes_N2, rows = people(400)
    cells = torch.stack([cell_means(decoded(latent), 2) for latent in latent_NCXYZ])
    others_NF = np.array([[row.sex, row.age_years] for row in rows])
    found, explained_2 = fitted_reader(2, cells, latent_NCXYZ, others_NF, volumes_N2)
    assert (explained_2 > 0.97).all()
    return found


def test_what_is_told_is_shown_and_nothing_else_changes(reader: VolumeReader) -> None:
    latent_NCXYZ, volumes_N2, _ = people(420)
    latent_CXYZ, told_2 = latent_NCXYZ[-1], volumes_N2[-2]
    assert reader.read(decoded(latent_CXYZ)) == pytest.approx(volumes_N2[-1], rel=0.03)
    changed_CXYZ = reader.changed(latent_CXYZ, decoded(latent_CXYZ), told_2)
    assert reader.read(decoded(changed_CXYZ)) == pytest.approx(told_2, rel=1e-3)
    moved_V = (changed_CXYZ - latent_CXYZ)[0].flatten().abs()
    assert float(moved_V[9:].max()) < 0.35 * float(moved_V[:9].max())  # cells of no volume
    assert float((changed_CXYZ - latent_CXYZ)[1].abs().max()) < 0.35 * float(moved_V[:9].max())


def test_far_beyond_the_people_nothing_is_corrected(reader: VolumeReader) -> None:
    latent_NCXYZ, volumes_N2, _ = people(420)
    latent_CXYZ, image_XYZ = latent_NCXYZ[-1], decoded(latent_NCXYZ[-1])
    farthest = reader.changed(latent_CXYZ, image_XYZ, np.array(reader.highest_mm3_2))
    assert torch.equal(reader.changed(latent_CXYZ, image_XYZ, np.array([1e6, 1e7])), farthest)
    assert reader.read(decoded(farthest)) == pytest.approx(reader.highest_mm3_2, rel=1e-3)
    assert (volumes_N2[:400].max(axis=0) < reader.highest_mm3_2).all()
    beyond_CXYZ = latent_CXYZ + 5 * (farthest - latent_CXYZ)
    assert (reader.read(decoded(beyond_CXYZ)) > reader.highest_mm3_2).all()
    assert torch.equal(reader.changed(beyond_CXYZ, decoded(beyond_CXYZ), np.array([1e6, 1e7])), beyond_CXYZ)


def test_what_goes_beyond_the_range_is_read_as_its_end(reader: VolumeReader) -> None:
    image_XYZ = decoded(people(1)[0][0])
    image_XYZ[0, 0, 0], image_XYZ[3, 5, 3] = -5.0, 7.0
    assert np.array_equal(reader.read(image_XYZ), reader.read(np.clip(image_XYZ, 0, 1)))
    assert cell_means(np.zeros((5, 7, 4)), 2).shape == (2, 3, 2)


def test_cells_are_decoded_once_and_what_cannot_be_read_gives_no_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent_NCXYZ, _, rows = people(60)
    asked: list[int] = []

    def decode(index: int) -> np.ndarray:
        asked.append(index)
        return decoded(latent_NCXYZ[index])

    find = lambda rows, key: find_volume_reader(tmp_path, latent_NCXYZ.__getitem__, rows, decode, 4.0, key)  # noqa: E731
    found, facts = find(rows, "key")
    assert found is not None and facts["used"] and facts["people"] == len(asked) == 60
    strangers = [replace(row, brain_mm3=1.4e6 + 1e5 * stream(1, "x", i).normal()) for i, row in enumerate(rows)]
    nothing, facts = find(strangers, "key")
    assert nothing is None and not facts["used"] and facts["explained"]["brain_mm3"] < 0.5
    assert len(asked) == 60, "decoded again"
    find(rows, "another key")
    assert len(asked) == 120
    monkeypatch.setattr(volume_reading, "MOST_PEOPLE", 30)
    _, facts = find(rows, "another key")
    assert facts["people"] == 30 and asked[120:] == sorted(set(asked[120:])) and asked[-1] == 59


def test_an_interrupted_decoding_is_gone_on_with_and_a_damaged_file_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brainldm.train.parts.PART_LENGTH", 20)
    latent_NCXYZ, _, rows = people(50)
    asked: list[int] = []

    def decode(index: int) -> np.ndarray:
        asked.append(index)
        if len(asked) == 31:
            raise KeyboardInterrupt
        return decoded(latent_NCXYZ[index])

    with pytest.raises(KeyboardInterrupt):
        find_volume_reader(tmp_path, latent_NCXYZ.__getitem__, rows, decode, 4.0, "key")
    found, _ = find_volume_reader(tmp_path, latent_NCXYZ.__getitem__, rows, decode, 4.0, "key")
    assert asked == [*range(31), *range(20, 50)]
    sorted((tmp_path / "cells").iterdir())[0].write_bytes(b"torn")
    again, _ = find_volume_reader(tmp_path, latent_NCXYZ.__getitem__, rows, decode, 4.0, "key")
    assert asked[61:] == [*range(20)]
    assert all(torch.equal(a, b) for a, b in zip(found.tensors().values(), again.tensors().values(), strict=True))


def test_volumes_that_all_share_are_not_read() -> None:
    latent_NCXYZ, volumes_N2, _ = people(30)
    cells = torch.stack([cell_means(decoded(latent), 2) for latent in latent_NCXYZ])
    volumes_N2[:, 1] = 1.4e6
    found, explained_2 = fitted_reader(2, cells, latent_NCXYZ, np.zeros((30, 2)), volumes_N2)
    assert explained_2[1] == 0
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.tensors().values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 30 tiny people whose reader is taken however little it explains."""
    folder = tmp_path_factory.mktemp("reading")
    write_tiny_cohort(folder / "cohort", people=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volume_reading, "LEAST_EXPLAINED", -1.0)
        train(reading_recipe(), folder / "cohort", folder / "run")
    return folder / "run"


def reading_recipe():  # type: ignore[no-untyped-def]
    recipe = tiny_recipe()
    return replace(recipe, diffusion=replace(recipe.diffusion, volume_reader=True))


def test_a_trained_model_shows_the_volumes_it_reads(run: Path, tmp_path: Path) -> None:
    model = load_latent_diffusion(run)
    assert model.description.training["volume_reader"]["people"] == 28 and model.description.decodes == 2
    told = Covariates(1, 60.0, 3.5e4, 1.45e6)
    without_it = replace(model, volume_reader=None)
    with_it, without = (m.sample([told], [row_noise(0, 0)], steps=3)[0] for m in (model, without_it))
    missed = [abs(model.volume_reader.read(image_XYZ) - [3.5e4, 1.45e6])[0] for image_XYZ in (with_it, without)]
    assert missed[0] < missed[1]  # the autoencoder took six steps: little of its answer is a straight line
    # Half precision keeps it, and a folder without it is no model.
    save_model(tmp_path, model, weights_dtype="float16")
    again = load_latent_diffusion(tmp_path)
    np.testing.assert_allclose(again.volume_reader.read(with_it), model.volume_reader.read(with_it), rtol=1e-3)
    written = [path.stat().st_mode for path in tmp_path.iterdir()]
    assert len(set(written)) == 1, "others of the group may read model.json and not the weights"
    (tmp_path / "volume_reader.safetensors").unlink()
    with pytest.raises(BadInput, match="weights are missing"):
        load_latent_diffusion(tmp_path)


def test_a_calibrated_model_corrects_to_what_it_is_told_not_to_what_is_asked(run: Path) -> None:
    model = load_latent_diffusion(run)
    doubling = ResponseDescription(
        intercepts_mm3=(0.0, 0.0), slopes=((0, 0, 0.5, 0), (0, 0, 0, 1)), brains=40, seed=1, instrument="x"
    )
    covariates = model.description.covariates.model_copy(update={"response": doubling})
    asked = Covariates(1, 60.0, 2e4, 1.45e6)
    told = replace(asked, ventricles_mm3=4e4)
    assert covariates.told([asked]) == [told]
    calibrated = replace(model, description=model.description.model_copy(update={"covariates": covariates}))
    images = [
        m.sample([c], [row_noise(0, 0)], steps=3) for m, c in ((calibrated, asked), (model, told), (model, asked))
    ]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_the_second_decoding_counts_in_progress_and_time(run: Path, tmp_path: Path) -> None:
    model = load_latent_diffusion(run)
    rows = make_plan({}, n=3, seed=0, ranges=model.ranges, joint=model.joint)
    progress = Counted()
    generate(model, tmp_path, rows, GenerateSettings(steps=4, batch=2), progress=progress)
    assert progress.total == progress.done == 2 * 4 + 2 * 3
    plain = model.description.model_copy(update={"volume_reader": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainldm.model.cost.convolution_speed", lambda *_: 1.0)  # so that no call is too short to count
        seconds = [
            estimate_seconds(d, images=1, sampler="ddim", steps=4, device=torch.device("cpu"), precision="fp32")
            for d in (plain, model.description)
        ]
    assert seconds[1] - seconds[0] > work_of(plain).decode_flop


class Counted(Quiet):
    total = done = 0

    def start(self, task: str, total: int, done: int = 0) -> None:
        self.total = total

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


def test_a_reader_of_another_shape_is_refused(run: Path, tmp_path: Path) -> None:
    model = load_latent_diffusion(run)
    save_model(tmp_path, model)
    assert load_file(tmp_path / "volume_reader.safetensors")["weights"].shape[0] == 2
    content = json.loads((tmp_path / "model.json").read_text())
    content["volume_reader"]["cell_voxels"] *= 2
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="where finite tensors"):
        load_latent_diffusion(tmp_path)


def test_a_run_says_when_nothing_can_be_read(
    tiny_cohort: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Eight people are too few; the brain volumes of the thirty are random numbers.
    for name, cohort in (("few", tiny_cohort), ("unread", run.parent / "cohort")):
        train(reading_recipe(), cohort, tmp_path / name, steps=1)
        assert "0 % of brain_mm3 is explained; it takes 80 %), so the model does not" in capsys.readouterr().err
        description = read_description(tmp_path / name)
        assert description.volume_reader is None and not description.training["volume_reader"]["used"]
