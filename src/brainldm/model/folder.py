"""The model folder: model.json, safetensors beside it, and nothing that runs.

    MODEL/model.json                 what the weights are and how to use them (description.py)
    MODEL/autoencoder.safetensors
    MODEL/unet.safetensors

Loading refuses a folder in which anything is missing, changed, of a newer format or of another shape than described.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from brainldm.base.errors import BadInput
from brainldm.base.files import read_json, sha256_of, write_json
from brainldm.model.description import FORMAT_VERSION, LatentDiffusionDescription, WeightsFile
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.tensors import write_tensors
from brainldm.nets.autoencoder import Autoencoder
from brainldm.nets.unet import DiffusionUNet

DESCRIPTION_NAME = "model.json"
AUTOENCODER_NAME = "autoencoder.safetensors"
UNET_NAME = "unet.safetensors"
_REMEDY = "Copy the model folder again, whole."


def save_model(folder: Path, model: LatentDiffusion) -> LatentDiffusionDescription:
    """Writes the model folder; model.json last, so that a folder with a model.json is whole."""
    weights = {
        AUTOENCODER_NAME: _save_weights(folder / AUTOENCODER_NAME, model.autoencoder),
        UNET_NAME: _save_weights(folder / UNET_NAME, model.unet),
    }
    description = model.description.model_copy(update={"weights": weights})
    write_json(folder / DESCRIPTION_NAME, description.model_dump(mode="json"))
    return description


def _save_weights(path: Path, module: torch.nn.Module) -> WeightsFile:
    write_tensors(path, module.state_dict())
    return WeightsFile(bytes=path.stat().st_size, sha256=sha256_of(path))


def find_model(path: Path) -> Path:
    """The model folder at `path`, or in the `model` folder of a training run at `path`."""
    for folder in (path, path / "model"):
        if (folder / DESCRIPTION_NAME).is_file():
            return folder
    if (path / "run.json").is_file():
        told, fix = "is a training run that has not finished a model yet.", "Run `brainldm train` again to finish it."
    elif path.exists():
        told, fix = (
            f"is not a model folder: it has no {DESCRIPTION_NAME}.",
            "Name a folder that `brainldm train` wrote.",
        )
    else:
        told, fix = "there is no such model folder.", "Check the path."
    raise BadInput(told, remedy=fix, path=path, reason="not_a_model")


def read_description(folder: Path) -> LatentDiffusionDescription:
    """model.json, checked; BadInput naming the field that is missing, unknown or wrong."""
    path = find_model(folder) / DESCRIPTION_NAME
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise BadInput(
            f"is in model format {version!r}; this brainldm reads format {FORMAT_VERSION}.",
            remedy="Use the brainldm version that wrote it." if isinstance(version, int) else _REMEDY,
            path=path,
            reason="format_version",
        )
    try:
        return LatentDiffusionDescription.model_validate(content)
    except (ValidationError, ValueError) as error:
        raise BadInput(_field_faults(error), remedy=_REMEDY, path=path, reason="bad_description") from error


def _field_faults(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"cannot be used: {error}."
    faults = [f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']}" for e in error.errors()[:5]]
    return "cannot be used: " + "; ".join(faults) + "."


def load_model(folder: Path, device: str | torch.device = "cpu") -> LatentDiffusion:
    """The model in a folder, its weights proven by size and SHA-256, in evaluation mode on `device`."""
    folder = find_model(folder)
    description = read_description(folder)
    try:
        autoencoder = Autoencoder(description.autoencoder.build())
        unet = DiffusionUNet(description.unet.build())
    except ValueError as error:
        raise BadInput(str(error), remedy=_REMEDY, path=folder / DESCRIPTION_NAME, reason="architecture") from error
    for name, module in ((AUTOENCODER_NAME, autoencoder), (UNET_NAME, unet)):
        _load_weights(folder / name, module, description.weights.get(name))
    model = LatentDiffusion(description, autoencoder.eval(), unet.eval())
    return model.to(device)


def _load_weights(path: Path, module: torch.nn.Module, expected: WeightsFile | None) -> None:
    if expected is None:
        raise BadInput(
            f"{DESCRIPTION_NAME} does not list this file.", remedy=_REMEDY, path=path, reason="bad_description"
        )
    if not path.is_file():
        raise BadInput("the weights are missing.", remedy=_REMEDY, path=path, reason="missing")
    if path.stat().st_size != expected.bytes or sha256_of(path) != expected.sha256:
        raise BadInput(
            f"the weights are not those that {DESCRIPTION_NAME} describes (size or SHA-256 differs).",
            remedy=_REMEDY,
            path=path,
            reason="checksum",
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"is not a safetensors file ({error}).", remedy=_REMEDY, path=path, reason="damaged") from error
    wanted = module.state_dict()
    differences = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    differences += [f"{name} is not part of the described network" for name in tensors.keys() - wanted.keys()]
    differences += [
        f"{name} has shape {tuple(tensors[name].shape)}, described as {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:4]) + (
            f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        )
        raise BadInput(
            f"does not fit the network that {DESCRIPTION_NAME} describes: {shown}.",
            remedy=_REMEDY,
            path=path,
            reason="architecture",
        )
    if any(not torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
        raise BadInput("holds weights that are not finite numbers.", remedy=_REMEDY, path=path, reason="nan")
    module.load_state_dict(tensors)
