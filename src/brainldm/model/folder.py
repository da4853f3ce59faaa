"""The model folder: model.json, safetensors beside it, and nothing that runs.

    MODEL/model.json                 what the weights are and how to use them (description.py)
    MODEL/autoencoder.safetensors
    MODEL/unet.safetensors           (a GAN: generator.safetensors alone)
    MODEL/latent_population.safetensors   (where the U-Net works on what a population's mean leaves)
    MODEL/volume_reader.safetensors       (where volumes are read and corrected)

Loading refuses a folder in which anything is missing, changed, of a newer format or of another shape than described.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from brainldm.base.covariates import COVARIATES, VOLUMES
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import atomic_path, read_json, sha256_of, write_json
from brainldm.base.shipped import shipped_folder, shipped_name
from brainldm.model.description import (
    AUTOENCODER_NAME,
    FORMAT_VERSION,
    GENERATOR_NAME,
    POPULATION_NAME,
    UNET_NAME,
    VOLUME_READER_NAME,
    GanDescription,
    LatentDiffusionDescription,
    WeightsDtype,
    WeightsFile,
)
from brainldm.model.gan import GanModel
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.latent_population import LatentPopulation
from brainldm.model.memory import MemoryPlan
from brainldm.model.tensors import misfits, shortened, write_tensors
from brainldm.model.volume_reader import VolumeReader
from brainldm.nets.atlas import AnyAutoencoder, build_autoencoder
from brainldm.nets.blocks import pack_for_sampling
from brainldm.nets.gan import GanGenerator
from brainldm.nets.packed import packing_works
from brainldm.nets.unet import DiffusionUNet

DESCRIPTION_NAME = "model.json"
_REMEDY = "Copy the model folder again, whole."
_FLOAT16_LARGEST = torch.finfo(torch.float16).max


def save_model(
    folder: Path,
    model: LatentDiffusion | GanModel,
    *,
    weights_dtype: WeightsDtype = "float32",
    licence: str | None = None,
) -> LatentDiffusionDescription | GanDescription:
    """Writes the model folder; model.json last, so that a folder with a model.json is whole.

    A model that is there stays until all weights of the new one are written beside it. While they take their places
    there is no model.json, unless it would be the same: an interrupted writing reads as no model, never as another.
    With `weights_dtype` float16 it takes half the room, and is float32 again once loaded; UsageError, before anything
    is written, for a weight beyond float16. `licence` replaces what the model states.
    """
    parts = {name: stored(tensors, weights_dtype, name) for name, tensors in tensors_of(model).items()}
    stated = {"licence": model.description.licence if licence is None else licence}
    with contextlib.ExitStack() as renamed_at_the_end:
        weights = {}
        for name, tensors in parts.items():
            weights[name] = _save_weights(renamed_at_the_end.enter_context(atomic_path(folder / name)), tensors)
        description = model.description.model_copy(update={"weights": weights, "weights_dtype": weights_dtype} | stated)
        content = description.model_dump(mode="json")
        if not _is_described(folder, content):
            (folder / DESCRIPTION_NAME).unlink(missing_ok=True)
    write_json(folder / DESCRIPTION_NAME, content)
    return description


def _is_described(folder: Path, content: dict[str, Any]) -> bool:
    try:
        return bool(read_json(folder / DESCRIPTION_NAME) == content)
    except BadInput:
        return False


def tensors_of(model: LatentDiffusion | GanModel) -> dict[str, dict[str, torch.Tensor]]:
    """Everything of a model that is stored as tensors, by file."""
    if isinstance(model, GanModel):
        return {GENERATOR_NAME: model.generator.state_dict()}
    parts = {AUTOENCODER_NAME: model.autoencoder.state_dict(), UNET_NAME: model.unet.state_dict()}
    for name, part in ((POPULATION_NAME, model.population), (VOLUME_READER_NAME, model.volume_reader)):
        if part is not None:
            parts[name] = part.tensors()
    return parts


def stored(tensors: Mapping[str, torch.Tensor], dtype: WeightsDtype, file: str) -> dict[str, torch.Tensor]:
    """The tensors as a file keeps them; UsageError where a number of them has no neighbour in float16."""
    if dtype == "float32":
        return dict(tensors)
    for name, tensor in tensors.items():
        # Not a number counts as too large: it would be found only when the model is loaded.
        if tensor.numel() and not float(tensor.detach().abs().max()) <= _FLOAT16_LARGEST:
            raise UsageError(
                f"{name} of {file} holds {float(tensor.detach().abs().max()):g}; float16 ends at {_FLOAT16_LARGEST:g}.",
                remedy="Keep this model in float32.",
                reason="float16_range",
            )
    return {name: tensor.detach().to(torch.float16) for name, tensor in tensors.items()}


def _save_weights(path: Path, tensors: Mapping[str, torch.Tensor]) -> WeightsFile:
    write_tensors(path, tensors)
    return WeightsFile(bytes=path.stat().st_size, sha256=sha256_of(path))


def find_model(path: Path) -> Path:
    """The model folder at `path`, or in the `model` folder of a training run at `path`; or the shipped model of that
    name, where nobody made a model at the path."""
    named = shipped_name(path)
    if named is not None:
        return shipped_folder(named)
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


_KINDS: dict[str, type[LatentDiffusionDescription] | type[GanDescription]] = {
    "latent_diffusion": LatentDiffusionDescription,
    "lsgan": GanDescription,
    "vaegan": GanDescription,
}


def read_description(folder: Path) -> LatentDiffusionDescription | GanDescription:
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
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise BadInput(
            f"describes a model of kind {kind!r}; this brainldm knows {', '.join(_KINDS)}.",
            remedy=_REMEDY,
            path=path,
            reason="bad_description",
        )
    try:
        description = _KINDS[kind].model_validate(content)
        description.covariates.fitted_ranges()
        description.covariates.joint_model()
        return description
    except BadInput as error:  # of the ranges or the distribution, which do not know where they were read
        raise BadInput(error.message, remedy=_REMEDY, path=path, reason=error.reason) from error
    except (ValidationError, ValueError) as error:
        raise BadInput(_field_faults(error), remedy=_REMEDY, path=path, reason="bad_description") from error


def _field_faults(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"cannot be used: {error}."
    faults = [f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']}" for e in error.errors()[:5]]
    return "cannot be used: " + "; ".join(faults) + "."


def load_model(
    folder: Path,
    device: str | torch.device = "cpu",
    *,
    precision: str = "fp32",
    memory: MemoryPlan = MemoryPlan(),
) -> LatentDiffusion | GanModel:
    """The model in a folder, its weights proven by size and SHA-256, in evaluation mode on `device`.

    With precision bf16 on a CPU the weights of a latent diffusion model are held in bfloat16 and packed for its
    convolutions, so such a model can sample but not train. `memory` says how it bounds what it takes.
    """
    folder, device = find_model(folder), torch.device(device)
    description = read_description(folder)
    if isinstance(description, LatentDiffusionDescription):
        return _load_latent_diffusion(folder, description, device, precision, memory)
    with torch.device("meta"):
        generator = GanGenerator(description.build())
    _prove(folder / GENERATOR_NAME, description.weights.get(GENERATOR_NAME))
    _fill(folder / GENERATOR_NAME, generator.eval(), device)
    return GanModel(description, generator, precision)


def load_latent_diffusion(
    folder: Path,
    device: str | torch.device = "cpu",
    *,
    precision: str = "fp32",
    memory: MemoryPlan = MemoryPlan(),
) -> LatentDiffusion:
    """As `load_model`, for what only latent diffusion can do; BadInput for a model of another kind."""
    model = load_model(folder, device, precision=precision, memory=memory)
    if not isinstance(model, LatentDiffusion):
        raise BadInput(
            f"is a model of kind {model.description.kind!r}; latent diffusion is needed here.",
            path=folder,
            reason="kind",
        )
    return model


def load_autoencoder(
    folder: Path, device: str | torch.device = "cpu"
) -> tuple[LatentDiffusionDescription, AnyAutoencoder]:
    """The autoencoder of a model folder alone, proven and in evaluation mode, with the folder's description; its U-Net,
    many times larger, is not read. BadInput for a model of another kind."""
    folder = find_model(folder)
    description = read_description(folder)
    if not isinstance(description, LatentDiffusionDescription):
        raise BadInput(
            f"is a model of kind {description.kind!r}, which has no autoencoder.",
            remedy="Name a latent diffusion model.",
            path=folder,
            reason="kind",
        )
    try:
        with torch.device("meta"):
            autoencoder = build_autoencoder(description.autoencoder)
    except ValueError as error:
        raise BadInput(str(error), remedy=_REMEDY, path=folder / DESCRIPTION_NAME, reason="architecture") from error
    _prove(folder / AUTOENCODER_NAME, description.weights.get(AUTOENCODER_NAME))
    _fill(folder / AUTOENCODER_NAME, autoencoder.eval(), torch.device(device))
    return description, autoencoder


def _load_latent_diffusion(
    folder: Path, description: LatentDiffusionDescription, device: torch.device, precision: str, memory: MemoryPlan
) -> LatentDiffusion:
    try:
        with torch.device("meta"):
            autoencoder = build_autoencoder(description.autoencoder)
            unet = DiffusionUNet(description.unet)
    except ValueError as error:
        raise BadInput(str(error), remedy=_REMEDY, path=folder / DESCRIPTION_NAME, reason="architecture") from error
    half: dict[str, set[str]] = {AUTOENCODER_NAME: set(), UNET_NAME: set()}
    if precision == "bf16" and device.type == "cpu" and packing_works():
        half = {
            AUTOENCODER_NAME: pack_for_sampling(autoencoder, autoencoder.exact_parts),
            UNET_NAME: pack_for_sampling(unet, unet.exact_parts),
        }
    for name, module in ((AUTOENCODER_NAME, autoencoder), (UNET_NAME, unet)):
        _prove(folder / name, description.weights.get(name))
        _fill(folder / name, module.eval(), device, half[name])

    def reload_unet() -> None:
        # Proven again: the folder may have been written anew since, and half a dataset would be of another model.
        _prove(folder / UNET_NAME, description.weights.get(UNET_NAME))
        _fill(folder / UNET_NAME, unet, device, half[UNET_NAME])

    return LatentDiffusion(
        description,
        autoencoder,
        unet,
        precision,
        memory.slab_bytes,
        None if memory.keeps_unet else reload_unet,
        _read_population(folder, description, device) if description.latent.by_population else None,
        volume_reader=_read_volume_reader(folder, description),
    )


def _read_population(folder: Path, description: LatentDiffusionDescription, device: torch.device) -> LatentPopulation:
    shape_CXYZ = description.latent.shape_CXYZ
    wanted = {"mean": shape_CXYZ, "slopes": (len(COVARIATES), *shape_CXYZ), "std": shape_CXYZ}
    return LatentPopulation.from_tensors(_read_tensors(folder / POPULATION_NAME, description, wanted), device)


def _read_volume_reader(folder: Path, description: LatentDiffusionDescription) -> VolumeReader | None:
    facts = description.volume_reader
    if facts is None:
        return None
    cells_XYZ = tuple(n // facts.cell_voxels for n in description.grid.shape_XYZ)
    wanted = {
        "cells": cells_XYZ,
        "weights": (len(VOLUMES), *cells_XYZ),
        "directions": (len(VOLUMES), *description.latent.shape_CXYZ),
    }
    tensors = _read_tensors(folder / VOLUME_READER_NAME, description, wanted)
    parts = (tensors[name].float() for name in wanted)
    volumes = (facts.centre_mm3, facts.spread_mm3, facts.lowest_mm3, facts.highest_mm3)
    return VolumeReader(facts.cell_voxels, *volumes, *parts)


def _read_tensors(
    path: Path, description: LatentDiffusionDescription, wanted: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """All tensors of a file that is no network's: of these names and shapes, finite."""
    _prove(path, description.weights.get(path.name))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"is not a safetensors file ({error}).", remedy=_REMEDY, path=path, reason="damaged") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise BadInput(
            f"holds {found} where finite tensors of {wanted} are needed.",
            remedy=_REMEDY,
            path=path,
            reason="architecture",
        )
    return tensors


def _prove(path: Path, expected: WeightsFile | None) -> None:
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


def _fill(path: Path, module: torch.nn.Module, device: torch.device, half: Collection[str] = ()) -> None:
    """Reads the tensors of `path` into a module on the meta device: those named in `half` in bfloat16, the others in
    float32 where the file keeps them in float16.

    One at a time: a file of gigabytes is never in memory twice. Convolutions lie channels last, which they are fastest
    in.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"is not a safetensors file ({error}).", remedy=_REMEDY, path=path, reason="damaged") from error
    faults = misfits(module, shapes)
    if faults:
        raise BadInput(
            f"does not fit the network that {DESCRIPTION_NAME} describes: {shortened(faults)}.",
            remedy=_REMEDY,
            path=path,
            reason="architecture",
        )
    for name, shape in shapes.items():
        with safe_open(path, framework="pt") as file:  # opened anew: closing it gives its pages back
            tensor = file.get_tensor(name)
            layout = torch.channels_last_3d if len(shape) == 5 else torch.contiguous_format
            wanted = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
            tensor = tensor.to(device, torch.bfloat16 if name in half else wanted, copy=True, memory_format=layout)
        if not torch.isfinite(tensor).all():
            raise BadInput("holds weights that are not finite numbers.", remedy=_REMEDY, path=path, reason="nan")
        owner, _, parameter = name.rpartition(".")
        held_by = module.get_submodule(owner)
        needs_gradient = getattr(held_by, parameter).requires_grad
        setattr(held_by, parameter, torch.nn.Parameter(tensor, requires_grad=needs_gradient))
