"""The published weights (MONAI bundle `brain_image_synthesis_latent_diffusion_model`): in as a model folder, and out.

A checkpoint is a pickle, and a pickle can run code: it is read with torch's weights-only reader, which knows tensors
and plain containers and refuses everything else. Nothing of the bundle is ever executed.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from brainldm.base.covariates import PAPER_RANGES
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import atomic_path, locked_folder, make_folder
from brainldm.base.volume import GRIDS, Grid
from brainldm.model.bundle_layout import Layout, autoencoder_config, layout_of, network_kind, renamed, unet_config
from brainldm.model.description import (
    AutoencoderDescription,
    CovariatesDescription,
    GridDescription,
    LatentDescription,
    LatentDiffusionDescription,
    UNetDescription,
)
from brainldm.model.folder import DESCRIPTION_NAME, load_model, save_model
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.tensors import misfits, shortened
from brainldm.nets.autoencoder import Autoencoder
from brainldm.nets.unet import DiffusionUNet

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PublishedFile:
    """One file of the bundle as its model zoo lists it (version 1.0.3)."""

    name: str
    md5: str
    bytes: int


PUBLISHED = {
    "autoencoder": PublishedFile("autoencoder.pt", "329e97b3085643ff235f11f049856242", 55_100_000),
    "unet": PublishedFile("model.pt", "21c3047556fb671caf0556f1cce6ef22", 2_210_000_000),
}
PUBLISHED_VERSION = "MONAI model zoo 1.0.3 (31,740 people of UK Biobank)"
_COPY_AGAIN = "Get the file again, whole; `brainldm fetch ukb` does it where there is a network."


@dataclass(frozen=True)
class ImportSummary:
    """What was imported: where it lies, the layout of each file, and the version its md5 proves (None: not known)."""

    folder: Path
    layouts: dict[str, Layout]
    version: str | None

    def __str__(self) -> str:
        proven = (
            f"They are {self.version}, proven by md5."
            if self.version
            else ("Their md5 is not that of the published files: they are taken for what their shapes say they are.")
        )
        layouts = ", ".join(f"{name} in the {layout} layout" for name, layout in self.layouts.items())
        return f"Imported {layouts}. {proven} The model is in {self.folder}."


def import_monai(autoencoder: Path, unet: Path, out: Path) -> ImportSummary:
    """Writes a model folder of two MONAI checkpoints, of either layout and any width of this architecture.

    Ranges, grid, schedule and latent scale are the publication's (Pinaya et al. 2022; the bundle decodes raw latents).
    BadInput for files that are truncated, swapped, hold anything but tensors, or belong to another architecture.
    """
    if (out / DESCRIPTION_NAME).exists():
        raise UsageError("there is a model already.", remedy="Choose another folder.", path=out)
    read = {name: _read_network(path, name) for name, path in (("autoencoder", autoencoder), ("unet", unet))}
    ae_config = _fitted(autoencoder, "autoencoder", autoencoder_config, read["autoencoder"].tensors)
    net_config = _fitted(unet, "unet", unet_config, read["unet"].tensors)
    grid = GRIDS["paper"]
    proven = all(read[name].md5 == PUBLISHED[name].md5 for name in read)
    version = PUBLISHED_VERSION if proven else None
    try:
        description = _description(ae_config, net_config, grid, {n: r.md5 for n, r in read.items()}, version)
    except ValueError as error:
        raise BadInput(
            f"the two files do not belong together: {_first_line(error)}", remedy=_COPY_AGAIN, path=unet
        ) from error
    with torch.device("meta"):
        networks = Autoencoder(ae_config), DiffusionUNet(net_config)
    for network, name, path in zip(networks, read, (autoencoder, unet)):
        _fill(network, read[name].tensors, path)
    with locked_folder(out):
        save_model(out, LatentDiffusion(description, *networks))
    return ImportSummary(out, {name: r.layout for name, r in read.items()}, version)


def export_monai(model: Path, out: Path, layout: Layout = "old") -> list[Path]:
    """Writes a model folder's weights as the bundle's two files, in MONAI's old (the published) or new layout.

    Every value goes out as it came in. UsageError for a model that MONAI's networks cannot hold.
    """
    loaded = load_model(model)
    if loaded.autoencoder.config.fold != 1:
        raise UsageError(
            f"its autoencoder folds {loaded.autoencoder.config.fold} voxels into channels, which MONAI's does not.",
            remedy="Only models with fold 1 can be exported.",
            path=model,
        )
    if loaded.description.latent.scale != 1.0:
        raise UsageError(
            f"its latent scale is {loaded.description.latent.scale}, and the bundle has no place to say so.",
            remedy="Only models with latent scale 1 can be exported.",
            path=model,
        )
    make_folder(out)
    written = []
    for name, network in (("autoencoder", loaded.autoencoder), ("unet", loaded.unet)):
        tensors = OrderedDict((renamed(key, layout), value.contiguous()) for key, value in network.state_dict().items())
        path = out / PUBLISHED[name].name
        with atomic_path(path) as part:
            torch.save(tensors, part)
        written.append(path)
    return written


@dataclass(frozen=True)
class _Checkpoint:
    tensors: Tensors
    layout: Layout
    md5: str


def _read_network(path: Path, expected: str) -> _Checkpoint:
    """The parameters of a checkpoint in the new layout's names."""
    tensors = read_checkpoint(path)
    kind = network_kind(tensors)
    if kind != expected:
        what = {"unet": "the U-Net", "autoencoder": "the autoencoder"}.get(kind, "neither network of this system")
        swapped = kind != "unknown"
        raise BadInput(
            f"was given as the {'U-Net' if expected == 'unet' else expected} and holds {what}.",
            remedy="Swap --autoencoder and --unet." if swapped else "Give the bundle's autoencoder.pt and model.pt.",
            path=path,
            reason="swapped" if swapped else "architecture",
        )
    try:
        layout = layout_of(tensors)
    except ValueError as error:
        raise BadInput(f"{error}.", remedy="Import only unmixed checkpoints.", path=path, reason="ambiguous") from error
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return _Checkpoint({renamed(name, "new"): tensor for name, tensor in tensors.items()}, layout, md5)


def read_checkpoint(path: Path) -> Tensors:
    """The tensors of a `.pt`, `.pth` or `.safetensors` checkpoint; nothing in it is executed.

    BadInput for a file that is missing, damaged, not a checkpoint, or that holds anything but tensors and plain data.
    """
    if not path.is_file():
        raise BadInput("there is no such file.", remedy="Check the path.", path=path, reason="missing")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error
    head = path.open("rb").read(512)
    if head.lstrip()[:1] == b"<":
        raise BadInput(
            "is a web page, not weights: the download met a login or an error page.",
            remedy=_COPY_AGAIN,
            path=path,
            reason="not_a_checkpoint",
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise _damaged(path, error) from error
        raise BadInput(
            f"holds more than tensors ({_first_line(error)}); nothing of it was executed.",
            remedy="A file of weights needs no code: do not open this one with other tools unless you trust its maker.",
            path=path,
            reason="unsafe",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    return _tensors_of(content, path)


def _tensors_of(content: Any, path: Path) -> Tensors:
    """The one state dict in a checkpoint, without the prefix that data-parallel training leaves."""
    if isinstance(content, dict) and not any(isinstance(value, torch.Tensor) for value in content.values()):
        inner = [value for value in content.values() if isinstance(value, dict) and _is_state(value)]
        if len(inner) != 1:
            raise BadInput(
                f"holds {len(inner)} sets of weights, not one.",
                remedy="Save the one network's state dict by itself.",
                path=path,
                reason="ambiguous" if inner else "not_a_checkpoint",
            )
        content = inner[0]
    if not isinstance(content, dict) or not _is_state(content):
        raise BadInput(
            "is no state dict: names with tensors.", remedy=_COPY_AGAIN, path=path, reason="not_a_checkpoint"
        )
    tensors = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    wrong = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if wrong:
        raise BadInput(f"{wrong[0]} is not a floating-point tensor.", remedy=_COPY_AGAIN, path=path, reason="damaged")
    return tensors


def _is_state(content: dict) -> bool:
    return bool(content) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )


def _damaged(path: Path, error: Exception) -> BadInput:
    return BadInput(
        f"is truncated or damaged, or is no checkpoint ({_first_line(error)}).",
        remedy=_COPY_AGAIN,
        path=path,
        reason="damaged",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _fitted(path: Path, name: str, infer: Any, tensors: Tensors) -> Any:
    try:
        return infer({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except (ValueError, KeyError, IndexError) as error:
        raise BadInput(
            f"is of another architecture than the {name} of Pinaya et al. 2022 ({_first_line(error)}).",
            remedy="Give the bundle's autoencoder.pt and model.pt.",
            path=path,
            reason="architecture",
        ) from error


def _fill(network: torch.nn.Module, tensors: Tensors, path: Path) -> None:
    faults = misfits(network, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    faults += [f"{name} holds values that are not finite" for name, t in tensors.items() if not torch.isfinite(t).all()]
    if faults:
        raise BadInput(
            f"does not fit the architecture its shapes suggest: {shortened(faults)}.",
            remedy=_COPY_AGAIN,
            path=path,
            reason="architecture",
        )
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)


def _description(
    autoencoder: Any, unet: Any, grid: Grid, md5: dict[str, str], version: str | None
) -> LatentDiffusionDescription:
    return LatentDiffusionDescription(
        name="ukb-ldm" if version else "monai-import",
        autoencoder=AutoencoderDescription(**vars(autoencoder)),
        unet=UNetDescription(**vars(unet)),
        latent=LatentDescription(shape_CXYZ=autoencoder.latent_shape_CXYZ(grid.shape_XYZ), scale=1.0),
        covariates=CovariatesDescription(ranges=PAPER_RANGES.to_json()),
        grid=GridDescription.of(grid, network_x="right_to_left"),
        preprocessing={"register": "unires", "intensity": "min-max", "skull_stripped": False},
        training={
            "imported_from": version or "MONAI checkpoints of unknown origin",
            "md5": md5,
            **({"training_images": 31_740, "cohort": "UK Biobank"} if version else {}),
        },
        licence="Apache-2.0" if version else "unknown",
        weights={},
    )
