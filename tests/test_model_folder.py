"""A model folder cannot be misread: whatever is missing, changed or foreign is refused with its name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from brainldm.base.covariates import Covariates
from brainldm.base.errors import BadInput
from brainldm.base.files import sha256_of
from brainldm.generate.run import row_noise
from brainldm.model.folder import load_model, save_model


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
    ],
)
def test_damaged_description_is_refused_by_field(
    model_folder: Path, change: Callable[[dict], object], told: str
) -> None:
    edit(model_folder, change)
    with pytest.raises(BadInput, match=told):
        load_model(model_folder)


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
