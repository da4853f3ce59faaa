"""A model folder cannot be misread: whatever is missing, changed or foreign is refused with its name."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from brainldm.base.covariates import Covariates
from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.base.files import sha256_of
from brainldm.generate.run import row_noise
from brainldm.model import folder as folder_module
from brainldm.model.folder import load_latent_diffusion, load_model, save_model
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.memory import MemoryPlan


@pytest.fixture
def model_folder(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "model.json").read_text())
    change(content)
    (folder / "model.json").write_text(json.dumps(content))


def test_saved_and_loaded_gives_the_same_brain(tiny_run: Path, tmp_path: Path) -> None:
    model = load_model(tiny_run)
    save_model(tmp_path / "copy", model)
    again = load_model(tmp_path / "copy")
    person, noise = [Covariates(1, 60.0, 3e4, 1.45e6)], [row_noise(0, 0)]
    first = model.sample(person, noise, sampler="ddim", steps=4)
    assert np.array_equal(first, again.sample(person, noise, sampler="ddim", steps=4))
    assert first.shape == (1, *model.grid.shape_XYZ)
    assert np.isfinite(first).all()


def another(model: LatentDiffusion) -> LatentDiffusion:
    """The model with other weights in both networks."""
    autoencoder, unet = deepcopy(model.autoencoder), deepcopy(model.unet)
    for network in (autoencoder, unet):
        network.load_state_dict({name: tensor + 0.01 for name, tensor in network.state_dict().items()})
    return replace(model, autoencoder=autoencoder, unet=unet)


def test_weights_changed_meanwhile_are_not_sampled_with(model_folder: Path) -> None:
    low = load_latent_diffusion(model_folder, memory=MemoryPlan(keeps_unet=False))
    person, noise = [Covariates(1, 60.0, 3e4, 1.45e6)], [row_noise(0, 0)]
    first = low.sample(person, noise, steps=2)
    assert np.array_equal(first, low.sample(person, noise, steps=2))
    save_model(model_folder, another(load_latent_diffusion(model_folder)))
    with pytest.raises(BadInput, match="not those that") as caught:
        low.sample(person, noise, steps=2)
    assert caught.value.reason == "checksum"


class Killed(BaseException):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException) -> None:
    """The n-th call of that function of the folder's does not happen: the writing ends there."""
    real, calls = getattr(folder_module, name), 0

    def stopped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(folder_module, name, stopped)


def test_a_model_half_replaced_is_no_finished_model(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    new = another(load_latent_diffusion(run))
    with monkeypatch.context() as now, pytest.raises(Killed):
        stop_at(now, "write_json", 1, Killed())
        save_model(run / "model", new)
    with pytest.raises(BadInput, match="has not finished a model yet"):
        load_model(run)
    save_model(run / "model", new)
    assert torch.equal(next(load_latent_diffusion(run).unet.parameters()), next(new.unet.parameters()))


def test_a_model_stays_until_all_of_the_next_is_written(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    with monkeypatch.context() as now, pytest.raises(EnvironmentProblem, match="disk is full"):
        stop_at(now, "write_tensors", 2, OSError(errno.ENOSPC, "No space left on device"))
        save_model(model_folder, another(load_latent_diffusion(model_folder)))
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before


def test_the_same_model_written_again_is_there_all_the_time(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    model = load_model(model_folder)
    with monkeypatch.context() as now, pytest.raises(Killed):
        stop_at(now, "write_json", 1, Killed())
        save_model(model_folder, model)
    assert load_model(model_folder).description == model.description
    save_model(model_folder, model)
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"no model\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("latent"), "latent: Field required"),
        (lambda c: c["latent"].pop("scale"), "latent.scale"),
        (lambda c: c["latent"].update(scale=0.0), "latent.scale"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c.update(format_version=2), "format 2"),
        (lambda c: c["covariates"]["ranges"].pop("age_years"), "age_years"),
        (lambda c: c["covariates"]["ranges"]["ventricles_mm3"].update(units="ml"), "ventricles_mm3"),
        (lambda c: c["grid"].update(shape_XYZ=[8, 8, 8]), "latent shape"),
        (lambda c: c["autoencoder"].update(channels=[16, 32]), "does not fit"),
        (lambda c: c["weights"].pop("unet.safetensors"), "does not list"),
        (lambda c: c["weights"].update({"unet.safetensors": "here"}), "weights"),
        (lambda c: c.update(kind=[]), "of kind"),
        (lambda c: c["covariates"]["ranges"]["age_years"].update(low=90.0, high=40.0), "age_years is 90 to 40"),
        (lambda c: c["covariates"]["ranges"]["age_years"].pop("low"), "ranges are incomplete"),
        (lambda c: c["covariates"]["joint"].update(male_probability=2), "joint distribution"),
        (lambda c: c["covariates"]["joint"].update(people=float("inf")), "joint distribution"),
    ],
)
def test_damaged_description_is_refused_by_field(
    model_folder: Path, change: Callable[[dict], object], told: str
) -> None:
    edit(model_folder, change)
    with pytest.raises(BadInput, match=told) as caught:
        load_model(model_folder)
    assert caught.value.path is not None and caught.value.path.parent == model_folder


def test_changed_weights_are_refused(model_folder: Path) -> None:
    weights = model_folder / "unet.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BadInput, match="SHA-256"):
        load_model(model_folder)
    weights.unlink()
    with pytest.raises(BadInput, match="weights are missing"):
        load_model(model_folder)


def restate_hash(folder: Path, name: str) -> None:
    path = folder / name
    edit(folder, lambda c: c["weights"].update({name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}}))


def test_weights_of_another_network_are_refused_by_tensor(model_folder: Path) -> None:
    tensors = load_file(model_folder / "unet.safetensors")
    tensors["extra"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, model_folder / "unet.safetensors")
    restate_hash(model_folder, "unet.safetensors")
    with pytest.raises(BadInput, match="extra is not part"):
        load_model(model_folder)


def test_weights_that_are_not_finite_are_refused(model_folder: Path) -> None:
    tensors = load_file(model_folder / "unet.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, model_folder / "unet.safetensors")
    restate_hash(model_folder, "unet.safetensors")
    with pytest.raises(BadInput, match="not finite"):
        load_model(model_folder)


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_run(model_folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (model_folder / "unet.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    restate_hash(model_folder, "unet.safetensors")
    with pytest.raises(BadInput, match="not a safetensors file"):
        load_model(model_folder)
    assert not canary.exists()
